"""The oracle: proof that an adapter does what the merged model does, without building it.

    from lorax import testing
    testing.check(model, params, spec, x)

It is how every rule of Lorax is tested, and how you can prove an adapter on your own model.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ._errors import MaterializeError
from ._init import init_lora
from ._merge import merge_params
from ._pair import combine, flatten_pair, is_array
from ._transform import lora
from ._weight import LoraWeight

__all__ = ["check", "random_factors", "weight_sized"]


def check(
    fn: Callable[..., Any],
    params: Any,
    spec: Any,
    *args: Any,
    tolerance: float | None = None,
    transforms: bool = True,
    materializes: bool = False,
    seed: int = 0,
    through_custom_derivatives: bool = False,
    **kwargs: Any,
) -> None:
    """Proves `lora(fn)` on random, non-zero factors.

    1. Its value, and the gradient of every trained parameter, equal those of `fn` on merged
       parameters, each within `tolerance` of its largest entry.
    2. So they do under `jit`, `vmap` over data, `vmap` over adapters, `checkpoint` and `scan`.
    3. No equation makes an array as big as an adapted weight that `fn` does not make itself.

    Args:
        fn: a function of the parameters first.
        params: the parameters.
        spec: as for `init_lora`.
        *args: what `fn` is called with.
        tolerance: relative to the largest entry; by default 100 units of rounding of the lowest
            precision among the results, and 8 of a 16-bit one or of a chip's matrix units, where
            those round float32 (TF32 on a GPU, bfloat16 on a TPU) and
            `jax.default_matmul_precision` does not ask for more.
        transforms: whether to try point 2.
        materializes: whether the weight is expected to be built: then point 3 is left out, and
            instead `lora` must say so.
        seed: for the random factors.
        through_custom_derivatives: as in `lora`; the merged model keeps the derivative rules, so
            that point 1 fails where one of them is not the derivative of its function.
        **kwargs: what `fn` is called with.

    Raises:
        AssertionError: which point failed, with the numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import testing
        >>> testing.check(lambda params, x: x @ params["w"], {"w": jnp.ones((7, 5))}, {"w": 2},
        ...               jnp.ones((3, 7)))
    """
    frozen, tunable = init_lora(params, spec, jax.random.key(seed), a_init="zeros")
    tunable = random_factors(tunable, jax.random.key(seed + 1))
    mode = "allow" if materializes else "error"
    through = through_custom_derivatives
    adapted = lora(fn, on_materialize=mode, through_custom_derivatives=through)

    def ours(tunable: Any, *args: Any) -> Any:
        return adapted((frozen, tunable), *args, **kwargs)

    def merged(tunable: Any, *args: Any) -> Any:
        return fn(merge_params(frozen, tunable), *args, **kwargs)

    if materializes:
        _expect_message(fn, frozen, tunable, args, kwargs)
    else:
        excess = weight_sized(
            fn, frozen, tunable, *args, through_custom_derivatives=through, **kwargs
        )
        assert not excess, f"arrays as big as an adapted weight are built: {excess}"
    programs = {"value and gradient": _value_and_gradient}
    if transforms:
        programs |= {
            "vmap over data": _over_data,
            "vmap over adapters": _over_adapters,
            "checkpoint": _checkpointed,
            "scan": _scanned,
        }

    # Data goes in as operands: as constants, XLA would fold them away.
    data, fill = _split_data(args)

    def results(function: Any) -> dict[str, Any]:
        def run(tunable: Any, data: list[Any]) -> dict[str, Any]:
            return {name: make(function, fill(data))(tunable) for name, make in programs.items()}

        return jax.jit(run)(tunable, data)

    got, expected = results(ours), results(merged)
    for name in programs:
        _compare(name, got[name], expected[name], tolerance)


def _split_data(args: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays among the leaves of `args`, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(args)
    data = [leaf for leaf in leaves if is_array(leaf)]

    def fill(data: Sequence[Any]) -> Any:
        arrays = iter(data)
        filled = [next(arrays) if is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, filled)

    return data, fill


def random_factors(tunable: Any, key: jax.Array) -> Any:
    """The same tree with normal numbers in every factor, so that no delta is zero."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    # NumPy draws at once what JAX would compile a program for, shape by shape.
    generator = np.random.default_rng(np.asarray(key))

    def draw(leaf: jax.Array) -> jax.Array:
        numbers = generator.standard_normal(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            numbers = numbers + 1j * generator.standard_normal(leaf.shape)
        # Halved, so that the delta is about as large as an ordinary base and rounding stays small.
        drawn = jnp.asarray((numbers / 2).astype(leaf.dtype))
        named = isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(drawn, leaf.sharding) if named else drawn

    return jax.tree.map(draw, tunable)


def weight_sized(
    fn: Callable[..., Any],
    frozen: Any,
    tunable: Any,
    *args: Any,
    through_custom_derivatives: bool = False,
    **kwargs: Any,
) -> dict[tuple[int, ...], int]:
    """Shapes of arrays that `lora(fn)` builds more often than `fn`, as big as an adapted weight.

    An array counts where it has as many entries as an adapted weight, or all of a weight's axes
    and more, and its shape is made more often than by `fn` on plain parameters, nested equations
    included. Sizes are all it goes by, so give batches other sizes than weights.

    Args:
        fn: a function of the parameters first.
        frozen: the frozen tree of the pair.
        tunable: the tunable tree of the pair.
        *args: what `fn` is called with.
        through_custom_derivatives: as in `lora`.
        **kwargs: what `fn` is called with.

    Returns:
        How often each such shape is made too often; empty where no weight is built.
    """
    leaves, _ = flatten_pair(frozen, tunable, "weight_sized")
    shapes = {leaf.frozen.shape for leaf in leaves if isinstance(leaf.tunable, LoraWeight)}
    adapted = lora(
        fn,
        on_materialize="allow",
        on_unused="allow",
        through_custom_derivatives=through_custom_derivatives,
    )
    data, fill = _split_data(args)

    def call(function: Callable[..., Any], first: Any, data: list[Any]) -> list[jax.Array]:
        return _arrays(function(first, *fill(data), **kwargs))

    counts = []
    for function, make in ((adapted, lambda t: (frozen, t)), (fn, lambda t: _bases(frozen, t))):
        closed = jax.make_jaxpr(lambda t, a, f=function, m=make: call(f, m(t), a))(tunable, data)
        counts.append(collections.Counter(_shapes(closed)))
    ours, plain = counts
    return {
        shape: n - plain[shape]
        for shape, n in ours.items()
        if n > plain[shape] and any(_holds(shape, weight) for weight in shapes)
    }


def _holds(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    axes = collections.Counter(size for size in weight if size != 1)
    return math.prod(shape) == math.prod(weight) or axes <= collections.Counter(shape)


def _bases(frozen: Any, tunable: Any) -> Any:
    """Plain parameters whose values do not matter."""
    leaves, structure = flatten_pair(frozen, tunable, "weight_sized")
    return combine(leaves, structure, lambda leaf: leaf.frozen)


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of everything that an equation makes, in nested jaxprs too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [p for value in eqn.params.values() for p in _jaxprs(value)]
        if inner:
            for body in inner:
                yield from _shapes(body)
        else:
            yield from (getattr(v.aval, "shape", ()) for v in eqn.outvars)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [body for item in value for body in _jaxprs(item)]
    return []


def _expect_message(fn: Any, frozen: Any, tunable: Any, args: Any, kwargs: Any) -> None:
    try:
        lora(fn, on_materialize="error")((frozen, tunable), *args, **kwargs)
    except MaterializeError:
        return
    raise AssertionError("a weight is built in full, or should be, and nothing was said")


def _arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def _numbers(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in _arrays(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _loss(function: Any, args: tuple[Any, ...]) -> Callable[[Any], jax.Array]:
    """A scalar that weighs every output entry differently, so that no gradient is uniform."""

    def loss(tunable: Any) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for k, out in enumerate(_numbers(function(tunable, *args))):
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32) + k).reshape(out.shape)
            # Fill values are NaN in the model itself.
            entries = jnp.nan_to_num(jnp.real(out)).astype(jnp.float32)
            total = total + jnp.sum(weights * entries)
        return total

    return loss


def _value_and_gradient(function: Any, args: Any) -> Callable[[Any], Any]:
    return lambda t: (
        _arrays(function(t, *args)),
        jax.grad(_loss(function, args))(t),
    )


def _over_data(function: Any, args: Any) -> Callable[[Any], Any]:
    data, fill = _split_data(args)

    def mapped(tunable: Any) -> Any:
        if not data:
            return []
        several = [jnp.stack([x, x[::-1] if x.ndim else x]) for x in data]
        return jax.vmap(lambda *data: _arrays(function(tunable, *fill(data))))(*several)

    return mapped


def _over_adapters(function: Any, args: Any) -> Callable[[Any], Any]:
    def mapped(tunable: Any) -> Any:
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf / 2]), tunable)
        return jax.vmap(lambda t: _arrays(function(t, *args)))(several)

    return mapped


