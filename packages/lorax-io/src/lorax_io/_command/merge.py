"""`lorax merge`."""

import argparse
import math
from pathlib import Path

from .._bases.fit import Fitted, fit_adapter
from .._bases.merge_files import merge_files
from .._bases.opening import open_base
from .._errors import AdapterError
from .options import ADAPTER, SAME, add_naming, check_unused, opened, renaming
from .verify import MERGED_BASE, add_missing

HELP = "merge adapters into a base model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", nargs="+", help=f"one or several: {ADAPTER}")
    parser.add_argument("--base", type=Path, required=True, help=MERGED_BASE)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="factors for the changes that the adapters make: one for all, or one for each",
    )
    parser.add_argument(
        "--sum",
        action="store_true",
        help="merge each adapter into the base and add the changes; by default each is merged "
        "into the result of the previous one, which is the same for LoRA",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize the adapted weights again, in the base's format, and keep the others; by "
        "default all quantized weights become floats",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="the dtype in which a GGUF base is written; by default that of its matrices, or "
        "bfloat16 if they are quantized",
    )
    add_naming(parser)
    add_missing(parser)


def run(args: argparse.Namespace) -> int:
    """Writes a base model with adapters merged into it, and copies its config and tokenizer."""
    checkpoint, rename = open_base(args.base, args.dtype), renaming(args)
    scales = args.scale * len(args.adapter) if len(args.scale) == 1 else args.scale
    if len(scales) != len(args.adapter):
        raise AdapterError(
            f"merges {len(args.adapter)} adapters, but --scale has {len(scales)} numbers.",
            args.out,
        )
    if not all(map(math.isfinite, scales)):
        raise AdapterError("is not a finite number.", "--scale")
    if not (checkpoint.coded or checkpoint.broken):
        check_unused(args, ("requantize",), "on a base without quantized weights")
    fitted: list[Fitted] = []
    for path in args.adapter:
        adapter = opened(path, args)
        missing = args.allow_missing
        fitted.append(fit_adapter(adapter, checkpoint, rename, allow_missing=missing))
        checkpoint = fitted[-1].checkpoint
    merge_files(fitted, args.out, scales=scales, summed=args.sum, requantize=args.requantize)
    adapted = {name for each in fitted for name in each.rows}
    print(f"{args.out}: {len(checkpoint.shapes)} tensors, {len(adapted)} of them adapted")
    if checkpoint.is_gguf:
        (dtype,) = {str(shape.dtype) for shape in checkpoint.shapes.values()}
        print(f"{args.out}: the weights of {args.base}, in {dtype}")
    if checkpoint.is_gguf and checkpoint.config is None:
        print(
            f"{args.out}: only the weights are written, because there is no config.json next to "
            f"{args.base}. Put the model's config and tokenizer there to load it."
        )
    return SAME
