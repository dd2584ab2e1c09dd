"""The results of a benchmark as tables and as a plot.

`python benchmarks/report.py FILE.json` prints the tables of docs/performance.md from the output of
`bench.py --json FILE.json`.
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

from costs_table import short

CONSOLE = Console(width=160)
PEERS = ("flax.nnx.LoRA", "qwix", "quax", "PEFT on torch")
NOISE = "hand-written again"


def ratios(workload: Any, one: str, other: str, key: str = "step_ms") -> list[float] | None:
    """Ratios of two variants within each round, or None if one was not measured."""
    measured = [workload["variants"].get(name, {}).get(key) for name in (one, other)]
    return [x / y for x, y in zip(*measured, strict=True)] if all(measured) else None


def spread(values: list[float], digits: int = 3) -> tuple[str, ...]:
    """Median, minimum and maximum."""
    numbers = statistics.median(values), min(values), max(values)
    return tuple(f"{number:.{digits}f}" for number in numbers)


def show_about(about: Any) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    CONSOLE.print(
        f"{about['cores']} cores of {about['processor']}, load {about['load']:.1f}; "
        f"Python {about['python']}, {versions}; float32",
        soft_wrap=True,
    )
    for name, value in about["environment"].items():
        CONSOLE.print(f"{name}={value}", highlight=False)


def show_workload(name: str, workload: Any) -> None:
    """One row for each variant."""
    table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("variant")
    count_columns = ("FLOPs", "argument bytes", "temp bytes", "residual bytes", "page faults")
    time_columns = ("trace", "first call", "step, ms", "step / hand-written", "min", "max")
    for column in (*count_columns, *time_columns):
        table.add_column(column, justify="right")
    for variant, measured in workload["variants"].items():
        counts = [
            short(measured[count]) if count in measured else "–"
            for count in ("flops", "argument_bytes", "temp_bytes", "residual_bytes", "page_faults")
        ]
        first = [
            f"{statistics.median(rounds):.2f} ×" if rounds else "–"
            for rounds in (
                ratios(workload, variant, "hand-written", key)
                for key in ("trace_ms", "first_call_ms")
            )
        ]
        steps = ratios(workload, variant, "hand-written") or []
        milliseconds = f"{statistics.median(measured['step_ms']):.1f}"
        table.add_row(variant, *counts, *first, milliseconds, *spread(steps))
    CONSOLE.print(table)
    for variant, error in workload["errors"].items():
        CONSOLE.print(f"  {variant}: {error[:180]}", markup=False, highlight=False, soft_wrap=True)


def goals(workloads: Any) -> Iterator[tuple[str, str, float, list[float]]]:
    """Yields workload, label, the largest ratio that meets the goal, and the measured ratios."""
    for name, workload in workloads.items():
        compared = [
            ("step / hand-written, flat", "hand-written, flat", "step_ms", 1.02),
            ("step / floor", "floor", "step_ms", 1.25),
            *((f"step / {peer}", peer, "step_ms", 1.0) for peer in PEERS),
            ("first call / hand-written", "hand-written", "first_call_ms", 1.15),
            ("at once / in turn", "ours, in turn", "step_ms", 0.9),
        ]
        if name == "GPT":
            compared.insert(0, ("step / hand-written", "hand-written", "step_ms", 0.47))
        for label, other, key, goal in compared:
            measured = ratios(workload, "ours", other, key)
            if measured is not None:
                yield name, label, goal, measured


def show_goals(workloads: Any) -> None:
    table = Table(title="Ours", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("workload")
    table.add_column("ratio")
    for column in ("goal", "median", "min", "max", "noise"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, label, goal, measured in goals(workloads):
        noise = ratios(workloads[name], NOISE, "hand-written") or [1.0]
        median, least, most = spread(measured)
        met = statistics.median(measured) <= goal
        table.add_row(
            name, label, f"{goal}", median, least, most, spread(noise)[0], "" if met else "missed"
        )
    CONSOLE.print(table)


COLORS = {"ours": "#c2410c", "hand-written, flat": "#0f766e", "floor": "#94a3b8"}


def plot(results: Any, path: pathlib.Path) -> None:
    """A panel for each workload: median and range of each variant."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lorax", "font.family": "sans-serif"}
    workloads = results["workloads"]
    columns = 2
    rows = -(-len(workloads) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(11, 2.3 * rows), squeeze=False)
    for panel in panels.flat[len(workloads) :]:
        panel.set_visible(False)
    for panel, (name, workload) in zip(panels.flat, workloads.items(), strict=False):
        names = list(workload["variants"])[::-1]
        for y, variant in enumerate(names):
            values = ratios(workload, variant, "hand-written") or []
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


def markdown(results: Any) -> Iterator[str]:
    """The tables of docs/performance.md, from the output of `bench.py --json`."""
    workloads = results["workloads"]
    trained = {
        name: workload for name, workload in workloads.items() if "floor" in workload["variants"]
    }
    names = ["ours", "hand-written, flat", "floor", "full fine-tuning", *PEERS, NOISE]
    yield "| | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for name, workload in trained.items():
        cells = []
        for variant in names:
            values = ratios(workload, variant, "hand-written")
            cells.append("{} ({}–{})".format(*spread(values, 2)) if values else "–")
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    yield "| | FLOPs | temporary bytes | residual bytes | trace | first call |"
    yield "|---|---|---|---|---|---|"
    for name, workload in workloads.items():
        ours, hand_written = workload["variants"]["ours"], workload["variants"]["hand-written"]
        counts = [
            f"{ours[count] / hand_written[count]:.3f}" if count in ours else "–"
            for count in ("flops", "temp_bytes", "residual_bytes")
        ]
        first = [
            f"{statistics.median(ratios(workload, 'ours', 'hand-written', key) or [1]):.2f}"
            for key in ("trace_ms", "first_call_ms")
        ]
        yield f"| {name} | " + " | ".join([*counts, *first]) + " |"
    for name, workload in workloads.items():
        if name in trained:
            continue
        yield ""
        yield f"| {name} | time, ms | time / hand-written |"
        yield "|---|---|---|"
        for variant, values in workload["variants"].items():
            step_ratios = ratios(workload, variant, "hand-written") or []
            ratio = "{} ({}–{})".format(*spread(step_ratios, 2))
            yield f"| {variant} | {statistics.median(values['step_ms']):.1f} | {ratio} |"
    yield ""
    for name, workload in workloads.items():
        for variant, error in workload["errors"].items():
            # A library's message may contain backticks.
            code = error.startswith("`")
            shown = f"`` {error[1:-1]} ``" if code and "`" in error[1:-1] else error
            yield f"- {name}, {variant}: {shown}"


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(pathlib.Path(sys.argv[1]).read_text()))))
