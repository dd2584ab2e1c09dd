"""Two and four processes, connected over the loopback interface, agree with one process."""

import contextlib
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import worker

PROGRAM = pathlib.Path(worker.__file__)
SECONDS = 300  # time limit, after which processes are assumed to hang
GRACE = 3  # seconds for the other processes to print their errors after one has failed
# The devices sum in a different order. Relative to the largest entry of each array.
TOLERANCE = 1e-4


@contextlib.contextmanager
def free_port():
    """A port that stays reserved until the coordinator listens on it, as gRPC reuses ports."""
    with socket.socket() as end:
        if hasattr(socket, "SO_REUSEPORT"):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        end.bind(("127.0.0.1", 0))
        yield end.getsockname()[1]


def run_processes(program, count, home, *, seconds=SECONDS):
    """Runs `program PROCESS COUNT PORT HOME` for every process. Errors contain their outputs.

    If one fails or they hang, all are killed.
    """
    codes, outputs = [], [""]
    for _ in range(3):
        with free_port() as port:
            codes, outputs = _run_once(program, count, port, home, seconds)
        # JAX's coordinator may crash with this message, regardless of the processes.
        if "Failed to add port to server" not in outputs[0]:
            break
    report = "\n".join(
        f"== process {k}, which {'was killed' if code is None else f'ended with {code}'}\n{output}"
        for k, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    assert codes == [0] * count, report


def _run_once(program, count, port, home, seconds):
    files = [home / f"output of process {k}.txt" for k in range(count)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    start = functools.partial(subprocess.Popen, env=environment, stderr=subprocess.STDOUT)
    running = []
    try:
        for k, file in enumerate(files):
            arguments = map(str, (program, k, count, port, home))
            with file.open("w") as output:
                running.append(start([sys.executable, "-W", "error", *arguments], stdout=output))
        failed, deadline = False, time.monotonic() + seconds
        while None in (codes := [process.poll() for process in running]):
            if any(codes) and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return codes, [file.read_text() for file in files]


def read_file(file):
    with safetensors.safe_open(file, "numpy") as opened:
        return safetensors.numpy.load_file(file), opened.metadata()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_agree_with_one(count, tmp_path):
    several, one = tmp_path / "several", tmp_path / "one"
    for home in (several, one):
        home.mkdir()
    expected = worker.run(worker.setting_for(count), one)
    run_processes(PROGRAM, count, several)
    for k in range(count):
        losses = json.loads((several / f"losses of process {k}.json").read_text())
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    for file in ("adapter", "folder/adapter_model.safetensors"):
        actual, header = read_file(several / file)
        tensors, expected_header = read_file(one / file)
        assert header == expected_header and actual.keys() == tensors.keys()
        for key, y in tensors.items():
            assert actual[key].dtype == y.dtype
            atol = TOLERANCE * np.abs(y).max()
            np.testing.assert_allclose(actual[key], y, rtol=0, atol=atol)
    config = "folder/adapter_config.json"
    assert (several / config).read_bytes() == (one / config).read_bytes()


SLEEPING = """
import sys, time
print("process", sys.argv[1], "has printed", flush=True)
if sys.argv[1] == "1": {}
time.sleep(600)
"""


@pytest.mark.parametrize("code", ["pass", "sys.exit(3)"], ids=["hang", "failure"])
def test_hang_raises_with_the_output_of_every_process(code, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SLEEPING.format(code))
    with pytest.raises(AssertionError) as error:
        run_processes(program, 2, tmp_path, seconds=4)
    for k in range(2):
        assert f"process {k} has printed" in str(error.value)
    assert ("process 1, which ended with 3" in str(error.value)) == (code != "pass")
