"""The header of a native file: the settings of each parameter."""

import os
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorax import Adapter, adapter_from_settings

from ..._disk.tensors import (
    TensorFile,
    parse_json,
)
from ..._errors import AdapterFileError

PREFIX = "lorax."
FORMAT_KEY, ADAPTER, BASE = (PREFIX + key for key in ("format", "adapter", "base"))
FROZEN_FACTORS = PREFIX + "held"  # the key of version 2
FROZEN_KEY = PREFIX + "frozen_format"
_FORMATS = ("1", "2")
_SHORT = reprlib.Repr()  # settings in an untrusted file may be nested very deeply
_SHORT.maxdict = _SHORT.maxstring = 64
FIRST_KINDS = ("full", "lora")  # the kinds that format 1 supports


def check_format(file: TensorFile) -> None:
    """Rejects files that are not native adapters, and formats of later versions."""
    version = file.metadata.get(FORMAT_KEY)
    if version in _FORMATS:
        return
    if FROZEN_KEY in file.metadata:
        raise AdapterFileError("is a frozen tree, not an adapter; `load_frozen` reads it.")
    raise AdapterFileError(
        "is a safetensors file, but not a native adapter; `load_peft` reads the folders of PEFT."
        if version is None
        else f"is a native adapter of format {version!r}; this version of lorax-io reads formats 1 "
        "and 2. Update it.",
    )


class Header(NamedTuple):
    """The parameters in a header, by path."""

    blanks: dict[str, Adapter | None]  # adapters without arrays; None if trained in full
    frozen: dict[str, list[str]]  # the names of the frozen factors in the file


def read_header(file: TensorFile) -> Header:
    """Reads the header, and checks that it lists exactly the tensors of the file."""
    check_format(file)
    settings_of = _object(file, ADAPTER)
    blanks = {path: _read_settings(path, settings) for path, settings in settings_of.items()}
    frozen = _object(file, FROZEN_FACTORS) if FROZEN_FACTORS in file.metadata else {}
    for path, names in frozen.items():
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if blanks.get(path) is None or not is_list:
            raise AdapterFileError(f"its header has no frozen factors of `{path}`: {names!r}.")
    wanted: set[str] = set()
    for path, blank in blanks.items():
        factors = [] if blank is None else [*blank.factors(), *frozen.get(path, ())]
        for name in [path] if blank is None else [f"{path}/{factor}" for factor in factors]:
            if name in wanted:
                raise AdapterFileError(f"its header has two uses for `{name}`.")
            wanted.add(name)
    if missing := sorted(wanted - file.entries.keys()):
        raise AdapterFileError(f"lacks the tensor `{missing[0]}` of its header.")
    if extra := sorted(file.entries.keys() - wanted):
        raise AdapterFileError(f"has a tensor `{extra[0]}` that is not in its header.")
    return Header(blanks, frozen)


def _object(file: TensorFile, key: str) -> dict[str, Any]:
    content = parse_json(file.metadata.get(key, ""))
    if not isinstance(content, dict):
        raise AdapterFileError(f"its header has no object under {key!r}.")
    return content


def _read_settings(path: str, settings: Any) -> Adapter | None:
    if settings == {"kind": "full"}:
        return None
    try:
        return adapter_from_settings(settings)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(
            f"its header has an invalid setting for `{path}`: {_SHORT.repr(settings)}."
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the `metadata` that `save_adapter` or `save_frozen` was given.

    Args:
        path: a native file.

    Returns:
        The dictionary, without the format's own keys.

    Raises:
        AdapterError: if the file is damaged or not native.

    Example:
        >>> import jax.numpy as jnp, lorax_io, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, {"bias": jnp.zeros(3)}, metadata={"task": "reviews"})
        >>> lorax_io.read_metadata(file)
        {'task': 'reviews'}
    """
    with TensorFile(path) as file:
        if FROZEN_KEY not in file.metadata:
            check_format(file)
        return user_metadata(file.metadata)


def user_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header's strings without the format's own keys."""
    return {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}
