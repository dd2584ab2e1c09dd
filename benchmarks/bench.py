"""Training steps with LoRA: ours beside hand-written LoRA, and beside other libraries.

    python benchmarks/bench.py [--works NAME …] [--rounds N] [--no-peers]
                               [--no-kinds] [--json FILE] [--plot FILE]

Every round runs each variant, in a random order, and a ratio is of two times of the same round:
what else the machine does then weighs on both. At the end each kind of adapter is compared with
LoRA, here and in PEFT, as `python benchmarks/kinds.py` prints it.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import traceback
import warnings
from functools import partial
from typing import Any

import jax
import numpy as np

import kinds
import lorax
import report
from adapted import adapt
from counts import first_call, paired
from steps import NotCompared
from variants import Variant, step_milliseconds, variant
from works import WORKS, Lora, Work

OTHERS = ("floor", "full fine-tuning", "base")  # they compute something else
OF_MEMORY = ("GLIBC_TUNABLES", "LD_PRELOAD")  # who hands it out, and how


def numbers(out: Any) -> list[np.ndarray]:
    """Of the first run: the losses, or outputs, and the size of the gradients, or other outputs.

    PyTorch gives only the former.
    """
    values = np.concatenate([np.ravel(value) for value, *_ in out])
    rest = [getattr(part, "mean", part) for _, *parts in out for part in parts]
    square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(rest))
    return [values, np.array(square**0.5)] if rest else [values]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Times mean nothing unless all compute the same."""
    for x, y in zip(found, wanted, strict=False):
        # Not `error > …`: whatever is not a number is not the same.
        if x.shape != y.shape or not abs(x - y).max() < 1e-4 * abs(y).max():
            raise NotCompared(f"it computes {x} instead of {y}")


def variants(work: Work, peers: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Each variant of a work, and why there is none of some."""
    model = work.model()
    adapted = adapt(model, work.rank)
    found = {name: variant(program) for name, program in work.programs(model, adapted).items()}
    wanted = numbers(found["hand-written"].run())
    for name, made in found.items():
        if name not in ("hand-written", *OTHERS):
            same(numbers(made.run()), wanted)
    errors: dict[str, str] = {}
    for name, peer in known_peers().items() if peers else ():
        try:
            made = peer.make(work, model, adapted)
            if isinstance(made, Lora):
                of_peer = variant(work.program(made, model.batch))
            else:
                of_peer = Variant(made, {}, None)
            same(numbers(of_peer.run()), wanted)
            found[name] = of_peer
        except NotCompared as reason:
            errors[name] = str(reason)
        except Exception as error:  # whatever a peer says is what the table shows
            if not passed_through(error, peer.package):
                raise
            errors[name] = f"`{type(error).__name__}: {str(error).strip().splitlines()[0]}`"
    return found, errors


def known_peers() -> dict[str, Any]:
    """Imported only where they are asked for: they need PyTorch and more."""
    from peers import PEERS

    return PEERS


def passed_through(error: Exception, package: str) -> bool:
    """Whether a library was at work when the error came: a mistake in here is not theirs."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(f"/site-packages/{package}/" in frame.filename for frame in frames)


AT_LEAST = 200  # milliseconds of a measurement: a shorter one is mostly what else the machine does


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
        "environment": {key: os.environ[key] for key in OF_MEMORY if key in os.environ},
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
    times = math.ceil(AT_LEAST / step_milliseconds(found["hand-written"]))
    every_step = {key: partial(step_milliseconds, made, times) for key, made in found.items()}
    steps = paired(every_step, options.rounds)
    traced = {key: variant.program for key, variant in found.items() if variant.program is not None}
    calls = {key: partial(first_call, made.fn, *made.calls[0]) for key, made in traced.items()}
    firsts = paired(calls, options.first_calls)
    return {
        "variants": {
            key: {
                **variant.counts,
                "page_faults": page_faults(variant),
                "step_ms": steps[key],
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
    parser.add_argument("--no-kinds", dest="kinds", action="store_false")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="also draw the steps")
    options = parser.parse_args()

    jax.config.update("jax_traceback_filtering", "off")  # who was at work is in the traceback
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
    if options.kinds:
        kinds.show(rounds=options.rounds, peer=options.peers)
    if options.plot:
        report.plot(found, options.plot)


if __name__ == "__main__":
    main()
