"""The cells of the matrix, for `nox.parametrize`."""

import sys
from typing import Any, NamedTuple

import nox

PACKAGES = ["lorax-core", "lorax-hf", "lorax-io"]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"  # the Python that nox runs on
OLDEST_PYTHON, NEWEST_PYTHON = "3.11", "3.13"
PYTHONS = sorted({OLDEST_PYTHON, "3.12", NEWEST_PYTHON, HERE}, key=lambda v: int(v.split(".")[1]))

# The newest JAX in uv.lock for a Python version, and the oldest that a package allows.
JAX = ["newest", "floor"]
CPU = "cpu"
ACCELERATORS = ["cuda12", "cuda13", "tpu"]

ARGUMENTS = "package, backend, python, jax"

# The part of lorax-hf that needs PyTorch. pip installs it, since uv would install the CUDA build.
# The pinned PyTorch has a CPU build for one Python version.
WITH_TORCH = "lorax-hf[torch]"


class Cell(NamedTuple):
    """One combination, in the order of `ARGUMENTS`."""

    package: str
    backend: str
    python: str
    jax: str

    @property
    def name(self) -> str:
        """The arguments in the session's name, without defaults.

        `lorax-core`, `lorax-core, 3.12, floor`, `lorax-io, tpu`.
        """
        defaults = (CPU, HERE, JAX[0])
        return ", ".join(part for part in self if part not in defaults)

    @property
    def session(self) -> str:
        """The name of the session that runs this cell."""
        if self.package == WITH_TORCH:
            return "torch"
        return f"{'tests' if self.backend == CPU else 'accelerator'}({self.name})"

    @property
    def is_default(self) -> bool:
        """Whether plain `nox` runs this cell."""
        if self.package == WITH_TORCH:
            return True
        newest, floor = JAX
        here = (self.python, self.jax) == (HERE, newest)
        if self.backend != CPU:
            return here and self.package == "lorax-core" and self.backend in ("cuda13", "tpu")
        # The models of transformers are slow, and the session `peft` also runs them on this Python.
        here = here and self.package != "lorax-hf"
        return here or (self.python, self.jax) in {(HERE, floor), (NEWEST_PYTHON, newest)}

    def param(self) -> Any:
        """The cell as a parameter of a nox session."""
        tags = [self.backend, self.jax, "matrix", *(["default"] if self.is_default else [])]
        return nox.param(*self, id=self.name, tags=tags)


CELLS = [
    Cell(package, backend, python, jax)
    for backend in [CPU, *ACCELERATORS]
    for package in PACKAGES
    for jax in JAX
    for python in PYTHONS
] + [Cell(WITH_TORCH, CPU, OLDEST_PYTHON, JAX[0])]
