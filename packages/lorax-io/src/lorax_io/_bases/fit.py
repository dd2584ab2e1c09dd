"""Matches an adapter to the tensors of a base; unmatched and missing tensors are errors."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .._errors import AdapterMismatchError, about
from .._formats.kohya import resolve
from .._formats.native import read
from .._formats.opening import OpenedAdapter, fit, in_diffusers, is_translated
from .._formats.peft.patterns import distrusted
from .._shapes import base_sizes
from .._torch_names import (
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Parameter,
    Tensor,
    TorchName,
    TorchNames,
    tensor_name,
)
from .._tree import FrozenFactors, suggestion
from .checkpoint import Checkpoint
from .coded import MARKS, check_plain, coding_of
from .missing import check_lacking, lacking
from .ties import find_embedding, is_head, ties


class Fitted(NamedTuple):
    """An adapter matched to a base."""

    checkpoint: Checkpoint  # the base, with a head of its own if the adapter unties it
    rows: dict[str, Any]  # by the names of the base's tensors, with the axes of these tensors
    frozen: FrozenFactors  # the frozen factors in the adapter's file


def fit_adapter(
    adapter: OpenedAdapter,
    checkpoint: Checkpoint,
    rename: Callable[[str], str] = str,
    *,
    allow_missing: bool = False,
) -> Fitted:
    """Matches an adapter to the tensors of a base.

    Args:
        adapter: the adapter, as it was opened.
        checkpoint: the base.
        rename: maps a module's name in the adapter to its name in the base, up to a prefix.
        allow_missing: whether to warn about targets without tensors instead of raising.

    Raises:
        AdapterMismatchError: if a module has no tensor, or two modules have the same one.
        AdapterFileError: if the adapter lacks tensors of its targets.
        UnsupportedAdapterError: if an adapted weight is quantized and cannot be decoded.
    """
    with about(adapter.path):
        if is_translated((x.module for x in adapter.names.values()), checkpoint.shapes):
            adapter = in_diffusers(adapter)
        if adapter.config is None:
            return _fit_native(adapter, checkpoint)
        paths = {
            tensor_name(torch_name.module, torch_name.parameter): path
            for path, torch_name in adapter.names.items()
        }
        called = {name: _renamed(name, rename) for name in paths}
        checkpoint = _with_head(checkpoint, called.values())
        matched = {name: _tensor_of(other, adapter, checkpoint) for name, other in called.items()}
        if len({*matched.values()}) < len(matched):
            raise AdapterMismatchError("maps two modules to one tensor of the base.")
        _check_plain(checkpoint, matched.values())
        with distrusted():
            missing = lacking(adapter.config, checkpoint.shapes, matched)
        check_lacking(checkpoint.path, missing, allow_missing)
        names = {
            matched[name]: _in_pytorch(
                adapter.names[path],
                adapter.rows.get(path),
                checkpoint.shapes[matched[name]].shape,
                adapter.config.fan_in_fan_out,
            )
            for name, path in paths.items()
        }
        names |= _biases(names, checkpoint)
        base = _with_biases(names, checkpoint)
        translate, alpha = adapter.translated, adapter.alpha
        opened = fit(adapter.path, names, base, translate=translate, alpha=alpha)
        return Fitted(checkpoint, opened.rows, opened.frozen)


def _biases(names: TorchNames, checkpoint: Checkpoint) -> dict[str, TorchName]:
    """The names of the biases of adapted layers, which some kinds, such as IA³, change."""
    candidates = {
        name.removesuffix("weight") + "bias": torch_name for name, torch_name in names.items()
    }
    return {
        name: Tensor(torch_name.module)
        for name, torch_name in candidates.items()
        if name in checkpoint.shapes and name not in names
    }


def _with_biases(names: TorchNames, checkpoint: Checkpoint) -> dict[str, Any]:
    """The base's shapes, with the arrays themselves for biases, which are small."""
    biases = [name for name, x in names.items() if isinstance(x, Tensor) and x.parameter == "bias"]
    return {**checkpoint.shapes, **checkpoint.read(biases)}


def _fit_native(adapter: OpenedAdapter, checkpoint: Checkpoint) -> Fitted:
    for name in sorted(adapter.rows):
        if name not in checkpoint.shapes:
            raise AdapterMismatchError(
                f"adapts `{name}`, and {checkpoint.path} has no tensor of that name."
                f"{suggestion(name, checkpoint.shapes)} For a base of PyTorch, convert it first: "
                "`lorax convert --to peft`."
            )
    _check_plain(checkpoint, adapter.rows)
    loaded = read(adapter.path, checkpoint.shapes, with_frozen=True)
    return Fitted(checkpoint, loaded.rows, adapter.frozen)


