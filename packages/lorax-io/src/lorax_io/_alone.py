"""Adapters without their base: opened as what they are, with names and shapes from themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ._config import CONFIG_NAME, PeftConfig, config_of, distrusted
from ._diffusers import METADATA_KEY, WEIGHTS_NAME as DIFFUSERS_NAME
from ._errors import AdapterFileError, AdapterNotFoundError, UnsupportedAdapterError
from ._export import pattern_name
from ._layouts import Conv, Embedding, Experts, Layout, Linear, Names, Tensor
from ._native import FORMAT_KEY, load_alone
from ._peft import WEIGHTS_NAME, open_peft
from ._restore import FACTOR, Source, plain_keys, restore
from ._tensors import TensorFile, parse_json


class Adapter(NamedTuple):
    """An adapter, and what of its form is worth knowing."""

    kind: str  # native, peft or diffusers
    path: Path
    rows: dict[str, Any]  # by path: a LoraWeight, or an array
    names: Names  # empty for a native file
    metadata: dict[str, str]
    config: PeftConfig | None = None


def open_adapter(
    path: Path, names: Names | None = None, base: Mapping[str, Any] | None = None
) -> Adapter:
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
            return Adapter("native", path, load_alone(file), {}, file.metadata)
        if METADATA_KEY in file.metadata:
            return _restored("diffusers", path, _diffusers_source(file), names, base)
    raise AdapterFileError(
        path, "is neither a native adapter nor one for diffusers; give the folder of one of PEFT's."
    )


def _diffusers_source(file: TensorFile) -> Source:
    found = parse_json(file.path, file.metadata[METADATA_KEY])
    prefixes = {name.partition(".")[0] for name in file.entries}
    if not isinstance(found, dict) or len(prefixes) != 1:
        raise UnsupportedAdapterError(file.path, "is for several parts of a pipeline, or for none.")
    prefix = f"{prefixes.pop()}."
    values = {key.removeprefix(prefix): value for key, value in found.items()}
    return Source(file, plain_keys(file, prefix), config_of(file.path, values), {}, False)


def _restored(
    kind: str, path: Path, source: Source, names: Names | None, base: Mapping[str, Any] | None
) -> Adapter:
    names = _own_names(source) if names is None else names
    if base is None:
        shapes = {p: _own_shape(source, layout) for p, layout in names.items()}
        base = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items() if s is not None}
        names = {p: names[p] for p in base}
    _, rows = restore(source, base, names)
    rows = {p: row for p, row in rows.items() if row is not None}
    return Adapter(kind, path, rows, names, source.file.metadata, source.config)


def _own_names(source: Source) -> dict[str, Layout]:
    """A parameter for each module, by the names of Flax."""
    names: dict[str, Layout] = {}
    experts = _experts(source)
    for key, name in source.tensors.items():
        axes = len(source.file.entries[name].shape)
        match = FACTOR.search(key)
        module = key[: match.start()] if match else key.rpartition(".")[0]
        path = module.replace(".", "/")
        if match is None:
            parameter = key.rpartition(".")[2]
            module = module.removesuffix(".base_layer")
            if not key.endswith(".base_layer.weight"):
                names[f"{path}/{parameter}"] = Tensor(module, parameter=parameter)
        elif module in experts:
            names[f"{path}/{experts[module]}"] = Experts(
                module, parameter=experts[module], shared_axes=(0,), swapped=False
            )
        elif match[1].startswith("lora_embedding"):
            names[f"{path}/embedding"] = Embedding(module)
        else:
            names[f"{path}/kernel"] = Linear(module) if axes == 2 else Conv(module)
    return names


def _experts(source: Source) -> dict[str, str]:
    """The adapted parameter of each module of experts."""
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
    """The shape of the base that a module's tensors fit; None where it has no tensors."""

    def shape(key: str) -> tuple[int, ...] | None:
        # A parameter of experts may be wrapped more than once.
        for wrapped in range(1 + len(source.config.target_parameters or ())):
            name = source.tensors.get(f"{layout.module}{'.base_layer' * wrapped}.{key}")
            if name is not None:
                return source.file.entries[name].shape
        return None

    roles = layout.roles(3 if isinstance(layout, Experts) else 2)
    keys = [factor.key for factor in layout.factors(roles)]
    found = [shape(key) for key in keys] or [shape(layout.parameter)]
    if None in found:
        return None
    if isinstance(layout, Tensor):
        return found[0]
    a, b = (s for s in found if s is not None)
    if len(a) < 2 or len(b) < 2:
        raise AdapterFileError(
            source.file.path, f"has factors of `{layout.module}` with the shapes {a} and {b}."
        )
    if isinstance(layout, Experts):
        with distrusted(source.file.path):
            rank = source.config.rank(pattern_name(layout, layout.module))
        return a[0] // rank, a[1], b[0]
    return (*a[2:], a[1], b[0])
