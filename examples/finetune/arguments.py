"""The command-line arguments of the fine-tuning programs."""

import argparse
import pathlib

from data import HELD_OUT
from download import cache_folder
from training import TRAIN_BATCH


def parse_args(about, arguments=None, *, out, steps, bases=()):
    """Parses the arguments. `bases` are the choices of `--base`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    path = {"type": pathlib.Path, "metavar": "DIR"}
    add("--cache", **path, default=cache_folder(), help="where downloads are kept")
    add("--out", **path, default=out, help="where the adapter and the plot go")
    add("--plot", type=pathlib.Path, metavar="FILE", help="write the plot to this file instead")
    count = {"type": int, "metavar": "N"}
    add("--steps", **count, default=steps, help=f"training steps of {TRAIN_BATCH} sentences")
    add("--rank", **count, default=8, help="rank of the adapter")
    add("--alpha", type=float, default=16, metavar="X", help="scale of the adapter is alpha / rank")
    add(
        "--learning-rate",
        type=float,
        default=2e-3,
        metavar="X",
        help="initial learning rate; decays to zero",
    )
    add("--seed", **count, default=0, help="seed of the adapter and of the training sentences")
    add("--limit-eval", **count, default=HELD_OUT, help="held-out sentences to evaluate on")
    if bases:
        add("--base", choices=bases, default=bases[0], help="format of the frozen weights")
    args = parser.parse_args(arguments)
    allowed = {"steps": (1, 500), "rank": (1, 192), "seed": (0, 2**31 - 1)}
    for name, (least, most) in (allowed | {"limit_eval": (1, HELD_OUT)}).items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be between {least} and {most}")
    return args
