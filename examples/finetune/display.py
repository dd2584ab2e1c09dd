"""Progress bars, tables, and the plot of a run."""

import contextlib
import time

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from download import fetch_all

console = Console(highlight=False)


@contextlib.contextmanager
def bytes_bar(label):
    """A progress bar for a download; yields `report(done, total)`."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    quiet = not console.is_terminal  # a transient bar would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def download(assets, cache):
    """`fetch_all` with a progress bar."""
    with bytes_bar(f"Downloading {assets[0].requirement}") as report:
        paths = fetch_all(assets, cache, report)
    for path in paths:
        console.print(f"Have {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    return paths


@contextlib.contextmanager
def steps_bar(label, total):
    """A persistent progress bar; yields `advance(note)`, which completes a step."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, note="")
        yield lambda note="": progress.update(task, advance=1, note=note)


@contextlib.contextmanager
def timed(seconds, part):
    """Add the wall time of a block to `seconds`."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def show_scores(title, columns):
    """A table with a column of scores for each classifier in `columns`, a dict."""
    table = Table("", *columns, title=title, title_justify="left")
    for row, field in [
        ("accuracy", "accuracy"),
        ("accuracy, threshold fitted", "calibrated"),
        ("AUC", "auc"),
    ]:
        table.add_row(row, *(f"{getattr(scores, field):.3f}" for scores in columns.values()))
    console.print(table)


def show_seconds(seconds, title="Wall time"):
    """A table of the wall time of each part."""
    table = Table("", "seconds", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for part, duration in seconds.items():
        table.add_row(part, f"{duration:.1f}")
    table.add_row("all", f"{sum(seconds.values()):.1f}", style="bold")
    console.print(table)


def plot_curve(curve, path, held_out, window=10):
    """The loss and the accuracy of each step, and their means over the last `window` steps.

    `held_out` has accuracies on held-out sentences, by their label.
    """
    # White, so that it is also readable on a page with a dark background.
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    steps = np.arange(1, len(curve.losses) + 1)
    for panel, values in zip(panels, curve, strict=True):
        panel.plot(steps, values, ".", color="0.75", label="one step")
        if len(values) >= window:
            mean = np.convolve(values, np.ones(window) / window, "valid")
            panel.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    for color, (name, accuracy) in zip(("C2", "C1"), held_out.items(), strict=True):
        label = f"held out, {name}: {accuracy:.3f}"
        panels[1].axhline(accuracy, color=color, linestyle="--", linewidth=1, label=label)
    panels[0].set(xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    panels[1].set(xlabel="step", ylabel="accuracy", ylim=(None, 1.02))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="small")
    with rc_context({"svg.hashsalt": "lorax"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def show_adapter(folder, results, checks, base, tolerance):
    """Print the saved adapter and its differences from the trained model.

    `results` is the name of the compared outputs. `checks` has the difference of each form of the
    adapter. `base` is the difference of the base model, for comparison. Returns whether all
    differences are within the tolerance.
    """
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    console.print(f"Adapter, for PEFT too: {folder} ({size:.2f} MB)", soft_wrap=True)
    console.print(
        f"Largest difference from the trained model's {results}, relative to the largest: "
        f"{', '.join(f'{form} {distance:.1e}' for form, distance in checks.items())} "
        f"(the base model {base:.1e})",
        soft_wrap=True,
    )
    agree = all(distance <= tolerance for distance in checks.values())  # false for NaN
    if not agree:
        console.print(f"Error: these must agree to {tolerance:g}.")
    return agree
