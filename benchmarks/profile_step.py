"""Where a training step's time goes, in JAX and in PEFT on PyTorch.

    python benchmarks/profile_step.py [--steps N] [--no-peers]

The operations of each are sorted into products with weights, other products, and the rest. What an
adapter adds is found by its scope `lora` in JAX, and is among the others in PyTorch.
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
from works import WORKS, Program

# What JAX calls an operation that XLA may fuse with others or rename.
PRODUCTS = ("dot_general", "conv_general_dilated")


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """The opcode of each instruction of a compiled program, and the source that it comes from."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?(\S+) = .*?\s([a-z][a-z-]*)\(", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if match:
            found[match[1]] = match[2], scope[1] if scope else ""
    return found


def kind(scope: str) -> str:
    """What a row of the table collects."""
    product = scope.endswith(PRODUCTS)
    if "lora" in scope:
        return "adapters: products" if product else "adapters: the rest"
    return "products" if product else "the rest"


def in_jax(program: Program, steps: int) -> Mapping[str, float]:
    """Milliseconds of a step that all threads together spend in each kind."""
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
                        continue  # what is within has its own events
                    spent[kind(scope)] += event.duration_ns / 1e6 / steps
    return spent


def in_torch(step: Any, steps: int) -> Mapping[str, float]:
    """The same of PyTorch, in which an operation of an adapter does not have another name."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    spent: dict[str, float] = collections.Counter()
    for event in found.key_averages():
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        spent["products" if product else "the rest"] += event.self_cpu_time_total / 1e3 / steps
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORKS, default="GPT")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    options = parser.parse_args()

    work = WORKS[options.work]
    model = work.model()
    adapted = adapt(model, work.rank)
    programs = work.programs(model, adapted)
    columns = {
        name: in_jax(programs[name], options.steps)
        for name in ("ours", "hand-written", "hand-written, flat", "floor")
        if name in programs
    }
    if options.peers:
        from peers import PEERS

        run = PEERS["PEFT on torch"].make(work, model, adapted)
        columns["PEFT on torch"] = in_torch(run, options.steps)
    table = Table(title=f"{options.work}: ms of a step, by operation", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    kinds = ("products", "the rest", "adapters: products", "adapters: the rest")
    for row in kinds:
        table.add_row(row, *(f"{spent.get(row, 0):.1f}" for spent in columns.values()))
    table.add_section()
    table.add_row("together", *(f"{sum(spent.values()):.1f}" for spent in columns.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
