"""PEFT on the same model in PyTorch, with one thread per core."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import peft
import torch

import workloads
from adapted import Adapted, is_pair
from models import Model
from peers import torch_models
from peers.torch_models import tensor
from workloads import ADAPTERS, Workload, scaled

Run = Callable[[], list[tuple[Any, ...]]]  # runs the program once: a loss or an output of each call


def with_peft(workload: Workload, model: Model, adapted: Adapted) -> Run:
    """One adapter, or several in turn, since PEFT has no `vmap`."""
    torch.set_num_threads(os.cpu_count() or 1)
    pairs = by_name(adapted.factors, model.stack)
    config = config_for(pairs, workload.rank, fan_in_fan_out="wte" in model.params)
    net = peft.get_peft_model(torch_models.model(model), config)
    fill(net, "default", pairs)
    return RUNS[workload.program](net, config, pairs, model.batch)


def by_name(factors: Any, stack: int) -> dict[str, Any]:
    """The factors of every adapted module, by the module's name in PyTorch."""
    if stack:
        factors = torch_models.layers(factors, stack)
    leaves = jax.tree_util.tree_leaves_with_path(factors, is_leaf=is_pair)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".kernel"): f
        for name, (_, f) in zip(names, leaves, strict=True)
        if f is not None
    }


def is_expert_pair(f: Any) -> bool:
    return f["a"].ndim == f["b"].ndim == 3


def config_for(pairs: dict[str, Any], rank: int, **options: Any) -> peft.LoraConfig:
    """PEFT's config: experts are target parameters, everything else is a target module."""
    ranks = {name: f["a"].shape[-1] for name, f in pairs.items()}
    others = {name: smaller for name, smaller in ranks.items() if smaller < rank}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=[name for name, f in pairs.items() if not is_expert_pair(f)],
        target_parameters=[f"{name}.weight" for name, f in pairs.items() if is_expert_pair(f)],
        **options,
    )


def fill(net: Any, adapter: str, pairs: dict[str, Any]) -> None:
    """Sets PEFT's factors to ours, in PEFT's shapes."""
    for name, f in pairs.items():
        module = net.base_model.model.get_submodule(name)
        if adapter in module.lora_embedding_A:
            first, second = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            first, second = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        for variable, value in zip((first, second), as_peft(**f), strict=True):
            variable.data = tensor(value).reshape(variable.shape)


def as_peft(a: Any, b: Any) -> tuple[Any, Any]:
    """Factors in PEFT's layout: `A [rank, in]`, `B [out, rank]`."""
    a, b = np.asarray(a), np.asarray(b)
    rank = a.shape[-1]
    if a.ndim == b.ndim == 3:  # experts come before the rank in A, and after it in B
        return a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.transpose(2, 1, 0)
    if a.ndim == 4:  # a convolution
        return a.transpose(3, 2, 0, 1), b.T
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


# What is run


def one_step(net: Any, batch: Any) -> Callable[[], tuple[float]]:
    """A training step of the active adapter."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    x = torch_models.batch(batch)

    def step():
        optimizer.zero_grad()
        out = net(x)
        out = getattr(out, "last_hidden_state", out)
        loss = ((out * out) ** 2).mean()
        loss.backward()
        optimizer.step()
        return (loss.item(),)

    return step


def training(net: Any, config: Any, pairs: dict[str, Any], batch: Any) -> Run:
    step = one_step(net, batch)
    return lambda: [step()]


def output(net: Any, config: Any, pairs: dict[str, Any], batch: Any) -> Run:
    x = torch_models.batch(batch)

    @torch.inference_mode()
    def run():
        return [(net(x)[0].numpy(),)]

    return run


def adapters(net: Any, config: Any, pairs: dict[str, Any], batch: Any) -> Run:
    names = ["default", *(f"adapter {k}" for k in range(1, ADAPTERS))]
    for name in names[1:]:
        net.add_adapter(name, config)
    steps: dict[str, Callable[[], tuple[float]]] = {}
    for k, name in enumerate(names):
        fill(net, name, scaled(pairs, k))
        net.set_adapter(name)
        steps[name] = one_step(net, scaled(batch, k))

    def run():
        losses = []
        for name, step in steps.items():
            net.set_adapter(name)
            losses.append(step())
        return losses

    return run


RUNS = {workloads.step: training, workloads.forward: output, workloads.at_once: adapters}
