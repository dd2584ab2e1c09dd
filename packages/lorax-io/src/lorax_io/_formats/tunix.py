"""Checkpoints of tunix and qwix: Orbax trees with `w_lora_a` and `w_lora_b` next to a `w`.

`w_lora_a` is (*input axes of `w`, rank), and `w_lora_b` is (rank, *all other axes). Alpha is in the
rules of the model's qwix provider, not in the file.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax import LoraWeight

from .._disk.arrays import one_writer, to_host
from .._disk.orbax import OrbaxTree, write_orbax
from .._disk.tensors import check_finite, is_number
from .._errors import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    UnsupportedAdapterError,
    about,
    warn,
)
from .._torch_names import Linear
from .._tree import pair_rows
from .format import Content, Format
from .self_described import self_described
from .signature import signature
from .source import Own, Source, Stored, check_any

TREE = "model_params"  # the name of the tree in which tunix saves the model
ALPHA = "lora_alpha"
_FACTOR = re.compile(r"(?P<path>.+)_lora_(?P<side>[ab])(?:/value)?")


def is_factor(name: str) -> bool:
    """Whether an array of a tree is a factor."""
    return _FACTOR.fullmatch(name) is not None


def _recognizes(content: Content) -> bool:
    return isinstance(content.file, OrbaxTree) and any(map(is_factor, content.file.entries))


class _Pair(NamedTuple):
    """The two factors of a parameter."""

    a: Stored  # [*in, rank]
    b: Stored  # [rank, *out]

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter, if its inputs come first."""
        return (*self.a.shape[:-1], *self.b.shape[1:])

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        count = len(self.a.shape) - 1
        return tuple(range(count)), tuple(range(count, len(self.shape)))


def _read(content: Content) -> Source:
    assert isinstance(content.file, OrbaxTree)
    pairs = _pairs(content.file)
    modules = _modules(pairs)
    tensors: dict[str, Stored] = {}
    own: dict[str, Own] = {}
    for path, pair in pairs.items():
        module, (inputs, outputs) = modules[path], pair.axes
        flat_a, flat_b = (math.prod(pair.a.shape[:-1]), pair.rank), (pair.rank, -1)
        tensors[f"{module}.lora_A.weight"] = pair.a.shaped(flat_a).turned()
        tensors[f"{module}.lora_B.weight"] = pair.b.shaped(flat_b).turned()
        torch_name = Linear(module, in_axes=inputs, out_axes=outputs)
        own[path] = Own(torch_name, pair.shape, lambda shape, x=pair: _axes(x, shape))
    alpha = content.alpha if content.alpha is not None else _stored_alpha(content.file)
    ranks = {modules[path]: pair.rank for path, pair in pairs.items()}
    scales = {module: alpha / rank for module, rank in ranks.items()}
    return self_described(tensors, scales=scales)._replace(own=own)


def _pairs(file: OrbaxTree) -> dict[str, _Pair]:
    factors_of: dict[str, dict[str, Stored]] = {}
    others: list[str] = []
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        factors = factors_of.setdefault(match["path"], {})
        if match["side"] in factors:
            raise AdapterFileError(f"has `{name}` twice, with `value` and without.")
        factors[match["side"]] = Stored(name, *entry, lambda name=name: file.view(name))
    check_any({f.name: f.shape for factors in factors_of.values() for f in factors.values()})
    if others:
        warn(
            f"has {len(others)} arrays besides the factors, such as `{others[0]}`, which are the "
            "model's own. They are not read."
        )
    return {path: _pair(path, factors) for path, factors in sorted(factors_of.items())}


def _pair(path: str, factors: Mapping[str, Stored]) -> _Pair:
    if lacking := sorted({"a", "b"} - factors.keys()):
        raise AdapterFileError(f"lacks `{path}_lora_{lacking[0]}`.")
    pair = _Pair(factors["a"], factors["b"])
    if min(len(pair.a.shape), len(pair.b.shape)) < 2 or pair.a.shape[-1] != pair.rank:
        raise UnsupportedAdapterError(
            f"has factors of `{path}` of shapes {pair.a.shape} and {pair.b.shape}, where the last "
            "axis of the first and the first of the second are the rank. Factors of a batch of "
            "weights are not read."
        )
    return pair


