"""Times training steps with LoRA: ours, hand-written, and with other libraries.

    python benchmarks/bench.py [--workloads NAME …] [--rounds N] [--no-peers]
                               [--no-kinds] [--json FILE] [--plot FILE]

Every round runs each variant once, in random order. A ratio is of two times of the same round, so
that other load on the machine affects both. At the end each kind of adapter is compared with LoRA,
here and in PEFT, as `python benchmarks/kinds.py` prints it.
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
from workloads import WORKLOADS, Lora, Workload

DIFFERENT_WORK = ("floor", "full fine-tuning", "base")  # not compared for equal outputs
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD")


def numbers(out: Any) -> list[np.ndarray]:
    """From the first run: losses or outputs, and the norm of the gradients or other outputs.

    PyTorch returns only the losses or outputs.
    """
    values = np.concatenate([np.ravel(value) for value, *_ in out])
    rest = [getattr(part, "mean", part) for _, *parts in out for part in parts]
    square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(rest))
    return [values, np.array(square**0.5)] if rest else [values]


def check_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Raises unless both compute the same: otherwise their times cannot be compared."""
    for x, y in zip(actual, expected, strict=False):
        # `not error < …` instead of `error >= …`, so that NaN is not the same.
        if x.shape != y.shape or not abs(x - y).max() < 1e-4 * abs(y).max():
            raise NotCompared(f"it computes {x} instead of {y}")


def variants(workload: Workload, peers: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Each variant of a workload, and the error of each that has none."""
    model = workload.model()
    adapted = adapt(model, workload.rank)
    measured = {
        name: variant(program) for name, program in workload.programs(model, adapted).items()
    }
    expected = numbers(measured["hand-written"].run())
    for name, made in measured.items():
        if name not in ("hand-written", *DIFFERENT_WORK):
            check_same(numbers(made.run()), expected)
    errors: dict[str, str] = {}
    for name, peer in known_peers().items() if peers else ():
        try:
            made = peer.make(workload, model, adapted)
            if isinstance(made, Lora):
                peer_variant = variant(workload.program(made, model.batch))
            else:
                peer_variant = Variant(made, {}, None)
            check_same(numbers(peer_variant.run()), expected)
            measured[name] = peer_variant
        except NotCompared as reason:
            errors[name] = str(reason)
        except Exception as error:  # the table shows the peer's own error
            if not raised_inside(error, peer.package):
                raise
            errors[name] = f"`{type(error).__name__}: {str(error).strip().splitlines()[0]}`"
    return measured, errors


def known_peers() -> dict[str, Any]:
    """The other libraries, imported only on request, since they need PyTorch and more."""
    from peers import PEERS

    return PEERS


def raised_inside(error: Exception, package: str) -> bool:
    """Whether a library is in the traceback. Otherwise the error is a mistake in this benchmark."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(f"/site-packages/{package}/" in frame.filename for frame in frames)


MINIMUM_MILLISECONDS = 200  # of one measurement: shorter ones are mostly noise


def page_faults(variant: Variant) -> int:
    """Page faults of a step after the first: memory that the system maps again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(variant.run())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def about() -> dict[str, Any]:
    """The machine and the versions."""
    packages = ("jax", "flax", "qwix", "quax", "peft", "torch", "transformers")
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {
        "versions": {name: installed[name] for name in packages if name in installed},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "environment": {key: os.environ[key] for key in ALLOCATOR_VARIABLES if key in os.environ},
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The measurements of one workload, for the report."""
    measured_variants, errors = variants(WORKLOADS[name], options.peers)
    hand_written = measured_variants["hand-written"]
    times = math.ceil(MINIMUM_MILLISECONDS / step_milliseconds(hand_written))
    runs = {key: partial(step_milliseconds, v, times) for key, v in measured_variants.items()}
    steps = paired(runs, options.rounds)
    traced = {key: v.program for key, v in measured_variants.items() if v.program is not None}
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
            for key, variant in measured_variants.items()
        },
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of steps")
    parser.add_argument("--first-calls", type=int, default=3, help="rounds of first calls")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-kinds", dest="kinds", action="store_false")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="also draw the steps")
    options = parser.parse_args()

    jax.config.update("jax_traceback_filtering", "off")  # for `raised_inside`
    warnings.simplefilter("error", lorax.MaterializeWarning)
    warnings.simplefilter("error", lorax.UnusedAdapterWarning)
    results: dict[str, Any] = {"about": about(), "workloads": {}}
    report.show_about(results["about"])
    for name in options.workloads:
        results["workloads"][name] = measured(name, options)
        report.show_workload(name, results["workloads"][name])
        if options.json:  # after each workload, so that an interrupted run keeps its results
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    report.show_goals(results["workloads"])
    if options.kinds:
        kinds.show(rounds=options.rounds, peer=options.peers)
    if options.plot:
        report.plot(results, options.plot)


if __name__ == "__main__":
    main()
