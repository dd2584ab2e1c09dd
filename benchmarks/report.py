"""The benchmark as tables and as a plot.

`python benchmarks/report.py FILE.json` prints the tables of docs/performance.md, from what
`bench.py --json FILE.json` wrote.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from table import short

CONSOLE = Console(width=160)
PEERS = ("flax.nnx.LoRA", "qwix", "quax", "PEFT on torch")
NOISE = "hand-written again"


def ratios(work: Any, one: str, other: str, what: str = "step_ms") -> list[float] | None:
    """Of the same round; None where one of the two was not measured."""
    found = [work["variants"].get(name, {}).get(what) for name in (one, other)]
    return [x / y for x, y in zip(*found, strict=True)] if all(found) else None


def spread(values: list[float], digits: int = 3) -> tuple[str, ...]:
    """Median, minimum and maximum."""
    found = statistics.median(values), min(values), max(values)
    return tuple(f"{value:.{digits}f}" for value in found)


def show_about(about: Any) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    CONSOLE.print(
        f"{about['cores']} cores of {about['processor']}, load {about['load']:.1f}; "
        f"Python {about['python']}, {versions}; float32",
        soft_wrap=True,
    )
    for name, value in about["environment"].items():
        CONSOLE.print(f"{name}={value}", highlight=False)


def show_work(name: str, work: Any) -> None:
    """One row for each variant."""
    table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("variant")
    of_counts = ("FLOPs", "argument bytes", "temp bytes", "residual bytes", "page faults")
    of_times = ("trace", "first call", "step, ms", "step / hand-written", "min", "max")
    for column in (*of_counts, *of_times):
        table.add_column(column, justify="right")
    for variant, found in work["variants"].items():
        counts = [
            short(found[count]) if count in found else "–"
            for count in ("flops", "argument_bytes", "temp_bytes", "residual_bytes", "page_faults")
        ]
        first = [
            f"{statistics.median(rounds):.2f} ×" if rounds else "–"
            for rounds in (
                ratios(work, variant, "hand-written", what)
                for what in ("trace_ms", "first_call_ms")
            )
        ]
        steps = ratios(work, variant, "hand-written") or []
        milliseconds = f"{statistics.median(found['step_ms']):.1f}"
        table.add_row(variant, *counts, *first, milliseconds, *spread(steps))
    CONSOLE.print(table)
    for variant, error in work["errors"].items():
        CONSOLE.print(f"  {variant}: {error[:180]}", markup=False, highlight=False, soft_wrap=True)


# What each is compared with, and the most that it should be.


def goals(works: Any) -> Iterator[tuple[str, str, float, list[float]]]:
    """Work, what is compared, the goal and the ratios."""
    for name, work in works.items():
        compared = [
            ("step / hand-written, flat", "hand-written, flat", "step_ms", 1.02),
            ("step / floor", "floor", "step_ms", 1.25),
            *((f"step / {peer}", peer, "step_ms", 1.0) for peer in PEERS),
            ("first call / hand-written", "hand-written", "first_call_ms", 1.15),
            ("at once / in turn", "ours, in turn", "step_ms", 0.9),
        ]
        if name == "GPT":
            compared.insert(0, ("step / hand-written", "hand-written", "step_ms", 0.47))
        for text, other, what, goal in compared:
            found = ratios(work, "ours", other, what)
            if found is not None:
                yield name, text, goal, found


def show_goals(works: Any) -> None:
    table = Table(title="Ours", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("work")
    table.add_column("compared")
    for column in ("goal", "median", "min", "max", "noise"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, text, goal, found in goals(works):
        noise = ratios(works[name], NOISE, "hand-written") or [1.0]
        median, least, most = spread(found)
        met = statistics.median(found) <= goal
        table.add_row(
            name, text, f"{goal}", median, least, most, spread(noise)[0], "" if met else "missed"
        )
    CONSOLE.print(table)


COLORS = {"ours": "#c2410c", "hand-written, flat": "#0f766e", "floor": "#94a3b8"}


def plot(found: Any, path: pathlib.Path) -> None:
    """A panel for each work: the median of each variant, and from the least to the most."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lorax", "font.family": "sans-serif"}
    works = found["works"]
    columns = 2
    rows = -(-len(works) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(11, 2.3 * rows), squeeze=False)
    for panel in panels.flat[len(works) :]:
        panel.set_visible(False)
    for panel, (name, work) in zip(panels.flat, works.items(), strict=False):
        names = list(work["variants"])[::-1]
        for y, variant in enumerate(names):
            values = ratios(work, variant, "hand-written") or []
            color = COLORS.get(variant, "#334155")
            panel.plot([min(values), max(values)], [y, y], color=color, linewidth=1.5)
            panel.plot(statistics.median(values), y, "o", color=color, markersize=5)
        panel.axvline(1, color="#cbd5e1", linewidth=1, zorder=0)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlim(left=0)
        panel.set_title(name, fontsize=10, loc="left")
    figure.supxlabel("time / hand-written LoRA (median, minimum to maximum)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def markdown(found: Any) -> Iterator[str]:
    """The tables of the documentation, from what `bench.py --json` wrote."""
    works = found["works"]
    trained = {name: work for name, work in works.items() if "floor" in work["variants"]}
    names = ["ours", "hand-written, flat", "floor", "full fine-tuning", *PEERS, NOISE]
    yield "| | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for name, work in trained.items():
        cells = []
        for variant in names:
            values = ratios(work, variant, "hand-written")
            cells.append("{} ({}–{})".format(*spread(values, 2)) if values else "–")
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    yield "| | FLOPs | temporary bytes | residual bytes | trace | first call |"
    yield "|---|---|---|---|---|---|"
    for name, work in works.items():
        ours, by_hand = work["variants"]["ours"], work["variants"]["hand-written"]
        counts = [
            f"{ours[count] / by_hand[count]:.3f}" if count in ours else "–"
            for count in ("flops", "temp_bytes", "residual_bytes")
        ]
        first = [
            f"{statistics.median(ratios(work, 'ours', 'hand-written', what) or [1]):.2f}"
            for what in ("trace_ms", "first_call_ms")
        ]
        yield f"| {name} | " + " | ".join([*counts, *first]) + " |"
    for name, work in works.items():
        if name in trained:
            continue
        yield ""
        yield f"| {name} | time, ms | time / hand-written |"
        yield "|---|---|---|"
        for variant, values in work["variants"].items():
            found = ratios(work, variant, "hand-written") or []
            of_by_hand = "{} ({}–{})".format(*spread(found, 2))
            yield f"| {variant} | {statistics.median(values['step_ms']):.1f} | {of_by_hand} |"
    yield ""
    for name, work in works.items():
        for variant, error in work["errors"].items():
            # A library's message may have its own code in it.
            code = error.startswith("`")
            shown = f"`` {error[1:-1]} ``" if code and "`" in error[1:-1] else error
            yield f"- {name}, {variant}: {shown}"


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(pathlib.Path(sys.argv[1]).read_text()))))
