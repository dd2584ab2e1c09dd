"""Options that several subcommands share: opening adapters, and naming their modules."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .._errors import AdapterError, warn
from .._formats.opening import OpenedAdapter, open_adapter
from .._formats.table import FORMATS
from .._hub import pull_from_hub
from .._names import read_names

SAME, DIFFERENT, FAILED = 0, 1, 2
ADAPTER = f"{', '.join(row.description for row in FORMATS.values())}; or hf://user/name[@revision][/subfolder]"
Rename = Callable[[str], str]

_HUB = re.compile(r"hf:/+(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<subfolder>.+))?")


def console(**options: Any) -> Console:
    """A console without markup, as wide as the terminal, or without a limit if there is none."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False, **options)


def printable(text: str) -> str:
    """Text from an untrusted file, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_errors(rows: Mapping[str, Any], errors: Mapping[str, float], label: str) -> None:
    """Prints the rank of each adapter and the relative error of its delta."""
    right = [Column(title, justify="right") for title in ("rank", f"error, {label}")]
    table = Table(Column("path", overflow="fold"), *right)
    for path, error in errors.items():
        table.add_row(printable(path), str(rows[path].rank), f"{error:.2g}")
    console().print(table)


def add_naming(parser: argparse.ArgumentParser) -> None:
    """Adds the options `--names`, `--rename` and `--alpha`."""
    parser.add_argument(
        "--names",
        type=Path,
        help="a JSON file of PyTorch names by path, written by lorax_io.write_names",
    )
    parser.add_argument(
        "--rename",
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "REPLACEMENT"),
        help="rename the modules that match a regular expression; may be repeated",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="the adapter's alpha, for formats that do not store it, such as tunix",
    )


def check_unused(args: argparse.Namespace, options: Iterable[str], when: str) -> None:
    """Rejects options that would have no effect, instead of ignoring them.

    Raises:
        AdapterError: if one of them was given.
    """
    for option in options:
        value = getattr(args, option, None)
        if value is not None and value is not False and value != []:
            raise AdapterError(f"has no effect {when}.", f"--{option.replace('_', '-')}")


@dataclasses.dataclass
class Renaming:
    """The function on module names that `--rename` describes, and the patterns that it used."""

    pairs: Sequence[tuple[re.Pattern[str], str]]
    used: set[re.Pattern[str]] = dataclasses.field(default_factory=set)

    def __call__(self, module: str) -> str:
        for pattern, replacement in self.pairs:
            module, count = pattern.subn(replacement, module)
            if count:
                self.used.add(pattern)
        return module

    def warn_unused(self) -> None:
        """Warns of patterns that no module had."""
        for pattern, _ in self.pairs:
            if pattern not in self.used:
                warn(
                    f"--rename: no module matches {pattern.pattern!r}, so nothing was renamed. "
                    "`lorax inspect` shows the names of an adapter."
                )


def renaming(args: argparse.Namespace) -> Renaming:
    """The function that the values of `--rename` describe, one for each run of the command.

    Raises:
        AdapterError: if a pattern or its replacement is invalid.
    """
    if "renaming" in args:
        return args.renaming
    compiled: list[tuple[re.Pattern[str], str]] = []
    for pattern, replacement in args.rename:
        try:
            compiled.append((re.compile(pattern), replacement))
            compiled[-1][0].sub(replacement, "")
        except re.error as error:
            raise AdapterError(f"is not a pattern and a replacement ({error}).", pattern) from error
    args.renaming = Renaming(compiled)
    return args.renaming


def opened(path: str, args: argparse.Namespace) -> OpenedAdapter:
    """Opens the adapter of an argument, a path or `hf://…`, with `--names` and `--alpha`."""
    names = None if args.names is None else read_names(args.names)
    return open_adapter(local(path), names, alpha=args.alpha)


def local(path: str) -> Path:
    """The local path of an adapter, which is downloaded if it is on the Hub (`hf://…`)."""
    match = _HUB.fullmatch(path)
    if match is None:
        return Path(path)
    return pull_from_hub(match["repo"], revision=match["revision"], subfolder=match["subfolder"])


def renamed(adapter: OpenedAdapter, rename: Rename) -> OpenedAdapter:
    """The adapter with renamed modules; a path that follows its module's name is renamed too."""
    names, rows, frozen = dict(adapter.names), dict(adapter.rows), dict(adapter.frozen)
    for path, torch_name in adapter.names.items():
        module = rename(torch_name.module)
        if module == torch_name.module:
            continue
        begin, end = torch_name.module.replace(".", "/"), path.rpartition("/")[2]
        follows = path == f"{begin}/{end}"
        other = f"{module.replace('.', '/')}/{end}" if follows else path
        if other != path and other in adapter.rows:
            raise AdapterError(
                f"`{torch_name.module}` would be renamed to `{module}`, which the adapter already "
                "has.",
                adapter.path,
            )
        del names[path]
        names[other] = dataclasses.replace(torch_name, module=module)
        for table in (rows, frozen):
            if path in table:
                table[other] = table.pop(path)
    if not adapter.names:
        rows = {rename(path): row for path, row in adapter.rows.items()}
        frozen = {rename(path): factors for path, factors in adapter.frozen.items()}
    if len(rows) < len(adapter.rows):
        raise AdapterError("two of its modules would be renamed to one.", adapter.path)
    return adapter._replace(names=names, rows=rows, frozen=frozen)
