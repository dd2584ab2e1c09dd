"""GGUF model files, read by the `gguf` package: the codes and scales in each type of block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax import Int4, Int8
from lorax.bases import Affine, Format

from .._disk.files import regular_file
from .._errors import AdapterFileError, AdapterMismatchError, warn
from .._formats.llama_cpp import half_order, import_gguf
from .._places import Array
from .._tree import suggestion
from .codings import Coded, Decoded
from .codings.coding import Part

FLOAT32 = np.dtype(np.float32)


class Block(NamedTuple):
    """A type of block: the format of `lorax.bases` that decodes it, and how to unpack its bytes.

    Attributes:
        format: decodes the arrays.
        arrays: unpacks bytes `[…, blocks, bytes]` to arrays by name, each with the entries of a
            block along its last axis.
        grains: for each array, how many entries of the weight share one of its entries.
        dtypes: the dtype of each array.
    """

    format: Format
    arrays: Callable[[Array], dict[str, Array]]
    grains: dict[str, int]
    dtypes: dict[str, Any]


HALF = np.dtype(np.float16)
BYTE = np.dtype(np.uint8)


def _half(data: Array) -> Array:
    """Pairs of bytes as float16."""
    return np.ascontiguousarray(data).view(np.float16)


def _in_order(data: Array) -> Array:
    """The 4-bit codes of a block: the low halves of all bytes, then the high halves."""
    return np.concatenate([data & 15, data >> 4], -1)


def _q8_0(data: Array) -> dict[str, Array]:
    return {
        "codes": np.ascontiguousarray(data[..., 2:]).view(np.int8),
        "scales": _half(data[..., :2]),
    }


def _q4_0(data: Array) -> dict[str, Array]:
    return {"codes": _in_order(data[..., 2:]) ^ 8, "scales": _half(data[..., :2])}


def _q4_1(data: Array) -> dict[str, Array]:
    scales, mins = _half(data[..., :2]), _half(data[..., 2:4])
    return {"codes": _in_order(data[..., 4:]), "scales": scales, "mins": mins}


def _q5_0(data: Array) -> dict[str, Array]:
    codes = _in_order(data[..., 6:]) | _bits(data[..., 2:6]) << 4
    return {"codes": codes.view(np.int8) - np.int8(16), "scales": _half(data[..., :2])}


def _q5_1(data: Array) -> dict[str, Array]:
    codes = _in_order(data[..., 8:]) | _bits(data[..., 4:8]) << 4
    return {"codes": codes, "scales": _half(data[..., :2]), "mins": _half(data[..., 2:4])}


def _bits(data: Array) -> Array:
    return np.unpackbits(data, axis=-1, bitorder="little")


def _scales_of_k(data: Array) -> dict[str, Array]:
    """The 6-bit scales and minimums in a block of 256 entries, and the block's two outer scales."""
    low, mid, high = (data[..., 4 + 4 * k : 8 + 4 * k] for k in range(3))
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], -1)
    mins = np.concatenate([mid & 63, high >> 4 | mid >> 2 & 48], -1)
    outer, outer_mins = _half(data[..., :2]), -_half(data[..., 2:4])
    return {"scales": scales, "outer": outer, "mins": mins, "outer_mins": outer_mins}


def _runs(data: Array) -> Array:
    """The codes of each run of 32 bytes: the low halves of its bytes, then the high halves."""
    return _in_order(data.reshape(*data.shape[:-1], -1, 32)).reshape(*data.shape[:-1], -1)


def _q4_k(data: Array) -> dict[str, Array]:
    return {"codes": _runs(data[..., 16:]), **_scales_of_k(data)}


