"""`lorax convert`."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import Adapter, Pair

from .._bases.checkpoint import open_checkpoint
from .._errors import AdapterError
from .._formats import flux
from .._formats.diffusers import save_diffusers
from .._formats.export import export
from .._formats.keras import save_keras
from .._formats.kohya import resolve, save_kohya
from .._formats.llama_cpp import save_gguf
from .._formats.mlx import save_mlx
from .._formats.native import user_metadata, write
from .._formats.opening import OpenedAdapter
from .._formats.original import save_original
from .._formats.own_names import own_names, own_shapes
from .._formats.peft.config import TASK_TYPES, PeftConfig
from .._formats.peft.folder import save_peft
from .._formats.restore import restore
from .._formats.source import Source, Stored
from .._formats.tunix import save_tunix
from .._names import flax_names, read_names
from .._shapes import base_shape, padded_shape
from .._torch_names import TorchNames
from .._tree import Row, frozen_leaf
from .options import ADAPTER, SAME, add_naming, check_unused, opened, renamed, renaming
from .verify import BASE

HELP = "write an adapter in another format"
OUT = "a file, or a folder (PEFT, diffusers, mlx-lm and tunix)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("out", type=Path, help=OUT)
    add_naming(parser)
    parser.add_argument("--base", type=Path, help=f"resolves the names in kohya files: {BASE}")
    parser.add_argument(
        "--part", help="the part to convert, if the adapter is for several parts of a pipeline"
    )
    add_writing(parser, required=True)


def add_writing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the options for writing an adapter, which `write_as` reads."""
    parser.add_argument(
        "--to",
        choices=tuple(WRITERS),
        required=required,
        help="the format to write"
        + ("" if required else "; by default that of the (first) adapter"),
    )
    parser.add_argument(
        "--fold-scale", action="store_true", help="multiply b by the scale (PEFT and diffusers)"
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="the name of the base model to record (PEFT and mlx-lm)",
    )
    parser.add_argument("--task-type", choices=TASK_TYPES, help="the task type to record (PEFT)")
    parser.add_argument("--model-config", type=Path, help="the base model's config.json (GGUF)")
    parser.add_argument(
        "--prefix",
        help="the part of a pipeline (diffusers), or the prefix of all names (kohya)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes an adapter in another format."""
    adapter = opened(args.adapter, args)
    if adapter.format != "kohya":
        check_unused(args, ("base",), f"on an adapter of the format {adapter.format}")
    if args.base is not None:
        adapter = _with_dots(adapter, open_checkpoint(args.base))
    adapter = renamed(adapter, renaming(args))
    if args.part is not None:
        adapter = _one_part(adapter, args.part)
    write_as(adapter, args)
    return SAME


def write_as(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    """Writes an adapter to `args.out`, and prints the number of its parameters."""
    format = args.to or adapter.format
    if adapter.needs_base is not None:
        raise AdapterError(
            f"cannot be converted without its base: {adapter.needs_base}. Load it in Python "
            "(`lorax_io.load_peft`, with the parameters) and save it, or merge it.",
            adapter.path,
        )
    if format not in WRITERS:
        raise AdapterError(
            f"is of the format {format}, which is not written. Choose another with --to: "
            f"{', '.join(WRITERS)}.",
            adapter.path,
        )
    writer = WRITERS[format]
    check_unused(args, OPTIONS - writer.options, f"in the format {format}")
    writer.write(adapter, args)
    print(f"{args.out}: {len(adapter.rows)} parameters")


def _with_dots(adapter: OpenedAdapter, base: Any) -> OpenedAdapter:
    """A kohya adapter with its modules named as in the base, with dots."""
    base_names = {
        torch_name.module: resolve(f"{torch_name.module}.weight", base.shapes, base.parts)
        for torch_name in adapter.names.values()
    }
    return renamed(adapter, lambda module: base_names[module].removesuffix(".weight"))


def _one_part(adapter: OpenedAdapter, part: str) -> OpenedAdapter:
    begin = f"{part}."
    paths = [path for path, x in adapter.names.items() if x.module.startswith(begin)]
    if not paths and adapter.part != part:
        raise AdapterError(f"has nothing for the part {part!r}.", adapter.path)
    if not paths:
        return adapter
    names = {path: adapter.names[path] for path in paths}
    rows = {path: adapter.rows[path] for path in paths}
    of_part = adapter._replace(names=names, rows=rows, part=part)
    return renamed(of_part, lambda module: module.removeprefix(begin))


def _torch_names(adapter: OpenedAdapter, args: argparse.Namespace) -> TorchNames:
    if adapter.names:
        return adapter.names
    torch_names = (
        flax_names(_shapes(adapter.rows)) if args.names is None else read_names(args.names)
    )
    rename = renaming(args)
    return {p: dataclasses.replace(x, module=rename(x.module)) for p, x in torch_names.items()}


def _shapes(rows: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the bases, for the rows whose factors determine them."""
    shapes = {
        path: base_shape(row) if isinstance(row, Adapter) else row.shape
        for path, row in rows.items()
    }
    return {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, shape in shapes.items()
        if shape is not None
    }


def _pair(adapter: OpenedAdapter) -> Pair:
    """The adapter as a `Pair`, with shapes for bases and the frozen factors of its file."""
    shapes = {
        path: jax.ShapeDtypeStruct(
            padded_shape(row) if isinstance(row, Adapter) else row.shape, np.float32
        )
        for path, row in adapter.rows.items()
    }
    rows, frozen = adapter.rows, adapter.frozen
    leaves = {path: frozen_leaf(shapes[path], frozen.get(path), row) for path, row in rows.items()}
    return Pair(leaves, adapter.rows)


def _to_native(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    metadata = user_metadata(adapter.metadata) if adapter.format == "native" else None
    rows = [Row(path, row) for path, row in sorted(adapter.rows.items())]
    write(args.out, rows, adapter.frozen, metadata=metadata)


def _to_peft(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    config = adapter.config or PeftConfig()
    save_peft(
        args.out,
        _pair(adapter),
        _torch_names(adapter, args),
        base_model=args.base_model or config.base_model_name_or_path,
        revision=None if args.base_model else config.revision,
        task_type=args.task_type or config.task_type,
        fold_scale=args.fold_scale,
    )


def _in_diffusers(adapter: OpenedAdapter) -> OpenedAdapter:
    """An adapter of Flux's own modules in the names of diffusers.

    It is converted as it is in memory: it may have been renamed, resized or combined since its file
    was opened.
    """
    exported = export(_pair(adapter), adapter.names, lycoris=True)
    tensors = {key: Stored.of(key, tensor) for key, tensor in exported.tensors.items()}
    source = flux.in_diffusers(Source(tensors, exported.config))
    names = own_names(source)
    rows = restore(source, own_shapes(source, names), names, alone=True).rows
    return adapter._replace(
        format="diffusers",
        rows=rows,
        names=names,
        config=source.config,
        frozen={},
        part=source.part,
    )


def _to_diffusers(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    if flux.is_original(torch_name.module for torch_name in adapter.names.values()):
        adapter = _in_diffusers(adapter)
    kept = "transformer" if adapter.part is None else adapter.part
    if adapter.part is None and adapter.format == "diffusers":
        kept = None  # the adapter has several parts, and its names begin with them
    prefix = kept if args.prefix is None else args.prefix
    save_diffusers(
        args.out,
        _pair(adapter),
        _torch_names(adapter, args),
        prefix=prefix,
        fold_scale=args.fold_scale,
    )


def _to_kohya(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    prefix = "lora_unet" if args.prefix is None else args.prefix
    save_kohya(args.out, _pair(adapter), _torch_names(adapter, args), prefix=prefix)


def _to_original(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    save_original(args.out, _pair(adapter), _torch_names(adapter, args))


def _to_keras(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    save_keras(args.out, _pair(adapter), _torch_names(adapter, args))


def _to_tunix(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    save_tunix(args.out, _pair(adapter))


def _to_mlx(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    base = adapter.config.base_model_name_or_path if adapter.config else None
    model = args.base_model or base
    save_mlx(args.out, _pair(adapter), _torch_names(adapter, args), model=model)


def _to_gguf(adapter: OpenedAdapter, args: argparse.Namespace) -> None:
    if args.model_config is None:
        raise AdapterError("needs --model-config, the base's config.json.", args.out)
    save_gguf(args.out, _pair(adapter), _torch_names(adapter, args), config=args.model_config)


class Writer(NamedTuple):
    """How the command writes a format, and the options of `add_writing` that it uses."""

    write: Callable[[OpenedAdapter, argparse.Namespace], None]
    options: frozenset[str] = frozenset()


WRITERS: dict[str, Writer] = {
    "native": Writer(_to_native),
    "peft": Writer(_to_peft, frozenset(("fold_scale", "base_model", "task_type"))),
    "diffusers": Writer(_to_diffusers, frozenset(("fold_scale", "prefix"))),
    "kohya": Writer(_to_kohya, frozenset(("prefix",))),
    "original": Writer(_to_original),
    "keras": Writer(_to_keras),
    "tunix": Writer(_to_tunix),
    "mlx": Writer(_to_mlx, frozenset(("base_model",))),
    "gguf": Writer(_to_gguf, frozenset(("model_config",))),
}
OPTIONS = frozenset(("fold_scale", "base_model", "task_type", "model_config", "prefix"))
