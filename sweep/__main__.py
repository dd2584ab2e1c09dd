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

# Before the processes are forked: importing takes longer than most models. JAX itself is first used
# in each of them, since its threads do not survive a fork.
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

SECONDS = 120  # of one model, past which it does not end
RESULTS = Path("sweep", "results.json")


def main() -> int:
    """The exit status: 0 where every model is as it was recorded."""
    parser = argparse.ArgumentParser(prog="nox -s sweep-torch --", description=__doc__)
    parser.add_argument("--only", default="", help="the models whose title contains this")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    parser.add_argument("--again", action="store_true", help="those with a fault alone")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    known = _read()
    findings: dict[str, Finding] = {}
    for title in titles():
        if options.only in title and not (options.again and _is_well(known.get(title))):
            findings[title] = _in_a_process(title)
            print(summary(findings[title]), flush=True)
            if options.record:
                _write({**known, **findings})
    if options.record:
        record({**known, **findings})
        return 0
    worse = [t for t, f in findings.items() if t in known and _is_worse(f, known[t])]
    for title in worse:
        print(f"not as recorded: {title}: {summary(known[title])}")
    return 1 if worse else 0


def _is_well(finding: Finding | None) -> bool:
    if finding is None or finding.fault or finding.unlike:
        return False
    return finding.no_peft != "" or (finding.peft or 0) <= 1e-4


def _is_worse(found: Finding, known: Finding) -> bool:
    if found.fault or known.fault:
        return bool(found.fault) and not known.fault
    errors = [
        (getattr(found, name), getattr(known, name)) for name in ("forward", "merged", "peft")
    ]
    compared = [(new, old) for new, old in errors if new is not None and old is not None]
    grown = any(new > 10 * old + 1e-5 for new, old in compared)
    return grown or found.factored < known.factored


def _in_a_process(title: str) -> Finding:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, title))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else Finding(title, f"does not end in {SECONDS} s")
    except EOFError:
        process.join()
        return Finding(title, f"the process ends with {process.exitcode}")
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
