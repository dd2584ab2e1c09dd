"""What is worth knowing of an adapter in a table, and how far two of them are apart."""

import math
from typing import Any, NamedTuple

import numpy as np

from lorax import LoraWeight

from ._layouts import Array
from ._tree import settings_of


class Line(NamedTuple):
    """One parameter of an adapter."""

    path: str
    kind: str  # lora or full
    rank: int | None
    alpha: float | None
    scale: float | None
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    norm: float  # of the delta, or of the parameter that is trained in full


def summarize(rows: dict[str, Any]) -> list[Line]:
    """A line for each parameter, by path."""
    return [_line(path, rows[path]) for path in sorted(rows)]


def _line(path: str, row: Any) -> Line:
    if not isinstance(row, LoraWeight):
        norm = float(np.linalg.norm(_wide(row)))
        return Line(path, "full", None, None, None, (row.shape,), str(row.dtype), norm)
    shapes = (row.a.shape, row.b.shape)
    norm = delta_norm(row)
    return Line(path, "lora", row.rank, row.alpha, row.scale, shapes, str(row.a.dtype), norm)


def delta_norm(*weights: LoraWeight) -> float:
    """The Frobenius norm of a delta, or of the first of two less the second.

    The delta itself is never built: with `a = Q R` and `bᵀ = P S`, ‖a b‖ = ‖R Sᵀ‖.
    """
    signs = (1.0, -1.0)
    a = [_matrices(w.a, w, rank_axis=-1) for w in weights]
    b = [s * w.scale * _matrices(w.b, w, rank_axis=1) for s, w in zip(signs, weights, strict=False)]
    left: Array = np.linalg.qr(np.concatenate(a, axis=2)).R
    right: Array = np.linalg.qr(np.concatenate(b, axis=1).swapaxes(1, 2)).R
    return float(np.linalg.norm(left @ right.swapaxes(1, 2)))


def _matrices(factor: Any, weight: LoraWeight, rank_axis: int) -> Array:
    """A factor as (entries, fan in, rank) or (entries, rank, fan out)."""
    shared = factor.shape[: len(weight.shared_axes)]
    shape = (-1, weight.rank) if rank_axis == -1 else (weight.rank, -1)
    return _wide(factor).reshape(math.prod(shared), *shape)


def _wide(array: Any) -> Array:
    """The array in double precision."""
    return np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64)


class Difference(NamedTuple):
    """How one parameter of two adapters differs."""

    path: str
    what: str
    relative: float | None  # of the deltas, to the first; None of unlike shapes, or to zero


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """The parameters that are not the same to the bit."""
    found: list[Difference] = []
    for path in sorted(first.keys() | second.keys()):
        if path not in second:
            found.append(Difference(path, "only in the first", None))
        elif path not in first:
            found.append(Difference(path, "only in the second", None))
        else:
            found += _compare_rows(path, first[path], second[path])
    return found


def _compare_rows(path: str, first: Any, second: Any) -> list[Difference]:
    ours, theirs = settings_of(first), settings_of(second)
    changed = [
        f"{key} {ours.get(key)} and {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if _is_same(first, second) and not changed:
        return []
    return [Difference(path, ", ".join(changed) or "numbers", _distance(first, second))]


def _is_same(first: Any, second: Any) -> bool:
    pairs = zip(_arrays(first), _arrays(second), strict=True)
    return len(_arrays(first)) == len(_arrays(second)) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs
    )


def _arrays(row: Any) -> list[Array]:
    return [np.asarray(x) for x in ((row.a, row.b) if isinstance(row, LoraWeight) else (row,))]


def _distance(first: Any, second: Any) -> float | None:
    """The norm of the difference of two deltas, relative to the first."""
    if isinstance(first, LoraWeight) and isinstance(second, LoraWeight):
        unlike = first.axes != second.axes or _base_sizes(first) != _base_sizes(second)
        if unlike:
            return None
        size, apart = delta_norm(first), delta_norm(first, second)
    elif isinstance(first, LoraWeight) or isinstance(second, LoraWeight):
        return None
    elif first.shape != second.shape:
        return None
    else:
        x, y = _wide(first), _wide(second)
        size, apart = float(np.linalg.norm(x)), float(np.linalg.norm(x - y))
    if apart == 0:
        return 0.0
    return apart / size if size else None


def _base_sizes(weight: LoraWeight) -> tuple[Any, Any]:
    return weight.a.shape[:-1], weight.b.shape[len(weight.shared_axes) + 1 :]
