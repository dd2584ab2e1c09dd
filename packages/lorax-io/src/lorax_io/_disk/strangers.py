"""Files that are mistaken for adapters, identified by how they begin."""

_BEGINS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a pointer of Git LFS, not the file. Fetch it: `git lfs pull`, or `pull_from_hub`",
    ),
    (
        b"PK\x03\x04",
        "is a zip archive, as torch.save writes it, with a pickle, which may run code and is never "
        "read. Where it is trusted, load it with torch, and save it with safetensors",
    ),
    (
        b"\x80\x02",
        "is a pickle, which may run code and is never read. Where it is trusted, load it with "
        "torch, and save it with safetensors",
    ),
    (
        b"GGUF",
        "is a GGUF file. `load_base` reads one as a base, and so do `lorax merge` and `verify`; an "
        "adapter in GGUF is only written",
    ),
    (
        b"\x89HDF",
        "is an HDF5 file, as Keras writes it; `lorax_io.load_any` reads those of KerasHub",
    ),
    (b"<!DOCTYPE", "is a web page: the download did not give the file"),
    (b"<html", "is a web page: the download did not give the file"),
)


def identified(begin: bytes) -> str | None:
    """The kind of a file with these first bytes, as a clause; None where it is not known."""
    return next((description for mark, description in _BEGINS if begin.startswith(mark)), None)
