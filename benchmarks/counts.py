"""XLA's analysis of a compiled program, the bytes kept for its gradient, and its times."""

import gc
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp


class Counts(NamedTuple):
    """Exact numbers of one compiled program."""

    flops: float
    temp_bytes: int
    argument_bytes: int
    instructions: int


def count(compiled: Any) -> Counts:
    """XLA's analysis of an executable. The body of a loop counts once."""
    memory = compiled.memory_analysis()
    instructions = re.findall(r"^\s+(?:ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE)
    return Counts(
        compiled.cost_analysis()["flops"],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        len(instructions),
    )


def compiled(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The executable, with these options of `jax.jit`."""
    return jax.jit(fn, **options).lower(*args).compile()


def residual_bytes(loss: Callable[..., Any], x: Any, *args: Any) -> int:
    """Bytes kept between the forward and backward pass of `loss`, excluding its arguments.

    Counts like `kept_bytes` of `lorax.explain`: a code of four bits is half a byte, and an array
    that is kept twice counts once.
    """

    def kept(x, *args):
        return jax.tree.leaves(jax.vjp(lambda x: loss(x, *args), x)[1])

    traced = jax.jit(kept).trace(x, *args)
    jaxpr = traced.jaxpr.jaxpr
    given = set(map(id, [*jaxpr.invars, *jaxpr.constvars]))
    out = {id(var): var.aval for var in jaxpr.outvars}
    return sum(_bytes_of(aval) for k, aval in out.items() if k not in given)


def _bytes_of(aval: Any) -> int:
    is_integer = jnp.issubdtype(aval.dtype, jnp.integer)
    bits = jnp.iinfo(aval.dtype).bits if is_integer else 8 * aval.dtype.itemsize
    return math.ceil(aval.size * bits / 8)


T = TypeVar("T")


def paired(measures: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """The result of each measurement in each round, so that ratios compare runs close in time."""
    results: dict[str, list[T]] = {name: [] for name in measures}
    order = random.Random(0)
    for _ in range(rounds):
        # Random order: each measurement changes caches, memory and threads for the next one, which
        # in a fixed order would always be the same.
        for name in order.sample(list(measures), len(measures)):
            results[name].append(measures[name]())
    return results


class Seconds(NamedTuple):
    """Times of a first call, from empty caches."""

    trace: float  # CPU time of this thread, which depends less on other load
    call: float  # tracing, lowering, compiling and running


def trace_seconds(fn: Callable[..., Any], *args: Any) -> float:
    jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        jax.jit(lambda *args: fn(*args)).trace(*args)
        return time.thread_time() - start
    finally:
        gc.enable()


def first_call(fn: Callable[..., Any], *args: Any) -> Seconds:
    trace = trace_seconds(fn, *args)
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(lambda *args: fn(*args))(*args))
    return Seconds(trace, time.perf_counter() - start)
