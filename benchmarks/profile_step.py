"""Profiles a training step in JAX and in PEFT on PyTorch, by kind of operation.

    python benchmarks/profile_step.py [--steps N] [--no-peers]

Operations are grouped into products and the rest. In JAX, the operations that an adapter adds are
recognized by their scope `lora`; in PyTorch, they are counted with the others.
"""

import argparse
import collections
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from adapted import adapt
from counts import compiled
from workloads import WORKLOADS, Program

# JAX's names of products. XLA may rename an operation or fuse it with others.
PRODUCTS = ("dot_general", "conv_general_dilated")


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """The opcode and the scope of each instruction of a compiled program."""
    by_name = {}
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?(\S+) = .*?\s([a-z][a-z-]*)\(", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if match:
            by_name[match[1]] = match[2], scope[1] if scope else ""
    return by_name


def kind(scope: str) -> str:
    """The row of the table to which an operation belongs."""
    product = scope.endswith(PRODUCTS)
    if "lora" in scope:
        return "adapters: products" if product else "adapters: the rest"
    return "products" if product else "the rest"


def in_jax(program: Program, steps: int) -> Mapping[str, float]:
    """Milliseconds per step in each kind of operation, summed over threads."""
    executable = compiled(program.fn, *program.calls[0])
    known = instructions(executable.as_text())
    run = lambda: jax.block_until_ready(executable(*program.calls[0]))  # noqa: E731
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    spent: dict[str, float] = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in known:
                    opcode, scope = known[event.name]
                    if opcode in ("call", "while", "conditional"):
                        continue  # the operations inside have their own events
                    spent[kind(scope)] += event.duration_ns / 1e6 / steps
    return spent


def in_torch(step: Any, steps: int) -> Mapping[str, float]:
    """The same for PyTorch, where operations of an adapter cannot be told from others."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    spent: dict[str, float] = collections.Counter()
    for event in profiled.key_averages():
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        spent["products" if product else "the rest"] += event.self_cpu_time_total / 1e3 / steps
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="GPT")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    options = parser.parse_args()

    workload = WORKLOADS[options.workload]
    model = workload.model()
    adapted = adapt(model, workload.rank)
    programs = workload.programs(model, adapted)
    columns = {
        name: in_jax(programs[name], options.steps)
        for name in ("ours", "hand-written", "hand-written, flat", "floor")
        if name in programs
    }
    if options.peers:
        from peers import PEERS

        run = PEERS["PEFT on torch"].make(workload, model, adapted)
        columns["PEFT on torch"] = in_torch(run, options.steps)
    table = Table(
        title=f"{options.workload}: milliseconds per step, by operation", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    kinds = ("products", "the rest", "adapters: products", "adapters: the rest")
    for row in kinds:
        table.add_row(row, *(f"{spent.get(row, 0):.1f}" for spent in columns.values()))
    table.add_section()
    table.add_row("total", *(f"{sum(spent.values()):.1f}" for spent in columns.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
