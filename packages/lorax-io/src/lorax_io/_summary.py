"""A summary of an adapter as a table, and the differences between two adapters."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter

from ._places import Array
from ._shapes import base_sizes
from ._tree import FrozenFactors, settings_of


class Line(NamedTuple):
    """One parameter of an adapter."""

    path: str
    kind: str  # such as lora or dora; `full` if the parameter itself was trained
    rank: int | None
    alpha: float | None
    scale: float | None
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    norm: float  # of the delta, else of all factors together, or of the parameter trained in full


def summarize(rows: Mapping[str, Any]) -> list[Line]:
    """One line for each parameter, sorted by path."""
    return [_line(path, rows[path]) for path in sorted(rows)]


def _line(path: str, row: Any) -> Line:
    arrays = list(_arrays(row).values())
    shapes, dtype = tuple(array.shape for array in arrays), str(arrays[0].dtype)
    if not isinstance(row, Adapter):
        return Line(path, "full", None, None, None, shapes, dtype, _size([row]))
    # DoRA's rank and alpha are those of the adapter within it.
    fields = dataclasses.fields(row)  # pyright: ignore[reportArgumentType]
    within = [getattr(row, field.name) for field in fields]
    of = next((value for value in within if isinstance(value, Adapter)), row)
    rank, alpha = (getattr(of, name, None) for name in ("rank", "alpha"))
    scale = of.scale if hasattr(of, "alpha") else None
    return Line(path, row.kind, rank, alpha, scale, shapes, dtype, norm(row))


def norm(weight: Adapter) -> float:
    """The Frobenius norm of the delta if it is a product of two factors, else of all factors."""
    factors = _two_factors(weight)
    return _size(weight.factors().values()) if factors is None else _product_norm(*factors)


def _size(arrays: Any) -> float:
    return math.sqrt(sum(float(np.linalg.norm(_wide(array))) ** 2 for array in arrays))


def _two_factors(weight: Adapter) -> tuple[Array, Array] | None:
    """The two factors whose product is the delta, as (entries, m, inner) and (entries, inner, n).

    Returns:
        The matrices, the second one scaled; None for all other kinds.
    """
    layout = _layout(weight)
    if layout is None or len(layout.factors) != 2 or layout.frozen or layout.gains:
        return None
    (one, left), (two, right) = layout.factors.items()
    shown = {label.id for labels in layout.out for label in labels}
    both = [label.id for label in left if label in right]
    entries, inner = ([d for d in both if (d in shown) == is_out] for is_out in (True, False))
    arrays = weight.factors()

    def matrices(name: str, labels: Any, first: bool) -> Array:
        where = {label.id: k for k, label in enumerate(labels)}
        own = [d for d in where if d not in both]
        groups = (entries, own, inner) if first else (entries, inner, own)
        array = _wide(arrays[name])
        sizes = [math.prod(array.shape[where[d]] for d in group) for group in groups]
        return array.transpose([where[d] for group in groups for d in group]).reshape(sizes)

    return matrices(one, left, True), weight.scale * matrices(two, right, False)


def _layout(weight: Adapter) -> Any:
    """The layout of an adapter on a base with axes of size 1: only its labels are used."""
    try:
        return weight.layout((1,) * sum(map(len, weight.axes)))
    except ValueError:
        return None  # a kind that splits the axes into blocks


def _product_norm(left: Array, right: Array) -> float:
    """‖left right‖ without the product: it is ‖R Sᵀ‖ for `left = Q R` and `rightᵀ = P S`."""
    first: Array = np.linalg.qr(left).R
    second: Array = np.linalg.qr(right.swapaxes(1, 2)).R
    return float(np.linalg.norm(first @ second.swapaxes(1, 2)))


def _wide(array: Any) -> Array:
    """The array in double precision."""
    return np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64)


class Difference(NamedTuple):
    """How one parameter of two adapters differs."""

    path: str
    difference: str
    relative: float | None  # norm of the difference / norm of the first; None if undefined


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    first_frozen: FrozenFactors | None = None,
    second_frozen: FrozenFactors | None = None,
) -> list[Difference]:
    """The parameters that are not bit-identical in both, or whose frozen factors are not."""
    first_frozen, second_frozen = first_frozen or {}, second_frozen or {}
    differences: list[Difference] = []
    for path in sorted(first.keys() | second.keys()):
        if path not in second:
            differences.append(Difference(path, "only in the first", None))
        elif path not in first:
            differences.append(Difference(path, "only in the second", None))
        else:
            frozen = first_frozen.get(path, {}), second_frozen.get(path, {})
            differences += _compare_rows(path, first[path], second[path], frozen)
    return differences


def _compare_rows(path: str, first: Any, second: Any, frozen: Any) -> list[Difference]:
    ours, theirs = settings_of(first), settings_of(second)
    changed = [
        f"{key} {ours.get(key)} and {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if not _is_same(*frozen):
        changed.append("frozen factors")
    if _is_same(_arrays(first), _arrays(second)) and not changed:
        return []
    return [Difference(path, ", ".join(changed) or "numbers", _distance(first, second))]


def _is_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    pairs = [(np.asarray(first[n]), np.asarray(second[n])) for n in first.keys() & second.keys()]
    return first.keys() == second.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs
    )


def _arrays(row: Any) -> dict[str, Any]:
    return row.factors() if isinstance(row, Adapter) else {"": row}


def _distance(first: Any, second: Any) -> float | None:
    """The norm of the difference of two deltas, or of all factors, relative to the first's norm."""
    if isinstance(first, Adapter) and isinstance(second, Adapter):
        if first.kind != second.kind or _base(first) != _base(second):
            return None
        ours, theirs = _two_factors(first), _two_factors(second)
        if ours is not None and theirs is not None:
            both = np.concatenate([ours[0], theirs[0]], 2), np.concatenate([ours[1], -theirs[1]], 1)
            return _ratio(_product_norm(*both), _product_norm(*ours))
    if settings_of(first) != settings_of(second):
        return None
    pairs = [(_wide(x), _wide(_arrays(second)[name])) for name, x in _arrays(first).items()]
    if any(x.shape != y.shape for x, y in pairs):
        return None
    return _ratio(_size(x - y for x, y in pairs), _size(x for x, _ in pairs))


def _base(weight: Adapter) -> tuple[Any, Any]:
    return weight.axes, base_sizes(weight)


def _ratio(distance: float, size: float) -> float | None:
    if distance == 0:
        return 0.0
    return distance / size if size else None
