"""BD-LoRA: LoRA with one block-diagonal factor, of which only the blocks are stored."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorax import Adapter, BdloraWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .tuner import Module, check_linear, the_one

# Inner axes of the adapter's layout: the entries within a block of the split axis, and the rank.
_PART, _RANK = RANK, RANK - 1
_KEYS = {"in": "target_modules_bd_a", "out": "target_modules_bd_b"}


def blocked_side(config: PeftConfig, module: str) -> Any:
    """The side of a module that is split into blocks, `in` or `out`; None if it is plain LoRA.

    PEFT looks for the config's names anywhere in the module's name.
    """
    blocks = config.use_bdlora or {}
    sides = [side for side, key in _KEYS.items() if any(x in module for x in blocks.get(key) or ())]
    if len(sides) > 1:
        raise AdapterFileError(f"has `{module}` among the modules of both sides of BD-LoRA.")
    if config.use_bdlora and not sides and blocks.get("match_strict", True):
        raise AdapterFileError(
            f"adapts `{module}`, which is on neither side of `use_bdlora` of its config."
        )
    return sides[0] if sides else None


def blank(place: Place, config: PeftConfig, module: str, side: Any) -> Adapter:
    """The adapter without arrays."""
    check_linear(place, "BD-LoRA")
    assert config.use_bdlora is not None
    blocks, rank = config.use_bdlora.get("nblocks", 1), config.rank(module)
    cut = (place.axes.inputs if side == "in" else place.outputs)[0]
    if rank % blocks or place.sizes[cut] % blocks:
        raise AdapterFileError(
            f"is BD-LoRA of {blocks} blocks, which do not divide the rank {rank} and the axis "
            f"{cut} of `{place.path}`, of shape {place.shape}."
        )
    scaling = "rslora" if config.use_rslora else "standard"
    shared, inputs, outputs = place.axes
    sides = (side, cut, inputs, outputs, shared)
    return BdloraWeight(None, None, rank, config.alpha(module), scaling, blocks, *sides)


def factors(place: Place, weight: Any) -> tuple[Factor, ...]:
    """The keys and axes of the two tensors."""
    check_linear(place, "BD-LoRA")
    inputs, outputs, cut = place.axes.inputs, place.outputs, weight.split_axis
    side = inputs if weight.side == "in" else outputs
    if cut != side[0]:
        raise UnsupportedAdapterError(
            f"`{place.path}` cuts the axis {cut}, and PEFT the first of a side. Use `save_adapter` "
            "or `save_merged`."
        )
    if weight.side == "in":
        a: tuple[Any, ...] = ((cut, _RANK), (_PART, *inputs[1:]))
        b: tuple[Any, ...] = (outputs, (cut, _RANK))
    else:
        a, b = ((cut, _RANK), inputs), ((cut, _PART, *outputs[1:]), (_RANK,))
    return Factor("lora_A.weight", "a", a), Factor("lora_B.weight", "b", b)


def sides(shapes: Mapping[str, Any], config: PeftConfig, side: Any) -> tuple[int, tuple[int, ...]]:
    """The numbers of outputs and inputs of a module, from the shapes of its tensors."""
    blocks = (config.use_bdlora or {}).get("nblocks", 1)
    a, b = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    if len(a) != 2 or len(b) != 2:
        raise AdapterFileError(f"has two factors of shapes {a} and {b}, not of two axes each.")
    return b[0], (a[1] * (blocks if side == "in" else 1),)


def settings(modules: Sequence[Module]) -> dict[str, Any] | None:
    """The value of `use_bdlora` in the config; None if no module has BD-LoRA.

    PEFT looks for its names anywhere in a module's name, so no other module may contain one.
    """
    cut = [module for module in modules if isinstance(module.weight, BdloraWeight)]
    if not cut:
        return None
    count = the_one(cut, "BD-LoRA", "blocks", lambda weight: weight.blocks)
    of_side = {s: sorted(m.name for m in cut if m.weight.side == s) for s in _KEYS}
    blocks = {
        "nblocks": count,
        "match_strict": len(cut) == len(modules),
        **{_KEYS[side]: names or None for side, names in of_side.items()},
    }
    config = PeftConfig(use_bdlora=blocks)
    for module in modules:
        side = getattr(module.weight, "side", None)
        caught = [s for s, names in of_side.items() if any(name in module.name for name in names)]
        if caught != ([] if side is None else [side]):
            raise UnsupportedAdapterError(
                f"`{module.name}` has the name of another module of BD-LoRA in its own, so PEFT "
                "would split it as well. Use `save_adapter` or `save_merged`."
            )
        assert blocked_side(config, module.name) == side
    return blocks
