"""Detects the interpreters and accelerators of this machine."""

import functools
import pathlib
import shutil
import subprocess

from .cells import HERE

# The oldest driver for each CUDA version, from NVIDIA's table of minor version compatibility.
OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
GOOGLE = "0x1ae0"  # the vendor of a TPU on the PCI bus


@functools.cache
def missing_python(python: str) -> str | None:
    """The reason why a Python version cannot be used, or None."""
    if python == HERE:
        return None
    command = f"python{python}"
    if shutil.which(command) is None:
        return f"{command} is not on the path"
    # pyenv has a shim on the path for each installed version, but runs only the selected ones.
    if _output(command, "--version") is None:
        return f"{command} is on the path but does not run"
    return None


@functools.cache
def missing_device(backend: str) -> str | None:
    """The reason why programs cannot run on a backend here, or None."""
    return _missing_tpu() if backend == "tpu" else _missing_gpu(OLDEST_DRIVER[backend])


def _missing_tpu() -> str | None:
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    if any(vendor.read_text().strip() == GOOGLE for vendor in vendors):
        return None
    return "no TPU on the PCI bus"


def _missing_gpu(oldest: int) -> str | None:
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not drivers:
        return "nvidia-smi finds no GPU"
    driver = drivers.splitlines()[0]
    if int(driver.split(".")[0]) < oldest:
        return f"the GPU's driver is {driver}, but {oldest} or newer is needed"
    return None


def _output(*command: str) -> str | None:
    """The output of a command, or None if it is missing or fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
