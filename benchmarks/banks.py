"""Counts and times batches whose rows use different adapters.

    python benchmarks/banks.py [--rounds N] [--slots N] [--no-peer]

Each is compared with the base, and with one adapter for all rows. FLOPs and bytes are XLA's count
of the compiled program. The time is the median ratio of paired runs to the base. PEFT's ratio is to
the same base in PyTorch.
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


class Workload(NamedTuple):
    """The tokens of a row, and how often a program runs on its own output in one compiled loop."""

    tokens: int
    steps: int = 1


WORKLOADS = {
    "decoding, 1 token": Workload(1),
    f"decoding, {STEPS} steps of 1 token": Workload(1, STEPS),
    "prefill, 128 tokens": Workload(128),
}

HEADER = (
    "| rows | adapters | FLOPs / base | bytes / base | temporary bytes / base | time / base |\n"
    "|---|---|---:|---:|---:|---:|"
)


def model(params: Any, x: jax.Array) -> jax.Array:
    """Residual blocks of two products."""
    for layer in params:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return x


class Served(NamedTuple):
    """A program and its arguments, rows first."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]


def repeated(program: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """The program applied to its own output, as in decoding."""
    if steps == 1:
        return program

    def run(x, *rest):
        return jax.lax.scan(lambda x, _: (program(x, *rest), None), x, length=steps)[0]

    return run


def programs(slots: int, tokens: int) -> dict[str, Served]:
    """All programs that compute the same rows, and the base."""
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

    def hand_written(x, params, factors, index):
        def row(x, k):
            for layer, pairs in zip(params, jax.tree.map(lambda f: f[k], factors), strict=True):
                up, down = pairs["up"], pairs["down"]
                h = jax.nn.relu(x @ layer["up"] + x @ up["a"] @ up["b"])
                x = x + h @ layer["down"] + h @ down["a"] @ down["b"]
            return x

        return jax.vmap(row)(x, index)

    def in_turn(x, params, trees):
        rows = x.reshape(-1, slots, *x.shape[1:])
        outputs = [one(rows[:, k], params, tree) for k, tree in enumerate(trees)]
        return jnp.stack(outputs, 1).reshape(x.shape)

    def mixed(x, params, bank, index):
        def row(x, k):
            return adapted((params, lorax.mix_adapters(bank, jax.nn.one_hot(k, slots))), x)

        return jax.vmap(row)(x, index)

    def grouped(x, params, bank):
        """Groups the rows by adapter, and maps over the bank and the groups together."""

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
            hand_written, (x, params, as_factors(bank.tunable), index)
        ),
        f"{slots}, one at a time": Served(in_turn, (x, params, trees)),
    }


def peft_runs(slots: int, workload: Workload) -> dict[str, Callable[[], Any]]:
    """The same batches in PEFT, and its base. Needs PyTorch."""
    from peers import peft_banks

    x = np.asarray(jax.random.normal(jax.random.key(1), (ROWS, workload.tokens, WIDTH)))
    return peft_banks.runs(WIDTH, HIDDEN, LAYERS, RANK, slots, x, workload.steps)


def table(slots: int, rounds: int, peer: bool) -> str:
    """One row for each program, relative to the base."""
    lines = [HEADER]
    for name, workload in WORKLOADS.items():
        served_programs = programs(slots, workload.tokens)
        runs = {
            row: compiled(repeated(served.program, workload.steps), *served.arguments)
            for row, served in served_programs.items()
        }
        calls: dict[str, Callable[[], Any]] = {
            row: partial(runs[row], *served.arguments) for row, served in served_programs.items()
        }
        peft_calls = peft_runs(slots, workload) if peer and rounds else {}
        times = paired(
            {row: partial(run_milliseconds, c) for row, c in (calls | peft_calls).items()}, rounds
        )
        base = counts(runs["none"])
        for row, run in runs.items():
            cells = [f"{x / y:.3f}" for x, y in zip(counts(run), base, strict=True)]
            cells.append(ratio(times[row], times["none"]))
            lines.append(f"| {name} | {row} | {' | '.join(cells)} |")
        for row in peft_calls:
            cells = ["–", "–", "–", ratio(times[row], times["PEFT on torch, none"])]
            lines.append(f"| {name} | {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(run: Any) -> tuple[float, float, float]:
    """FLOPs, bytes read and written, and temporary bytes of a compiled program."""
    counted = count(run)
    return counted.flops, run.cost_analysis()["bytes accessed"], counted.temp_bytes


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
