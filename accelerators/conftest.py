"""Which platform the programs are compiled for, and the table of what came out."""

import pathlib
import sys
from typing import NamedTuple

import pytest

HERE = pathlib.Path(__file__).parent
# For `targets` and its neighbors, and for the models that the benchmarks have.
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

from compiling import Facts  # noqa: E402
from targets import TARGETS, mesh_of  # noqa: E402


class Row(NamedTuple):
    """One program, compiled twice."""

    target: str
    name: str
    ours: Facts
    theirs: Facts


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption("--platform", choices=("tpu", "cuda"), required=True)


def pytest_configure(config):
    config.stash[ROWS] = []
    config.addinivalue_line("markers", "every_target: not for the first chip of a platform alone")


def pytest_generate_tests(metafunc):
    """A test that takes a `target` is run for the first one of the platform, or for `@every`."""
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
    """Puts a program into the table at the end."""

    def add(name, ours, theirs):
        request.config.stash[ROWS].append(Row(target, name, ours, theirs))

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    say = terminalreporter.write_line
    terminalreporter.section("bytes of one device, and ratios to what each is compared with")
    say(f"{'target':8} {'program':44} {'peak':>12} {'arguments':>12} {'temp':>12} {'ratio of':>8}")
    say(f"{'':8} {'':44} {'':12} {'':12} {'':12} {'peak':>8} {'FLOPs':>6}  collectives")
    for row in rows:
        ours, theirs = row.ours, row.theirs
        flops = f"{ours.flops / theirs.flops:6.3f}" if ours.flops and theirs.flops else "     –"
        moves = ", ".join(f"{n} {kind}" for kind, n in ours.collectives.items()) or "none"
        say(
            f"{row.target:8} {row.name:44} {ours.peak:12,} {ours.arguments:12,} {ours.temp:12,} "
            f"{ours.peak / max(theirs.peak, 1):8.3f} {flops}  {moves}"
        )
