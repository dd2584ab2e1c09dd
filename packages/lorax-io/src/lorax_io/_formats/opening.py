"""Opens adapters of any format, without a base (`open_adapter`) or onto one (`load_any`)."""

import contextlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorax import Pair

from .._disk.arrays import all_read
from .._disk.files import file_in, regular_file
from .._disk.hdf5 import Hdf5File, is_hdf5, open_hdf5
from .._disk.orbax import OrbaxTree, is_orbax, open_orbax, tree_of
from .._disk.progress import bars
from .._disk.tensors import TensorFile, is_number
from .._errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, about, warn
from .._plain_names import Names, as_torch_names
from .._torch_names import TorchNames
from .._tree import FrozenFactors
from . import flux, kohya, native, tunix
from .format import Content, Format, Rows
from .own_names import names_on, own_names, own_shapes
from .peft.config import CONFIG_NAME, PeftConfig
from .restore import restore
from .source import Source
from .table import FORMATS


class OpenedAdapter(NamedTuple):
    """An adapter that was opened without its base.

    Attributes:
        format: "native", "peft", "diffusers", or the name of another format.
        path: the path that was given.
        rows: the adapter of each parameter, by path; an array if it is trained in full.
        names: the name of each parameter in PyTorch, by path; empty for a native file.
        metadata: the strings in the file's header.
        config: the settings in PEFT's terms; None for a native file.
        frozen: the frozen factors in the file, by path of their base and by name.
        part: the part of a diffusion pipeline; "" if the file does not name one.
        needs_base: why part of the adapter cannot be read without its base; None if it is complete.
        translated: whether modules were renamed from Flux's own names to those of diffusers.
        alpha: the alpha that was given, for a format that does not store it.
    """

    format: str
    path: Path
    rows: dict[str, Any]
    names: TorchNames
    metadata: dict[str, str]
    config: PeftConfig | None = None
    frozen: FrozenFactors = {}
    part: str | None = None
    needs_base: str | None = None
    translated: bool = False
    alpha: float | None = None


def open_adapter(
    path: Any, names: Names | None = None, *, alpha: float | None = None
) -> OpenedAdapter:
    """Opens an adapter of any supported format, without its base.

    The format is recognized by the file's content. Every number is read and checked.

    Args:
        path: a file or a folder.
        names: the PyTorch name of each parameter, by path, as in `load_peft`. By default each
            module is one parameter, whose path follows Flax's convention: `layers/0/q_proj/kernel`.
        alpha: the adapter's alpha, for formats that do not store it: tunix and torchtune.

    Returns:
        The `OpenedAdapter`: its format, its settings, and its adapters by path.

    Raises:
        AdapterNotFoundError: if there is no adapter at the path.
        AdapterFileError: if it is damaged, or its format is not known.
        UnsupportedAdapterError: if its kind of adapter is not supported.

    Example:
        >>> import jax.numpy as jnp, pathlib, tempfile
        >>> from lorax_io import open_adapter, save_adapter
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> save_adapter(file, {"bias": jnp.ones(3)})
        >>> adapter = open_adapter(file)
        >>> adapter.format, adapter.rows["bias"].tolist()
        ('native', [1.0, 1.0, 1.0])
    """
    return fit(Path(path), None if names is None else as_torch_names(names), None, alpha=alpha)


def is_translated(modules: Iterable[str], names: Iterable[str]) -> bool:
    """Whether the modules are in Flux's own names and the base in those of diffusers."""
    return flux.is_of_diffusers(names) and flux.is_original(modules)


def in_diffusers(adapter: OpenedAdapter) -> OpenedAdapter:
    """Opens the adapter's file again, with Flux's modules in the names of diffusers."""
    return fit(adapter.path, None, None, translate=True)


def fit(
    path: Path,
    names: TorchNames | None,
    base: Mapping[str, Any] | None,
    *,
    translate: bool = False,
    alpha: float | None = None,
) -> OpenedAdapter:
    """Opens an adapter and fits it to a base, or to the shapes that its factors imply.

    Args:
        path: as in `open_adapter`.
        names: as in `open_adapter`.
        base: the base's parameters or their shapes, by path; None to infer shapes from the factors.
        translate: whether to convert Flux's own names to those of diffusers.
        alpha: as in `open_adapter`.
    """
    with about(path), content_of(path, alpha) as content:
        row = _format_of(content)
        source = row.read(content)
        metadata = dict(content.file.metadata)
        if isinstance(source, Rows):
            return OpenedAdapter(row.name, path, source.rows, {}, metadata, frozen=source.frozen)
        format = row.name
        if translate:
            format, source = "diffusers", flux.in_diffusers(source)
        names = own_names(source) if names is None else names
        alone = base is None
        if base is None:
            base = own_shapes(source, names)
            names = {p: names[p] for p in base}
        needs_base = source.tuner.needs_base(source.config) if alone else None
        rows, frozen, _, _ = restore(source, base, names, alone=alone)
        frozen = (
            {} if needs_base else {path: factors for path, factors in frozen.items() if factors}
        )
        of_file = (format, path, rows, names, metadata, source.config)
        return OpenedAdapter(*of_file, frozen, source.part, needs_base, translate, alpha)


