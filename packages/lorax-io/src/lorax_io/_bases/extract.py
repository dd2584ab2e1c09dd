"""Extracts the best low-rank approximation of the difference of two checkpoints."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax import LoraSpec, extract_lora

from .._disk.progress import track
from .._disk.tensors import TensorFile, check_finite
from .._errors import AdapterMismatchError, about, warn
from .._places import Array
from .._torch_names import Conv, Conv1D, Linear, TorchName
from .checkpoint import Checkpoint
from .coded import check_plain
from .decoding import with_decoded
from .ties import is_embedding, is_head

_END = ".weight"
_SHOWN = 8


class Extracted(NamedTuple):
    """An adapter by path, in the form of `OpenedAdapter`, and the relative error of each weight."""

    rows: dict[str, Any]
    names: dict[str, TorchName]
    errors: dict[str, float]


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    targets: re.Pattern[str] | None = None,
    fan_in_fan_out: bool = False,
) -> Extracted:
    """Extracts the LoRA adapters of linear layers and convolutions that best approximate `tuned`.

    One tensor of each checkpoint is in memory at a time. Quantized weights are decoded.

    Args:
        base: the checkpoint before fine-tuning.
        tuned: the checkpoint after fine-tuning.
        rank: the largest rank of each adapter.
        energy: as in `lorax.extract_lora`.
        tolerance: as in `lorax.extract_lora`.
        targets: a pattern that the full names of adapted modules match; by default all modules but
            embeddings and heads.
        fan_in_fan_out: whether matrices are (in, out), as in transformers' `Conv1D`.

    Raises:
        AdapterMismatchError: if the checkpoints are of different models, or differ in no target.
        UnsupportedAdapterError: if a weight that differs is quantized and cannot be decoded.

    Warns:
        AdapterWarning: if tensors differ that the adapter does not cover.
    """
    base, tuned = with_decoded(base), with_decoded(tuned)
    _check_same(base, tuned)
    places = _places(base), _places(tuned)
    extracted = Extracted({}, {}, {})
    left: list[str] = []
    for full in track(list(tuned.shapes), "Extracting"):
        with contextlib.ExitStack() as stack:
            before, after = (
                _tensor(checkpoint, full, where, stack)
                for checkpoint, where in zip((base, tuned), places, strict=True)
            )
            if np.array_equal(before, after):
                continue
            module = full.removesuffix(_END)
            if not _is_target(full, after.ndim, targets):
                left.append(full)
                continue
            for checkpoint in (base, tuned):
                with about(checkpoint.path):
                    dtype = checkpoint.shapes[full].dtype
                    check_plain(full, dtype, checkpoint.shapes, checkpoint.config)
            check_finite(full, after)
            torch_name = _torch_name(module, after.ndim, fan_in_fan_out)
            _add(extracted, torch_name, before, after, rank, energy, tolerance)
    if not extracted.rows:
        raise AdapterMismatchError(
            "does not differ from the base in any module that can be adapted.", tuned.path
        )
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        listed = ", ".join(f"`{name}`" for name in left[:_SHOWN])
        warn(
            f"differs from the base in {listed}{more}, and the adapter lacks these changes. Name "
            "modules with --targets, or merge into a base that has these tensors."
        )
    return extracted


def _tensor(
    checkpoint: Checkpoint,
    name: str,
    places: Mapping[str, tuple[Path, str]],
    stack: contextlib.ExitStack,
) -> Array:
    """A tensor, decoded if it is quantized."""
    if name in checkpoint.coded:
        with about(checkpoint.path):
            return checkpoint.coded[name].array()
    path, own = places[name]
    return stack.enter_context(TensorFile(path)).view(own)


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    for checkpoint in (base, tuned):
        for name in sorted(checkpoint.broken.keys() & (base.shapes.keys() | tuned.shapes.keys())):
            with about(checkpoint.path):
                raise checkpoint.broken[name]
    for name in sorted(base.shapes.keys() | tuned.shapes.keys()):
        shapes = [
            checkpoint.shapes[name].shape if name in checkpoint.shapes else None
            for checkpoint in (base, tuned)
        ]
        if shapes[0] != shapes[1]:
            one, other = ("is not there" if shape is None else f"is {shape}" for shape in shapes)
            raise AdapterMismatchError(
                f"is not the same model as {base.path}: `{name}` {one} in the base, but {other} "
                "here.",
                tuned.path,
            )


def _places(checkpoint: Checkpoint) -> Mapping[str, tuple[Path, str]]:
    """The file of each tensor, and its name there."""
    places: dict[str, tuple[Path, str]] = {}
    for path, prefix in checkpoint.files:
        with TensorFile(path) as file:
            places |= {prefix + name: (path, name) for name in file.entries}
    return places


def _is_target(name: str, ndim: int, targets: re.Pattern[str] | None) -> bool:
    module = name.removesuffix(_END)
    if not name.endswith(_END) or ndim < 2:
        return False
    if targets is not None:
        return targets.fullmatch(module) is not None
    return not is_embedding(module) and not is_head(module)


def _torch_name(module: str, ndim: int, fan_in_fan_out: bool) -> TorchName:
    if ndim > 2:
        return Conv(module)
    return Conv1D(module, in_axes=(0,), out_axes=(1,)) if fan_in_fan_out else Linear(module)


def _add(
    extracted: Extracted,
    torch_name: TorchName,
    before: Any,
    after: Any,
    rank: int,
    energy: float | None,
    tolerance: float | None,
) -> None:
    """Adds the adapter of one tensor, after transposing it to `[*window, in, out]`."""
    if not isinstance(torch_name, Conv1D):
        order = (*range(2, before.ndim), 1, 0)
        before, after = np.transpose(before, order), np.transpose(after, order)
    path = f"{torch_name.module.replace('.', '/')}/kernel"
    (_, tunable), errors = extract_lora(
        {path: before}, {path: after}, {path: LoraSpec(rank)}, energy=energy, tolerance=tolerance
    )
    extracted.rows[path] = tunable[path]
    extracted.names[path] = torch_name
    extracted.errors[path] = errors[path]
