"""`quantize` and `dequantize`: convert a tree of weights to few bits, and back."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._adapter import adapter_from_settings
from ._base import QuantizedWeight, blank_of, check_finite, decoded, encoded
from ._base_format import Format, format_of
from ._compat import is_tracer
from ._errors import ArgumentError, PairError, SpecError, UnquantizedWarning, a_kind
from ._frozen_weight import FrozenWeight, base_and_frozen_factors, factors_from_base
from ._infer import roles_of
from ._pair import flatten_params, has_adapters
from ._sharding import placement
from ._spec import Pattern, matches, shown, some


def quantize(
    params: Any,
    formats: Any,
    /,
    *,
    fn: Any = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    where: Pattern | None = None,
    tables: bool = False,
) -> Any:
    """Quantizes the weights of parameters or of the frozen tree of a pair.

    `lora` accepts such a tree as the frozen one, with or without adapters. A weight is decoded in
    the equation that reads it, and again in the backward pass.

    With one format for all weights, `fn` is traced to find the weights of products and convolutions
    and their input axes, along which blocks run. Norms, biases and positions are left unchanged.

    Args:
        params: the parameters, or the frozen tree of `init_lora`. For a `jax.ShapeDtypeStruct`, the
            shapes of codes and scales are returned.
        formats: a format, such as `NF4(block=64)`, or its name: "int8", "int4", "nf4", "fp8" or
            "mxfp4". Or a tree of these with the structure of `params`, where None leaves a leaf
            unchanged.
        fn: the model, a function whose first argument is the parameters.
        args: the other arguments of `fn`; arrays may be `jax.ShapeDtypeStruct`.
        kwargs: the keyword arguments of `fn`.
        where: with one format for all weights, a filter on paths: a glob, a compiled regular
            expression or a callable.
        tables: with one format for all weights, whether lookup tables are quantized as well:
            embeddings, and a head tied to one. Their blocks run along each row.

    Returns:
        The tree with a `QuantizedWeight` in place of each weight, sharded as the weight was. An
        axis in blocks is split between blocks.

    Raises:
        SpecError: if a format does not fit a leaf of a tree of formats, or is not one; if a
            weight is quantized already, or has entries that are not finite; if this JAX or this
            backend lacks a dtype; if nothing is found.
        ArgumentError: if one format is given for all, and no `fn`; if `where` or `tables` is
            given with a tree of formats; if an argument has a wrong type.

    Warns:
        UnquantizedWarning: names weights of products that are left unchanged because blocks do not
            divide them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import quantize
        >>> model = lambda params, x: x @ params["w"] + params["b"]
        >>> params = {"w": jnp.ones((128, 8), jnp.bfloat16), "b": jnp.zeros(8, jnp.bfloat16)}
        >>> frozen = quantize(params, "nf4", fn=model, args=(jnp.ones((2, 128), jnp.bfloat16),))
        >>> frozen["w"].arrays["codes"].shape, frozen["b"].shape
        ((2, 64, 8), (8,))
    """
    if has_adapters(params):
        raise PairError("quantize takes parameters or a frozen tree, and this one has adapters.")
    _check_arguments(fn, args, kwargs)
    leaves, structure = flatten_params(params)
    bases = [(path, base_and_frozen_factors(leaf)[0]) for path, leaf in leaves]
    roles = None
    if fn is not None:
        # Traced on the bases, whether or not some of them are quantized already.
        roles = roles_of(fn, bases, structure, tuple(args), dict(kwargs or {}))
    if isinstance(formats, str | Format):
        blanks = _everywhere(bases, format_of(formats), roles, where, tables)
    else:
        if where is not None or tables:
            option = "where" if where is not None else "tables"
            raise ArgumentError(
                f"quantize: `{option}` selects weights if one format is given for all. A tree of "
                "formats selects them itself: None leaves a weight as it is."
            )
        blanks = _by_leaf(bases, structure, formats, roles)
    made: dict[Any, QuantizedWeight] = {}
    out: list[Any] = []
    for (_, leaf), (path, base), blank in zip(leaves, bases, blanks, strict=True):
        if blank is None:
            out.append(leaf)
            continue
        key = (id(base), jax.tree.structure(blank))  # An array at two paths is quantized once.
        if key not in made:
            _check(path, base, blank)
            made[key] = encoded(blank, base)
        quantized = made[key]
        out.append(_on_base(leaf, quantized) if isinstance(leaf, FrozenWeight) else quantized)
    return jax.tree.unflatten(structure, out)


def _check_arguments(fn: Any, args: Any, kwargs: Any) -> None:
    if fn is not None and not callable(fn):
        raise ArgumentError(f"quantize: `fn` must be a function, not {a_kind(fn)}.")
    # An array is a sequence of its rows, and not of arguments.
    if not isinstance(args, list | tuple):
        raise ArgumentError(
            "quantize: `args` must be a tuple of the other arguments of `fn`, not "
            f"{a_kind(args)}. For one argument, write `args=(x,)`."
        )
    if not isinstance(kwargs, Mapping | None):
        raise ArgumentError(
            f"quantize: `kwargs` must be a dict of keyword arguments of `fn`, not {a_kind(kwargs)}."
        )


def dequantize(tree: Any) -> Any:
    """Returns the tree with an array in place of each quantized weight.

    Args:
        tree: parameters, or the frozen tree of a pair.

    Returns:
        The tree; leaves that were not quantized are the same objects.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import Int8, dequantize, quantize
        >>> frozen = quantize({"w": jnp.full((4, 2), 127.0)}, {"w": Int8()})
        >>> dequantize(frozen)["w"].tolist()[0]
        [127.0, 127.0]
    """
    leaves, structure = flatten_params(tree)

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, FrozenWeight):
            return dataclasses.replace(leaf, base=decoded(leaf.base))
        return decoded(leaf)

    return jax.tree.unflatten(structure, [plain(leaf) for _, leaf in leaves])


def _on_base(leaf: FrozenWeight, base: QuantizedWeight) -> FrozenWeight:
    """Returns the leaf with a quantized base; factors derived from the base are recomputed.

    The norms of DoRA are such factors: the norms of the original floats would rescale every output.
    """
    factors = dict(leaf.factors)
    if leaf.settings:
        adapter = adapter_from_settings(json.loads(leaf.settings))
        traced = any(map(is_tracer, jax.tree.leaves((base, factors))))
        where = {} if traced else {name: placement(old) for name, old in factors.items()}
        derived = factors_from_base(adapter, base, where)
        for name in factors.keys() & derived.keys():
            factors[name] = derived[name].astype(factors[name].dtype)
    return dataclasses.replace(leaf, base=base, factors=factors)


def _everywhere(
    bases: Sequence[tuple[str, Any]], format: Format, roles: Any, where: Any, tables: bool
) -> list[QuantizedWeight | None]:
    """Returns blanks for one format on every weight of a product."""
    if roles is None:
        raise ArgumentError(
            "With one format for all weights, quantize needs `fn` and `args` to find the "
            "weights. Without a function, pass a tree of formats."
        )
    blanks: list[QuantizedWeight | None] = []
    reasons: list[str] = []
    for path, base in bases:
        is_table, is_weight = path in roles.tables, path in roles.axes
        chosen = is_weight and (tables or not is_table) and (where is None or matches(where, path))
        if not chosen or not _is_float(base):
            if chosen:
                # A weight that is quantized already is an error, not silently left out.
                _refuse_twice(path, base)
                reasons.append(
                    f"`{path}` is {base.dtype}; the formats hold floats of 16 bits or more."
                )
            blanks.append(None)
            continue
        along = roles.tables[path] if is_table else roles.axes[path][0]
        try:
            blank = _blank(path, base, along, format)
            _check_smaller(path, base, blank)
            blanks.append(blank)
        except SpecError as error:
            reasons.append(str(error))
            blanks.append(None)
    if not any(blanks):
        chosen = "" if where is None else f" whose path {shown(where)} accepts"
        names = [path for path, base in bases if getattr(base, "ndim", 0) > 1]
        raise SpecError(
            "\n  ".join(
                [
                    f"quantize finds no weight{chosen} of a product or a convolution that it can "
                    f"store as {format}. Parameters of two or more axes: {some(names) or 'none'}.",
                    *reasons,
                ]
            )
        )
    if reasons:
        lines = "\n".join(f"  {line}" for line in reasons)
        warnings.warn(
            f"quantize did not quantize these weights:\n{lines}\nTo silence this warning, exclude "
            "such weights with `where`.",
            UnquantizedWarning,
            stacklevel=3,
        )
    return blanks


def _by_leaf(
    bases: Sequence[tuple[str, Any]], structure: Any, formats: Any, roles: Any
) -> list[QuantizedWeight | None]:
    """Returns blanks for a tree of formats."""
    leaves, other = jax.tree.flatten(formats, is_leaf=lambda x: x is None or isinstance(x, Format))
    if other != structure:
        raise SpecError(
            "The tree of formats must have the structure of the parameters, None where a leaf is "
            f"left as it is. Parameters: {structure}; formats: {other}."
        )
    blanks: list[QuantizedWeight | None] = []
    for (path, base), leaf in zip(bases, leaves, strict=True):
        if leaf is None:
            blanks.append(None)
            continue
        format = format_of(leaf)
        _refuse_twice(path, base)
        if not _is_float(base) or base.ndim < 2:
            kind = f"{base.dtype} {tuple(base.shape)}" if hasattr(base, "dtype") else type(base)
            raise SpecError(
                f"`{path}` is {kind}, and quantize takes floats of two or more axes. Give it None."
            )
        along = (base.ndim - 2,)  # as in a kernel `[…, in, out]`
        if roles is not None and path in roles.axes:
            along = roles.tables.get(path, roles.axes[path][0])
        blanks.append(_blank(path, base, along, format))
    return blanks


def _blank(path: str, base: Any, along: Sequence[int], format: Format) -> QuantizedWeight:
    """Returns the weight without arrays; a format may fix the axes that share scales."""
    if 0 in base.shape:
        raise SpecError(f"`{path}` has shape {tuple(base.shape)}: it has no entries.")
    given = getattr(format, "along", None)
    return blank_of(path, base, along if given is None else given, format)


def _check_smaller(path: str, base: Any, blank: QuantizedWeight) -> None:
    """Raises for a weight that would take as many bits as it has, such as one of one input."""
    quantized = encoded(blank, jax.ShapeDtypeStruct(base.shape, base.dtype))
    bits = 8 * base.dtype.itemsize
    if quantized.bits >= bits:
        raise SpecError(
            f"`{path}` has shape {tuple(base.shape)}: with its scales, {blank.codec} takes "
            f"{quantized.bits:.4g} bits per entry, and {base.dtype} takes {bits}."
        )


def _is_float(base: Any) -> bool:
    is_array = isinstance(base, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return is_array and jnp.issubdtype(base.dtype, jnp.floating) and base.dtype.itemsize > 1


def _refuse_twice(path: str, base: Any) -> None:
    if isinstance(base, QuantizedWeight):
        raise SpecError(
            f"`{path}` is quantized already, as {base.codec}. Call dequantize first, or give it "
            "None."
        )


def _check(path: str, base: Any, blank: QuantizedWeight) -> None:
    """Raises for dtypes that this backend lacks, and for entries that are not finite."""
    # Before the weight is encoded, so that the error names it.
    for dtype in blank.codec.dtypes():
        _check_backend(path, jnp.dtype(dtype).name)
    check_finite(path, base)


def _check_backend(path: str, dtype: str) -> None:
    try:
        _computes_with(dtype)
    except Exception as error:
        raise SpecError(
            f"`{path}`: JAX {jax.__version__} on {jax.default_backend()} does not compute with "
            f"{dtype}: {error}. Choose another format."
        ) from error


@functools.cache
def _computes_with(dtype: str) -> None:
    with jax.ensure_compile_time_eval():
        # Some backends accept a dtype and fail only when a program with it runs.
        jnp.zeros(2, dtype).astype(jnp.float32).block_until_ready()
