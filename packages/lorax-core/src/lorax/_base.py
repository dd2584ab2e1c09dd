"""A quantized base: labeled arrays, and the format that decodes one entry of each at a time.

All code outside `bases/` handles quantized bases through this file, and names no format.
`QuantizedWeight` is a node of the frozen tree: arrays, format, and the position of its blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, Sharding

from ._arrays import Encoded
from ._axes import normalize
from ._base_format import FORMATS, Blocks, Format, fields_of
from ._coded import CodedArray, array_spec, weight_spec
from ._compat import is_tracer
from ._contract import wide_dtype
from ._errors import ArgumentError, SpecError
from ._formats import register_with_export
from ._statics import is_of, with_tuples
from ._terms import Labels, Term


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Encoded):
    """A weight that is stored as codes and scales: a node of the frozen tree, made by `quantize`.

    Attributes:
        arrays: by name, `codes` with one entry per entry of the weight, where an axis in blocks is
            two axes; `scales`; and further arrays of the format.
        format: the name of the format.
        options: the settings of the format, in order.
        blocks: for each axis in blocks, `(axis, entries per block)`, or
            `(axis, blocks per group, entries per block)`. Axes are counted from the end, −1 being
            the last: so a stack of weights may be made or taken apart one array at a time, along a
            leading axis, as `jax.vmap` and `jax.lax.scan` do.
        along: the axes whose entries share scales, also counted from the end.
        stored: the name of the dtype of the decoded weight.
    """

    arrays: dict[str, Any]
    format: str = dataclasses.field(metadata={"static": True})
    options: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    blocks: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    along: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stored: str = dataclasses.field(metadata={"static": True})

    @property
    def codec(self) -> Format:
        """The format with its settings."""
        cls = FORMATS[self.format]
        return cls(**dict(zip(fields_of(cls), self.options, strict=True)))

    @property
    def dtype(self) -> Any:
        """The dtype of the decoded weight."""
        return jnp.dtype(self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        # codes [in / 64, 64, out] -> (in, out): as many axes of the codes as the axis has parts
        sizes = iter(self.arrays["codes"].shape)
        parts = {d: len(within) for d, *within in self.blocks}
        return tuple(
            math.prod(next(sizes) for _ in range(1 + parts.get(d, 0))) for d in range(-self.ndim, 0)
        )

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        shape = self.arrays["codes"].shape
        ndim = len(shape) - sum(len(within) for _, *within in self.blocks)
        needed = -min((*self.along, *(d for d, *_ in self.blocks)), default=0)
        if ndim < needed:
            raise ArgumentError(
                f"A quantized weight of {needed} axes or more, {self.codec}, has codes of shape "
                f"{tuple(shape)}: its arrays were indexed or mapped along an axis that shares "
                "scales. That is possible for leading axes that share none, such as layers. Index "
                "the weight inside the function that `lora` transforms, or dequantize it."
            )
        return ndim

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return self.arrays["codes"].size

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays; codes of four bits count half a byte."""
        return sum(map(bytes_of, self.arrays.values()))

    @property
    def bits(self) -> float:
        """Bits per entry of the weight, scales included."""
        return 8 * self.nbytes / self.size

    def labels(self) -> tuple[tuple[Labels, ...], dict[str, Labels]]:
        """Returns the labels of each axis of the weight, and those of each array."""
        blocks = self.blocks_of(self.shape)
        labels = self.codec.labels(blocks)
        return blocks.out, {name: labels[name] for name in self.names}

    def checked_labels(self) -> tuple[tuple[Labels, ...], dict[str, Labels]]:
        """Returns the labels of a weight whose arrays fit them.

        Raises:
            ArgumentError: where they do not, as after a cast or a slice of every array of a tree.
                Most such arrays would still broadcast, to other numbers.
        """
        codes = self.arrays["codes"]
        if codes.dtype not in map(jnp.dtype, self.codec.dtypes()):
            raise ArgumentError(
                f"The format {self.format!r} does not have codes in {codes.dtype}. Cast and slice "
                "weights before `quantize`, or inside the function that `lora` transforms."
            )
        out, labels = self.labels()
        for name, axis_labels in labels.items():
            shape, sizes = self.arrays[name].shape, tuple(label.size for label in axis_labels)
            if tuple(shape) != sizes:
                raise ArgumentError(
                    f"{name} has shape {tuple(shape)} and should have {sizes}, in a quantized "
                    f"weight of shape {self.shape}."
                )
        return out, labels

    def blocks_of(self, shape: Sequence[int]) -> Blocks:
        """Returns the labels for a weight of `shape`, which need not be that of its arrays."""
        ndim = len(shape)
        sizes = {d + ndim: within for d, *within in self.blocks}
        return Blocks.of(shape, sizes, tuple(d + ndim for d in self.along))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays, in the order of the format."""
        return tuple(name for name in FORMATS[self.format].arrays if name in self.arrays)

    @property
    def sharding(self) -> Sharding:
        """The sharding of the weight as a whole, derived from that of its codes."""
        codes = self.arrays["codes"]
        sharding = jax.typeof(codes).sharding if is_tracer(codes) else codes.sharding
        if not isinstance(sharding, NamedSharding):
            return sharding
        out, labels = self.labels()
        # An axis of the weight is sharded as the first label of its codes is.
        spec = weight_spec(sharding.spec, out, labels["codes"])
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    def shardings(self, sharding: Sharding) -> dict[str, Sharding]:
        """Returns the sharding of each array for a sharding of the weight.

        An axis in blocks is split between blocks. The arrays may be shapes.
        """
        if not isinstance(sharding, NamedSharding):
            return dict.fromkeys(self.names, sharding)
        mesh, kind = sharding.mesh, sharding.memory_kind
        out, labels = self.labels()
        specs = {name: array_spec(mesh, sharding.spec, out, labels[name]) for name in self.names}
        return {n: NamedSharding(mesh, spec, memory_kind=kind) for n, spec in specs.items()}

    @property
    def committed(self) -> bool:
        """Whether the codes are committed to devices."""
        return getattr(self.arrays["codes"], "committed", False)

    def coded(self, source: Any = None) -> CodedArray:
        """Returns the weight as `lora` evaluates it; `source` names it in messages."""
        out, labels = self.checked_labels()
        names, dtype = self.names, self.dtype
        # As factors with labels, codes and scales are sliced and transposed like a term.
        term = Term(tuple(self.arrays[n] for n in names), tuple(labels[n] for n in names), out)
        sources = () if source is None else (source,)
        return CodedArray(
            term, (), names, self.codec, dtype, (), self.shape, dtype, sources
        )  # fmt: skip

    def array(self) -> jax.Array:
        """The weight as an array of floats."""
        return self.coded().array()

    def settings(self) -> dict[str, Any]:
        """Returns everything but the arrays, as JSON for `quantized_from_settings`.

        There, axes are counted from the start.
        """
        ndim = self.ndim
        return {
            **self.codec.settings(),
            "blocks": [[d + ndim, *within] for d, *within in self.blocks],
            "along": [d + ndim for d in self.along],
            "dtype": self.stored,
        }


register_with_export(QuantizedWeight)


def from_end(
    ndim: int, blocks: Mapping[int, Sequence[int]], along: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Returns the blocks and the axes that share scales as `QuantizedWeight` has them."""
    rows = tuple((d - ndim, *within) for d, within in sorted(blocks.items()))
    return rows, tuple(d - ndim for d in along)


