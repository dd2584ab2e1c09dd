"""Counts and times rows of mixed adapters, beside the base and beside one adapter for all rows.

    python benchmarks/banks.py [--rounds N] [--slots N]

FLOPs and bytes are XLA's count of the compiled program; the time is the median ratio of paired
runs, to the base.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorax
from counts import compiled, paired

WIDTH, HIDDEN, LAYERS, RANK, ROWS = 1024, 4096, 2, 16, 64
TOKENS = {"decoding, 1 token": 1, "reading, 128 tokens": 128}

HEADER = (
    "| rows | adapters | FLOPs | bytes | temporary bytes | time |\n|---|---|---:|---:|---:|---:|"
)


def model(params: Any, x: jax.Array) -> jax.Array:
    """Blocks of two products."""
    for layer in params:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return x


class Served(NamedTuple):
    """A program and what it is called with."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]


def programs(slots: int, tokens: int) -> dict[str, Served]:
    """All ways to compute the same rows, and the base."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + slots + 1))
    params = [
        {
            "up": jax.random.normal(next(keys), (WIDTH, HIDDEN)) / WIDTH**0.5,
            "down": jax.random.normal(next(keys), (HIDDEN, WIDTH)) / HIDDEN**0.5,
        }
        for _ in range(LAYERS)
    ]
    spec = jax.tree.map(lambda _: RANK, params)
    trees = [
        lorax.init_lora(params, spec, next(keys), b_init="gaussian").tunable for _ in range(slots)
    ]
    bank = lorax.stack_adapters(trees)
    x = jax.random.normal(next(keys), (ROWS, tokens, WIDTH))
    index = jnp.arange(ROWS) % slots
    adapted = lorax.lora(model)

    def base(params, x):
        return jax.vmap(lambda row: model(params, row))(x)

    def one(params, tunable, x):
        return jax.vmap(lambda row: adapted((params, tunable), row))(x)

    def selected(params, bank, x, index):
        def row(x, k):
            return adapted((params, lorax.select_adapters(bank, k)), x)

        return jax.vmap(row)(x, index)

    def mixed(params, bank, x, index):
        def row(x, k):
            return adapted((params, lorax.mix_adapters(bank, jax.nn.one_hot(k, slots))), x)

        return jax.vmap(row)(x, index)

    return {
        "none": Served(base, (params, x)),
        "one": Served(one, (params, trees[0], x)),
        f"{slots}, `select_adapters`": Served(selected, (params, bank, x, index)),
        f"{slots}, `mix_adapters`": Served(mixed, (params, bank, x, index)),
    }


def table(slots: int, rounds: int) -> str:
    """Each way as a ratio to the base."""
    lines = [HEADER]
    for name, tokens in TOKENS.items():
        made = programs(slots, tokens)
        runs = {way: compiled(made[way].program, *made[way].arguments) for way in made}
        counts = {way: run.cost_analysis() for way, run in runs.items()}
        measures = {
            way: lambda run=runs[way], served=served: _milliseconds(run, served.arguments)
            for way, served in made.items()
        }
        times = paired(measures, rounds)
        for way, run in runs.items():
            cells = [
                f"{counts[way][count] / counts['none'][count]:.3f}"
                for count in ("flops", "bytes accessed")
            ]
            temporary = run.memory_analysis().temp_size_in_bytes
            cells.append(f"{temporary / runs['none'].memory_analysis().temp_size_in_bytes:.2f}")
            ratios = [x / y for x, y in zip(times[way], times["none"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "–")
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(run: Any, arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--slots", type=int, default=16)
    options = parser.parse_args()
    print(
        f"JAX {jax.__version__} on {jax.devices()[0].device_kind}: {ROWS} rows, {LAYERS} blocks of "
        f"{WIDTH} × {HIDDEN}, rank {RANK}, beside the base\n"
    )
    print(table(options.slots, options.rounds))


if __name__ == "__main__":
    main()
