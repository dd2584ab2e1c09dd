"""The command `lorax`: look at adapters, compare them, and carry them from form to form."""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from lorax import Adapter, LoraxError

from .._bases.checkpoint import open_checkpoint
from .._bases.fit import fit_adapter
from .._bases.merge_files import merge_files
from .._formats.diffusers import save_diffusers
from .._formats.native import user_metadata, write
from .._formats.opening import OpenedAdapter, open_adapter
from .._formats.peft.config import TASK_TYPES, PeftConfig
from .._formats.peft.folder import save_peft
from .._names import flax_names, read_names
from .._shapes import base_shape
from .._summary import Line, compare, summarize
from .._tree import Row

_SAME, _DIFFERENT, _FAILED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, 1 where a comparison fails, 2 for an error."""
    args = _parser().parse_args(arguments)
    # Numbers are looked at, not trained: no accelerator is taken, and no type is shortened.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    errors = _console(stderr=True, soft_wrap=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            code = args.run(args)
        except (LoraxError, OSError) as error:
            errors.print(f"lorax: {error}")
            code = _FAILED
    # An adapter may be opened twice.
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        errors.print(f"lorax: warning: {message}")
    return code


def _console(**options: Any) -> Console:
    """A console that prints text as it is, and tables in full where no terminal bounds them."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.strip("_"), help=help, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    adapter = "a native file, a folder of PEFT, or a file for diffusers"

    inspect = command(_inspect, "what is in an adapter")
    inspect.add_argument("adapter", type=Path, help=adapter)
    inspect.add_argument("--json", action="store_true", help="for programs")

    verify = command(_verify, "whether an adapter is whole, and fits a base")
    verify.add_argument("adapter", type=Path, help=adapter)
    verify.add_argument("--base", type=Path, help="safetensors file, or folder of transformers")

    diff = command(_diff, "how two adapters differ")
    diff.add_argument("first", type=Path, help=adapter)
    diff.add_argument("second", type=Path, help=adapter)
    diff.add_argument("--json", action="store_true", help="for programs")

    convert = command(_convert, "an adapter in another form")
    convert.add_argument("adapter", type=Path, help=adapter)
    convert.add_argument("out", type=Path, help="file, or folder for PEFT and diffusers")
    convert.add_argument("--to", choices=("native", "peft", "diffusers"), required=True)
    convert.add_argument("--names", type=Path, help="layouts by path, of lorax_io.write_names")
    convert.add_argument(
        "--fold-scale", action="store_true", help="multiply b by the scale: PEFT, diffusers"
    )
    convert.add_argument("--base-model", metavar="NAME", help="for PEFT: the base's name")
    convert.add_argument("--task-type", choices=TASK_TYPES, help="for PEFT")
    convert.add_argument(
        "--prefix", help="for diffusers: the part of a pipeline; by default the adapter's"
    )

    merge = command(_merge, "a base with an adapter merged into it")
    merge.add_argument("adapter", type=Path, help=adapter)
    merge.add_argument("--base", type=Path, required=True, help="as for verify")
    merge.add_argument("--out", type=Path, required=True, help="a new folder")
    for subcommand in (verify, merge):
        subcommand.add_argument(
            "--allow-missing",
            action="store_true",
            help="leave targets of the adapter that it has no tensors for as they are",
        )
    return parser


def _inspect(args: argparse.Namespace) -> int:
    """Prints a line for each parameter of an adapter: rank, alpha, shapes, and norms."""
    adapter = open_adapter(args.adapter)
    lines = summarize(adapter.rows)
    about = _about(adapter, lines)
    if args.json:
        print(json.dumps({**about, "parameters": [line._asdict() for line in lines]}, indent=1))
        return _SAME
    console = _console()
    for key, value in about.items():
        console.print(_printable(f"{key}: {value}"), soft_wrap=True)
    table = Table(
        Column("path", overflow="fold"),
        "kind",
        *_right("rank", "alpha", "scale"),
        "shapes",
        "dtype",
        *_right("norm"),
    )
    for line in lines:
        table.add_row(
            _printable(line.path),
            line.kind,
            *(_text(value) for value in (line.rank, line.alpha, line.scale)),
            " · ".join("×".join(map(str, shape)) or "()" for shape in line.shapes),
            line.dtype,
            f"{line.norm:.4g}",
        )
    console.print(table)
    return _SAME


