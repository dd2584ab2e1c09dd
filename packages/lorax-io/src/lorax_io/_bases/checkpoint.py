"""A base model on disk: a safetensors file, a transformers folder, or a diffusers pipeline."""

import collections
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._disk.files import file_in, regular_file
from .._disk.tensors import TensorFile, read_json
from .._errors import AdapterFileError, AdapterNotFoundError
from .._formats.peft.patterns import suffixes
from .._places import Array

CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
INDEX_END = ".index.json"
# In this order; if a folder has both, transformers reads the file, and diffusers the index.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
SETTINGS_KEY = "quantization_config"
SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class BaseFile(NamedTuple):
    """One file of tensors, and the prefix of its names in the checkpoint."""

    path: Path
    prefix: str


class Checkpoint(NamedTuple):
    """The tensors of a base model by name, and the files that they are in.

    In a pipeline a name begins with the part's folder: `unet.conv_in.weight`.
    """

    path: Path
    files: list[BaseFile]  # empty for a GGUF file
    shapes: dict[str, jax.ShapeDtypeStruct]
    config: dict[str, Any] | None  # the model's config.json, if there is one
    by_end: Mapping[str, list[str]]  # full names, by each of their ends after a dot
    roots: frozenset[str]  # the first parts of names that have several
    copies: Mapping[str, str] = {}  # a tied head that the adapter unties: the embedding's name
    coded: Mapping[str, Any] = {}  # quantized weights, decoded when they are read
    broken: Mapping[str, Exception] = {}  # quantized weights that cannot be decoded, and why

    @property
    def parts(self) -> set[str]:
        """The folders of a pipeline; empty for a single model."""
        return {file.prefix.removesuffix(".") for file in self.files} - {""}

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, whose tensors are all in `coded`."""
        return not self.files

    @property
    def home(self) -> Path | None:
        """The folder of the model, whose other files are about it as well."""
        if self.path.is_dir():
            return self.path
        return self.path.parent if self.is_gguf and self.config is not None else None

    def read(self, names: Collection[str]) -> dict[str, Array]:
        """Copies of some of the tensors, by name."""
        if self.is_gguf:
            return {name: self.coded[name].array() for name in names}
        tensors: dict[str, Array] = {}
        for path, prefix in self.files if names else ():
            with TensorFile(path) as file:
                wanted = [name for name in file.entries if prefix + name in names]
                tensors |= {prefix + name: np.array(file.view(name)) for name in wanted}
        return tensors

    def candidates(self, name: str) -> list[str]:
        """The tensors whose name equals `name`, or else differs from it only by a prefix."""
        if name in self.shapes:
            return [name]
        return self._shorter(name) + self.by_end.get(name, [])

    def _shorter(self, name: str) -> list[str]:
        """The tensors whose name is that without its first parts, if no tensor has the first."""
        shorter = [end for end in suffixes(name) if end in self.shapes]
        return [] if name.partition(".")[0] in self.roots else shorter


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the base at a path: reads its config and the headers of all its files."""
    files = _files(path)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for file_path, prefix in files:
        with TensorFile(file_path) as file:
            for name, entry in file.entries.items():
                full = prefix + name
                if full in shapes:
                    raise AdapterFileError(f"has `{name}`, which another file also has.")
                shapes[full] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    return Checkpoint(path, files, shapes, config_of(path), by_end(shapes), roots(shapes))


def by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """The full names, by each of their proper ends after a dot."""
    names_by_end: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        for end in suffixes(name)[1:]:
            names_by_end[end].append(name)
    return dict(names_by_end)


def roots(names: Iterable[str]) -> frozenset[str]:
    """The first parts of the names that have several."""
    return frozenset(name.partition(".")[0] for name in names if "." in name)


def config_of(path: Path) -> dict[str, Any] | None:
    """The config in a folder, if there is one."""
    if not (path.is_dir() and (path / CONFIG_NAME).exists()):
        return None
    config = read_json(file_in(path, CONFIG_NAME))
    if not isinstance(config, dict):
        raise AdapterFileError("is not a JSON object.", path / CONFIG_NAME)
    return config


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config that says how weights are quantized, also for a single file of the model.

    AutoGPTQ and AutoAWQ before transformers 4.35 write their settings to a file of their own.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = config_of(folder) or {}
    for name, method in SETTINGS.items():
        if SETTINGS_KEY not in config and (folder / name).exists():
            own = read_json(file_in(folder, name))
            if not isinstance(own, dict):
                raise AdapterFileError("is not a JSON object.", folder / name)
            config = {**config, SETTINGS_KEY: {"quant_method": method, **own}}
    return config


def _files(path: Path) -> list[BaseFile]:
    if not path.is_dir():
        return [BaseFile(regular_file(path), "")]
    if (path / PIPELINE_NAME).exists():
        parts = sorted(part for part in path.iterdir() if part.is_dir())
        files_by_part = {part: _weights(part) for part in parts}
        if not any(files_by_part.values()):
            raise AdapterNotFoundError("is a pipeline without safetensors files.", path)
        return [
            BaseFile(file, f"{part.name}.")
            for part, files in files_by_part.items()
            for file in files
        ]
    if files := _weights(path):
        return [BaseFile(file, "") for file in files]
    names = ", ".join(f"`{name}`" for name in _WEIGHTS if not name.endswith(INDEX_END))
    others = sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])
    instead = f" Give the path of a file itself, such as {others[0].name}." if others else ""
    raise AdapterNotFoundError(f"has none of {names}, nor an index of them.{instead}", path)


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of one model's folder; empty if there are none."""
    named = (config_of(folder) or {}).get("transformers_weights")  # a key of transformers
    found = [name for name in _WEIGHTS if (folder / name).exists()]
    if isinstance(named, str):
        found = [named]
    if not found:
        return []
    path = file_in(folder, found[0])
    if not path.name.endswith(INDEX_END):
        return [path]
    content = read_json(path)
    try:
        return [file_in(folder, name) for name in sorted({*content["weight_map"].values()})]
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError("has no `weight_map`.", path) from error
