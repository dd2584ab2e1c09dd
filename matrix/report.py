"""Prints which cells of the matrix ran, which did not, and why.

python -m matrix.report
"""

import collections

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import records
from .cells import ACCELERATORS, CELLS, CPU, HERE, Cell
from .devices import missing_device, missing_python

MARK = {"passed": "[green]✓[/]", "failed": "[red]✗[/]"}


def entry(cell: Cell | None) -> str:
    """The text of a cell in the table. A backend may not have a cell, which is None."""
    if cell is None:
        return "[dim]–[/]"
    record = records.read(cell.session)
    if record is None:
        return "[dim]no Python[/]" if missing_python(cell.python) else "[dim]not run[/]"
    if record["outcome"] == "skipped":
        return "[dim]skipped[/]"
    counts = ", ".join(f"{n} {outcome}" for outcome, n in record["counts"].items() if n)
    return f"{MARK[record['outcome']]} {record['did']}: {counts or record['outcome']}"


def reasons() -> dict[str, int]:
    """The reasons why cells did not run, and the number of cells for each."""
    by_reason: dict[str, int] = collections.Counter()
    for cell in CELLS:
        record, reason = records.read(cell.session), missing_python(cell.python)
        if record is None:
            hint = "not requested (`nox -t matrix` runs all)"
            by_reason[f"skipped: {reason}" if reason else f"not run: {hint}"] += 1
        elif record["outcome"] == "skipped":
            by_reason[f"skipped: {record['reason']}"] += 1
    return by_reason


def main() -> None:
    """Print the table and the reasons."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title="The matrix, by the last run of each cell")
    for heading in ("package", "Python", "JAX", CPU, *ACCELERATORS):
        table.add_column(heading)
    rows: dict[tuple[str, str, str], dict[str, Cell]] = collections.defaultdict(dict)
    for cell in CELLS:
        rows[cell.package, cell.python, cell.jax][cell.backend] = cell
    for (package, python, jax), row in rows.items():
        records_of_row = [record for cell in row.values() if (record := records.read(cell.session))]
        versions = sorted({record["jax"] for record in records_of_row if record["jax"]})
        label = f"{jax} ({', '.join(versions)})" if versions else jax
        entries = [entry(row.get(backend)) for backend in (CPU, *ACCELERATORS)]
        table.add_row(escape(package), python, label, *entries)  # an extra has brackets
    console.print(table)
    for backend in ACCELERATORS:
        reason = missing_device(backend)
        mode = f"{reason}: programs are compiled for one" if reason else "tests run on the device"
        console.print(f"{backend}: {mode}")
    for reason, count in reasons().items():
        console.print(f"{count} cells {reason}")
    console.print(f"Names of cells omit the defaults: Python {HERE}, the newest JAX, and the CPU.")


if __name__ == "__main__":
    main()
