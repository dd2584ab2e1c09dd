"""A program that is counted and timed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from counts import compiled, count, residual_bytes
from steps import State
from works import Program


class Variant(NamedTuple):
    """One row: what is counted, and how it is run."""

    run: Callable[[], Any]
    counts: dict[str, float]
    program: Program | None  # none of PyTorch


def variant(program: Program) -> Variant:
    """Compiled, and counted over all of its calls."""
    first = program.calls[0]
    trains = isinstance(first[0], State)
    executable = compiled(program.fn, *first, donate_argnums=(0,) if trains else ())
    counts: dict[str, float] = count(executable)._asdict()
    counts["flops"] *= len(program.calls)
    if program.loss is not None:
        factors = first[0].factors if trains else first[0]
        counts["residual_bytes"] = residual_bytes(program.loss, factors, *first[1:])
    if not trains:
        return Variant(lambda: [executable(*args) for args in program.calls], counts, program)
    # As in a training loop, a step gives its state to the next one and is given that memory back.
    states = [jax.tree.map(jnp.copy, state) for state, *_ in program.calls]

    def run():
        made = []
        for k, (_, *rest) in enumerate(program.calls):
            value, states[k] = executable(states[k], *rest)
            made.append((value, states[k]))
        return made

    return Variant(run, counts, program)


def step_milliseconds(variant: Variant, times: int = 1) -> float:
    """The mean of so many, one right after the other, and after one that does not count."""
    return run_milliseconds(variant.run, times)


def run_milliseconds(run: Callable[[], Any], times: int = 1) -> float:
    """The same of any function."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start) / times