def _printable(text: str) -> str:
    """The text of a stranger's file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _right(*names: str) -> list[Any]:
    return [Column(name, justify="right") for name in names]


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}"


def _about(adapter: OpenedAdapter, lines: list[Line]) -> dict[str, Any]:
    count = sum(math.prod(shape) for line in lines for shape in line.shapes)
    about: dict[str, Any] = {"form": adapter.format, "parameters trained": count}
    if adapter.config is not None:
        about |= {
            "base": adapter.config.base_model_name_or_path,
            "task": adapter.config.task_type,
        }
    if adapter.format == "native":
        about |= user_metadata(adapter.metadata)
    return {key: value for key, value in about.items() if value is not None}


def _verify(args: argparse.Namespace) -> int:
    """Checks an adapter as loading it does: its file, its config, every number; and the base."""
    adapter = open_adapter(args.adapter)
    fits = ""
    if args.base is not None:
        checkpoint = open_checkpoint(args.base)
        fit_adapter(adapter, checkpoint, allow_missing=args.allow_missing)
        fits = f", and fits {args.base}"
    print(f"{args.adapter}: {len(adapter.rows)} parameters, all as they should be{fits}")
    return _SAME


def _diff(args: argparse.Namespace) -> int:
    """Prints the parameters in which two adapters differ; exits with 1 where there are any."""
    first, second = (open_adapter(path) for path in (args.first, args.second))
    found = compare(first.rows, second.rows, first.held, second.held)
    if args.json:
        print(json.dumps([difference._asdict() for difference in found], indent=1))
    elif found:
        table = Table(Column("path", overflow="fold"), "what differs", *_right("delta, relative"))
        for path, what, relative in found:
            table.add_row(_printable(path), what, "–" if relative is None else f"{relative:.2g}")
        _console().print(table)
    else:
        print(f"the same {len(first.rows)} parameters, to the bit")
    return _DIFFERENT if found else _SAME


def _convert(args: argparse.Namespace) -> int:
    """Writes an adapter in another form."""
    names = None if args.names is None else read_names(args.names)
    adapter = open_adapter(args.adapter, names)
    if args.to == "native":
        metadata = user_metadata(adapter.metadata) if adapter.format == "native" else None
        rows = [Row(path, row) for path, row in sorted(adapter.rows.items())]
        write(args.out, rows, adapter.held, metadata=metadata)
    else:
        layouts = names or adapter.names or flax_names(_shapes(adapter.rows))
        if args.to == "peft":
            config = adapter.config or PeftConfig()
            save_peft(
                args.out,
                adapter.rows,
                layouts,
                base_model=args.base_model or config.base_model_name_or_path,
                revision=None if args.base_model else config.revision,
                task_type=args.task_type or config.task_type,
                fold_scale=args.fold_scale,
            )
        else:
            kept = "transformer" if adapter.part is None else adapter.part
            prefix = kept if args.prefix is None else args.prefix
            save_diffusers(
                args.out, adapter.rows, layouts, prefix=prefix, fold_scale=args.fold_scale
            )
    print(f"{args.out}: {len(adapter.rows)} parameters")
    return _SAME


def _shapes(rows: dict[str, Any]) -> dict[str, Any]:
    """The bases that the rows fit, where the rows say so."""
    shapes = {
        path: base_shape(row) if isinstance(row, Adapter) else row.shape
        for path, row in rows.items()
    }
    return {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, shape in shapes.items()
        if shape is not None
    }


def _merge(args: argparse.Namespace) -> int:
    """Writes a base's files with an adapter merged into them, and config and tokenizer beside."""
    checkpoint = open_checkpoint(args.base)
    adapter = open_adapter(args.adapter)
    fitted = fit_adapter(adapter, checkpoint, allow_missing=args.allow_missing)
    merge_files([fitted], args.out)
    count = len(fitted.checkpoint.shapes)
    print(f"{args.out}: {count} tensors, {len(fitted.rows)} of them adapted")
    return _SAME
