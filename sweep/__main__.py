"""Runs every model, each in its own process, and writes the table.

python -m sweep [--only TEXT] [--record]
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

# Imported before the processes are forked, since importing takes longer than most models. JAX
# itself is only used after the fork, which its threads would not survive.
import jax
import peft  # noqa: F401
import torch
import transformers

from lorax_hf._torch import _function  # noqa: F401
from lorax_hf._torch._importing import missing_overloads_allowed

from .finding import Finding
from .models import titles
from .page import record, summary
from .trial import try_model

with missing_overloads_allowed():
    import torchax.tensor  # noqa: F401

SECONDS = 120  # time limit for one model
RESULTS = Path("sweep", "results.json")


def main() -> int:
    """Runs the models; returns 0 if no result is worse than recorded."""
    parser = argparse.ArgumentParser(prog="nox -s sweep-torch --", description=__doc__)
    parser.add_argument("--only", default="", help="the models whose title contains this")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    parser.add_argument(
        "--again", action="store_true", help="only models with a fault or a large error"
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    known = _read()
    findings: dict[str, Finding] = {}
    for title in titles():
        if options.only in title and not (options.again and _is_good(known.get(title))):
            findings[title] = _in_a_process(title)
            print(summary(findings[title]), flush=True)
            if options.record:
                _write({**known, **findings})
    if options.record:
        record({**known, **findings})
        return 0
    worse = [t for t, f in findings.items() if t in known and _is_worse(f, known[t])]
    for title in worse:
        print(f"worse than recorded: {title}: {summary(known[title])}")
    return 1 if worse else 0


def _is_good(finding: Finding | None) -> bool:
    if finding is None or finding.fault or finding.axes_differ:
        return False
    return finding.not_in_peft != "" or (finding.peft or 0) <= 1e-4


def _is_worse(new: Finding, old: Finding) -> bool:
    if new.fault or old.fault:
        return bool(new.fault) and not old.fault
    errors = [(getattr(new, name), getattr(old, name)) for name in ("forward", "merged", "peft")]
    compared = [(x, y) for x, y in errors if x is not None and y is not None]
    larger = any(x > 10 * y + 1e-5 for x, y in compared)
    return larger or new.factored < old.factored


def _in_a_process(title: str) -> Finding:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, title))
    process.start()
    sender.close()
    try:
        timeout = f"did not finish in {SECONDS} s"
        return receiver.recv() if receiver.poll(SECONDS) else Finding(title, timeout)
    except EOFError:
        process.join()
        return Finding(title, f"the process exited with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(connection: object, title: str) -> None:
    os.nice(10)
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finding = try_model(title)
    connection.send(finding)


def _read() -> dict[str, Finding]:
    if not RESULTS.exists():
        return {}
    return {row["title"]: Finding(**row) for row in json.loads(RESULTS.read_text())}


def _write(findings: dict[str, Finding]) -> None:
    rows = [dataclasses.asdict(findings[title]) for title in titles() if title in findings]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
