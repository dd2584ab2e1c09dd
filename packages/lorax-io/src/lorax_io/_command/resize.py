"""`lorax resize`."""

import argparse
from pathlib import Path

from lorax import resize_adapter

from .._errors import AdapterError, about
from .convert import OUT, add_writing, write_as
from .options import ADAPTER, SAME, add_naming, opened, print_errors, renamed, renaming

HELP = "lower the rank of an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("out", type=Path, help=OUT)
    add_ranks(parser)
    add_naming(parser)
    add_writing(parser, required=False)


def add_ranks(parser: argparse.ArgumentParser, **of_rank: object) -> None:
    """Adds the options that limit the rank: `--rank`, `--energy` and `--tolerance`."""
    parser.add_argument("--rank", type=int, help="the highest rank of the result", **of_rank)  # pyright: ignore
    parser.add_argument(
        "--energy", type=float, help="the fraction of ‖delta‖² to keep, from 0 to 1"
    )
    parser.add_argument("--tolerance", type=float, help="the relative error to allow, from 0 to 1")


def run(args: argparse.Namespace) -> int:
    """Writes the best approximation of a lower rank, and prints its error for each weight."""
    adapter = renamed(opened(args.adapter, args), renaming(args))
    with about(adapter.path):
        try:
            resized, errors = resize_adapter(
                adapter.rows, args.rank, energy=args.energy, tolerance=args.tolerance
            )
        except ValueError as error:
            raise AdapterError(f"cannot be resized: {error}") from error
    write_as(adapter._replace(rows=resized), args)
    print_errors(resized, errors, "from the original")
    return SAME
