"""Adapters without their base: opened as what they are, with names and shapes from themselves."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import Axes

from ._config import CONFIG_NAME, PeftConfig, config_of, distrusted, suffixes
from ._diffusers import METADATA_KEY, WEIGHTS_NAME as DIFFUSERS_NAME
from ._errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    UnsupportedAdapterError,
)
from ._export import pattern_name
from ._layouts import MAGNITUDE, RANK, Conv, Embedding, Experts, Layout, Layouts, Linear, Tensor
from ._missing import check_any
from ._native import FORMAT_KEY, load_alone
from ._peft import WEIGHTS_NAME, open_peft
from ._restore import FACTOR, Source, plain_keys, restore
from ._tensors import TensorFile, parse_json
from ._tree import Held


class Opened(NamedTuple):
    """An adapter, and what of its form is worth knowing."""

    kind: str  # native, peft or diffusers
    path: Path
    rows: dict[str, Any]  # by path: an adapter, or an array
    names: Layouts  # empty for a native file
    metadata: dict[str, str]
    config: PeftConfig | None = None
    held: Held = {}
    part: str | None = None  # of a pipeline, for diffusers; "" where the file names none


def open_adapter(
    path: Path, names: Layouts | None = None, base: Mapping[str, Any] | None = None
) -> Opened:
    """An adapter in whichever form it is.

    Args:
        path: a native file, a folder of PEFT, or a file or folder for diffusers.
        names: the layouts of the parameters that are to come of PEFT's modules; by default each
            module is a parameter of its own.
        base: the shapes of those parameters; by default what the factors fit.
    """
    if path.is_dir() and (path / CONFIG_NAME).exists():
        with open_peft(path) as source:
            return _restored("peft", path, source, names, base)
    file_path = path / DIFFUSERS_NAME if path.is_dir() else path
    if path.is_dir() and not file_path.exists():
        raise AdapterNotFoundError(path, f"has neither `{CONFIG_NAME}` nor `{DIFFUSERS_NAME}`.")
    if path.name == WEIGHTS_NAME and path.with_name(CONFIG_NAME).exists():
        return open_adapter(path.parent, names, base)
    with TensorFile(file_path) as file:
        if FORMAT_KEY in file.metadata:
            check_any(file.path, {name: entry.shape for name, entry in file.entries.items()})
            rows, held = load_alone(file)
            return Opened("native", path, rows, {}, file.metadata, held=held)
        if METADATA_KEY in file.metadata:
            source, part = _diffusers_source(file)
            return _restored("diffusers", path, source, names, base)._replace(part=part)
    raise AdapterFileError(
        path, "is neither a native adapter nor one for diffusers; give the folder of one of PEFT's."
    )


def _diffusers_source(file: TensorFile) -> tuple[Source, str]:
    """The adapter, and the part of the pipeline that it is of: "" where the file names none."""
    found = parse_json(file.path, file.metadata[METADATA_KEY])
    if not isinstance(found, dict):
        raise AdapterFileError(file.path, f"its header has no object under {METADATA_KEY!r}.")
    parts = {""} if "r" in found else {key.partition(".")[0] for key in found}
    if len(parts) != 1:
        raise UnsupportedAdapterError(file.path, "is for several parts of a pipeline.")
    part = parts.pop()
    prefix = f"{part}." if part else ""
    values = {key.removeprefix(prefix): value for key, value in found.items()}
    source = Source(file, plain_keys(file, prefix), config_of(file.path, values), {}, False)
    return source, part


def _restored(
    kind: str, path: Path, source: Source, names: Layouts | None, base: Mapping[str, Any] | None
) -> Opened:
    names = _own_names(source) if names is None else names
    if base is None:
        shapes = {p: _own_shape(source, layout) for p, layout in names.items()}
        base = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items() if s is not None}
        names = {p: names[p] for p in base}
    _, rows = restore(source, base, names)
    rows = {p: row for p, row in rows.items() if row is not None}
    return Opened(kind, path, rows, names, source.file.metadata, source.config)


def _own_names(source: Source) -> dict[str, Layout]:
    """A parameter for each module, by the names of Flax."""
    names: dict[str, Layout] = {}
    experts = _experts(source)
    for key, name in source.tensors.items():
        match = FACTOR.search(key)
        if match is not None and match[1] == MAGNITUDE:
            continue  # beside the factors
        module = key[: match.start()] if match else key.rpartition(".")[0]
        module = module.removesuffix(".base_layer")
        path = module.replace(".", "/")
        adapted = next((experts[end] for end in suffixes(module) if end in experts), None)
        if match is None:
            parameter = key.rpartition(".")[2]
            if not key.endswith(".base_layer.weight"):  # of an embedding, and as it is in the base
                names[f"{path}/{parameter}"] = Tensor(module, parameter=parameter)
        elif adapted is not None:
            names[f"{path}/{adapted}"] = Experts(
                module, parameter=adapted, shared_axes=(0,), swapped=False
            )
        elif match[1].startswith("lora_embedding"):
            names[f"{path}/embedding"] = Embedding(module)
        else:
            names[f"{path}/kernel"] = _of_axes(source, module, name)
    return names


def _of_axes(source: Source, module: str, name: str) -> Layout:
    """The layout that has a factor with so many axes."""
    shape = source.file.entries[name].shape
    if not 2 <= len(shape) <= 5:
        raise AdapterFileError(
            source.file.path,
            f"has `{name}` of shape {shape}; a factor has 2 axes, or 3 to 5 of a convolution.",
        )
    return Linear(module) if len(shape) == 2 else Conv(module)


def _experts(source: Source) -> dict[str, str]:
    """The adapted parameter of each module of experts, by the end of the module's name."""
    found: dict[str, str] = {}
    for target in source.config.target_parameters or ():
        module, _, parameter = target.rpartition(".")
        if found.setdefault(module, parameter) != parameter:
            raise UnsupportedAdapterError(
                source.file.path,
                f"adapts several parameters of `{module}`, and does not say which factors are "
                "whose. Give names (`lorax_io.write_names`), with the order of each.",
            )
    return found


