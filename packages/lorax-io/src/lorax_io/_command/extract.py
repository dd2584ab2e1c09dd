"""`lorax extract`."""

import argparse
import re
from pathlib import Path

from .._bases.checkpoint import open_checkpoint
from .._bases.extract import extract
from .._errors import AdapterError, about
from .._formats.opening import OpenedAdapter
from .convert import OUT, add_writing, write_as
from .options import SAME, print_errors
from .resize import add_ranks
from .verify import BASE

HELP = "extract the adapter that is closest to a full fine-tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--base", type=Path, required=True, help=BASE)
    parser.add_argument("--tuned", type=Path, required=True, help="the same model, fine-tuned")
    parser.add_argument("--out", type=Path, required=True, help=OUT)
    add_ranks(parser, required=True)
    parser.add_argument(
        "--targets",
        help="a regular expression for modules; by default all linear layers and convolutions, "
        "without embeddings and heads",
    )
    parser.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        help="matrices are stored as (in, out), like transformers' Conv1D in GPT-2",
    )
    add_writing(parser, required=True)
    parser.set_defaults(names=None, rename=[], alpha=None)


def run(args: argparse.Namespace) -> int:
    """Writes the difference of two checkpoints as an adapter, and prints each weight's error."""
    try:
        targets = None if args.targets is None else re.compile(args.targets)
    except re.error as error:
        raise AdapterError(f"is not a regular expression ({error}).", args.targets) from error
    base, tuned = open_checkpoint(args.base), open_checkpoint(args.tuned)
    with about(args.tuned):
        try:
            rows, names, errors = extract(
                base,
                tuned,
                args.rank,
                energy=args.energy,
                tolerance=args.tolerance,
                targets=targets,
                fan_in_fan_out=args.fan_in_fan_out,
            )
        except AdapterError:
            raise
        except ValueError as error:
            raise AdapterError(f"cannot be extracted: {error}") from error
    write_as(OpenedAdapter("peft", args.tuned, rows, names, {}), args)
    print_errors(rows, errors, "from the difference")
    return SAME