def load_any(
    path: Any,
    params: Any,
    names: Names | None = None,
    *,
    alpha: float | None = None,
    sharding: Any = None,
    progress: bool = True,
) -> Pair:
    """Reads an adapter of any supported format as the pair `(frozen, tunable)` for `lora(model)`.

    Args:
        path: a file or a folder.
        params: the base's parameters, as arrays or `jax.ShapeDtypeStruct`.
        names: the PyTorch name of each parameter that the adapter may adapt, by its path. Native
            files and checkpoints of tunix contain paths and need no names.
        alpha: as in `open_adapter`.
        sharding: where to put the arrays, as in `load_peft`.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The `lorax.Pair`.

    Raises:
        AdapterError: as `load_peft` and `open_adapter` do.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, load_any, save_kohya
        >>> params, names = {"to_q": jnp.ones((5, 3))}, {"to_q": Linear("mid_block.attn.to_q")}
        >>> frozen, tunable = lorax.init_lora(params, {"to_q": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "style.safetensors")
        >>> save_kohya(file, tunable, names)
        >>> load_any(file, params, names).tunable["to_q"].rank
        2
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        for door in (bars(progress), all_read(params, sharding), about(path)):
            stack.enter_context(door)
        content = stack.enter_context(content_of(path, alpha))
        row = _format_of(content)
        if row is FORMATS["native"]:
            return native.load_pair(path, params, sharding=sharding)
        source = row.read(content)
        assert isinstance(source, Source)
        torch_names = names_on(source, params) if names is None else as_torch_names(names)
        if is_translated(flux.modules_of(source), (x.module for x in torch_names.values())):
            source = flux.in_diffusers(source)
        elif row is FORMATS["kohya"]:
            torch_names = kohya.with_flat_names(torch_names, source.tensors)
        return restore(source, params, torch_names, sharding).pair()


def _format_of(content: Content) -> Format:
    for row in FORMATS.values():
        if row.recognizes(content):
            _check_alpha(content.alpha, row)
            return row
    first = next(iter(content.file.entries), None)
    tensor = "and has no tensors" if first is None else f"with tensors such as `{first}`"
    kind = _KINDS[type(content.file)]
    raise AdapterFileError(
        f"is {kind} {tensor}, in no known format: "
        f"{', '.join(row.description for row in FORMATS.values())}."
    )


_KINDS = {
    TensorFile: "a safetensors file",
    Hdf5File: "an HDF5 file",
    OrbaxTree: "a checkpoint of Orbax",
}


def _check_alpha(alpha: float | None, row: Format) -> None:
    if alpha is None:
        return
    if not row.takes_alpha:
        raise AdapterMismatchError(f"got alpha={alpha}, but {row.description} stores its own.")
    if not is_number(alpha):
        raise AdapterMismatchError(f"got alpha={alpha!r}, which is not a finite number.")


@contextlib.contextmanager
def content_of(path: Path, alpha: float | None) -> Generator[Content]:
    """Opens the file at a path, or the adapter's file in a folder, with its config."""
    if is_orbax(path):
        with open_orbax(tree_of(path, tunix.TREE), tunix.is_factor) as file:
            yield Content(file, alpha=alpha)
        return
    if is_hdf5(path):
        with open_hdf5(path) as file:
            yield Content(file, alpha=alpha)
        return
    file_path = _weights_in(path) if path.is_dir() else regular_file(path)
    folder = file_path.parent
    with TensorFile(file_path) as file:
        named = file_path.name in (*FORMATS["peft"].files, *FORMATS["mlx"].files)
        has_config = named and (folder / CONFIG_NAME).exists()
        yield Content(file, folder if has_config else None, alpha)


def _weights_in(folder: Path) -> Path:
    """The file with the adapter's tensors in a folder."""
    known = (name for row in FORMATS.values() for name in row.files)
    if found := [name for name in known if (folder / name).exists()]:
        if len(found) > 1:
            warn(f"has `{found[0]}`, which is read, and `{found[1]}`; give the file's path for it.")
        return file_in(folder, found[0])
    others = {file.name for file in folder.iterdir()}
    if "pytorch_adapter.bin" in others:
        raise AdapterFileError(
            "is a folder of AdapterHub's `adapters`, with a pickle, which is never read. Save the "
            "adapter in PEFT's form."
        )
    if pickles := sorted(name for name in others if name.endswith((".bin", ".pt", ".pth"))):
        raise AdapterFileError(
            f"its weights are a pickle, `{pickles[0]}`, which may run code and is never read. If "
            "you trust them, load them with PEFT, and save them again."
        )
    if "config.json" in others:
        raise AdapterFileError("is a folder of a model, not of an adapter.")
    tensors = sorted(name for name in others if name.endswith(".safetensors"))
    if len(tensors) == 1:
        return file_in(folder, tensors[0])
    names = [name for row in FORMATS.values() for name in row.files]
    contents = (
        f"several files of tensors, {', '.join(tensors[:3])}; give one" if tensors else "none"
    )
    raise AdapterNotFoundError(
        f"should have one of {', '.join(f'`{name}`' for name in names)}, and has {contents}."
    )