def bytes_of(leaf: Any) -> int:
    """Returns the bytes of an array or a quantized weight; four-bit codes count half a byte."""
    if isinstance(leaf, QuantizedWeight):
        return leaf.nbytes
    bits = 8 * leaf.dtype.itemsize  # also of a PRNG key
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        bits = jnp.iinfo(leaf.dtype).bits
    return math.ceil(bits * math.prod(leaf.shape) / 8)


def blank_of(path: str, base: Any, along: Sequence[int], format: Format) -> QuantizedWeight:
    """Returns a quantized weight without arrays, for an array or its shape."""
    shape = tuple(base.shape)
    along = normalize(path, len(shape), "along", along)
    blocks = format.blocks(path, shape, along)
    _check_parts(path, base, blocks)
    options = tuple(getattr(format, name) for name in fields_of(format))
    rows, axes = from_end(len(shape), blocks, along)
    return QuantizedWeight({}, format.name, options, rows, axes, base.dtype.name)


def _check_parts(path: str, base: Any, blocks: Mapping[int, Sequence[int]]) -> None:
    """Raises if sharding over explicit mesh axes would cut a block.

    Over automatic axes, such codes are replicated instead; for explicit axes, that would change the
    sharding in the type that the function was written for.
    """
    is_shape = isinstance(base, jax.ShapeDtypeStruct)
    sharding = base.sharding if is_shape else jax.typeof(base).sharding
    if not isinstance(sharding, NamedSharding):
        return
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # The mesh axes that each axis of the weight is split over.
    split = dict(enumerate(sharding.spec))
    for d, within in blocks.items():
        entry = split.get(d) or ()
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(name for name in names if kinds[name] is AxisType.Explicit)
        parts = math.prod(mesh.shape[name] for name in names)
        size, block = base.shape[d], math.prod(within)
        if size // block % parts == 0:
            continue
        part = size // parts
        raise SpecError(
            f"`{path}` has shape {tuple(base.shape)}, and its axis {d} is {parts} parts of {part} "
            f"over the explicit mesh axis {', '.join(map(repr, names))}, which blocks of {block} "
            f"do not divide. Give it a block that divides {part}, a format without blocks such as "
            f"Int8(), or None; or reshard it so that axis {d} is whole."
        )


