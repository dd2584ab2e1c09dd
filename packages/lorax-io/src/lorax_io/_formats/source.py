"""`Source`: an adapter in PEFT's terms, which the reader of every format returns."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .._disk.hdf5 import Hdf5File
from .._disk.orbax import OrbaxTree
from .._disk.tensors import TensorFile
from .._errors import AdapterFileError
from .._torch_names import MAGNITUDE, TorchName
from .peft.config import PeftConfig
from .peft.tuners import TUNERS, Tuner
from .stored import Stored as Stored

Tensors = TensorFile | Hdf5File | OrbaxTree  # what arrays are read from

_ADAPTER_NAME = re.compile(
    rf"\.(lora_A|lora_B|lora_embedding_[AB]|{MAGNITUDE})\.(?!weight$|bias$)([^.]+)"
)
_COPY_OF_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.+\.)?bias$")


class Own(NamedTuple):
    """A parameter that a file names by its path in a tree, not by a module."""

    torch_name: TorchName
    shape: tuple[int, ...]  # of the parameter, with its inputs first
    # From a parameter's shape to its input and output axes; None if the factors do not fit it.
    axes: Callable[[Sequence[int]], tuple[tuple[int, ...], tuple[int, ...]] | None]


class Source(NamedTuple):
    """The tensors of an adapter by module and PEFT's key, and its settings."""

    tensors: Mapping[str, Stored]
    config: PeftConfig
    # The alpha and scaling of modules whose config expresses the same scale differently.
    original_scaling: Mapping[str, Mapping[str, Any]] = {}
    written_here: bool = False  # by lorax-io: experts are not swapped, unless their name says so
    part: str | None = None  # of a pipeline, for diffusers
    own: Mapping[str, Own] = {}  # by path, if the file has paths instead of modules

    @property
    def tuner(self) -> Tuner:
        """The adapter's kind."""
        return TUNERS[self.config.peft_type]


def stored(file: Tensors) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        AdapterFileError: if a tensor is empty, or there are no tensors.
    """
    check_any({name: entry.shape for name, entry in file.entries.items()})
    return {
        name: Stored(name, entry.dtype, entry.shape, lambda name=name: file.view(name))
        for name, entry in file.entries.items()
    }


def check_any(tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Rejects a file with empty tensors, as DeepSpeed's ZeRO-3 may write, or without any.

    Args:
        tensors: the shape of each tensor, by name.
    """
    empty = [name for name, shape in tensors.items() if 0 in shape]
    if empty or not tensors:
        problem = f"has a tensor without numbers, `{empty[0]}`" if empty else "has no tensors"
        raise AdapterFileError(
            f"{problem}: the adapter was not gathered when it was saved, as happens under "
            "DeepSpeed's ZeRO-3. Save it again from a gathered state."
        )


def plain_keys(
    tensors: Mapping[str, Stored], prefix: str, common: Mapping[str, str] = {}
) -> dict[str, Stored]:
    """The tensors by module and key, without the prefix and the adapter's name.

    Args:
        tensors: the tensors by their names in the file.
        prefix: the prefix of every name, such as `base_model.model.`.
        common: the keys of tensors that are in no module, by their names.
    """
    renamed: dict[str, Stored] = {}
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        if name in common:
            renamed[common[name]] = tensor
            continue
        if not name.startswith(prefix):
            raise AdapterFileError(
                f"has `{name}`; every tensor of an adapter begins with `{prefix}`."
            )
        key = name.removeprefix(prefix)
        if match := _ADAPTER_NAME.search(key):
            adapters.add(match[2])
            key = key.replace(match[0], f".{match[1]}", 1)
        # In a model of PEFT it is a module with a weight; in its files it is an array.
        key = key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key
        if key in renamed or len(adapters) > 1:
            other = renamed.get(key, next(iter(renamed.values()))).name
            raise AdapterFileError(f"has `{name}` and `{other}`: two adapters in one file.")
        renamed[key] = tensor
    return renamed


def without_copies(tensors: Mapping[str, Stored], config: PeftConfig) -> dict[str, Stored]:
    """The tensors without the copies of a head's bias that PEFT saves for `bias="all"`."""
    if config.bias != "all":
        return dict(tensors)
    return {key: tensor for key, tensor in tensors.items() if not _COPY_OF_BIAS.search(key)}


def shapes_of(tensors: Mapping[str, Stored], module: str, keys: Iterable[str]) -> dict[str, Any]:
    """The shapes of a module's tensors, by key, for the keys that the file has."""
    return {key: tensors[f"{module}.{key}"].shape for key in keys if f"{module}.{key}" in tensors}
