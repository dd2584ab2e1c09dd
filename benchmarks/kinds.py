"""Counts and times a training step with each kind of adapter, relative to LoRA.

    python benchmarks/kinds.py [--rounds N] [--workloads NAME ...] [--rows NAME ...] [--no-peer]

FLOPs, temporary bytes and the bytes kept for the backward pass are exact. The time is the median
ratio of paired runs. The next columns are the same ratio in PEFT on torch, and the time of ours
over that of PEFT. Some kinds also have a hand-written row.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax

import lorax
from adapted import adapt
from counts import paired
from hand_written_kinds import OPS
from models import Model
from report import spread
from steps import floor, start, train
from variants import Variant, run_milliseconds, step_milliseconds, variant
from workloads import Program, gpt

RANK, RATE = 16, 0.05
LORA = lorax.LoraSpec(RANK, alpha=RANK)

KINDS: dict[str, lorax.AdapterSpec] = {
    "LoRA": LORA,
    "DoRA": lorax.DoraSpec(LORA),
    "DoRA, norm with a gradient": lorax.DoraSpec(LORA, detached=False),
    "IA³": lorax.IA3Spec(),
    "LoHa, rank 8": lorax.LohaSpec(8, alpha=8),
    "LoKr": lorax.LokrSpec(RANK, alpha=RANK),
    "LoKr, rank 8, factor 8": lorax.LokrSpec(8, alpha=8, factor=8),
    "MiSS": lorax.MissSpec(RANK),
    "GraLoRA": lorax.GraloraSpec(RANK, alpha=RANK, blocks=2),
    "BD-LoRA": lorax.BdloraSpec(RANK, alpha=RANK),
    "OFT, blocks of 32": lorax.OftSpec(32),
    "LoRA-FA": lorax.LoraFASpec(RANK, alpha=RANK),
    "VeRA, rank 256": lorax.VeraSpec(256),
    "AdaLoRA": lorax.AdaloraSpec(RANK, alpha=RANK),
    "DeLoRA": lorax.DeloraSpec(RANK),
}

DROPOUT, FLOOR = "LoRA, dropout", "floor"
HAND_WRITTEN = {f"{name}, hand-written": name for name in OPS}

WORKLOADS: dict[str, Callable[[], Model]] = {
    "GPT": gpt,
    "GPT, scan + remat": lambda: gpt(scan=True, remat=True),
}

HEADER = (
    "| kind | trained | FLOPs | temporary bytes | kept bytes | step | PEFT's step | ours / PEFT |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


class Step(NamedTuple):
    """A step, and the number of trained entries."""

    variant: Variant
    trained: int


ROWS = (*KINDS, DROPOUT, *HAND_WRITTEN, FLOOR)


def make_step(model: Model, row: str) -> Step:
    """A training step of a kind, of LoRA with dropout, of a hand-written kind, or of the floor."""
    if row == FLOOR:
        return Step(variant(Program(*floor(model))), 0)
    if row in HAND_WRITTEN:
        return _hand_written_step(model, HAND_WRITTEN[row])
    return Step(*_step(model, KINDS.get(row, LORA), dropout=row == DROPOUT))


def _step(model: Model, spec: Any, dropout: bool = False) -> tuple[Variant, int]:
    adapted = adapt(model, spec)
    trained, frozen = train(adapted.apply), adapted.frozen
    if dropout:
        trained = train(
            lambda tunable, frozen, batch: adapted.apply(
                lorax.with_dropout(tunable, jax.random.key(0), RATE), frozen, batch
            )
        )
    calls = [(start(adapted.tunable), frozen, model.batch)]
    return variant(Program(trained.step, calls, trained.loss)), lorax.count_params(adapted.tunable)


def _hand_written_step(model: Model, kind: str) -> Step:
    """A step of the hand-written model, with the same factors and frozen factors."""
    adapted, hand_written = adapt(model, KINDS[kind]), model.with_ops(OPS[kind])

    def apply(factors, frozen, batch):
        tree_map = partial(jax.tree.map, is_leaf=_has_factors)
        bases = tree_map(lambda node: node.base if _has_factors(node) else node, frozen)
        frozen_factors = lambda node: node.factors if _has_factors(node) else {}  # noqa: E731
        factors = tree_map(
            lambda node, own: own and {**own, **frozen_factors(node)}, frozen, factors
        )
        return hand_written(factors, bases, batch)

    trained = train(apply)
    calls = [(start(adapted.factors), adapted.frozen, model.batch)]
    program = Program(trained.step, calls, trained.loss)
    return Step(variant(program), lorax.count_params(adapted.tunable))


def _has_factors(node: Any) -> bool:
    return isinstance(node, lorax.FrozenWeight)


def table(model: Model, rounds: int, peer: bool, rows: Iterable[str] = ROWS) -> str:
    """One row for each kind, relative to LoRA."""
    steps = {row: make_step(model, row) for row in dict.fromkeys(("LoRA", *rows))}
    peft_runs = peft_steps(model) if peer and rounds else {}
    peft_runs = {name: run for name, run in peft_runs.items() if name in steps}
    runs = {name: partial(step_milliseconds, step.variant) for name, step in steps.items()}
    runs |= {f"PEFT: {name}": partial(run_milliseconds, run) for name, run in peft_runs.items()}
    times = paired(runs, rounds)
    lines = [HEADER]
    lora = steps["LoRA"].variant.counts
    for name, (measured, trained) in steps.items():
        cells = [f"{trained:,}"]
        for count in ("flops", "temp_bytes", "residual_bytes"):
            cells.append(f"{measured.counts[count] / lora[count]:.3f}")
        for one, other in (
            (name, "LoRA"),
            (f"PEFT: {name}", "PEFT: LoRA"),
            (name, f"PEFT: {name}"),
        ):
            cells.append(ratio(times.get(one), times.get(other)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(times: list[float] | None, others: list[float] | None) -> str:
    """Median, minimum and maximum of the ratios, or a dash if one was not measured."""
    if not times or not others:
        return "–"
    return "{} ({}–{})".format(*spread([x / y for x, y in zip(times, others, strict=True)], 2))


def peft_steps(model: Model) -> dict[str, Callable[[], Any]]:
    """PEFT's steps. The import needs PyTorch, so it is made only on request."""
    from peers import peft_kinds

    return peft_kinds.steps(model, RANK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="in addition to LoRA")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without PEFT")
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    show(options.workloads, options.rounds, options.peer, options.rows)


def show(
    workloads: Iterable[str] = WORKLOADS,
    rounds: int = 0,
    peer: bool = False,
    rows: Iterable[str] = ROWS,
) -> None:
    """Prints the tables. Without rounds, they contain only counts."""
    print(f"\nKinds of adapters, rank {RANK}, relative to LoRA", flush=True)
    for name in workloads:
        print(f"\n{name}\n\n{table(WORKLOADS[name](), rounds, peer, rows)}", flush=True)


if __name__ == "__main__":
    main()
