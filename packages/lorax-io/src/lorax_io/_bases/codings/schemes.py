"""How compressed-tensors' config quantizes weights: the bits of codes, and which share a scale."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import regex

from ..._errors import AdapterFileError, UnsupportedAdapterError
from ..._formats.peft.patterns import distrusted, match
from .coding import Tensors, setting

_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_FORMATS = frozenset(
    "fakequant dense int-quantized float-quantized naive-quantized pack-quantized mixed-precision "
    "nvfp4-pack-quantized mxfp4-pack-quantized mxfp8-quantized".split()
)
_SIDE = 128  # of the blocks that are assumed if no config says otherwise


class Scheme(NamedTuple):
    """The `weights` of one of the `config_groups`.

    Attributes:
        kind: "int" or "float".
        bits: of each code.
        is_symmetric: whether codes have no zero points.
        has_order: whether groups are in an order of their own.
        sides: of the blocks, None for a whole axis; None if the scheme does not say them. They are
            those of the last axes, and 1 along all others.
    """

    kind: str
    bits: int
    is_symmetric: bool
    has_order: bool
    sides: tuple[int | None, ...] | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The scheme of a config.

        Raises:
            UnsupportedAdapterError: if a setting is not known, so that codes may mean anything.
        """
        kind, bits, order = row.get("type", "int"), row.get("num_bits", 8), row.get("actorder")
        kind, order = (x.lower() if isinstance(x, str) else x for x in (kind, order))
        if kind not in ("int", "float") or type(bits) is not int:
            raise UnsupportedAdapterError(
                f"its config says weights of the type {kind!r} in {bits!r} bits, which is not "
                "known; int and float are read."
            )
        has_order = order in ("group", "dynamic", True)
        return cls(kind, bits, row.get("symmetric") is not False, has_order, _sides(row))


