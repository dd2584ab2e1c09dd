"""Counts and times a training step of many adapters, relative to one adapter on all of their rows.

    python benchmarks/bank_steps.py [--rounds N] [--workloads NAME ...] [--slots N]

The ranks cycle through 4 to 64, and each adapter has its own scale and learning rate. In float64,
the factors of each are compared with those of the same adapter trained alone.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lorax
from counts import compiled, count, paired
from kinds import ratio
from lorax.testing import random_factors
from models import Model, blocks
from steps import objective
from variants import run_milliseconds
from workloads import gpt

RANKS = (4, 8, 16, 64)

WORKLOADS: dict[str, Callable[..., Model]] = {
    "GPT": gpt,
    "GPT, scan + remat": partial(gpt, scan=True, remat=True),
}

# In float64 the models above take gigabytes for 32 adapters. Comparing factors does not need width.
SMALL: dict[str, Callable[..., Model]] = {
    "GPT": partial(blocks, 4, batch=1, time=8),
    "GPT, scan + remat": partial(blocks, 4, batch=1, time=8, scan=True, remat=True),
}

HEADER = "| workload | adapters | FLOPs | temporary bytes | time |\n|---|---|---:|---:|---:|"


def adapter(model: Model, seed: int, rank: int, alpha: float) -> Any:
    """An adapter with random factors, scaled down so that activations stay bounded."""
    spec = lorax.infer_spec(
        model.apply,
        model.params,
        model.batch,
        spec=lorax.LoraSpec(rank, alpha=alpha),
        where=model.where,
        skip_small=False,
    )
    tunable = lorax.init_lora(model.params, spec, jax.random.key(seed)).tunable
    tunable = random_factors(tunable, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf / 8, tunable)


def adapters(model: Model, slots: int) -> list[Any]:
    """One for each slot, with different ranks and scales."""
    ranks = [RANKS[k % len(RANKS)] for k in range(slots)]
    return [adapter(model, k, rank, rank * (1 + k / slots)) for k, rank in enumerate(ranks)]


def step_of(model: Model) -> Callable[..., Any]:
    """A step of gradient descent on (tunable, rows, rate), with or without the scales of a bank."""
    adapted = lorax.lora(model.apply, on_materialize="error", on_unused="error")

    def loss(tunable, rows, scales):
        if scales is not None:
            tunable = lorax.with_scales(tunable, scales)
        return objective(adapted((model.params, tunable), rows))

    def step(tunable, rows, rate, scales=None):
        value, grads = jax.value_and_grad(loss)(tunable, rows, scales)
        return value, jax.tree.map(lambda x, g: x - rate * g, tunable, grads)

    return step


def rates_of(slots: int) -> jax.Array:
    return 1e-3 * (1 + jnp.arange(slots) / slots)


def difference(model: Model, slots: int, steps: int = 2) -> float:
    """The largest relative difference of factors, trained in one bank and trained alone."""
    trees, rates = adapters(model, slots), rates_of(slots)
    batches = jax.random.normal(jax.random.key(9), (steps, slots, *model.batch.shape))
    bank = lorax.stack_adapters(trees)
    step = step_of(model)
    together = jax.jit(jax.vmap(step))
    tunable = bank.tunable
    for rows in batches:
        _, tunable = together(tunable, rows, rates, bank.scales)
    from_bank = lorax.unstack_adapters(dataclasses.replace(bank, tunable=tunable))
    alone = jax.jit(step)
    worst = 0.0
    for k, tree in enumerate(trees):
        for rows in batches:
            _, tree = alone(tree, rows[k], rates[k])
        for one, two in zip(jax.tree.leaves(from_bank[k]), jax.tree.leaves(tree), strict=True):
            worst = max(worst, float(abs(one - two).max() / abs(two).max()))
    return worst


def table(name: str, slots: int, rounds: int) -> str:
    """All adapters in one step, and one adapter of the bank's rank on all rows."""
    one_row = WORKLOADS[name](batch=1)
    step, rates = step_of(one_row), rates_of(slots)
    bank = lorax.stack_adapters(adapters(one_row, slots))
    rows = jax.random.normal(jax.random.key(9), (slots, *one_row.batch.shape))
    wide = adapter(one_row, 0, max(RANKS), max(RANKS))
    runs = {
        f"1, rank {max(RANKS)}": (step, (wide, rows.reshape(-1, *rows.shape[2:]), rates[0])),
        f"{slots}, ranks {RANKS}": (jax.vmap(step), (bank.tunable, rows, rates, bank.scales)),
    }
    executables = {row: compiled(fn, *args) for row, (fn, args) in runs.items()}
    calls = {row: partial(executables[row], *args) for row, (_, args) in runs.items()}
    times = paired({row: partial(run_milliseconds, call) for row, call in calls.items()}, rounds)
    counts = {row: count(run) for row, run in executables.items()}
    first = next(iter(runs))
    lines = []
    for row, counted in counts.items():
        flops = counted.flops / counts[first].flops
        temporary = counted.temp_bytes / counts[first].temp_bytes
        cells = f"{flops:.3f} | {temporary:.3f} | {ratio(times[row], times[first])}"
        lines.append(f"| {name} | {row} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of paired runs; 0 only counts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--slots", type=int, default=32)
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}\n\n{HEADER}", flush=True)
    for name in options.workloads:
        print(table(name, options.slots, options.rounds), flush=True)
    print("\nFactors of 4 blocks of width 128 after two steps in float64, in a bank and alone:\n")
    with jax.enable_x64(True):
        for name in options.workloads:
            worst = difference(to_double(SMALL[name]()), options.slots)
            print(f"- {name}: {worst:.0e}", flush=True)


def to_double(model: Model) -> Model:
    """The model in float64."""
    double = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)  # noqa: E731
    return model._replace(params=double(model.params), batch=double(model.batch))


if __name__ == "__main__":
    main()
