"""Writes native files."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lorax import Adapter

from ..._disk.arrays import one_writer, to_host
from ..._disk.progress import bars, track
from ..._disk.tensors import (
    check_dtype,
    write_tensors,
)
from ..._errors import AdapterError, about
from ..._shapes import check_frozen
from ..._tree import (
    FrozenFactors,
    Row,
    arrays_of,
    pair_rows,
    settings_of,
)
from ..signature import signature
from .fingerprint import fingerprint
from .header import ADAPTER, BASE, FIRST_KINDS, FORMAT_KEY, FROZEN_FACTORS, PREFIX


def save_adapter(
    path: str | os.PathLike[str],
    tunable: Any,
    *,
    base: Any = None,
    hash_base: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Writes a tunable tree, or a pair, to one safetensors file, atomically.

    A new file is written next to the old one, flushed, read back and compared, and only then
    replaces it. Arrays that span several devices or processes are gathered one after the other.
    Every process must call this; the first one writes, and the others wait.

    Args:
        path: the file.
        tunable: the tunable tree; or the whole `lorax.Pair`, whose frozen factors are then written
            too. Kinds of adapters whose frozen factors cannot be computed from the base need the
            pair. The bases themselves are not written.
        base: the parameters that the adapter belongs to, or the frozen tree. The file keeps a
            fingerprint of their paths, shapes and dtypes, so that it is not loaded onto another
            model.
        hash_base: whether the fingerprint also covers the base's numbers, which are then all read.
        metadata: further strings for the file's header. Keys must not begin with `lorax.`.
        progress: whether to show a progress bar, on a terminal, if saving takes long.

    Raises:
        AdapterError: if two parameters have the same path, an array holds NaN or infinity or has a
            dtype that the format lacks, or a kind of adapter needs the pair.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"kernel": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, tunable, base=params, metadata={"base": "my-model"})
        >>> lorax_io.read_metadata(file)
        {'base': 'my-model'}
        >>> tunable = lorax_io.load_adapter(file, params=params)
    """
    with about(path), bars(progress):
        rows, frozen = pair_rows(tunable)
        write(path, rows, frozen, base=base, hash_base=hash_base, metadata=metadata)


def write(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    frozen: FrozenFactors,
    *,
    base: Any = None,
    hash_base: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes rows and frozen factors."""
    arrays: dict[str, Any] = {}
    for row in rows:
        if isinstance(row.leaf, Adapter):
            check_frozen(row.path, row.leaf, frozen.get(row.path, {}))
        for name, array in arrays_of(*row, frozen.get(row.path)).items():
            if name in arrays:
                raise AdapterError(f"two arrays are both called `{name}`; rename one.")
            check_dtype(name, array.dtype)
            arrays[name] = array
    if taken := [key for key in metadata or {} if key.startswith(PREFIX)]:
        raise AdapterError(f"metadata keys may not begin with {PREFIX!r}: {taken}.")
    settings = {row.path: settings_of(row.leaf) for row in rows}
    is_first = not frozen and all(each["kind"] in FIRST_KINDS for each in settings.values())
    header = {
        **(metadata or {}),
        FORMAT_KEY: "1" if is_first else "2",
        **signature(),
        ADAPTER: json.dumps(settings),
    }
    if frozen:
        header[FROZEN_FACTORS] = json.dumps({of: sorted(factors) for of, factors in frozen.items()})
    if base is not None:
        header[BASE] = json.dumps(fingerprint(base, dict(rows), hash_base))
    gathered = {name: to_host(array) for name, array in track(arrays.items(), "Saving the adapter")}
    with one_writer() as writer:
        if writer:
            write_tensors(path, gathered, header)
