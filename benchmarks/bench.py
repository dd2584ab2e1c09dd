"""Training steps with LoRA: ours beside LoRA written by hand, and beside other libraries.

    python benchmarks/bench.py [--works NAME …] [--rounds N] [--no-peers]
                               [--json FILE] [--plot FILE]

Every round runs each variant once, one right after the other, and a ratio is of two times of the
same round: what else the machine does then weighs on both.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import lorax
import report
from adapted import adapt
from counts import compiled, count, first_call, paired, residual_bytes
from steps import NotCompared
from works import WORKS, Program, Work


class Variant(NamedTuple):
    """One row: what is counted, and how it is run."""

    run: Callable[[], Any]
    counts: dict[str, float]
    program: Program | None  # none of PyTorch


def variant(program: Program) -> Variant:
    """Compiled, and counted over all of its calls."""
    first = program.calls[0]
    executable = compiled(program.fn, *first)
    counts: dict[str, float] = count(executable)._asdict()
    counts["flops"] *= len(program.calls)
    if program.loss is not None:
        factors = getattr(first[0], "factors", first[0])
        counts["residual_bytes"] = residual_bytes(program.loss, factors, *first[1:])
    return Variant(lambda: [executable(*args) for args in program.calls], counts, program)


def numbers(out: Any) -> np.ndarray:
    """The losses, and the size of their gradients, of a training step; or the outputs."""
    calls = [(value, getattr(rest, "mean", rest)) for value, rest in out]
    square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves([rest for _, rest in calls]))
    return np.array([*np.ravel([value for value, _ in calls]), square**0.5])


def variants(work: Work, peers: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Each variant of a work, and why there is none of some."""
    model = work.model()
    adapted = adapt(model, work.rank)
    found = {name: variant(program) for name, program in work.programs(model, adapted).items()}
    wanted = numbers(found["by hand"].run())
    for name in ("ours", "by hand, flat", "ours, in turn", "by hand, in turn"):
        if name in found:
            same(numbers(found[name].run()), wanted)
    errors: dict[str, str] = {}
    for name, make in peer_steps().items() if peers and work.peers else ():
        try:
            made = make(model, adapted, work.rank)
            found[name] = variant(made) if isinstance(made, Program) else Variant(made, {}, None)
            out = found[name].run()
            same(np.array([out]) if made is found[name].run else numbers(out), wanted)
        except NotCompared as reason:
            found.pop(name, None)
            errors[name] = str(reason)
        except Exception as error:  # whatever a peer says is what the table shows
            found.pop(name, None)
            errors[name] = f"`{type(error).__name__}: {str(error).strip().splitlines()[0]}`"
    return found, errors


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Times mean nothing unless all compute the same. PyTorch says only its loss."""
    wanted = wanted[: len(found)]
    if not np.all(np.abs(found - wanted) < 1e-4 * np.abs(wanted)):
        raise NotCompared(f"it computes {found} instead of {wanted}")


def peer_steps() -> dict[str, Callable[..., Any]]:
    """Imported only where they are asked for: they need PyTorch and more."""
    from peers import PEERS

    return PEERS


def step_milliseconds(variant: Variant) -> float:
    start = time.perf_counter()
    jax.block_until_ready(variant.run())
    return 1e3 * (time.perf_counter() - start)


def page_faults(variant: Variant) -> int:
    """Of a step that is not the first: memory that the system hands out anew, page by page."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(variant.run())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def about() -> dict[str, Any]:
    """The machine and the versions."""
    wanted = ("jax", "flax", "qwix", "quax", "peft", "torch", "transformers")
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {
        "versions": {name: installed[name] for name in wanted if name in installed},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def processor() -> str:
    """As Linux names it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A work, for the report."""
    found, errors = variants(WORKS[name], options.peers)
    every_step = {key: partial(step_milliseconds, variant) for key, variant in found.items()}
    steps = paired(every_step, options.rounds + 1)
    traced = {key: variant.program for key, variant in found.items() if variant.program is not None}
    calls = {key: partial(first_call, made.fn, *made.calls[0]) for key, made in traced.items()}
    firsts = paired(calls, options.first_calls)
    return {
        "variants": {
            key: {
                **variant.counts,
                "page_faults": page_faults(variant),
                "step_ms": steps[key][1:],  # the first round warms up
                "trace_ms": [1e3 * seconds.trace for seconds in firsts.get(key, [])],
                "first_call_ms": [1e3 * seconds.call for seconds in firsts.get(key, [])],
            }
            for key, variant in found.items()
        },
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15, help="of steps")
    parser.add_argument("--first-calls", type=int, default=3, help="rounds of first calls")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="also draw the steps")
    options = parser.parse_args()

    warnings.simplefilter("error", lorax.MaterializeWarning)
    warnings.simplefilter("error", lorax.UnusedAdapterWarning)
    found: dict[str, Any] = {"about": about(), "works": {}}
    report.show_about(found["about"])
    for name in options.works:
        found["works"][name] = measured(name, options)
        report.show_work(name, found["works"][name])
        if options.json:  # after each: a long run that is cut short leaves what it has
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    report.show_goals(found["works"])
    if options.plot:
        report.plot(found, options.plot)


if __name__ == "__main__":
    main()