def _checkpointed(function: Any, args: Any) -> Callable[[Any], Any]:
    return jax.grad(jax.checkpoint(_loss(function, args)))


def _scanned(function: Any, args: Any) -> Callable[[Any], Any]:
    def scanned(tunable: Any) -> Any:
        def step(count: jax.Array, _: Any) -> tuple[jax.Array, list[jax.Array]]:
            return count + 1, _arrays(function(tunable, *args))

        return jax.lax.scan(step, jnp.zeros((), jnp.int32), None, length=2)

    return scanned


def _compare(name: str, got: Any, expected: Any, tolerance: float | None) -> None:
    got, expected = _arrays(got), _arrays(expected)
    assert len(got) == len(expected), f"{name}: {len(got)} results instead of {len(expected)}"
    bound = _bound(expected) if tolerance is None else tolerance
    for k, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        what = f"{name}, result {k}"
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
            f"{what}: {ours.dtype}{ours.shape} instead of {theirs.dtype}{theirs.shape}"
        )
        if jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        inexact = jnp.issubdtype(theirs.dtype, jnp.inexact)
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if not inexact:
            assert (ours == theirs).all(), f"{what} differs"
            continue
        wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
        ours, theirs = ours.astype(wide), theirs.astype(wide)
        assert (np.isnan(ours) == np.isnan(theirs)).all(), f"{what}: NaNs differ"
        ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)
        largest = np.max(np.abs(theirs), initial=0.0)
        error = np.max(np.abs(ours - theirs), initial=0.0)
        assert error <= bound * max(largest, 1e-30), (
            f"{what}: differs by {error:.3g} where the largest entry is {largest:.3g} "
            f"(relative {error / max(largest, 1e-30):.2g}, allowed {bound:.2g})"
        )


# A unit of rounding of what matrix units make of float32 by default: TF32, bfloat16.
_MATRIX_UNITS = {"gpu": 2.0**-10, "tpu": 2.0**-7}


def _bound(results: Any) -> float:
    """What rounding may do: 100 units of it, and 8 where a unit is already coarse."""
    widths = [jnp.finfo(r.dtype) for r in results if jnp.issubdtype(r.dtype, jnp.inexact)]
    precision: Any = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    exact = precision in ("float32", "highest")
    rounds = not exact and any(w.bits == 32 for w in widths)
    units = _MATRIX_UNITS.get(jax.default_backend(), 0.0) if rounds else 0.0
    return max([8 * units, *(float(w.eps) * (100 if w.bits >= 32 else 8) for w in widths)])
