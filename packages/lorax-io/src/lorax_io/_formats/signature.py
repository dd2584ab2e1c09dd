"""The mark of lorax-io in the metadata of the files that it writes."""

import importlib.metadata
from collections.abc import Mapping

VERSION = "lorax.version"


def signature() -> dict[str, str]:
    """Metadata that names the version of lorax-io, as strings; other libraries ignore it."""
    return {VERSION: importlib.metadata.version("lorax-io")}


def written_by(metadata: Mapping[str, str]) -> str | None:
    """The version of lorax-io that wrote a file with this metadata; None for other programs."""
    if VERSION not in metadata:
        return None
    return f"lorax-io {metadata[VERSION]}"
