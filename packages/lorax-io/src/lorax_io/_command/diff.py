"""`lorax diff`."""

import argparse
import json

from rich.table import Column, Table

from .._summary import compare
from .options import (
    ADAPTER,
    DIFFERENT,
    SAME,
    add_naming,
    console,
    opened,
    printable,
    renamed,
    renaming,
)

HELP = "show where two adapters differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("first", help=ADAPTER)
    parser.add_argument("second", help=ADAPTER)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_naming(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the parameters in which two adapters differ. The exit code is 1 if there are any."""
    rename = renaming(args)
    first, second = (renamed(opened(path, args), rename) for path in (args.first, args.second))
    differences = compare(first.rows, second.rows, first.frozen, second.frozen)
    if args.json:
        print(json.dumps([difference._asdict() for difference in differences], indent=1))
    elif differences:
        right = Column("delta, relative", justify="right")
        table = Table(Column("path", overflow="fold"), "what differs", right)
        for path, description, relative in differences:
            table.add_row(
                printable(path), description, "–" if relative is None else f"{relative:.2g}"
            )
        console().print(table)
    else:
        print(f"the same {len(first.rows)} parameters, bit for bit")
    return DIFFERENT if differences else SAME