def _own_shape(source: Source, layout: Layout) -> tuple[int, ...] | None:
    """The shape of the parameter that a layout's tensors are of; None where it has none."""
    path = source.file.path
    stack = _stack_sizes(source, layout)
    if stack is None:
        return None
    module = layout.module.format(*(0 for _ in stack))

    def shape(key: str) -> tuple[int, ...] | None:
        # A bias stands in a wrapper, and parameters of experts may stand in several.
        for wrapped in range(2 + len(source.config.target_parameters or ())):
            name = source.tensors.get(f"{module}{'.base_layer' * wrapped}.{key}")
            if name is not None:
                return source.file.entries[name].shape
        return None

    first = (
        None if isinstance(layout, Tensor) else shape("lora_A.weight") or shape("lora_embedding_A")
    )
    whole = shape(layout.parameter)
    unsure = AdapterMismatchError(
        path,
        f"does not say how large each of the axes is that are one in `{module}`. Load it in "
        "Python (`lorax_io.load_peft`), with the parameters.",
    )

    def roles_of(ndim: int) -> Axes:
        try:
            return layout.roles(ndim)
        except AdapterMismatchError as error:  # The parameter has more axes than its tensors.
            raise unsure from error

    if first is not None:
        roles = roles_of(len(layout.shared_axes) + len(first))
        tensors = [(shape(factor.key), factor.groups) for factor in layout.factors(roles)]
    elif whole is not None:
        roles = roles_of(len(stack) + len(whole))
        tensors = [(whole, layout.whole(roles))]
    else:
        return None
    with distrusted(path):
        rank = source.config.rank(pattern_name(layout, module))
    sizes = dict(zip(layout.stack(roles), stack, strict=True))
    for found, groups in tensors:
        if found is None or len(found) != len(groups):
            raise AdapterFileError(
                path, f"has no two factors of `{module}` that fit each other and {layout}."
            )
        for size, group in zip(found, groups, strict=True):
            axes = [axis for axis in group if axis != RANK]
            if len(axes) == 1:
                sizes[axes[0]] = size // rank if RANK in group else size
    if sorted(sizes) != list(range(sum(map(len, roles)))):
        raise unsure
    return tuple(sizes[axis] for axis in sorted(sizes))


def _stack_sizes(source: Source, layout: Layout) -> tuple[int, ...] | None:
    """How many modules a layout stacks along each of its axes; None where there are none."""
    parts = map(re.escape, layout.module.split("{}"))
    pattern = re.compile(r"(\d{1,9})".join(parts) + r"\.")
    matches = [match for key in source.tensors if (match := pattern.match(key))]
    if not matches:
        return None
    indices = zip(*(map(int, match.groups()) for match in matches), strict=True)
    sizes = tuple(1 + max(group) for group in indices)
    if math.prod(sizes) > len(matches):
        raise AdapterFileError(source.file.path, f"lacks some of the modules `{layout.module}`.")
    return sizes
