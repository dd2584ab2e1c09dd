"""Every loader rejects files that are not valid safetensors files."""

import io
import json
import pickle
import struct
import zipfile

import pytest
from untrusted import (
    LOADERS,
    assert_refused,
    rows,
    tensor,
    without,
)

from lorax_io import (
    AdapterFileError,
)


def container(header, data=b"", size=None):
    """The bytes of a safetensors file with an arbitrary header."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def zip_file():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": [1.0]}))
    return file.getvalue()


ZEROS = bytes(8)


NO_FILE = "is not a safetensors file"


TWICE = b'{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "w": %s}'


CONTAINERS = rows(
    ("no bytes", b"", f"{NO_FILE}.*header too small"),
    ("two bytes", b"{}", f"{NO_FILE}.*header too small"),
    ("seven bytes", bytes(7), f"{NO_FILE}.*header too small"),
    ("no header", container(b""), NO_FILE),
    ("header too large", container(b"{}", size=100_000_001), "header too large"),
    ("header of 2^63 bytes", container(b"{}", size=2**63), "header too large"),
    ("header of 2^64-1 bytes", container(b"{}", size=2**64 - 1), "header too large"),
    ("header past the end", container(b"{}", size=3), "invalid header length"),
    ("text", b"a long text, and no tensors in it", "header too large"),
    ("pickle", pickle.dumps({"w": [1.0]}, protocol=2), "is a pickle"),
    ("is a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ("web page", b"<!DOCTYPE html><html>", "is a web page"),
    ("GGUF", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    ("HDF5", b"\x89HDF\r\n", "is an HDF5 file"),
    ("zip, as torch writes it", zip_file(), "is a zip archive"),
    ("not JSON", container(b"{nothing}"), "invalid JSON in header"),
    ("JSON cut short", container(b'{"w": {'), "invalid JSON in header"),
    ("JSON array", container([]), "invalid JSON in header"),
    ("JSON string", container("w"), "invalid JSON in header"),
    ("JSON null", container(None), "invalid JSON in header"),
    ("NUL after the JSON", container(b"{}\0"), "invalid JSON in header"),
    ("two objects", container(b"{}{}"), "invalid JSON in header"),
    ("NaN in the JSON", container(b'{"w": NaN}'), "invalid JSON in header"),
    ("metadata of a number", container({"__metadata__": {"x": 1}}), "invalid JSON in header"),
    ("metadata of objects", container({"__metadata__": {"x": {}}}), "invalid JSON in header"),
    ("metadata is a list", container({"__metadata__": []}), "invalid JSON in header"),
    ("tensor is a number", container({"w": 3}), "invalid JSON in header"),
    ("negative size", container({"w": tensor(shape=(-2,))}, ZEROS), "invalid JSON in header"),
    ("size of a float", container({"w": tensor(shape=(2.0,))}, ZEROS), "invalid JSON in header"),
    ("size of true", container({"w": tensor(shape=(True,))}, ZEROS), "invalid JSON in header"),
    ("size of 2^64", container({"w": tensor(shape=(2**64,))}, ZEROS), "invalid JSON in header"),
    ("negative offset", container({"w": tensor(begin=-8)}, ZEROS), "invalid JSON in header"),
    ("unknown type", container({"w": tensor("F31")}, ZEROS), "invalid JSON in header"),
    ("type in small letters", container({"w": tensor("f32")}, ZEROS), "invalid JSON in header"),
    *(
        (f"no {field}", container({"w": without(tensor(), field)}, ZEROS), "invalid JSON in header")
        for field in ("dtype", "shape", "data_offsets")
    ),
    ("field twice", container(TWICE[:6] + b'{"dtype":"F32","dtype":"F32"}}'), "invalid JSON"),
    ("no UTF-8", container(b'{"\xff": {}}'), "invalid UTF-8 in header"),
    ("lone surrogate", container(b'{"\\ud800": {}}'), "invalid JSON in header"),
    ("data cut short", container({"w": tensor()}, ZEROS[:5]), "not fully covered"),
    ("no data", container({"w": tensor()}), "not fully covered"),
    ("bytes after the data", container({"w": tensor()}, ZEROS + b"0"), "not fully covered"),
    ("bytes after nothing", container({}, b"0"), "not fully covered"),
    ("hole", container({"w": tensor(begin=4, end=12)}, bytes(12)), "invalid offset"),
    ("overlap", container({"w": tensor(), "x": tensor(begin=4, end=12)}, bytes(12)), "offset"),
    ("the same bytes twice", container({"w": tensor(), "x": tensor()}, ZEROS), "offset"),
    ("offsets reversed", container({"w": tensor(begin=8, end=0)}, ZEROS), "invalid offset"),
    ("offset past 2^63", container({"w": tensor(end=2**63)}, ZEROS), NO_FILE),
    ("shape of other size", container({"w": tensor(shape=(3,))}, ZEROS), "invalid shape"),
    ("type of other size", container({"w": tensor("F16")}, ZEROS), "invalid shape"),
    ("size overflows", container({"w": tensor(shape=(2**40, 2**40))}, ZEROS), "overflow"),
    ("bits overflow", container({"w": tensor("F64", (2**61,))}, ZEROS), "overflow"),
    (
        "key twice",
        container(TWICE % b'{"dtype":"U8","shape":[8],"data_offsets":[0,8]}', ZEROS),
        "'w' twice",
    ),
    (
        "metadata twice",
        container(b'{"__metadata__": {}, "__metadata__": {}}'),
        "__metadata__|twice",
    ),
    ("metadata key twice", container(b'{"__metadata__": {"x": "1", "x": "2"}}'), "'x' twice"),
    ("space before the header", container(b" {}"), "does not begin with '{'"),
    ("newline before the header", container(b"\n{}"), "does not begin with '{'"),
    (
        "4-bit floats",
        container({"w": tensor("F4", (16,))}, ZEROS),
        "type F4, which JAX does not have",
    ),
    ("6-bit floats", container({"w": tensor("F6_E2M3", (4,), end=3)}, ZEROS[:3]), "type F6_E2M3"),
    ("deep header", container(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), NO_FILE),
)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("data", "message"), CONTAINERS)
def test_non_safetensors_file_raises(place, loader, data, message):
    (place.weights if loader == "peft" else place.native).write_bytes(data)
    assert_refused(place, loader, AdapterFileError, message)


def test_large_header_with_a_duplicate_key_raises_quickly(place):
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    entries = [entry % (k % 99_999) for k in range(100_000)]
    place.weights.write_bytes(container(b"{" + b",".join(entries) + b"}"))
    assert_refused(place, "peft", AdapterFileError, "'0' twice")
