"""`lorax verify`."""

import argparse
from pathlib import Path

from .._bases.fit import fit_adapter
from .._bases.gguf_checkpoint import ARCHITECTURES
from .._bases.opening import open_base
from .options import ADAPTER, SAME, add_naming, check_unused, opened, renaming

HELP = "check that an adapter is complete and fits a base model"
BASE = "a safetensors file, a transformers folder, or a diffusers pipeline"
MERGED_BASE = f"{BASE}; or a GGUF file of {', '.join(ARCHITECTURES)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("--base", type=Path, help=MERGED_BASE)
    add_naming(parser)
    add_missing(parser)


def add_missing(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--allow-missing`."""
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="warn, instead of failing, if the adapter lacks tensors for some of its targets",
    )


def run(args: argparse.Namespace) -> int:
    """Runs every check of loading: the file, the config, all numbers and, with --base, the base."""
    if args.base is None:
        check_unused(args, ("rename", "allow_missing"), "without --base")
    adapter = opened(args.adapter, args)
    fits = ""
    if args.base is not None:
        checkpoint, rename = open_base(args.base), renaming(args)
        fit_adapter(adapter, checkpoint, rename, allow_missing=args.allow_missing)
        fits = f", fits {args.base}"
    print(f"{args.adapter}: {len(adapter.rows)} parameters, OK{fits}")
    return SAME