def _check_plain(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    with about(checkpoint.path):
        for name in names:
            dtype = checkpoint.shapes[name].dtype
            _check_broken(checkpoint, name)
            check_plain(name, dtype, checkpoint.shapes, checkpoint.config)


def _check_broken(checkpoint: Checkpoint, name: str) -> None:
    if name in checkpoint.broken:
        raise checkpoint.broken[name]


def _with_head(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The base, with a head of its own if the adapter adapts the head and the base ties it."""
    heads = [
        name
        for name in names
        if name.endswith(".weight")
        and is_head(name.removesuffix(".weight"))
        and not checkpoint.candidates(name)
    ]
    embedding = find_embedding(checkpoint.shapes)
    if len(heads) != 1 or embedding is None or coding_of(heads[0], checkpoint.shapes, None):
        return checkpoint
    if checkpoint.config is None or ties(checkpoint.config) is False:
        how = "put a" if checkpoint.is_gguf else "give the base as a folder with a"
        where = "next to it" if checkpoint.is_gguf else "in it"
        raise AdapterMismatchError(
            f"adapts `{heads[0]}`, and {checkpoint.path} has no tensor of that name. A model may "
            f"use its embedding as its head: {how} config.json {where} that says so."
        )
    shapes = {**checkpoint.shapes, heads[0]: checkpoint.shapes[embedding]}
    copies = {**checkpoint.copies, heads[0]: embedding}
    return checkpoint._replace(shapes=shapes, copies=copies)


def _renamed(name: str, rename: Callable[[str], str]) -> str:
    module, dot, parameter = name.rpartition(".")
    return f"{rename(module)}{dot}{parameter}"


def _tensor_of(name: str, adapter: OpenedAdapter, checkpoint: Checkpoint) -> str:
    """The base's tensor for a name, which may have or lack the model's prefix."""
    if adapter.format == "kohya":
        return resolve(name, checkpoint.shapes, checkpoint.parts)
    part = adapter.part
    if part and f"{part}.{name}" in checkpoint.shapes:
        return f"{part}.{name}"
    candidates = checkpoint.candidates(name)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        _check_coded(checkpoint, name)
    raise AdapterMismatchError(
        f"adapts `{name}`, and {checkpoint.path} has no tensor of that name."
        f"{suggestion(name, checkpoint.shapes)}"
    )


def _check_coded(checkpoint: Checkpoint, name: str) -> None:
    """Rejects a base that has quantized codes, under other names, in place of the tensor."""
    module, _, parameter = name.rpartition(".")
    ends = {parameter, *MARKS, *(known.rpartition(".")[2] for known in checkpoint.shapes)}
    stems = {known.removesuffix(f".{end}") for known in checkpoint.shapes for end in ends}
    with about(checkpoint.path):
        for stem in stems:
            if stem == module or stem.endswith(f".{module}") or module.endswith(f".{stem}"):
                full = f"{stem}.{parameter}"
                _check_broken(checkpoint, full)
                check_plain(full, None, checkpoint.shapes, checkpoint.config)


def _in_pytorch(
    torch_name: TorchName, row: Any, shape: tuple[int, ...], fan_in_fan_out: bool
) -> TorchName:
    """The name of a base's tensor; its axes follow from the tensor's and the factors' shapes."""
    if isinstance(torch_name, Tensor):
        return torch_name
    if isinstance(torch_name, Embedding):
        return dataclasses.replace(torch_name, in_axes=(0,), out_axes=(1,))
    if isinstance(torch_name, Parameter):
        return dataclasses.replace(torch_name, in_axes=(1,), out_axes=(0,))
    if len(shape) > 2 and not isinstance(torch_name, Experts):
        rest = tuple(range(1, len(shape)))
        return Conv(torch_name.module, in_axes=rest, out_axes=(0,), channel_axis=1)
    sides = base_sizes(row)[-2:]
    fits = [_fits(shape[-2:], sides), _fits(shape[-2:], sides[::-1])]
    if isinstance(torch_name, Experts):
        first = len(shape) - 2
        if sides[0] == sides[1]:
            raise AdapterMismatchError(
                f"`{torch_name.module}` has as many inputs as outputs, so its axes are "
                "ambiguous. Merge it in Python, with `Experts` in `names`."
            )
        inputs, outputs = (first, first + 1) if fits[0] else (first + 1, first)
        return dataclasses.replace(torch_name, in_axes=(inputs,), out_axes=(outputs,))
    if fits[0] and (fan_in_fan_out or not fits[1]):
        return Conv1D(torch_name.module, in_axes=(0,), out_axes=(1,))
    return Linear(torch_name.module, in_axes=(1,), out_axes=(0,))


def _fits(shape: tuple[int, ...], sides: Any) -> bool:
    return len(shape) == len(sides) and all(
        side is None or side == size for size, side in zip(shape, sides, strict=True)
    )
