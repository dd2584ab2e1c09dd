"""Identifies files of other formats by their first bytes, for error messages."""

_BEGINS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the file itself. Fetch it: `git lfs pull`, or `pull_from_hub`",
    ),
    (
        b"PK\x03\x04",
        "is a zip archive, as torch.save writes it, with a pickle, which may run code and is "
        "never read. If you trust it, load it with torch, and save it with safetensors",
    ),
    (
        b"\x80\x02",
        "is a pickle, which may run code and is never read. If you trust it, load it with torch, "
        "and save it with safetensors",
    ),
    (
        b"GGUF",
        "is a GGUF file. `load_base`, `lorax merge` and `lorax verify` read GGUF files of base "
        "models; adapters can only be written as GGUF",
    ),
    (
        b"\x89HDF",
        "is an HDF5 file, as Keras writes it; `lorax_io.load_any` reads those of KerasHub",
    ),
    (b"<!DOCTYPE", "is a web page, not the file: the download failed"),
    (b"<html", "is a web page, not the file: the download failed"),
)


def identified(begin: bytes) -> str | None:
    """The kind of a file with these first bytes, as a clause; None if it is not known."""
    return next((description for mark, description in _BEGINS if begin.startswith(mark)), None)
