"""Converts Flux adapters from the names of Flux's own code to those of diffusers.

Flux's code has one fused module for q, k and v where diffusers has three. LoRA of the fused module
is LoRA of each of the three, with the same `lora_A` and that module's rows of `lora_B`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .._errors import AdapterFileError, UnsupportedAdapterError
from .._torch_names import MAGNITUDE
from .peft.tuners import FACTOR
from .self_described import self_described
from .source import Source
from .stored import Stored

Rows = list[slice]


class Rule(NamedTuple):
    """The modules of diffusers that one module of Flux's code becomes, and the rows of each."""

    modules: tuple[str, ...]
    rows: Callable[[int, int], list[Rows]]  # from the numbers of its outputs and inputs


def whole(fan_out: int, fan_in: int) -> list[Rows]:
    """All rows of one module."""
    return [[slice(0, fan_out)]]


def _thirds(fan_out: int, fan_in: int) -> list[Rows]:
    return _cut(fan_out, [fan_out // 3] * 3)


def _with_rest(fan_out: int, fan_in: int) -> list[Rows]:
    return _cut(fan_out, [fan_in, fan_in, fan_in, fan_out - 3 * fan_in])


def swapped(fan_out: int, fan_in: int) -> list[Rows]:
    """All rows with their halves swapped: (shift, scale) in Flux's code, (scale, shift) here."""
    half = fan_out // 2
    return [[slice(half, fan_out), slice(0, half)]]


def _cut(total: int, sizes: list[int]) -> list[Rows]:
    if sum(sizes) != total or min(sizes) < 1:
        raise AdapterFileError(f"has {total} outputs for a product that is cut into {sizes}.")
    ends = np.cumsum([0, *sizes]).tolist()
    return [[slice(a, b)] for a, b in zip(ends, ends[1:], strict=False)]


_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_TIME = "time_text_embed"
_ONES = {
    r"double_blocks.(\d+).img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
    r"double_blocks.(\d+).txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
    r"double_blocks.(\d+).img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
    r"double_blocks.(\d+).img_mlp.2": f"{_DOUBLE}.ff.net.2",
    r"double_blocks.(\d+).txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
    r"double_blocks.(\d+).txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
    r"double_blocks.(\d+).img_mod.lin": f"{_DOUBLE}.norm1.linear",
    r"double_blocks.(\d+).txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
    r"single_blocks.(\d+).linear2": f"{_SINGLE}.proj_out",
    r"single_blocks.(\d+).modulation.lin": f"{_SINGLE}.norm.linear",
    r"img_in": "x_embedder",
    r"txt_in": "context_embedder",
    r"time_in.in_layer": f"{_TIME}.timestep_embedder.linear_1",
    r"time_in.out_layer": f"{_TIME}.timestep_embedder.linear_2",
    r"vector_in.in_layer": f"{_TIME}.text_embedder.linear_1",
    r"vector_in.out_layer": f"{_TIME}.text_embedder.linear_2",
    r"guidance_in.in_layer": f"{_TIME}.guidance_embedder.linear_1",
    r"guidance_in.out_layer": f"{_TIME}.guidance_embedder.linear_2",
    r"final_layer.linear": "proj_out",
}
_QKV = ("to_q", "to_k", "to_v")
RULES: dict[str, Rule] = {
    **{name: Rule((module,), whole) for name, module in _ONES.items()},
    r"double_blocks.(\d+).img_attn.qkv": Rule(tuple(f"{_DOUBLE}.attn.{x}" for x in _QKV), _thirds),
    r"double_blocks.(\d+).txt_attn.qkv": Rule(
        tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), _thirds
    ),
    r"single_blocks.(\d+).linear1": Rule(
        (*(f"{_SINGLE}.attn.{x}" for x in _QKV), f"{_SINGLE}.proj_mlp"), _with_rest
    ),
    r"final_layer.adaLN_modulation.1": Rule(("norm_out.linear",), swapped),
}
# Matches names with dots, and kohya's, which have `_` in their place.
_PATTERNS = [(re.compile(name.replace(".", r"[._]")), rule) for name, rule in RULES.items()]
_KOHYA = "lora_unet_"
# Tensors with one row for each output, which are split; the parts share all others.
_BY_OUTPUT = ("lora_B.weight", MAGNITUDE, "hada_w1_a", "hada_w2_a")


def _rule(module: str) -> tuple[tuple[str, ...], Rule] | None:
    for pattern, rule in _PATTERNS:
        if match := pattern.fullmatch(module.removeprefix(_KOHYA)):
            return tuple(name.format(*match.groups()) for name in rule.modules), rule
    return None


def rule_of(module: str) -> Rule:
    """The rule of a known module of Flux's code."""
    found = _rule(module)
    assert found is not None, module
    return found[1]


def is_original(modules: Iterable[str]) -> bool:
    """Whether some of these modules are Flux's, in the names of its own code."""
    return any("_blocks" in module and _rule(module) is not None for module in modules)


def is_of_diffusers(names: Iterable[str]) -> bool:
    """Whether some of these are Flux's, in the names of diffusers."""
    return any("single_transformer_blocks." in name for name in names)


_SHARED = re.compile(
    r"(?:^|\.)transformer_blocks\.\d+\.(?:attn\.(?:add_[qkv]_proj|to_add_out)|ff_context\.)"
)


def may_be_of_diffusers(names: Iterable[str]) -> bool:
    """Whether some of these are modules that Flux's double blocks share with other models.

    Those of Stable Diffusion 3 and HunyuanVideo have the same names in diffusers.
    """
    return any(map(_SHARED.search, names))


def modules_of(source: Source) -> set[str]:
    """The names of the adapted modules."""
    return {key[: match.start()] for key in source.tensors if (match := FACTOR.search(key))}


def in_diffusers(source: Source) -> Source:
    """The adapter in the names of diffusers, with fused modules split.

    Raises:
        UnsupportedAdapterError: if diffusers has no such module, or the adapter cannot be split.
    """
    tensors: dict[str, Stored] = {}
    scales: dict[str, float] = {}
    for module in sorted(modules_of(source)):
        match = _rule(module)
        if match is None:
            raise UnsupportedAdapterError(
                f"adapts `{module}`, for which the Flux of diffusers has no module."
            )
        names, rule = match
        config = source.config
        scales |= dict.fromkeys(names, config.scale(module))
        own = {
            key.removeprefix(f"{module}."): tensor
            for key, tensor in source.tensors.items()
            if key.startswith(f"{module}.")
        }
        if rule.rows is whole:
            tensors |= {f"{names[0]}.{key}": tensor for key, tensor in own.items()}
            continue
        for name, rows in zip(names, rule.rows(*_sizes(source, module, own)), strict=True):
            tensors |= {
                f"{name}.{key}": _rows(tensor, rows) if key in _BY_OUTPUT else tensor
                for key, tensor in own.items()
            }
    return self_described(tensors, scales=scales, part="transformer")


def _sizes(source: Source, module: str, own: Mapping[str, Stored]) -> tuple[int, int]:
    if any(key.startswith("lokr_") for key in own):
        raise UnsupportedAdapterError(
            f"is LoKr of `{module}`, a product that diffusers has in parts, and LoKr cannot be "
            "split. Merge it into a base in the names of Flux's own code."
        )
    shapes = {key: tensor.shape for key, tensor in own.items()}
    out, inputs = source.tuner.sides(shapes, source.config, module)
    return out, inputs[0]


def _rows(tensor: Stored, rows: Rows) -> Stored:
    size = sum(part.stop - part.start for part in rows)
    view = lambda: np.concatenate([tensor.view()[part] for part in rows])  # noqa: E731
    return tensor._replace(shape=(size, *tensor.shape[1:]), view=view)
