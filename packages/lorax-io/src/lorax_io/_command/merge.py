"""`lorax merge`."""

import argparse
from pathlib import Path

from .._bases.checkpoint import open_checkpoint
from .._bases.decoding import with_decoded
from .._bases.fit import Fitted, fit_adapter
from .._bases.merge_files import merge_files
from .._errors import AdapterError
from .options import ADAPTER, SAME, add_naming, opened, renaming
from .verify import BASE, add_missing

HELP = "a base with adapters merged into it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", nargs="+", help=f"one or several: {ADAPTER}")
    parser.add_argument("--base", type=Path, required=True, help=BASE)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="multiply the change that an adapter makes: one for all, or one for each",
    )
    parser.add_argument(
        "--sum",
        action="store_true",
        help="merge each adapter into the base, and sum the changes; by default each is merged "
        "into what the last has left, which is the same for LoRA",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="write quantized weights that are adapted in the same codes again, and leave others "
        "as they are; by default all of them become floats",
    )
    add_naming(parser)
    add_missing(parser)


def run(args: argparse.Namespace) -> int:
    """Writes a base's files with adapters merged into them, and config and tokenizer beside."""
    checkpoint, rename = with_decoded(open_checkpoint(args.base)), renaming(args.rename)
    scales = args.scale * len(args.adapter) if len(args.scale) == 1 else args.scale
    if len(scales) != len(args.adapter):
        raise AdapterError(
            f"is merged from {len(args.adapter)} adapters, and there are {len(scales)} scales.",
            args.out,
        )
    fitted: list[Fitted] = []
    for path in args.adapter:
        adapter = opened(path, args)
        missing = args.allow_missing
        fitted.append(fit_adapter(adapter, checkpoint, rename, allow_missing=missing))
        checkpoint = fitted[-1].checkpoint
    merge_files(fitted, args.out, scales=scales, summed=args.sum, requantize=args.requantize)
    adapted = {name for each in fitted for name in each.rows}
    print(f"{args.out}: {len(checkpoint.shapes)} tensors, {len(adapted)} of them adapted")
    return SAME
