"""Extracts the closest LoRA adapter from a full fine-tune."""

import dataclasses
import functools
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._arrays import own
from .._axes import Axes
from .._base import decoded
from .._contract import wide_dtype
from .._errors import ArgumentError, SpecError, UnadaptedWarning
from .._init import flatten_spec
from .._pair import Pair, flatten_params
from .._spec import LORA_FREEZE, LORA_FULL, check_leaf, some
from ..kinds.lora import LoraSpec, LoraWeight, lora_scale
from ._matrices import energy_of, rank_for


class Extraction(NamedTuple):
    """The result of `extract_lora`.

    Attributes:
        pair: the base and the adapters, as `init_lora` returns them.
        errors: by path, `‖(tuned − base) − delta‖ / ‖tuned − base‖` in the Frobenius norm.
    """

    pair: Pair
    errors: dict[str, float]


# The randomized decomposition is used if it needs fewer than 1 / _PAYS of all singular vectors,
# with _OVERSAMPLED more vectors than the rank, and _POWERS power iterations.
_PAYS = 4
_OVERSAMPLED = 10
_POWERS = 4


def extract_lora(
    base: Any,
    tuned: Any,
    spec: Any,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    key: jax.Array | None = None,
) -> Extraction:
    """Returns the LoRA adapters that are closest to the change made by full fine-tuning.

        tuned − base  =  U S Vᵀ  ≈  s · a b,     a = U[:, :r],   s · b = S[:r] V[:, :r]ᵀ

    Weights are decomposed one at a time, each entry of the shared axes separately. If the rank is
    small compared to the matrix, a randomized decomposition with power iterations is used (Halko
    et al. 2011, arXiv:0909.4061).

    Args:
        base: the parameters before fine-tuning. Quantized weights stay quantized, and the adapters
            are for them.
        tuned: the parameters after it, a tree of the same structure. To convert adapters of another
            kind, pass `merge_params(pair)`.
        spec: as for `init_lora`: a rank or a `LoraSpec` for each weight that gets an adapter,
            `LORA_FULL` for parameters to take from `tuned` unchanged. `infer_spec` makes one.
        energy: the fraction of `‖tuned − base‖²` to keep in every entry: each weight gets the
            lowest rank that does so, and at most that of the spec.
        tolerance: the same as `energy = 1 − tolerance²`.
        key: a PRNG key for the randomized decomposition; by default a fixed one.

    Returns:
        The pair, and the errors by path.

    Raises:
        SpecError: if the spec does not fit or has adapters of other kinds.
        ArgumentError: if the trees differ in structure or shapes.

    Warns:
        UnadaptedWarning: names frozen parameters that differ in `tuned`; the result lacks these
            changes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import extract_lora, merge_params
        >>> base = {"w": jnp.zeros((6, 5))}
        >>> tuned = {"w": jnp.outer(jnp.arange(6.0), jnp.arange(5.0))}
        >>> pair, errors = extract_lora(base, tuned, {"w": 2})
        >>> bool(jnp.allclose(merge_params(pair)["w"], tuned["w"], atol=1e-4)), errors["w"] < 1e-5
        (True, True)
    """
    share = energy_of("extract_lora", energy, tolerance)
    key = jax.random.key(0) if key is None else key
    leaves, structure = flatten_params(base)
    after, other = flatten_params(tuned)
    if other != structure:
        raise ArgumentError(
            f"extract_lora: base has the structure {structure}, but tuned has {other}; both must "
            "be parameters of the same model."
        )
    specs = flatten_spec(spec, structure)
    frozen: list[Any] = []
    tunable: list[Any] = []
    errors: dict[str, float] = {}
    left_out: list[str] = []
    for (path, leaf), (_, new), leaf_spec in zip(leaves, after, specs, strict=True):
        if jnp.shape(leaf) != jnp.shape(new):
            raise ArgumentError(
                f"extract_lora: `{path}` is {jnp.shape(leaf)} in base and {jnp.shape(new)} in "
                "tuned; both must be parameters of the same model."
            )
        checked, new = check_leaf(path, leaf, leaf_spec), decoded(new)
        if checked == LORA_FULL:
            frozen.append(None)
            tunable.append(own(new))
            continue
        frozen.append(leaf)
        before = decoded(leaf)
        if checked == LORA_FREEZE:
            tunable.append(None)
            if not np.array_equal(np.asarray(before), np.asarray(new)):
                left_out.append(path)
            continue
        kind, axes = checked  # pyright: ignore[reportGeneralTypeIssues]
        if not isinstance(kind, LoraSpec):
            raise SpecError(
                f"extract_lora: `{path}` has a {type(kind).__name__}; extract_lora finds only "
                "plain LoRA."
            )
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        weight, errors[path] = _closest(before, new, kind, axes, share, own_key)
        tunable.append(weight)
    if left_out:
        warnings.warn(
            f"extract_lora: {some(left_out)} differ between base and tuned, and the spec freezes "
            "them, so the result lacks these changes. Give them a rank or LORA_FULL.",
            UnadaptedWarning,
            stacklevel=2,
        )
    pair = Pair(jax.tree.unflatten(structure, frozen), jax.tree.unflatten(structure, tunable))
    return Extraction(pair, errors)


