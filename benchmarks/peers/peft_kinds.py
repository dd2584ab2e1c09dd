"""PEFT's training step with each kind of adapter that it supports, on the same model in PyTorch.

The factors are PEFT's initial ones, since only times are compared.
"""

import os
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora import BdLoraConfig

from adapted import adapt
from models import Model
from peers import torch_models
from peers.peft_lora import by_name, one_step

# By the names in our table. Each takes the names of the adapted modules and the rank.
Config = Callable[[list[str], int], peft.PeftConfig]


def lora(names: list[str], rank: int, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **options)


def bdlora(names: list[str], rank: int) -> peft.LoraConfig:
    """Blocks in every `a`, as in ours."""
    blocks = BdLoraConfig(target_modules_bd_a=names, target_modules_bd_b=[], nblocks=2)
    return lora(names, rank, use_bdlora=blocks)


KINDS: dict[str, Config] = {
    "LoRA": lora,
    "DoRA": lambda names, rank: lora(names, rank, use_dora=True),
    "IA³": lambda names, rank: peft.IA3Config(target_modules=names, feedforward_modules=[]),
    "LoHa, rank 8": lambda names, rank: peft.LoHaConfig(r=8, alpha=8, target_modules=names),
    "LoKr": lambda names, rank: peft.LoKrConfig(r=rank, alpha=rank, target_modules=names),
    "MiSS": lambda names, rank: peft.MissConfig(r=rank, target_modules=names),
    "GraLoRA": lambda names, rank: peft.GraloraConfig(
        r=rank, alpha=rank, gralora_k=2, target_modules=names
    ),
    "BD-LoRA": bdlora,
    "OFT, blocks of 32": lambda names, rank: peft.OFTConfig(
        oft_block_size=32, target_modules=names
    ),
    "LoRA-FA": lora,
    "VeRA, rank 256": lambda names, rank: peft.VeraConfig(r=256, target_modules=names),
    "AdaLoRA": lambda names, rank: peft.AdaLoraConfig(
        init_r=rank, lora_alpha=rank, total_step=1000, target_modules=names
    ),
    "DeLoRA": lambda names, rank: peft.DeloraConfig(r=rank, target_modules=names),
    "LoRA, dropout": lambda names, rank: lora(names, rank, lora_dropout=0.05),
}


def steps(model: Model, rank: int) -> dict[str, Callable[[], Any]]:
    """A training step of each kind."""
    torch.set_num_threads(os.cpu_count() or 1)
    names = list(by_name(adapt(model, rank).factors, model.stack))
    step_of_kind = {}
    for kind, config in KINDS.items():
        net = peft.get_peft_model(torch_models.model(model), config(names, rank))
        if kind == "LoRA-FA":
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        step_of_kind[kind] = one_step(net, model.batch)
    return step_of_kind
