"""The two optional parts of this package, and what to install for each.

The Flax models ended with transformers 4, and the PyTorch models are followed in transformers 5, so
that one environment has one part.
"""

import importlib.metadata
import importlib.util

# What each extra is for, and the modules that it brings.
EXTRAS = {
    "flax": ("the Flax models of transformers 4", ("flax", "transformers")),
    "torch": ("PyTorch modules", ("torch", "torchax")),
}


def need(extra: str) -> None:
    """Raises `ImportError`, with what to install, unless the packages of an extra are there."""
    purpose, modules = EXTRAS[extra]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"lorax_hf needs {' and '.join(missing)} for {purpose}: {_install(extra)}",
            name=missing[0],
        )
    if extra == "flax":
        refuse_transformers_5(importlib.metadata.version("transformers"))


def refuse_transformers_5(version: str) -> None:
    """Raises `ImportError` where a version of transformers is too new to hold Flax models.

    An installer keeps to the declared range, but one `pip install -U transformers` later the models
    are gone, and the error would name a class instead of the reason.
    """
    if _major(version) >= 5:
        raise ImportError(
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
