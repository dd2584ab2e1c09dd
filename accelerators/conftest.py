"""The option `--platform`, and the table of results."""

import pathlib
import sys
from typing import NamedTuple

import pytest

HERE = pathlib.Path(__file__).parent
# For the modules of this folder, and the models of the benchmarks.
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

from compiling import Facts  # noqa: E402
from targets import TARGETS, mesh_of  # noqa: E402


class Row(NamedTuple):
    """One program, compiled twice."""

    target: str
    name: str
    ours: Facts
    baseline: Facts


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption("--platform", choices=("tpu", "cuda"), required=True)


def pytest_configure(config):
    config.stash[ROWS] = []
    config.addinivalue_line(
        "markers", "every_target: run for every chip of a platform, not only for the first"
    )


def pytest_generate_tests(metafunc):
    """Runs a test for the first target of the platform, or with `every_target` for each one."""
    if "target" in metafunc.fixturenames:
        platform = metafunc.config.getoption("platform")
        names = [name for name, target in TARGETS.items() if target.platform == platform]
        every = metafunc.definition.get_closest_marker("every_target")
        metafunc.parametrize("target", names if every else names[:1], scope="session")


@pytest.fixture(scope="session")
def mesh(target):
    return mesh_of(TARGETS[target])


@pytest.fixture
def report(request, target):
    """Adds a program to the table that is printed at the end."""

    def add(name, ours, baseline):
        request.config.stash[ROWS].append(Row(target, name, ours, baseline))

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("bytes of one device, and ratios to the baseline")
    write(
        f"{'target':8} {'program':44} {'peak':>12} {'arguments':>12} {'temp':>12} {'ratio of':>8}"
    )
    write(f"{'':8} {'':44} {'':12} {'':12} {'':12} {'peak':>8} {'FLOPs':>6}  collectives")
    for row in rows:
        ours, baseline = row.ours, row.baseline
        flops = f"{ours.flops / baseline.flops:6.3f}" if ours.flops and baseline.flops else "     –"
        moves = ", ".join(f"{n} {kind}" for kind, n in ours.collectives.items()) or "none"
        write(
            f"{row.target:8} {row.name:44} {ours.peak:12,} {ours.arguments:12,} {ours.temp:12,} "
            f"{ours.peak / max(baseline.peak, 1):8.3f} {flops}  {moves}"
        )