def _q5_k(data: Array) -> dict[str, Array]:
    planes = data[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    high = planes.reshape(*data.shape[:-1], 256)
    return {"codes": _runs(data[..., 48:]) | high << 4, **_scales_of_k(data)}


def _q6_k(data: Array) -> dict[str, Array]:
    low = data[..., :128].reshape(*data.shape[:-1], 2, 1, 64)
    low = (low >> np.array([[0], [4]], np.uint8) & 15).reshape(*data.shape[:-1], 256)
    high = data[..., 128:192].reshape(*data.shape[:-1], 2, 1, 32)
    high = (high >> np.array([[0], [2], [4], [6]], np.uint8) & 3).reshape(*data.shape[:-1], 256)
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(data[..., 192:208]).view(np.int8)
    return {"codes": codes, "scales": scales, "outer": _half(data[..., 208:])}


_ONE = {"codes": 1, "scales": 32}
_TWO = _ONE | {"mins": 32}
_K = _TWO | {"outer": 256, "outer_mins": 256}
_HALVES = {"scales": HALF, "mins": HALF}
_BYTES = {"scales": BYTE, "mins": BYTE, "outer": HALF, "outer_mins": HALF}
_SIGNED = {"codes": np.dtype(np.int8), "scales": np.dtype(np.int8), "outer": HALF}

BLOCKS: dict[str, Block] = {
    "Q8_0": Block(Int8(32), _q8_0, _ONE, _HALVES | {"codes": np.dtype(np.int8)}),
    "Q4_0": Block(Int4(32), _q4_0, _ONE, _HALVES | {"codes": jnp.int4}),
    "Q4_1": Block(Affine(), _q4_1, _TWO, _HALVES | {"codes": jnp.uint4}),
    "Q5_0": Block(Int8(32), _q5_0, _ONE, _HALVES | {"codes": np.dtype(np.int8)}),
    "Q5_1": Block(Affine(bits=8), _q5_1, _TWO, _HALVES | {"codes": BYTE}),
    "Q4_K": Block(Affine(group=8), _q4_k, _K, _BYTES | {"codes": jnp.uint4}),
    "Q5_K": Block(Affine(group=8, bits=8), _q5_k, _K, _BYTES | {"codes": BYTE}),
    "Q6_K": Block(
        Affine(16, group=16, bits=8, minimum=False),
        _q6_k, {"codes": 1, "scales": 16, "outer": 256}, _SIGNED,
    ),
}  # fmt: skip
"""The types that keep their codes, by llama.cpp's names. The codes of 5 and 6 bits take 8."""

PLAIN: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F64": np.float64,
}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one of GGUF."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class GGUFSource:
    """The tensors of a GGUF file, found by the names of transformers' modules."""

    def __init__(self, path: Path) -> None:
        gguf = import_gguf()
        self.path = path
        try:
            reader = gguf.GGUFReader(regular_file(path))
            self._fields = reader.fields
            self._is_swapped = reader.byte_order != "I"
            self.arch = self._fields["general.architecture"].contents()
            self.names = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # gguf raises errors of many types for a damaged file
            raise AdapterFileError(f"is not a readable GGUF file ({error}).") from error
        self._heads = self.field(f"{self.arch}.attention.head_count")
        self._kv_heads = self.field(f"{self.arch}.attention.head_count_kv", self._heads)
        self.used: set[str] = set()
        self.layers = self.field(f"{self.arch}.block_count", 1)
        self._check_counts()
        arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch), None)
        if arch is None:
            raise AdapterFileError(
                f"has the architecture {self.arch!r}, which the gguf package does not know."
            )
        self._known = gguf.get_tensor_name_map(arch, self.layers)

    def _check_counts(self) -> None:
        if self._is_swapped:
            raise AdapterFileError(
                "is of another byte order than this machine. Convert a copy first: "
                "`gguf-convert-endian copy.gguf native`."
            )
        if type(self.layers) is not int or not 0 <= self.layers <= _MOST_LAYERS:
            raise AdapterFileError(f"has block_count = {self.layers!r}, not a count of layers.")
        parts = self.field("split.count", 1)
        if parts != 1:
            raise AdapterFileError(
                f"is one of {parts} parts of a model. Join them first: `llama-gguf-split --merge`."
            )

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key; `default` if the file does not have it."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except Exception as error:  # as above
            raise AdapterFileError(f"has a `{key}` that cannot be read ({error}).") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, in the order of transformers."""
        return tuple(int(n) for n in reversed(self.names[name].shape))

    def floats(self, name: str, rows: slice = slice(None)) -> Array:
        """Rows of a tensor by llama.cpp's own name, decoded to float32 or wider."""
        tensor, shape = self.names[name], self.shape(name)
        order, kind = self._order(name, shape), tensor.tensor_type.name
        picked = rows if order is None else order[rows]
        if kind in PLAIN:
            values = tensor.data.view(np.dtype(PLAIN[kind])).reshape(shape)[picked]
            values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
            added = self._added(name).astype(values.dtype)
            return values - added if added else values
        if len(shape) == 1:
            return import_gguf().dequantize(tensor.data, tensor.tensor_type).reshape(shape)[picked]
        data = tensor.data.reshape(*shape[:-1], -1)[picked]
        return import_gguf().dequantize(data, tensor.tensor_type).reshape(-1, *shape[1:])

    def find(self, module: str, parameter: str) -> Coded | Decoded | Part | None:
        """A weight by its name in transformers or in llama.cpp; None if there is none."""
        name = self.name_of(module, parameter)
        if name not in self.names:
            return None
        self.used.add(name)
        tensor, shape = self.names[name], self.shape(name)
        kind = tensor.tensor_type.name
        order = self._order(name, shape)
        if kind in PLAIN:
            dtype = np.dtype(PLAIN[kind])
            values = tensor.data.view(dtype).reshape(shape)
            added = self._added(name).astype(dtype)
            read = lambda rows: values[rows if order is None else order[rows]]  # noqa: E731
            shifted = lambda rows: read(rows) - added if added else read(rows)  # noqa: E731
            return Part(shifted, (1,) * len(shape), shape, dtype)
        if kind in BLOCKS and len(shape) > 1:
            return _coded(name, BLOCKS[kind], tensor.data, shape, order)
        why = f"blocks of {kind} are not those of a format"
        return Decoded((name,), why, lambda rows: self.floats(name, rows), shape, FLOAT32)

    def name_of(self, module: str, parameter: str) -> str:
        """The name in the file, if `gguf` has one for that of transformers."""
        own = f"{module}.{parameter}" if module else parameter
        if own in self.names:
            return own
        known = self._known.get_name(own, try_suffixes=(".weight", ".bias"))
        return own if known is None else known

    def _added(self, name: str) -> np.float32:
        """What llama.cpp's converter has added to each entry of a tensor."""
        is_norm = name.endswith("norm.weight")
        return np.float32(is_norm and self.arch in _NORMS_PLUS_ONE)

    def warn_of_changes(self) -> None:
        """Warns if the converter may have changed the weights of this architecture."""
        if self.arch not in _PERMUTED | _NORMS_PLUS_ONE | _UNCHANGED:
            warn(
                f"is of the architecture {self.arch!r}. llama.cpp's converter may have changed its "
                "weights, such as the order of rows or the values of norms, and they are read as "
                "they are in the file. Compare the outputs with those of the original model."
            )

    def _order(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """The order of the file's rows in transformers; None if it is the same.

        llama.cpp stores the two rows of a rotated pair of q or k next to each other.
        """
        is_q, is_k = ".attn_q." in name, ".attn_k." in name
        if not (is_q or is_k) or self.arch not in _PERMUTED:
            return None
        heads = self._heads if is_q else self._kv_heads
        if not shape or type(heads) is not int or heads < 1 or shape[0] % (2 * heads):
            raise AdapterMismatchError(f"has `{name}` of shape {shape}, and {heads} heads.")
        return half_order(np.arange(shape[0]), heads)

    def lacking(self, name: str) -> str:
        """A sentence for the error: the weight is not in the file."""
        known = self.name_of(*name.rpartition(".")[::2])
        called = "" if known == name else f" (`{known}`)"
        return f"has no tensor for `{name}`{called}.{suggestion(known, self.names)}"


_MOST_LAYERS = 2**12
# The architectures for which llama.cpp's converter permutes the rows of q and k.
_PERMUTED = frozenset("llama granite granitemoe granitehybrid arcee".split())
# Those for which it adds 1 to the scales of norms.
_NORMS_PLUS_ONE = frozenset("gemma gemma2 gemma3 nemotron".split())
# Those of whose weights it changes nothing but the names.
_UNCHANGED = frozenset("qwen2 qwen2moe qwen3 qwen3moe phi3 stablelm starcoder2".split())


def _coded(
    name: str, block: Block, data: Array, shape: tuple[int, ...], order: Array | None
) -> Coded:
    """The codes of a tensor `[…, inputs]`; `order` permutes its rows if it is not None."""
    entries = max(block.grains.values())
    data = data.reshape(*shape[:-1], shape[-1] // entries, -1)

    def part(key: str) -> Part:
        def read(rows: slice) -> Array:
            blocks = data[rows if order is None else order[rows]]
            return block.arrays(np.asarray(blocks))[key].reshape(*blocks.shape[:-2], -1)

        grain = block.grains[key]
        inner = (*shape[:-1], shape[-1] // grain)
        return Part(read, (*(1,) * (len(shape) - 1), grain), inner, block.dtypes[key])

    parts = {key: part(key) for key in block.grains}
    return Coded((name,), block.format, parts, shape, FLOAT32)
