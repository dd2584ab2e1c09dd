"""Counts and times a training step with each kind of adapter, beside the same step with LoRA.

    python benchmarks/kinds.py [--rounds N] [--works NAME ...] [--rows NAME ...] [--no-peer]

FLOPs, temporary bytes and the bytes kept for the backward pass are exact. The time is the median
ratio of paired runs. Beside it are the same ratio in PEFT on torch, and the time of ours over that
of PEFT. Some kinds have a row in which they are written into the model.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax

import lorax
from adapted import adapt
from counts import paired
from kinds_by_hand import WRITTEN
from models import Model
from report import spread
from steps import floor, start, train
from variants import Variant, run_milliseconds, step_milliseconds, variant
from works import Program, gpt

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
BY_HAND = {f"{name}, hand-written": name for name in WRITTEN}

WORKS: dict[str, Callable[[], Model]] = {
    "GPT": gpt,
    "GPT, scan + remat": lambda: gpt(scan=True, remat=True),
}

HEADER = (
    "| kind | trained | FLOPs | temporary bytes | kept bytes | step | PEFT's step | ours / PEFT |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


class Step(NamedTuple):
    """A step, and how many numbers it trains."""

    variant: Variant
    trained: int


ROWS = (*KINDS, DROPOUT, *BY_HAND, FLOOR)


def make_step(model: Model, row: str) -> Step:
    """A training step of a kind, of LoRA with dropout, of a hand-written kind, or of the floor."""
    if row == FLOOR:
        return Step(variant(Program(*floor(model))), 0)
    if row in BY_HAND:
        return _written(model, BY_HAND[row])
    return Step(*_step(model, KINDS.get(row, LORA), dropout=row == DROPOUT))


def _step(model: Model, spec: Any, dropout: bool = False) -> tuple[Variant, int]:
    adapted = adapt(model, spec)
    trained, frozen = train(adapted.ours), adapted.frozen
    if dropout:
        trained = train(
            lambda tunable, frozen, batch: adapted.ours(
                lorax.with_dropout(tunable, jax.random.key(0), RATE), frozen, batch
            )
        )
    calls = [(start(adapted.tunable), frozen, model.batch)]
    return variant(Program(trained.step, calls, trained.loss)), lorax.count_params(adapted.tunable)


def _written(model: Model, kind: str) -> Step:
    """The same factors and frozen factors, in a model that is written for them."""
    adapted, apply = adapt(model, KINDS[kind]), model.written(WRITTEN[kind])

    def written(factors, frozen, batch):
        over = partial(jax.tree.map, is_leaf=_has_factors)
        bases = over(lambda node: node.base if _has_factors(node) else node, frozen)
        held = lambda node: node.factors if _has_factors(node) else {}  # noqa: E731
        factors = over(lambda node, own: own and {**own, **held(node)}, frozen, factors)
        return apply(factors, bases, batch)

    trained = train(written)
    calls = [(start(adapted.factors), adapted.frozen, model.batch)]
    program = Program(trained.step, calls, trained.loss)
    return Step(variant(program), lorax.count_params(adapted.tunable))


def _has_factors(node: Any) -> bool:
    return isinstance(node, lorax.FrozenWeight)


def table(model: Model, rounds: int, peer: bool, rows: Iterable[str] = ROWS) -> str:
    """Each kind as a ratio to LoRA."""
    made = {row: make_step(model, row) for row in dict.fromkeys(("LoRA", *rows))}
    of_peft = peft_steps(model) if peer and rounds else {}
    of_peft = {name: step for name, step in of_peft.items() if name in made}
    runs = {name: partial(step_milliseconds, step.variant) for name, step in made.items()}
    runs |= {f"PEFT: {name}": partial(run_milliseconds, run) for name, run in of_peft.items()}
    times = paired(runs, rounds)
    lines = [HEADER]
    lora = made["LoRA"].variant.counts
    for name, (found, trained) in made.items():
        cells = [f"{trained:,}"]
        for count in ("flops", "temp_bytes", "residual_bytes"):
            cells.append(f"{found.counts[count] / lora[count]:.3f}")
        for one, other in (
            (name, "LoRA"),
            (f"PEFT: {name}", "PEFT: LoRA"),
            (name, f"PEFT: {name}"),
        ):
            cells.append(ratio(times.get(one), times.get(other)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(times: list[float] | None, others: list[float] | None) -> str:
    """Median, least and most of the ratios, or a dash where one was not measured."""
    if not times or not others:
        return "–"
    return "{} ({}–{})".format(*spread([x / y for x, y in zip(times, others, strict=True)], 2))


def peft_steps(model: Model) -> dict[str, Callable[[], Any]]:
    """Imported only where it is asked for: it needs PyTorch."""
    from peers import peft_kinds

    return peft_kinds.steps(model, RANK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="beside LoRA")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without PEFT")
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    show(options.works, options.rounds, options.peer, options.rows)


def show(
    works: Iterable[str] = WORKS,
    rounds: int = 0,
    peer: bool = False,
    rows: Iterable[str] = ROWS,
) -> None:
    """Prints the tables; without rounds there are counts alone."""
    print(f"\nKinds of adapters, rank {RANK}, beside LoRA", flush=True)
    for name in works:
        print(f"\n{name}\n\n{table(WORKS[name](), rounds, peer, rows)}", flush=True)


if __name__ == "__main__":
    main()