def _closest(
    before: Any, after: Any, spec: LoraSpec, axes: Axes, energy: float | None, key: jax.Array
) -> tuple[LoraWeight, float]:
    wide = wide_dtype(before.dtype)
    fan_in, fan_out = axes.sizes(before.shape)
    # A matrix [in, out] has min(in, out) singular values.
    most = min(spec.rank, fan_in, fan_out)
    order = (*axes.shared, *axes.inputs, *axes.outputs)

    def matrices(array: Any) -> jax.Array:
        # [axes of the weight] -> [*shared, *in, *out] -> [entries, in, out]
        return jnp.transpose(jnp.asarray(array), order).reshape(-1, fan_in, fan_out).astype(wide)

    with jax.default_matmul_precision("highest"):
        deltas = matrices(after) - matrices(before)  # [entries, in, out]
        keys = jax.random.split(key, deltas.shape[0])
        left, values, right, squares = _decomposed(most)(deltas, keys)
        rank = most if energy is None else rank_for(values, squares, energy)
        a = left[:, :, :rank]  # [entries, in, rank]
        b = values[:, :rank, None].astype(wide) * right[:, :rank]  # [entries, rank, out]
        error = float(jnp.sqrt(_squared_error(deltas, a, b).sum()))
    # The Frobenius norm of all entries of the weight.
    size = float(jnp.sqrt(squares.sum()))
    resized = dataclasses.replace(spec, rank=rank)
    blank = resized.blank(before.shape, axes)
    shapes = blank.layout(before.shape).shapes()
    scale = lora_scale(rank, spec.alpha, spec.scaling)
    # delta = scale · a @ (b / scale)
    factors = {"a": a.reshape(shapes["a"]), "b": (b / scale).reshape(shapes["b"])}
    return blank.with_factors(factors), error / size if size else 0.0


@functools.lru_cache(maxsize=256)
def _decomposed(rank: int) -> Any:
    """Returns a jitted function of matrices and keys to singular triplets and squared norms."""

    def one(delta: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        if (rank + _OVERSAMPLED) * _PAYS < min(delta.shape):
            left, values, right = _randomized(delta, rank + _OVERSAMPLED, key)
        else:
            left, values, right = jnp.linalg.svd(delta, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank], _square(delta)

    # Sequential `map`, not `vmap`: the temporary arrays are those of a single matrix.
    return jax.jit(lambda deltas, keys: jax.lax.map(lambda x: one(*x), (deltas, keys)))


def _square(matrix: jax.Array) -> jax.Array:
    """Returns `‖matrix‖²`, also of complex numbers."""
    return jnp.sum((matrix * matrix.conj()).real)


def _randomized(delta: jax.Array, width: int, key: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the singular value decomposition within the range of a random sketch."""
    sketch = delta @ jax.random.normal(key, (delta.shape[1], width), delta.dtype)  # [in, width]
    basis = jnp.linalg.qr(sketch)[0]
    # Each iteration multiplies the sketch by ΔΔᴴ, which makes the largest singular directions
    # dominate; the QR decompositions keep its columns from becoming parallel.
    for _ in range(_POWERS):
        back = jnp.linalg.qr(delta.conj().T @ basis)[0]  # [out, width]
        basis = jnp.linalg.qr(delta @ back)[0]  # [in, width]
    left, values, right = jnp.linalg.svd(basis.conj().T @ delta, full_matrices=False)
    return basis @ left, values, right


@jax.jit
def _squared_error(deltas: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `‖delta − a b‖²` of each entry."""
    return jax.vmap(_square)(deltas - a @ b)
