"""Times training steps: ours beside LoRA written by hand, on the machine that runs this.

    python benchmarks/step_time.py [--peers] [--works NAME …] [--rounds N] [--json FILE]

Every round runs each variant once, one right after the other, and a ratio is of two times of the
same round: what else the machine does then weighs on both.
"""

import argparse
import json
import os
import pathlib
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
work                 variant           median     min     max   median     min     max
-------------------  ----------------  ----------------------   ----------------------"""


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


def compiled(step: works.Step, args: Any) -> Callable[[], Any]:
    """A step as a call without arguments."""
    ready = jax.jit(step).lower(*args).compile()
    return lambda: ready(*args)


def variants(work: works.Work, peers: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each variant of a work as a call, and why there is none of some."""
    steps = works.steps(work)
    found = {name: compiled(*step) for name, step in steps.items()}
    errors: dict[str, str] = {}
    loss, _ = found["by hand"]()
    for name, make in peer_steps().items() if peers else ():
        try:
            made = make(work, steps["by hand"][1][0].factors)
            found[name] = made if callable(made) else compiled(*made)
            theirs = found[name]()
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            if not abs(theirs - loss) < 1e-4 * abs(loss):
                raise ValueError(f"the loss is {theirs:.6g} instead of {loss:.6g}")
        except Exception as error:  # whatever a peer says is what the table shows
            found.pop(name, None)
            errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found, errors


def peer_steps() -> dict[str, Callable[..., Any]]:
    """Imported only where they are asked for: they need PyTorch and more."""
    import peers

    return {
        "flax.nnx.LoRA": peers.flax_nnx,
        "qwix": peers.qwix_provider,
        "quax": peers.quax_array,
        "PEFT on torch": peers.peft_torch,
    }


def lines(name: str, taken: dict[str, list[float]]) -> Iterator[str]:
    """The rows of one work."""
    for variant, found in taken.items():
        ratios = [x / y for x, y in zip(found, taken["by hand"], strict=True)]
        ms = " ".join(f"{x:7.1f}" for x in spread(found))
        of_by_hand = " ".join(f"{x:7.3f}" for x in spread(ratios))
        yield f"{name:19}  {variant:16} {ms}  {of_by_hand}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=works.WORKS, default=list(works.WORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", action="store_true", help="other libraries, too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    options = parser.parse_args()

    warnings.simplefilter("error", lorax.MaterializeWarning)
    load = os.getloadavg()[0]
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, float32; load {load:.1f}")
    print(HEADER)
    rounds: dict[str, Any] = {}
    for name in options.works:
        found, errors = variants(works.WORKS[name](), options.peers)
        rounds[name] = measure(found, options.rounds)
        for line in lines(name, rounds[name]):
            print(line, flush=True)
        for variant, error in errors.items():
            print(f"{name:19}  {variant:16} {error[:120]}", flush=True)
    if options.json:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "load": load}
        found = {"about": about, "milliseconds": rounds}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