def quantized_from_settings(
    settings: Mapping[str, Any], arrays: Mapping[str, Any]
) -> QuantizedWeight:
    """Returns a quantized weight from validated settings and arrays.

    Args:
        settings: a JSON object, which may come from an untrusted file.
        arrays: by name; or their shapes, as `jax.ShapeDtypeStruct`.

    Returns:
        The weight.

    Raises:
        ValueError, TypeError, KeyError: if these are not the settings and arrays of one.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import quantize
        >>> from lorax.bases import quantized_from_settings
        >>> weight = quantize({"w": jnp.ones((64, 3))}, {"w": "nf4"})["w"]
        >>> quantized_from_settings(weight.settings(), weight.arrays).shape
        (64, 3)
    """
    given = dict(settings)
    # Unknown names raise KeyError, as documented.
    cls = FORMATS[given.pop("format")]
    blocks, along, dtype = (with_tuples(given.pop(key)) for key in ("blocks", "along", "dtype"))
    if not is_of(blocks, tuple[tuple[int, ...], ...]) or not is_of(along, tuple[int, ...]):
        raise ArgumentError(
            f"A quantized weight cannot have blocks={blocks!r} and along={along!r}."
        )
    names = fields_of(cls)
    if given.keys() != names.keys():
        raise ArgumentError(f"The format {cls.name!r} needs exactly the settings {sorted(names)}.")
    for name, hint in names.items():
        if not is_of(given[name], hint):
            raise ArgumentError(f"The format {cls.name!r} cannot have {name}={given[name]!r}.")
    options = tuple(given[name] for name in names)
    format = cls(**given)  # checks them
    # Aliases such as "f4" would make settings of equal weights differ.
    if jnp.dtype(dtype).name != dtype or not jnp.issubdtype(jnp.dtype(dtype), jnp.inexact):
        raise ArgumentError(f"A quantized weight cannot have dtype={dtype!r}.")
    # (axis, entries) or (axis, blocks per group, entries)
    if not all(len(row) in (2, 3) and min(row[1:]) > 0 for row in blocks):
        raise ArgumentError(f"A quantized weight cannot have blocks={blocks}.")
    axes = [d for d, *_ in blocks]
    ndim = len(arrays["codes"].shape) - sum(len(row) - 1 for row in blocks)
    if not all(0 <= d < ndim for d in (*along, *axes)) or len(set(axes)) < len(axes):
        raise ArgumentError(
            f"A weight of {ndim} axes cannot have blocks={blocks} and along={along}."
        )
    blocks, along = from_end(ndim, {d: within for d, *within in blocks}, along)
    weight = QuantizedWeight(dict(arrays), cls.name, options, blocks, along, dtype)
    weight.checked_labels()
    if (made := _arrays_of(weight)) != set(arrays):
        raise ArgumentError(
            f"A weight in {format} has the arrays {sorted(made)}, and these are {sorted(arrays)}."
        )
    for name in weight.names:
        is_shape = isinstance(arrays[name], jax.ShapeDtypeStruct)
        if not is_shape and not format.are_numbers(name, arrays[name]):
            raise ArgumentError(f"`{name}` has entries that are not finite.")
    return weight


def _arrays_of(weight: QuantizedWeight) -> set[str]:
    """Returns the names of the arrays that the format of a weight makes."""
    encode = _encoder(jax.tree.structure(dataclasses.replace(weight, arrays={})), weight.shape)
    return set(jax.eval_shape(encode, jax.ShapeDtypeStruct(weight.shape, weight.dtype)))