def _modules(paths: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """A module's name for each path: the node it is in, or itself if that node has several."""
    within = [path.rpartition("/")[0] for path in paths]
    names = {
        path: (owner if owner and within.count(owner) == 1 else path).replace("/", ".")
        for path, owner in zip(paths, within, strict=True)
    }
    if len({*names.values()}) < len(names):
        raise AdapterFileError("has two parameters that get one name with `.` between keys.")
    return names


def _stored_alpha(file: OrbaxTree) -> float:
    text = file.metadata.get(ALPHA)
    if text is None:
        raise UnsupportedAdapterError(
            "is a tunix or qwix checkpoint, which does not store the alpha of its rules. Give "
            "it: `alpha=` in Python, `--alpha` in the command."
        )
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not is_number(alpha):
        raise AdapterFileError(f"has {ALPHA} = {text!r} in its metadata, which is not a number.")
    return alpha


def _axes(pair: _Pair, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input and output axes of a parameter of this shape; None if the factors do not fit it.

    If several choices fit, as for a square matrix, the one with the inputs first is taken.
    """
    fits = [
        (inputs, outputs)
        for inputs, outputs in _splits(len(shape))
        if _fits([shape[d] for d in inputs], pair.a.shape[:-1])
        and _fits([shape[d] for d in outputs], pair.b.shape[1:])
    ]
    first = [(inputs, outputs) for inputs, outputs in fits if max(inputs) < min(outputs)]
    if len(fits) > 1 and len(first) != 1:
        raise AdapterMismatchError(
            f"has factors of shapes {pair.a.shape} and {pair.b.shape}, which fit {tuple(shape)} in "
            "several ways. Give the parameter in `names`."
        )
    return next(iter(first or fits), None)


def _splits(ndim: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for count in range(1, min(ndim, 8)):
        for inputs in itertools.combinations(range(ndim), count):
            yield inputs, tuple(d for d in range(ndim) if d not in inputs)


def _fits(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a factor has axes of these sizes, or one axis that combines them all."""
    return tuple(sizes) == tuple(shape) or (len(shape) == 1 and math.prod(sizes) == shape[0])


def save_tunix(
    folder: str | os.PathLike[str], tunable: Any, *, alpha: float | None = None, step: int = 0
) -> None:
    """Writes a checkpoint that tunix restores onto a model with qwix's LoRA.

    `CheckpointManager(folder).maybe_restore(model, restore_only_lora_params=True)` reads it. The
    paths of the tree must be those of the tunix model. Needs `pip install "lorax-io[orbax]"`.

    Args:
        folder: the checkpoint's folder, which is created if it does not exist.
        tunable: the tunable tree.
        alpha: the alpha in the model's rules, which tunix does not store. Each `b` is multiplied so
            that its scale becomes `alpha / rank`. By default the tree's alpha, if it has only one.
        step: the number of the step.

    Raises:
        AdapterError: if the checkpoint already has this step.
        UnsupportedAdapterError: if the tree is not plain LoRA of weights without shared axes, or
            has several alphas and none is given.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import open_adapter, save_tunix
        >>> params = {"layers": {"0": {"q_proj": {"w": jnp.ones((5, 3))}}}}
        >>> spec = {"layers": {"0": {"q_proj": {"w": lorax.LoraSpec(2, alpha=4)}}}}
        >>> frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "checkpoint")
        >>> save_tunix(folder, tunable)
        >>> open_adapter(folder).rows["layers/0/q_proj/w"].scale
        2.0
    """
    folder = Path(folder)
    with about(folder):
        rows = {row.path: row.leaf for row in pair_rows(tunable)[0]}
        for path, weight in rows.items():
            if not isinstance(weight, LoraWeight) or weight.axes.shared:
                raise UnsupportedAdapterError(
                    f"tunix supports only plain LoRA of weights without shared axes, and `{path}` "
                    "has another adapter. Use `save_adapter`."
                )
        if alpha is not None and not (math.isfinite(alpha) and alpha):
            raise AdapterError(f"got alpha={alpha!r}; it must be a finite number other than 0.")
        # An alpha of 0 is multiplied into `b`.
        alpha = _one_alpha(rows) or 1.0 if alpha is None else alpha
        tree: dict[str, Any] = {}
        for path, weight in rows.items():
            a, b = to_host(weight.a), to_host(weight.b)
            gain = weight.scale * weight.rank / alpha
            b = b if gain == 1 else (b.astype(np.float64) * gain).astype(b.dtype)
            for side, array in (("a", a), ("b", b)):
                check_finite(path, array)
                *keys, name = path.split("/")
                inner = tree
                for key in keys:
                    inner = inner.setdefault(key, {})
                inner[f"{name}_lora_{side}"] = {"value": np.asarray(array, order="C")}
        with one_writer() as writer:
            if writer:
                write_orbax(folder, step, TREE, tree, {ALPHA: alpha, **signature()})


def _one_alpha(rows: Mapping[str, LoraWeight]) -> float:
    alphas = {weight.scale * weight.rank for weight in rows.values()}
    if len(alphas) != 1:
        raise UnsupportedAdapterError(
            f"has {'no adapters' if not alphas else 'several alphas'}, but tunix has one for all "
            "modules of a rule. Pass `alpha`; each `b` is then scaled to it."
        )
    return alphas.pop()


FORMAT = Format(
    "tunix",
    "a tunix or qwix checkpoint",
    _recognizes,
    _read,
    "lorax_io.load_any(path, params, alpha=alpha)",
    saved="save_tunix",
    takes_alpha=True,
)
