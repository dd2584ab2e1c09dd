"""Counts and times rows of mixed adapters, beside the base and beside one adapter for all rows.

    python benchmarks/banks.py [--rounds N] [--slots N] [--no-peer]

FLOPs and bytes are XLA's count of the compiled program; the time is the median ratio of paired
runs, to the base. PEFT's ratio is to the same base in PyTorch.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from adapted import as_factors
from counts import compiled, count, paired
from kinds import ratio
from variants import run_milliseconds

WIDTH, HIDDEN, LAYERS, RANK, ROWS = 1024, 4096, 2, 16, 64
STEPS = 16


class Work(NamedTuple):
    """What a row is, and how often each program runs on its own output, in one compiled loop."""

    tokens: int
    steps: int = 1


WORKS = {
    "decoding, 1 token": Work(1),
    f"decoding, {STEPS} steps of 1 token": Work(1, STEPS),
    "prefill, 128 tokens": Work(128),
}

HEADER = (
    "| rows | adapters | FLOPs / base | bytes / base | temporary bytes / base | time / base |\n"
    "|---|---|---:|---:|---:|---:|"
)


def model(params: Any, x: jax.Array) -> jax.Array:
    """Blocks of two products."""
    for layer in params:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return x


class Served(NamedTuple):
    """A program and what it is called with, the rows first."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]


def repeated(program: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """The program on its own output, as tokens are decoded."""
    if steps == 1:
        return program

    def run(x, *rest):
        return jax.lax.scan(lambda x, _: (program(x, *rest), None), x, length=steps)[0]

    return run


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

    def base(x, params):
        return jax.vmap(lambda row: model(params, row))(x)

    def one(x, params, tunable):
        return jax.vmap(lambda row: adapted((params, tunable), row))(x)

    def selected(x, params, bank, index):
        def row(x, k):
            return adapted((params, lorax.select_adapters(bank, k)), x)

        return jax.vmap(row)(x, index)

    def by_hand(x, params, factors, index):
        def row(x, k):
            for layer, pairs in zip(params, jax.tree.map(lambda f: f[k], factors), strict=True):
                up, down = pairs["up"], pairs["down"]
                h = jax.nn.relu(x @ layer["up"] + x @ up["a"] @ up["b"])
                x = x + h @ layer["down"] + h @ down["a"] @ down["b"]
            return x

        return jax.vmap(row)(x, index)

    def in_turn(x, params, trees):
        rows = x.reshape(-1, slots, *x.shape[1:])
        made = [one(rows[:, k], params, tree) for k, tree in enumerate(trees)]
        return jnp.stack(made, 1).reshape(x.shape)

    def mixed(x, params, bank, index):
        def row(x, k):
            return adapted((params, lorax.mix_adapters(bank, jax.nn.one_hot(k, slots))), x)

        return jax.vmap(row)(x, index)

    def grouped(x, params, bank):
        """The rows of each adapter side by side, and the bank mapped over like the rows."""

        def of_slot(tunable, scales, rows):
            pair = (params, lorax.with_scales(tunable, scales))
            return jax.vmap(lambda row: adapted(pair, row))(rows)

        rows = x.reshape(-1, slots, *x.shape[1:]).swapaxes(0, 1)
        out = jax.vmap(of_slot)(bank.tunable, bank.scales, rows)
        return out.swapaxes(0, 1).reshape(x.shape)

    interleaved = lorax.interleave_adapters(bank)
    return {
        "none": Served(base, (x, params)),
        "one": Served(one, (x, params, trees[0])),
        f"{slots}, `select_adapters`": Served(selected, (x, params, bank, index)),
        f"{slots}, `mix_adapters`": Served(mixed, (x, params, bank, index)),
        f"{slots}, `mix_adapters`, interleaved": Served(mixed, (x, params, interleaved, index)),
        f"{slots}, rows grouped by adapter": Served(grouped, (x, params, bank)),
        f"{slots}, hand-written `vmap`": Served(
            by_hand, (x, params, as_factors(bank.tunable), index)
        ),
        f"{slots}, one at a time": Served(in_turn, (x, params, trees)),
    }


def peft_runs(slots: int, work: Work) -> dict[str, Callable[[], Any]]:
    """Rows of mixed adapters in PEFT, and its base. It needs PyTorch."""
    from peers import peft_banks

    x = np.asarray(jax.random.normal(jax.random.key(1), (ROWS, work.tokens, WIDTH)))
    return peft_banks.runs(WIDTH, HIDDEN, LAYERS, RANK, slots, x, work.steps)


def table(slots: int, rounds: int, peer: bool) -> str:
    """Each way as a ratio to the base."""
    lines = [HEADER]
    for name, work in WORKS.items():
        made = programs(slots, work.tokens)
        runs = {
            way: compiled(repeated(served.program, work.steps), *served.arguments)
            for way, served in made.items()
        }
        calls: dict[str, Callable[[], Any]] = {
            way: partial(runs[way], *served.arguments) for way, served in made.items()
        }
        of_peft = peft_runs(slots, work) if peer and rounds else {}
        times = paired(
            {w: partial(run_milliseconds, c) for w, c in (calls | of_peft).items()}, rounds
        )
        base = counts(runs["none"])
        for way, run in runs.items():
            cells = [f"{x / y:.3f}" for x, y in zip(counts(run), base, strict=True)]
            cells.append(ratio(times[way], times["none"]))
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
        for way in of_peft:
            cells = ["–", "–", "–", ratio(times[way], times["PEFT on torch, none"])]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(run: Any) -> tuple[float, float, float]:
    """FLOPs, bytes that are read and written, and temporary bytes of a compiled program."""
    found = count(run)
    return found.flops, run.cost_analysis()["bytes accessed"], found.temp_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without PEFT")
    options = parser.parse_args()
    print(
        f"JAX {jax.__version__} on {jax.devices()[0].device_kind}: {ROWS} rows, {LAYERS} blocks of "
        f"{WIDTH} × {HIDDEN}, rank {RANK}, relative to the base\n"
    )
    print(table(options.slots, options.rounds, options.peer))


if __name__ == "__main__":
    main()
