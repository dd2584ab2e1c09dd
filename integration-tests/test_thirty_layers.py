"""examples/thirty_layers.py, with small layers."""

import os
import pathlib
import re
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "thirty_layers.py"


def test_it_trains_and_merges():
    command = [sys.executable, "-W", "error", str(PROGRAM), "--dim", "40", "--steps", "4"]
    # A warning, and so an error, if the weights were constants of a program.
    environment = {**os.environ, "JAX_CAPTURED_CONSTANTS_WARN_BYTES": "20000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    (difference,) = re.findall(r"differ by (\S+)", done.stdout)
    assert float(difference) < 1e-5
