"""Runs every model, prints the table, and compares it with `wild/expected.json`.

Each model runs in its own process, so that one that crashes or hangs is a row of the table.
"""

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import catalog
from .catalog import Model
from .finding import Finding
from .page import page, table
from .trial import SECONDS
from .verdict import differences, record

PAGE = Path("docs", "wild.md")


def main() -> int:
    """Runs the trials; returns 0 if all results are as expected."""
    parser = argparse.ArgumentParser(prog="nox -s wild --", description=__doc__)
    parser.add_argument("--only", default="", help="the models whose title contains this")
    parser.add_argument(
        "--record", action="store_true", help=f"accept the results, and write {PAGE}"
    )
    options = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 150)

    every = [model for name in catalog.modules() for model in catalog.load(name)]
    models = [model for model in every if options.only.lower() in model.title.lower()]
    findings = run(models, console)
    console.print(table(findings))
    if options.record:
        single = {model.title for model in every if model.single}
        PAGE.write_text(page(record(models, findings), single))
    unexpected = list(differences(models, findings))
    for difference in unexpected:
        console.print(f"✗ {difference}", markup=False, highlight=False, soft_wrap=True)
    as_expected = len(models) - len({difference.title for difference in unexpected})
    faults = sum(model.fault is not None for model in models)
    console.print(f"{as_expected} of {len(models)} models as expected, {faults} with a known fault")
    return 1 if unexpected else 0


def run(models: Sequence[Model], console: Console) -> list[Finding]:
    """Runs all trials, one at a time on each processor."""
    with (
        Progress(console=console, disable=not console.is_terminal) as progress,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("models", total=len(models))

        def run_one(model: Model) -> Finding:
            finding = trial(model)
            mark = f"✗ {finding.fault}" if finding.fault else "✓"
            progress.console.print(
                f"{mark[0]} {model.title}{mark[1:]}", markup=False, soft_wrap=True
            )
            progress.advance(task)
            return finding

        return list(pool.map(run_one, models))


def trial(model: Model) -> Finding:
    """Runs the trial of one model in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "finding.json")
        command = [sys.executable, "-m", "wild.trial", model.title, str(file)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if not file.exists():
            stage = " ".join(process.stdout.split()[-1:]) or "import"
            reason = " ".join(process.stderr.strip().splitlines()[-1:])
            if -process.returncode in (signal.SIGXCPU, signal.SIGKILL):
                reason = f"did not finish in {SECONDS} s"
            return Finding(model.title, model.version, fault=f"{stage}: {reason}")
        return Finding(**json.loads(file.read_text()))


if __name__ == "__main__":
    sys.exit(main())
