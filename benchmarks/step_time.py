"""Times training steps: ours beside LoRA written by hand, on the machine that runs this.

    python benchmarks/step_time.py [--works NAME …] [--rounds N]

Every round runs each variant once, one right after the other, and a ratio is of two times of the
same round: what else the machine does then weighs on both.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

import lorax
import works

HEADER = """\
                                      milliseconds             of by hand
work                 variant          median     min     max   median     min     max
-------------------  ---------------  ----------------------   ----------------------"""


class Spread(NamedTuple):
    """Of the same thing in every round."""

    median: float
    least: float
    most: float


def spread(values: list[float]) -> Spread:
    """Of the values."""
    return Spread(statistics.median(values), min(values), max(values))


def measure(compiled: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round."""
    taken: dict[str, list[float]] = {name: [] for name in compiled}
    names = list(compiled)
    for k in range(rounds + 1):
        # Whoever goes second may find the processor in another state: take turns.
        for name in names[k % len(names) :] + names[: k % len(names)]:
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name]())
            if k:  # the first round warms up
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def compile_all(steps: dict[str, tuple[works.Step, Any]]) -> dict[str, Callable[[], Any]]:
    """Each variant as a call without arguments."""

    def ready(step, args):
        compiled = jax.jit(step).lower(*args).compile()
        return lambda: compiled(*args)

    return {name: ready(step, args) for name, (step, args) in steps.items()}


def lines(name: str, taken: dict[str, list[float]]) -> Iterator[str]:
    """The rows of one work."""
    for variant, found in taken.items():
        ratios = [x / y for x, y in zip(found, taken["by hand"], strict=True)]
        ms = " ".join(f"{x:7.1f}" for x in spread(found))
        of_by_hand = " ".join(f"{x:7.3f}" for x in spread(ratios))
        yield f"{name:19}  {variant:15} {ms}  {of_by_hand}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=works.WORKS, default=list(works.WORKS))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    warnings.simplefilter("error", lorax.MaterializeWarning)
    load = os.getloadavg()[0]
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, float32; load {load:.1f}")
    print(HEADER)
    for name in options.works:
        compiled = compile_all(works.steps(works.WORKS[name]()))
        for line in lines(name, measure(compiled, options.rounds)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
