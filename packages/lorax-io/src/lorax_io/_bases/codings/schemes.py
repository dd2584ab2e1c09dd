"""How compressed-tensors' config quantizes weights: the bits of codes, and which share a scale."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..._errors import AdapterFileError
from .coding import Tensors, setting

Scheme = Mapping[str, Any]  # the `weights` of one of the `config_groups`

_SIDE = 128  # of the blocks that are assumed if no config says otherwise


def schemes_of(tensors: Tensors, name: str, dtype: Any) -> list[Scheme]:
    """The schemes for codes of a dtype; empty if the config has none.

    Raises:
        AdapterFileError: if all schemes are for codes of another kind.
    """
    groups = setting(tensors, "config_groups")
    if not isinstance(groups, dict):
        return []
    rows = [row.get("weights") for row in groups.values() if isinstance(row, dict)]
    schemes: list[Scheme] = [row for row in rows if isinstance(row, dict)]
    kind = "int" if np.issubdtype(dtype, np.integer) else "float"
    fitting = [scheme for scheme in schemes if scheme.get("type", "int") == kind]
    if schemes and not fitting:
        other = schemes[0].get("type")
        raise AdapterFileError(
            f"has `{name}` in codes of the type {kind}, and its config says {other}."
        )
    return fitting


def bits_of(name: str, schemes: list[Scheme], inputs: int, words: int) -> int:
    """The bits of each of the codes that fill these int32 words.

    Raises:
        AdapterFileError: if the config says other bits, or if it does not say, and several fit.
    """
    fitting = {bits for bits in range(1, 9) if -(-inputs * bits // 32) == words}
    said = {scheme.get("num_bits") for scheme in schemes} - {None}
    if said:
        # Codes that do not divide a word are packed with or without a gap at its end.
        gapped = {bits for bits in range(1, 9) if -(-inputs // (32 // bits)) == words}
        fitting = (fitting | gapped) & said
    if len(fitting) == 1:
        return fitting.pop()
    listed = " or ".join(map(str, sorted(said, key=str)))
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
    if schemes and all(scheme.get("symmetric") is False for scheme in schemes):
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
    stated = {sides for scheme in schemes if (sides := _stated(scheme, shape)) is not None}
    if not stated:
        grains = _plausible(shape, scales)
        if grains is None:
            raise AdapterFileError(
                f"{mismatch}, and no config says which entries share a scale. Pass the folder "
                "that has its config.json instead of the file."
            )
        return grains
    fitting = {sides for sides in stated if _counts(shape, sides) == scales}
    if len(fitting) != 1:
        raise AdapterFileError(f"{mismatch}, and its config says blocks of {sorted(stated)}.")
    return tuple(min(side, size) for side, size in zip(fitting.pop(), shape, strict=True))


def _stated(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sides of the blocks of a scheme; None if they are not known."""
    strategy, group, sides = (scheme.get(k) for k in ("strategy", "group_size", "block_structure"))
    ones = (1,) * (len(shape) - 1)
    if strategy == "tensor":
        return shape
    if strategy == "channel":
        return (*ones, shape[-1])
    if strategy in ("group", "tensor_group") and type(group) is int and group > 0:
        return (*ones, group)
    if strategy == "block" and isinstance(sides, list) and len(sides) == len(shape):
        return tuple(sides) if all(type(n) is int and n > 0 for n in sides) else None
    return None


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
