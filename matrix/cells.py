"""The cells of the matrix, for `nox.parametrize`."""

import sys
from typing import Any, NamedTuple

import nox

PACKAGES = ["lorax-core", "lorax-hf", "lorax-io"]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"  # the Python that nox runs on
OLDEST_PYTHON, NEWEST_PYTHON = "3.11", "3.13"
PYTHONS = sorted({OLDEST_PYTHON, "3.12", NEWEST_PYTHON, HERE}, key=lambda v: int(v.split(".")[1]))

# The newest JAX that uv.lock has for a Python, and the oldest that a package says it works with.
JAX = ["newest", "floor"]
CPU = "cpu"
ACCELERATORS = ["cuda12", "cuda13", "tpu"]

ARGUMENTS = "package, backend, python, jax"

# The part of lorax-hf that needs PyTorch, which pip installs: uv would take the build with CUDA.
# There is a CPU build of the pinned PyTorch for one Python.
WITH_TORCH = "lorax-hf[torch]"


class Cell(NamedTuple):
    """One combination, in the order of `ARGUMENTS`."""

    package: str
    backend: str
    python: str
    jax: str

    @property
    def name(self) -> str:
        """What is in the brackets of the session's name, without the defaults.

        `lorax-core`, `lorax-core, 3.12, floor`, `lorax-io, tpu`.
        """
        silent = (CPU, HERE, JAX[0])
        return ", ".join(part for part in self if part not in silent)

    @property
    def session(self) -> str:
        """The name of the session that runs it."""
        if self.package == WITH_TORCH:
            return "torch"
        return f"{'tests' if self.backend == CPU else 'accelerator'}({self.name})"

    @property
    def is_default(self) -> bool:
        """Whether plain `nox` runs it."""
        if self.package == WITH_TORCH:
            return True
        newest, floor = JAX
        here = (self.python, self.jax) == (HERE, newest)
        if self.backend != CPU:
            return here and self.package == "lorax-core" and self.backend in ("cuda13", "tpu")
        # All models of transformers take long, and `peft` runs them here as well.
        here = here and self.package != "lorax-hf"
        return here or (self.python, self.jax) in {(HERE, floor), (NEWEST_PYTHON, newest)}

    def param(self) -> Any:
        """Itself, as nox takes it."""
        tags = [self.backend, self.jax, "matrix", *(["default"] if self.is_default else [])]
        return nox.param(*self, id=self.name, tags=tags)


CELLS = [
    Cell(package, backend, python, jax)
    for backend in [CPU, *ACCELERATORS]
    for package in PACKAGES
    for jax in JAX
    for python in PYTHONS
] + [Cell(WITH_TORCH, CPU, OLDEST_PYTHON, JAX[0])]
