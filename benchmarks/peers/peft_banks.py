"""Batches whose rows use different adapters in PEFT, which takes an adapter name for each row."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from torch import nn


class Block(nn.Module):
    """Two products and a residual connection."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def runs(
    width: int, hidden: int, layers: int, rank: int, slots: int, x: np.ndarray, steps: int
) -> dict[str, Callable[[], Any]]:
    """The base alone, and one adapter for each slot, which alternate from row to row."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = torch.tensor(x)
    names = [f"adapter {k}" for k in range(slots)]
    base = nn.Sequential(*(Block(width, hidden) for _ in range(layers))).eval()
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=["up", "down"]
    )
    copied = nn.Sequential(*(Block(width, hidden) for _ in range(layers)))
    net = peft.get_peft_model(copied, config, adapter_name=names[0])
    for name in names[1:]:
        net.add_adapter(name, config)
    net.eval()
    row_names = [names[k % slots] for k in range(len(rows))]

    @torch.inference_mode()
    def none():
        x = rows
        for _ in range(steps):
            x = base(x)

    @torch.inference_mode()
    def mixed():
        x = rows
        for _ in range(steps):
            x = net(x, adapter_names=row_names)

    return {"PEFT on torch, none": none, f"PEFT on torch, {slots}, `adapter_names`": mixed}
