"""The two optional parts of this package, `flax` and `torch`, and what to install for each.

Flax models need transformers 4, and PyTorch models are supported with transformers 5, so an
environment can only have one of the parts.
"""

import importlib.metadata
import importlib.util

from lorax import MissingPackageError

# The purpose of each extra, and the modules that it installs.
EXTRAS = {
    "flax": ("the Flax models of transformers 4", ("flax", "transformers")),
    "torch": ("PyTorch modules", ("torch", "torchax")),
}


def need(extra: str) -> None:
    """Raises `MissingPackageError`, with what to install, if packages of an extra are missing."""
    purpose, modules = EXTRAS[extra]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"lorax_hf needs {' and '.join(missing)} for {purpose}: {_install(extra)}",
            name=missing[0],
        )
    if extra == "flax":
        refuse_transformers_5(importlib.metadata.version("transformers"))


def refuse_transformers_5(version: str) -> None:
    """Raises `MissingPackageError` if this version of transformers has no Flax models any more.

    A later `pip install -U transformers` ignores the declared range. Without this check, the error
    would only name a missing class.
    """
    if _major(version) >= 5:
        raise MissingPackageError(
            f"transformers {version} has no Flax models: version 5 removed them. For these, "
            f"{_install('flax')}; PyTorch models need {_install('torch')}",
            name="transformers",
        )


def major(package: str) -> int:
    """The first number of the version of an installed package."""
    return _major(importlib.metadata.version(package))


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _install(extra: str) -> str:
    return f'pip install "lorax-hf[{extra}]"'