def _sides(row: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    strategy, group, block = (row.get(k) for k in ("strategy", "group_size", "block_structure"))
    if strategy is None and group is not None:  # as compressed-tensors infers it
        strategy = "channel" if group == -1 else "group"
    strategy = strategy.lower() if isinstance(strategy, str) else strategy
    if isinstance(block, str):  # "128x128"
        block = [int(side) if side.isdecimal() else side for side in block.split("x")]
    match strategy, group, block:
        case None, _, _:
            return None
        case "tensor", _, _:
            return (None,)  # every axis
        case "channel", _, _:
            return (1, None)
        case (("group" | "tensor_group"), int(), _) if group > 0:
            return (1, group)
        case "block", _, [int(rows), int(columns)] if rows > 0 and columns > 0:
            return (rows, columns)
        case _:
            size = {"block": f" of {block!r}", "group": f" of {group!r}"}.get(str(strategy), "")
            raise UnsupportedAdapterError(
                f"its config says the strategy {strategy!r}{size} for weights; "
                f"{', '.join(_STRATEGIES)} with their sizes are read."
            )


def schemes_of(
    tensors: Tensors, module: str, name: str, kind: str, bits: int | None = None
) -> list[Scheme]:
    """The schemes that the config has for the codes of a module; empty if it has none.

    Args:
        tensors: the checkpoint.
        module: the name of the module.
        name: the name of the codes.
        kind: "int" or "float".
        bits: of each code; None: any.

    Raises:
        AdapterFileError: if the config contradicts the codes.
        UnsupportedAdapterError: if the config has settings that are not known.
    """
    groups = setting(tensors, "config_groups")
    if groups is None:
        return []
    if not isinstance(groups, dict):
        raise AdapterFileError("its config has `config_groups` that are not an object.")
    with distrusted():
        if any(_is_named(pattern, module) for pattern in _strings(setting(tensors, "ignore"))):
            raise AdapterFileError(f"has `{name}`, and its config says in `ignore` that the module "
                                   "is not quantized.")  # fmt: skip
        rows = _rows_of(groups, module)
    for form in (setting(tensors, "format"), *(row.get("format") for row in rows)):
        if form is not None and form not in _FORMATS:
            raise UnsupportedAdapterError(
                f"has `{name}` in the format {form!r} of compressed-tensors, which is not read."
            )
    weights = [row["weights"] for row in rows if isinstance(row.get("weights"), dict)]
    schemes = [Scheme.of(row) for row in weights]
    found = [scheme for scheme in schemes if scheme.kind == kind and bits in (None, scheme.bits)]
    if schemes and not found:
        size = "" if bits is None else f" of {bits} bits"
        said = " and ".join(sorted({f"{scheme.kind} of {scheme.bits}" for scheme in schemes}))
        raise AdapterFileError(
            f"has `{name}` in codes of the type {kind}{size}, and its config says {said} bits."
        )
    return found


def _rows_of(groups: Mapping[str, Any], module: str) -> list[Mapping[str, Any]]:
    """The groups whose targets name the module; else those for its class; else all of them.

    A checkpoint may name its modules by other prefixes than its config.
    """
    if presets := [name for name, row in groups.items() if not isinstance(row, dict)]:
        raise UnsupportedAdapterError(
            f"its config has the name {presets[0]!r} in place of a scheme. Save the model with "
            "compressed-tensors again, which writes out the scheme."
        )
    targets = {name: _strings(row.get("targets")) for name, row in groups.items()}
    for is_target in (_is_named, lambda target, _: target[:1].isupper()):
        names = [name for name in groups if any(is_target(t, module) for t in targets[name])]
        if names:
            return [groups[name] for name in names]
    return list(groups.values())


def _is_named(target: str, module: str) -> bool:
    """Whether a target is a module's name, or `re:` and a pattern of it."""
    if target.startswith("re:"):
        return match(regex.compile(target.removeprefix("re:")), module) is not None
    return target == module


def _strings(values: Any) -> list[str]:
    return [x for x in values if isinstance(x, str)] if isinstance(values, list) else []


def bits_of(name: str, schemes: list[Scheme], inputs: int, words: int) -> int:
    """The bits of each of the codes that fill these int32 words.

    Raises:
        AdapterFileError: if the config says other bits, or if it does not say, and several fit.
    """
    fitting = {bits for bits in range(1, 9) if -(-inputs * bits // 32) == words}
    said = {scheme.bits for scheme in schemes}
    if said:
        # Codes that do not divide a word are packed with or without a gap at its end.
        gapped = {bits for bits in range(1, 9) if -(-inputs // (32 // bits)) == words}
        fitting = (fitting | gapped) & said
    if len(fitting) == 1:
        return fitting.pop()
    listed = " or ".join(map(str, sorted(said)))
    config = f"its config says {listed} bits" if said else "no config says the bits"
    raise AdapterFileError(
        f"has `{name}`: {words} words for {inputs} inputs, and {config}. Pass the folder that has "
        "its config.json instead of the file."
    )


def is_symmetric_in(tensors: Tensors, zero: str, schemes: list[Scheme]) -> bool:
    """Whether a weight has no zero points.

    Raises:
        AdapterFileError: if they are absent, and the config says that every weight has them.
    """
    if zero in tensors:
        return False
    if schemes and not any(scheme.is_symmetric for scheme in schemes):
        raise AdapterFileError(f"lacks `{zero}`, and its config says that codes are asymmetric.")
    return True


def grains_of(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], schemes: list[Scheme]
) -> tuple[int, ...]:
    """How many entries share a scale along each axis, up to the whole axis.

    Args:
        name: the name of the scales.
        shape: the shape of the weight.
        scales: the shape of the scales. The last block of an axis may be cut.
        schemes: those that the config has for such codes.

    Raises:
        AdapterFileError: if the shapes do not fit each other, or the config; and if no config says
            which entries share a scale, and it does not follow from the shapes.
    """
    mismatch = f"has `{name}` of shape {scales} for a weight of {shape}"
    if len(scales) != len(shape) or not all(0 < n <= m for m, n in zip(shape, scales, strict=True)):
        raise AdapterFileError(f"{mismatch}.")
    stated = {_in(scheme.sides, shape) for scheme in schemes if scheme.sides is not None}
    if not stated:
        grains = _plausible(shape, scales)
        if grains is None:
            raise AdapterFileError(
                f"{mismatch}, and no config says which entries share a scale. Pass the folder "
                "that has its config.json instead of the file."
            )
        return grains
    fitting = {_within(shape, sides) for sides in stated if _counts(shape, sides) == scales}
    if len(fitting) != 1:
        raise AdapterFileError(f"{mismatch}, and its config says blocks of {sorted(stated)}.")
    return fitting.pop()


def _in(sides: tuple[int | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of the blocks of a weight along each axis."""
    if sides == (None,):
        return shape
    full = (1,) * (len(shape) - len(sides)) + sides
    return tuple(size if n is None else n for n, size in zip(full, shape, strict=True))


def _within(shape: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(side, size) for side, size in zip(sides, shape, strict=True))


def _counts(shape: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // side) for size, side in zip(shape, sides, strict=True))


def _plausible(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """The blocks that shapes suggest: of 128 × 128, or of powers of two, with none cut."""
    if len(shape) == 2 and scales == _counts(shape, (_SIDE, _SIDE)):
        return (_SIDE, _SIDE)
    sides = tuple(size // count for size, count in zip(shape, scales, strict=True))
    is_exact = _counts(shape, sides) == scales and all(
        size % side == 0 and (side == size or side & (side - 1) == 0)
        for size, side in zip(shape, sides, strict=True)
    )
    return sides if is_exact else None