def as_base(base: Any, source: Any = None) -> Any:
    """Returns a base as adapters take it: a quantized weight becomes a `CodedArray`."""
    return base.coded(source) if isinstance(base, QuantizedWeight) else base


def decoded(base: Any) -> Any:
    """Returns a base as an array, sharded like its codes; any other leaf is returned unchanged."""
    if not isinstance(base, QuantizedWeight):
        return base
    if isinstance(base.arrays["codes"], jax.ShapeDtypeStruct):
        return _shape_of(base.shape, base.dtype, base.sharding)
    return _decode(base)


@jax.jit
def _decode(weight: QuantizedWeight) -> jax.Array:
    return weight.array()


def first_array(base: Any) -> Any:
    """Returns the array of a base, or the codes of a quantized one."""
    return base.arrays["codes"] if isinstance(base, QuantizedWeight) else base


def check_finite(path: str, array: Any) -> None:
    """Raises for entries that are not finite; those of shapes and tracers are unknown."""
    if is_tracer(array) or isinstance(array, jax.ShapeDtypeStruct):
        return
    # One reduction: a NaN or an infinity anywhere makes the maximum not finite.
    if not bool(jnp.isfinite(jnp.max(jnp.abs(jnp.asarray(array))))):
        raise SpecError(
            f"`{path}` has entries that are not finite, and a block with such an entry has no "
            "scale. Repair the weight, or leave it as floats."
        )


def encoded(weight: QuantizedWeight, array: Any) -> QuantizedWeight:
    """Returns the weight with the codes and scales of `array`, sharded as the array is.

    For a shape, returns the shapes of codes and scales.
    """
    blank = jax.tree.structure(dataclasses.replace(weight, arrays={}))
    encode = _encoder(blank, tuple(array.shape))
    options: dict[str, Any] = {}
    # While tracing, the compiler places the codes.
    sharding = None if is_tracer(array) else getattr(array, "sharding", None)
    is_shape = isinstance(array, jax.ShapeDtypeStruct)
    if isinstance(sharding, NamedSharding) or is_shape:
        # The shardings depend on the arrays that the format makes, so their shapes are found first.
        shapes = jax.eval_shape(encode, jax.ShapeDtypeStruct(array.shape, array.dtype))
        if sharding is not None:
            where = dataclasses.replace(weight, arrays=shapes).shardings(sharding)
            options["out_shardings"] = where
            shapes = {n: _shape_of(x.shape, x.dtype, where[n]) for n, x in shapes.items()}
        if is_shape:
            return dataclasses.replace(weight, arrays=shapes)
    return dataclasses.replace(weight, arrays=jax.jit(encode, **options)(array))


@functools.lru_cache(maxsize=1024)
def _encoder(blank: Any, shape: tuple[int, ...]) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns one function for all weights of these settings and this shape, to compile it once.

    Args:
        blank: the tree structure of a quantized weight without arrays.
        shape: the shape of the weight.
    """
    weight: QuantizedWeight = jax.tree.unflatten(blank, ())
    blocks = weight.blocks_of(shape)
    labels = weight.codec.labels(blocks)

    def encode(array: jax.Array) -> dict[str, jax.Array]:
        entries, axis = array.astype(wide_dtype(array.dtype)), 0
        for group in blocks.out:  # one axis after the other, as explicit meshes require
            if len(group) > 1:
                sizes = [label.size for label in group]
                # […, in, …] -> […, in / block, block, …]
                entries = entries.reshape(*entries.shape[:axis], *sizes, *entries.shape[axis + 1 :])
            axis += len(group)
        # within: the axes that share a scale; across: the axes that share an outer scale.
        within, across = (
            tuple(k for k, label in enumerate(blocks.codes) if label not in kept)
            for kept in (blocks.scales, blocks.outer)
        )
        arrays = weight.codec.encode(entries, within, across)
        return {name: _without(x, blocks.codes, labels[name]) for name, x in arrays.items()}

    return encode


def _shape_of(shape: Any, dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _without(array: jax.Array, codes: Labels, labels: Labels) -> jax.Array:
    """Removes the axes of size one whose labels an array lacks."""
    # [in / 64, 1, out] -> [in / 64, out]
    return jnp.squeeze(array, [k for k, label in enumerate(codes) if label not in labels])
