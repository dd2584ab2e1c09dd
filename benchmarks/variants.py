"""A compiled program with its counts, ready to be timed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from counts import compiled, count, residual_bytes
from steps import State
from workloads import Program


class Variant(NamedTuple):
    """One row of a table: how it runs, and its counts."""

    run: Callable[[], Any]
    counts: dict[str, float]
    program: Program | None  # None for PyTorch


def variant(program: Program) -> Variant:
    """Compiles a program, and counts it over all of its calls."""
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
    # As in a training loop, each step donates its state to the next one.
    states = [jax.tree.map(jnp.copy, state) for state, *_ in program.calls]

    def run():
        results = []
        for k, (_, *rest) in enumerate(program.calls):
            value, states[k] = executable(states[k], *rest)
            results.append((value, states[k]))
        return results

    return Variant(run, counts, program)


def step_milliseconds(variant: Variant, times: int = 1) -> float:
    """The mean time of consecutive steps, after one that is not timed."""
    return run_milliseconds(variant.run, times)


def run_milliseconds(run: Callable[[], Any], times: int = 1) -> float:
    """The same for any function."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start) / times
