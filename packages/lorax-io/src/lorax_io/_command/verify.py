"""`lorax verify`."""

import argparse
from pathlib import Path

from .._bases.checkpoint import open_checkpoint
from .._bases.decoding import with_decoded
from .._bases.fit import fit_adapter
from .options import ADAPTER, SAME, add_naming, opened, renaming

HELP = "whether an adapter is whole, and fits a base"
BASE = "safetensors file, folder of transformers, or pipeline of diffusers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("--base", type=Path, help=BASE)
    add_naming(parser)
    add_missing(parser)


def add_missing(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--allow-missing`."""
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave targets of the adapter that it has no tensors for as they are",
    )


def run(args: argparse.Namespace) -> int:
    """Checks an adapter as loading it does: its file, its config, every number; and the base."""
    adapter = opened(args.adapter, args)
    fits = ""
    if args.base is not None:
        checkpoint, rename = with_decoded(open_checkpoint(args.base)), renaming(args.rename)
        fit_adapter(adapter, checkpoint, rename, allow_missing=args.allow_missing)
        fits = f", fits {args.base}"
    print(f"{args.adapter}: {len(adapter.rows)} parameters, OK{fits}")
    return SAME
