"""examples/thirty_layers.py, with small layers."""

import os
import pathlib
import re
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "thirty_layers.py"


def test_example_trains_and_merges():
    command = [sys.executable, "-W", "error", str(PROGRAM), "--dim", "40", "--steps", "4"]
    # JAX warns, which is an error here, if a program has its weights as constants.
    environment = {**os.environ, "JAX_CAPTURED_CONSTANTS_WARN_BYTES": "20000"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    losses = [float(number) for number in re.findall(r"loss (\S+)", process.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    (difference,) = re.findall(r"differ by (\S+)", process.stdout)
    assert float(difference) < 1e-5
