"""Which transformers this package can work with."""

import importlib.metadata


def check_transformers(installed: str | None = None) -> None:
    """Raises `ImportError` if transformers is too new to hold Flax models.

    An installer keeps to the range that this package declares, but one `pip install -U
    transformers` later the models are gone, and the error then names a class and not the reason.

    Args:
        installed: The version to judge; by default the one that is installed.

    Example:
        >>> import lorax_hf
        >>> lorax_hf.check_transformers()
        >>> lorax_hf.check_transformers("5.0.0")
        Traceback (most recent call last):
        ...
        ImportError: transformers 5.0.0 holds no Flax models: version 5 removed them. ...
    """
    version = installed or importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) >= 5:
        declared = importlib.metadata.requires("lorax-hf") or []
        wanted = next(r for r in declared if r.startswith("transformers"))
        raise ImportError(
            f"transformers {version} holds no Flax models: version 5 removed them."
            f' Install an older one: pip install "{wanted}"'
        )
