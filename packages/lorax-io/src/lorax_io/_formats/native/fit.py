"""Fits the header of a native file to a base, or to a tunable tree."""

from collections.abc import Mapping
from typing import Any

import jax

from ..._disk.arrays import shape_of
from ..._disk.tensors import (
    TensorFile,
    check_width,
)
from ..._errors import AdapterFileError, AdapterMismatchError
from ..._shapes import blank_rows
from ..._tree import (
    FrozenFactors,
    absent,
    all_arrays,
    is_array,
    settings_of,
    suggestion,
    tunable_rows,
)
from .header import Header


def fit_params(
    file: TensorFile, header: Header, leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], FrozenFactors]:
    """Rows of shapes for these parameters, and the shapes of the frozen factors in the file."""
    weights = {path: blank for path, blank in header.blanks.items() if blank is not None}
    blanks, frozen_factors = blank_rows(leaves, weights)
    rows: dict[str, Any] = {}
    for path, blank in header.blanks.items():
        base = leaves.get(path)
        if blank is not None:
            rows[path] = blanks[path]
        elif is_array(base):
            rows[path] = shape_of(base)
        else:
            raise AdapterMismatchError(f"trains `{path}` in full, {absent(path, leaves)}")
    for path, names in header.frozen.items():
        if unknown := sorted(set(names) - frozen_factors[path].keys()):
            raise AdapterFileError(
                f"has a frozen factor `{path}/{unknown[0]}`, which a {weights[path].kind} adapter "
                "does not have.",
            )
    frozen = {
        path: {n: frozen_factors[path][n] for n in names} for path, names in header.frozen.items()
    }
    _check_entries(file, all_arrays(rows, frozen))
    return rows, frozen


def fit_like(file: TensorFile, header: Header, like: Any) -> dict[str, Any]:
    """Rows of shapes, checked to have the settings, shapes and dtypes of a tunable tree."""
    wanted, blanks = dict(tunable_rows(like)), header.blanks
    if unknown := sorted(blanks.keys() - wanted.keys()):
        raise AdapterMismatchError(
            f"has `{unknown[0]}`, which is not in `like`.{suggestion(unknown[0], wanted)}"
        )
    if missing := sorted(wanted.keys() - blanks.keys()):
        raise AdapterMismatchError(
            f"lacks `{missing[0]}`, which is in `like`.{suggestion(missing[0], blanks)}"
        )
    for path, leaf in wanted.items():
        settings = settings_of(blanks[path])
        if settings != settings_of(leaf):
            raise AdapterMismatchError(
                f"has `{path}` with {settings}, but `like` has {settings_of(leaf)}."
            )
    for name, array in all_arrays(wanted).items():
        if file.entries[name].dtype != array.dtype:
            raise AdapterMismatchError(
                f"has `{name}` in {file.entries[name].dtype}, but `like` has {array.dtype}.",
            )
    rows = {path: jax.tree.map(shape_of, leaf) for path, leaf in wanted.items()}
    _check_entries(file, all_arrays(rows))
    return rows


def _check_entries(file: TensorFile, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        entry = file.entries[name]
        if entry.shape != array.shape:
            raise AdapterMismatchError(
                f"has `{name}` of shape {entry.shape}, but {array.shape} would fit."
            )
        check_width(name, entry.dtype)
