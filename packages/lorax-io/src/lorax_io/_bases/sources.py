"""Opens a base's files, safetensors or GGUF, and finds its weights by module."""

import bisect
import contextlib
import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .._disk.tensors import TensorFile
from .._errors import AdapterMismatchError, UnsupportedAdapterError
from .._places import Array
from .._torch_names import tensor_name
from .._tree import suggestion
from .checkpoint import Checkpoint, open_checkpoint, settings_of
from .coded import MARKS, coding_of, coding_of_any
from .codings import Coded, Decoded, find_coded
from .codings.coding import Part, whole
from .gguf import GGUFSource, is_gguf
from .missing import begins
from .ties import is_head, ties

Weight = Coded | Decoded | Part


class Source(Protocol):
    """The weights of a base, found by module."""

    used: set[str]  # the tensors of all weights found so far

    @property
    def names(self) -> Mapping[str, Any]:
        """All tensors, by name."""
        ...

    def find(self, module: str, parameter: str) -> Weight | None:
        """A weight, quantized or not; None if there is none."""
        ...

    def lacking(self, name: str) -> str:
        """A sentence for the error: why the weight cannot be found."""
        ...


class SafetensorsSource:
    """The tensors of safetensors files, which stay open."""

    def __init__(self, checkpoint: Checkpoint, stack: contextlib.ExitStack) -> None:
        self.config: Mapping[str, Any] = settings_of(checkpoint)
        self.used: set[str] = set()
        self._checkpoint = checkpoint
        self.names: dict[str, tuple[TensorFile, str]] = {}
        for path, prefix in checkpoint.files:
            file = stack.enter_context(TensorFile(path))
            self.names |= {prefix + name: (file, name) for name in file.entries}
        self._sorted = sorted(self.names)
        self._asked: dict[str, str] = {}  # the name that each weight was asked for by
        self._prefixed: dict[tuple[str, str], tuple[str, str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def view(self, name: str) -> Array:
        """The tensor as it is in the file."""
        file, own = self.names[name]
        return file.view(own)

    def beginning(self, prefix: str) -> Iterable[str]:
        """The names of the tensors that begin with a prefix."""
        begin = bisect.bisect_left(self._sorted, prefix)
        end = bisect.bisect_left(self._sorted, prefix + chr(sys.maxunicode), begin)
        return self._sorted[begin:end]

    def find(self, module: str, parameter: str) -> Weight | None:
        """A weight by module; its name may have a prefix that the checkpoint lacks, or lack one."""
        asked, module = module, self._module(module, parameter)
        coded = find_coded(self, module, parameter)
        if coded is not None or tensor_name(module, parameter) in self.names:
            self._check_match(tensor_name(asked, parameter), tensor_name(module, parameter))
        if coded is not None:
            self.used.update(coded.names)
            return coded
        name = tensor_name(module, parameter)
        if name not in self.names:
            return None
        self.used.add(name)
        view = self.view(name)
        self._check_plain(name, view.dtype if parameter == "weight" else None)
        return whole(view, (1,) * view.ndim)

    def _check_match(self, asked: str, found: str) -> None:
        """Rejects names that match by other prefixes than the rest: they may be of other modules.

        Raises:
            AdapterMismatchError: if two names match one weight, or by two prefixes.
        """
        if (first := self._asked.setdefault(found, asked)) != asked:
            raise AdapterMismatchError(
                f"has one weight `{found}` for `{first}` and `{asked}` of `names`, so that it "
                "lacks one of them."
            )
        if asked == found:
            return
        self._prefixed.setdefault(begins(asked, found), (asked, found))
        if len(self._prefixed) > 1:
            (one, its), (other, another) = list(self._prefixed.values())[:2]
            raise AdapterMismatchError(
                f"has `{its}` for `{one}` of `names` and `{another}` for `{other}`, whose prefixes "
                "differ in two ways. Give the names that the file has."
            )

    def _check_plain(self, name: str, dtype: Any) -> None:
        """Rejects codes that no reader has decoded. Buffers, such as positions, may be integers."""
        known = coding_of if dtype is None else functools.partial(coding_of_any, dtype=dtype)
        if coding := known(name, names=self.names, config=self.config):
            raise UnsupportedAdapterError(f"has `{name}` as {coding}, which is not supported.")

    def _module(self, module: str, parameter: str) -> str:
        """The checkpoint's name for a module; `module` itself if there is not exactly one."""
        ends = [parameter, f"{parameter}_packed", f"{parameter}_blocks", *MARKS]
        for end in ends:
            candidates = self._checkpoint.candidates(tensor_name(module, end))
            if len(candidates) == 1:
                return candidates[0].removesuffix(end).removesuffix(".")
        return module

    def lacking(self, name: str) -> str:
        """A sentence for the error: why the weight cannot be found."""
        prefix = f"{name.rpartition('.')[0]}."
        is_here = any(known.startswith(prefix) for known in self.names)
        known = functools.partial(coding_of_any, dtype=None) if is_here else coding_of
        coding = known(name, names=self.names, config=self.config)
        if coding is not None:
            return f"has `{name}` as {coding}, which is not supported."
        if is_head(name.removesuffix(".weight")) and ties(self.config):
            return (
                f"has no tensor for `{name}`: its config ties the head to the embedding. Name the "
                "embedding alone, and use its parameter as the head."
            )
        return f"has no tensor for `{name}`.{suggestion(name, self.names)}"


def open_source(path: Path, stack: contextlib.ExitStack) -> Source:
    """Opens the base at a path: a folder, a safetensors file or a GGUF file."""
    if is_gguf(path):
        source = GGUFSource(path)
        source.warn_of_changes()
        return source
    return SafetensorsSource(open_checkpoint(path), stack)


def needed(source: Source, module: str, parameter: str) -> Weight:
    """The weight; raises if there is none."""
    weight = source.find(module, parameter)
    if weight is None:
        raise AdapterMismatchError(source.lacking(tensor_name(module, parameter)))
    return weight
