"""`lorax combine`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lorax import combine_adapters

from .._errors import AdapterError, about
from .._formats.opening import OpenedAdapter
from .._torch_names import TorchName
from .convert import OUT, add_writing, write_as
from .options import (
    ADAPTER,
    SAME,
    add_naming,
    check_unused,
    opened,
    print_errors,
    renamed,
    renaming,
)

HELP = "combine several adapters of one base into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", nargs="+", help=f"two or more: {ADAPTER}")
    parser.add_argument("--out", type=Path, required=True, help=OUT)
    parser.add_argument(
        "--weights", type=float, nargs="+", help="a weight for each adapter; by default 1"
    )
    parser.add_argument(
        "--method",
        default="concatenate",
        help="as in lorax.combine_adapters: concatenate (the exact sum), svd, linear, ties, …",
    )
    parser.add_argument("--rank", type=int, help="the rank of the result (methods svd and …_svd)")
    parser.add_argument(
        "--density",
        type=float,
        help="the fraction of entries that pruning keeps, above 0 and at most 1",
    )
    parser.add_argument(
        "--signs",
        choices=("total", "frequency"),
        help="how ties and dare_ties elect signs; by default total",
    )
    parser.add_argument(
        "--seed", type=int, help="the random seed of dare_linear and dare_ties; by default 0"
    )
    add_naming(parser)
    add_writing(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Writes the weighted sum of adapters, and prints the error of each weight."""
    weights = args.weights or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter):
        raise AdapterError(
            f"combines {len(args.adapter)} adapters, but --weights has {len(weights)} numbers.",
            args.out,
        )
    for option, methods in (("signs", "ties"), ("seed", "dare")):
        if methods not in args.method:
            check_unused(args, (option,), f"with the method {args.method}")
    rename = renaming(args)
    adapters = [renamed(opened(path, args), rename) for path in args.adapter]
    _check_shared(adapters)
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.rows)
    # Names are numbered, since one file may be given twice.
    given: dict[str, Any] = {
        f"{k}. {adapter.path}": ({path: adapter.rows.get(path) for path in paths}, weight)
        for k, (adapter, weight) in enumerate(zip(adapters, weights, strict=True), start=1)
    }
    with about(args.out):
        try:
            combined, errors = combine_adapters(
                given,
                args.method,
                rank=args.rank,
                density=args.density,
                signs=args.signs or "total",
                key=jax.random.key(args.seed or 0),
            )
        except ValueError as error:
            raise AdapterError(f"cannot be made: {error}") from error
    names: dict[str, TorchName] = {}
    for adapter in reversed(adapters):
        names |= adapter.names
    result = adapters[0]._replace(rows=combined, names={p: names[p] for p in paths if p in names})
    write_as(result, args)
    print_errors(combined, errors, "from the weighted sum")
    return SAME


def _check_shared(adapters: Sequence[OpenedAdapter]) -> None:
    """Rejects adapters that share no parameter with the first: their names probably differ."""
    first = adapters[0]
    for adapter in adapters[1:]:
        if not first.rows.keys() & adapter.rows.keys():
            one, other = (min(each.rows, default="nothing") for each in (first, adapter))
            raise AdapterError(
                f"adapts no parameter that {first.path} adapts: for example, `{other}` here, but "
                f"`{one}` there. Give both the same names with --names or --rename.",
                adapter.path,
            )
