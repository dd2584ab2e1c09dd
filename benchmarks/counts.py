"""What XLA says of a compiled program, and how long JAX takes to trace one."""

import gc
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Counts(NamedTuple):
    """Exact numbers of one compiled program."""

    flops: float
    temp_bytes: int
    instructions: int


def count(fn: Callable[..., Any], *args: Any) -> Counts:
    """Compiles `fn` and reads XLA's analysis of it, in which a loop's body counts once."""
    compiled = jax.jit(fn).lower(*args).compile()
    cost = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    instructions = re.findall(r"^\s+(?:ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE)
    return Counts(cost["flops"], memory.temp_size_in_bytes, len(instructions))


def trace_ratio(
    ours: Callable[..., Any],
    our_args: Any,
    theirs: Callable[..., Any],
    their_args: Any,
    pairs: int,
) -> float:
    """How much longer `ours` traces: the median over pairs of runs, each from empty caches."""
    ratios = []
    for k in range(pairs):
        # Whoever goes second may find the processor in another state: take turns.
        sides = [(ours, our_args), (theirs, their_args)]
        seconds = [_trace_seconds(*side) for side in (sides if k % 2 == 0 else sides[::-1])]
        mine, other = seconds if k % 2 == 0 else seconds[::-1]
        ratios.append(mine / other)
    return statistics.median(ratios)


def _trace_seconds(fn: Callable[..., Any], args: Any) -> float:
    """Of this thread alone, so that other work on the machine counts less."""
    jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        jax.jit(lambda *args: fn(*args)).trace(*args)
        return time.thread_time() - start
    finally:
        gc.enable()
