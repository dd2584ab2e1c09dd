"""The comparisons of the oracle: which transformations are compared, and how closely."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._arrays import is_array
from ._errors import CheckError


def split_data(args: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the arrays among the leaves of `args`, and a function that replaces them."""
    leaves, structure = jax.tree.flatten(args)
    data = [leaf for leaf in leaves if is_array(leaf)]

    def fill(data: Sequence[Any]) -> Any:
        arrays = iter(data)
        filled = [next(arrays) if is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, filled)

    return data, fill


def arrays_of(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def numbers_of(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in arrays_of(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def loss_of(function: Any, args: tuple[Any, ...]) -> Callable[[Any], jax.Array]:
    """Returns a loss that weighs each output entry differently: no gradient is uniform."""

    def loss(tunable: Any) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for k, out in enumerate(numbers_of(function(tunable, *args))):
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32) + k).reshape(out.shape)
            is_complex = jnp.issubdtype(out.dtype, jnp.complexfloating)
            for part in (jnp.real(out), jnp.imag(out)) if is_complex else (out,):
                # Out-of-range lookups give NaN in the plain model as well.
                total = total + jnp.sum(weights * jnp.nan_to_num(part).astype(jnp.float32))
                weights = jnp.sin(weights)
        return total

    return loss


def value_and_gradient(function: Any, args: Any) -> Callable[[Any], Any]:
    return lambda t: (
        arrays_of(function(t, *args)),
        jax.grad(loss_of(function, args))(t),
    )


def over_data(function: Any, args: Any) -> Callable[[Any], Any]:
    data, fill = split_data(args)

    def mapped(tunable: Any) -> Any:
        if not data:
            return []
        # A batch of two: the data, and the data reversed along its first axis.
        several = [jnp.stack([x, x[::-1] if x.ndim else x]) for x in data]
        return jax.vmap(lambda *data: arrays_of(function(tunable, *fill(data))))(*several)

    return mapped


def over_adapters(function: Any, args: Any) -> Callable[[Any], Any]:
    def mapped(tunable: Any) -> Any:
        # A batch of three adapters that differ.
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf / 2]), tunable)
        return jax.vmap(lambda t: arrays_of(function(t, *args)))(several)

    return mapped


def checkpointed(function: Any, args: Any) -> Callable[[Any], Any]:
    return jax.grad(jax.checkpoint(loss_of(function, args)))


def scanned_over(function: Any, args: Any) -> Callable[[Any], Any]:
    def scanned(tunable: Any) -> Any:
        def step(count: jax.Array, _: Any) -> tuple[jax.Array, list[jax.Array]]:
            return count + 1, arrays_of(function(tunable, *args))

        return jax.lax.scan(step, jnp.zeros((), jnp.int32), None, length=2)

    return scanned


def compare(name: str, got: Any, expected: Any, tolerance: float | None) -> None:
    got, expected = arrays_of(got), arrays_of(expected)
    _require(len(got) == len(expected), f"{name}: {len(got)} results instead of {len(expected)}")
    bound = _bound(expected) if tolerance is None else tolerance
    for k, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        label = f"{name}, result {k}"
        _require(
            ours.shape == theirs.shape and ours.dtype == theirs.dtype,
            f"{label}: {ours.dtype}{ours.shape} instead of {theirs.dtype}{theirs.shape}",
        )
        if jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        inexact = jnp.issubdtype(theirs.dtype, jnp.inexact)
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if not inexact:
            _require((ours == theirs).all(), f"{label} differs")
            continue
        wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
        ours, theirs = ours.astype(wide), theirs.astype(wide)
        # NaN fill values must be in the same places; elsewhere they would hide errors.
        _require((np.isnan(ours) == np.isnan(theirs)).all(), f"{label}: NaNs differ")
        ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)
        # Errors are relative to the largest entry: small entries may be sums that cancel.
        largest = np.max(np.abs(theirs), initial=0.0)
        error = np.max(np.abs(ours - theirs), initial=0.0)
        _require(
            error <= bound * max(largest, 1e-30),
            f"{label}: differs by {error:.3g} where the largest entry is {largest:.3g} "
            f"(relative {error / max(largest, 1e-30):.2g}, allowed {bound:.2g})",
        )


def _require(holds: Any, message: str) -> None:
    # Not an `assert`: `python -O` would remove it, and the check with it.
    if not holds:
        raise CheckError(message)


# The rounding unit of float32 products in matrix units by default: TF32 on GPU, bfloat16 on TPU.
_MATRIX_UNITS = {"gpu": 2.0**-10, "tpu": 2.0**-7}


def _bound(results: Any) -> float:
    """Returns the error that rounding may cause: 100 rounding units, 8 if they are coarse."""
    widths = [jnp.finfo(r.dtype) for r in results if jnp.issubdtype(r.dtype, jnp.inexact)]
    precision: Any = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    exact = precision in ("float32", "highest")
    rounds = not exact and any(w.bits == 32 for w in widths)
    units = _MATRIX_UNITS.get(jax.default_backend(), 0.0) if rounds else 0.0
    return max([8 * units, *(float(w.eps) * (100 if w.bits >= 32 else 8) for w in widths)])
