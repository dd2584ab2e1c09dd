"""Converts Flux adapters from the names of diffusers to those of Flux's own code.

The modules of q, k and v become one fused module. If they share `a`, the rank stays the same.
Otherwise the fused factors are block-diagonal, with the sum of the ranks, and the delta is the
same: `[b_q 0; 0 b_k] @ [a_q; a_k]`. A part without an adapter gets rows of zeros in `b`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .._errors import AdapterMismatchError, UnsupportedAdapterError, warn
from .._places import Array
from .._torch_names import MAGNITUDE, TorchNames
from . import flux
from .peft.config import PeftConfig
from .peft.patterns import distrusted
from .peft.tuners import FACTOR
from .peft.tuners.tuner import most_frequent, pattern

A, B = "lora_A.weight", "lora_B.weight"
_GROUP = r"(\d+)"
_MLP = 4  # outputs of `proj_mlp` for each of its inputs, in diffusers' Flux


class _Part(NamedTuple):
    """The adapter of one module of diffusers, which is a part of a fused one."""

    tensors: Mapping[str, Array]  # by key
    scale: float


def in_original(
    tensors: Mapping[str, Array], config: PeftConfig
) -> tuple[dict[str, Array], PeftConfig]:
    """Exported tensors and their config, with the modules of Flux's own code.

    Args:
        tensors: tensors by module and key, in the names of diffusers.
        config: their config.

    Raises:
        UnsupportedAdapterError: if the kind is neither LoRA nor DoRA, or Flux's code has no such
            module.
    """
    if config.peft_type != "LORA" or config.use_bdlora:
        raise UnsupportedAdapterError(
            "is of a kind that cannot be fused into one product of q, k and v; only LoRA and "
            "DoRA can. Save it with `save_peft` or `save_adapter`."
        )
    groups: dict[str, dict[int, _Part]] = {}
    for module, part in _parts(tensors, config).items():
        name, position = _place(module)
        groups.setdefault(name, {})[position] = part
    made: dict[str, Array] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, parts in groups.items():
        own, scale = _fused(name, parts)
        made |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        ranks[name] = own[A].shape[0]
        alphas[name] = scale * ranks[name]
    r, alpha = most_frequent(ranks), most_frequent(alphas)
    patterns = {"rank_pattern": pattern(ranks, r), "alpha_pattern": pattern(alphas, alpha)}
    targets = sorted(groups)
    return made, config.replace(
        r=r, lora_alpha=alpha, use_rslora=False, target_modules=targets, **patterns
    )


def is_flux(tensors: Iterable[str], names: TorchNames) -> bool:
    """Whether an adapter is for diffusers' Flux, by its single blocks, adapted or only in `names`.

    Warns:
        AdapterWarning: if it may be for Flux, but nothing distinguishes it from other models.
    """
    modules = [torch_name.module for torch_name in names.values()]
    if flux.is_of_diffusers(tensors) or flux.is_of_diffusers(modules):
        return True
    if flux.may_be_of_diffusers(tensors):
        warn(
            "adapts only blocks whose names Flux shares with other models of diffusers, so it is "
            "written with these names, which readers of Flux's own names ignore. If it is for "
            "Flux, give `names` for the whole model, with its `single_transformer_blocks`; in the "
            "command, with --names. Otherwise use `save_diffusers`."
        )
    return False


def _parts(tensors: Mapping[str, Array], config: PeftConfig) -> dict[str, _Part]:
    own: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        match = FACTOR.search(key)
        if match is None or match[1] not in (A, B, MAGNITUDE):
            raise UnsupportedAdapterError(f"has `{key}`, which these files cannot store.")
        own.setdefault(key[: match.start()], {})[match[1]] = tensor
    parts: dict[str, _Part] = {}
    with distrusted():
        for module, found in own.items():
            parts[module] = _Part(found, config.scale(module))
    return parts


def _place(module: str) -> tuple[str, int]:
    """The module of Flux's code that this one is a part of, and its position there."""
    for name, rule in flux.RULES.items():
        for position, part in enumerate(rule.modules):
            if match := re.fullmatch(re.escape(part).replace(r"\{\}", _GROUP), module):
                return name.replace(_GROUP, "{}").format(*match.groups()), position
    raise UnsupportedAdapterError(
        f"adapts `{module}`, for which Flux's own code has no module. Save it with "
        "`save_diffusers`."
    )


def _fused(name: str, parts: Mapping[int, _Part]) -> tuple[dict[str, Array], float]:
    """The tensors of a module of Flux's code, and their scale."""
    rule = flux.rule_of(name)
    first = parts[min(parts)]
    if rule.rows is flux.whole:
        return dict(first.tensors), first.scale
    if rule.rows is flux.swapped:
        rows = _order(rule.rows(len(first.tensors[B]), 0)[0])
        by_output = {key: x[rows] for key, x in first.tensors.items() if key != A}
        return {A: first.tensors[A], **by_output}, first.scale
    sizes = _sizes(name, parts, len(rule.modules))
    found = _product(parts, sizes, first.scale)
    if any(MAGNITUDE in part.tensors for part in parts.values()):
        if len(parts) < len(sizes):
            raise UnsupportedAdapterError(
                f"is DoRA of some parts of `{name}`, and the magnitudes of the others are those of "
                "the base. Merge it into the base."
            )
        found[MAGNITUDE] = np.concatenate([parts[k].tensors[MAGNITUDE] for k in sorted(parts)])
    return found, first.scale


def _order(rows: Sequence[slice]) -> Array:
    return np.concatenate([np.arange(part.start, part.stop) for part in rows])


def _sizes(name: str, parts: Mapping[int, _Part], count: int) -> list[int]:
    """The number of outputs of each part, including parts without an adapter."""
    known = {k: part.tensors[B].shape[0] for k, part in parts.items()}
    inputs = {part.tensors[A].shape[1] for part in parts.values()}
    if len(inputs) > 1:
        raise AdapterMismatchError(f"has parts of `{name}` with {sorted(inputs)} inputs.")
    width = inputs.pop()
    expected = [width] * 3 + [_MLP * width] * (count - 3)
    if 3 in known:
        expected[3] = known[3]
    for k, size in known.items():
        if size != expected[k]:
            raise AdapterMismatchError(
                f"has a part of `{name}` with {size} outputs and {width} inputs; Flux has "
                f"{expected[k]} outputs there."
            )
    return expected


def _product(parts: Mapping[int, _Part], sizes: Sequence[int], scale: float) -> dict[str, Array]:
    factors = [(part.tensors[A], part.tensors[B], part.scale / scale) for part in parts.values()]
    dtype = np.result_type(*(b.dtype for _, b, _ in factors))
    same = all(np.array_equal(a, factors[0][0]) for a, _, _ in factors)
    a = factors[0][0] if same else np.concatenate([a for a, _, _ in factors])
    b = np.zeros((sum(sizes), a.shape[0]), dtype)
    ends = np.cumsum([0, *sizes]).tolist()
    column = 0
    for k, (of_a, of_b, gain) in zip(parts, factors, strict=True):
        width = of_a.shape[0]
        value = of_b if gain == 1 else (of_b.astype(np.float64) * gain).astype(dtype)
        b[ends[k] : ends[k + 1], column : column + width] = value
        column += 0 if same else width
    return {A: a, B: b}
