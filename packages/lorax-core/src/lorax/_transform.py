"""`lora(fn)`: traces a function and evaluates its jaxpr on factored weights."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from . import _uses, rules
from ._arrays import is_array
from ._coded import is_coded
from ._errors import ArgumentError, PairError, a_kind
from ._factored import FactoredArray, base_of
from ._interpreter import Interpreter
from ._pair import Leaf, flatten_pair, split_pair
from ._registry import RULES
from ._statics import plain_axes, plain_number
from .roles import DATA, beside_data

Policy = Literal["warn", "error", "allow"]

assert rules and RULES  # importing the families of rules fills the table

# The most jitted bodies that one `lora(fn)` caches; a model has far fewer.
MOST_TRANSFORMED = 1024


def lora(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    argnames: str | Sequence[str] = (),
    on_materialize: Policy = "warn",
    on_unused: Policy = "warn",
    through_custom_derivatives: bool = False,
) -> Callable[..., Any]:
    """Makes a function take `(frozen, tunable)` in place of its parameters.

    Wherever `fn` multiplies by a weight `W` that has an adapter, the product is computed as

        x @ (W + scale · a @ b)  =  x @ W  +  scale · (x @ a) @ b

    and the sum in brackets is never formed. `fn` needs no changes. It is traced once per
    call, so call the result under `jax.jit` as you would call `fn`; `jax.grad`, `jax.vmap` and
    the other transformations work through it. Without an adapter, `fn` itself is called.

    Args:
        fn: any JAX function. Its other arguments may be anything; only JAX arrays among them are
            traced.
        argnums: the position of the parameters, or several positions; each then takes a pair.
        argnames: the names of keyword-only arguments that take a pair.
        on_materialize: what to do if no rule covers the use of a weight, so that it is
            materialized: "warn", "error" (before anything runs) or "allow".
        on_unused: what to do about an adapter that no output depends on; the same choices.
        through_custom_derivatives: by default, a weight that enters a function with a
            `jax.custom_jvp` or `jax.custom_vjp` rule is materialized. If True, the function is
            evaluated on the factors instead and the call loses its rule: the value is unchanged,
            and JAX differentiates the function itself. The result differs if the rule is not the
            true derivative (straight-through rounding, clipped or scaled gradients), loses what
            the rule saves in memory or avoids in NaNs, and fails if the function has no reverse
            derivative without the rule, as with a `while_loop`. Calls without a weight keep their
            rule.

    Returns:
        A function with the signature of `fn` that takes pairs in place of parameters.

    Raises:
        ArgumentError: if an argument has a wrong type or value.
        PairError: when called with anything other than a pair.
        MaterializeError: when called, under `on_materialize="error"`.
        UnusedAdapterError: when called, under `on_unused="error"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, lora
        >>> model = lambda params, x: jnp.tanh(x @ params["w"])
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> frozen, tunable = init_lora(params, {"w": 1}, jax.random.key(0))
        >>> lora(model)((frozen, tunable), x).shape
        (4, 2)
        >>> grads = jax.grad(lambda t: lora(model)((frozen, t), x).sum())(tunable)
        >>> grads["w"].a.shape
        (3, 1)
    """
    for name, policy in (("on_materialize", on_materialize), ("on_unused", on_unused)):
        if policy not in ("warn", "error", "allow"):
            raise ArgumentError(f"{name}={policy!r}: it must be 'warn', 'error' or 'allow'.")
    if not callable(fn):
        raise ArgumentError(f"lora takes a function, not {a_kind(fn)}.")
    argnums, argnames = _several(argnums, int, "argnums"), _several(argnames, str, "argnames")
    if not argnums and not argnames:
        raise ArgumentError("lora: `argnums` and `argnames` are empty, so no argument is a pair.")

    # Shared by all calls: outside `jax.jit`, functions that `fn` jits compile on the first call
    # only.
    transformed: dict[Hashable, Any] = {}

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = bind_call(fn, argnums, argnames, args, kwargs)
        if not any(leaf.is_weight for leaf in call.leaves):
            # Without adapters and codes there is nothing to transform: no tracing overhead.
            args, kwargs = call.arguments(lambda leaf: leaf.plain)
            return fn(*args, **kwargs)
        traced = trace(fn, call)
        if "error" in (on_materialize, on_unused):
            # A dry run without arithmetic: an error must be raised before anything has run.
            ahead = uses(traced, through_custom_derivatives)
            _uses.announce(call.paths, ahead, on_materialize, on_unused)
        # Keys contain the id of a jaxpr, so functions that are traced in each call would grow it.
        if len(transformed) > MOST_TRANSFORMED:
            transformed.clear()
        interpreter = Interpreter(
            RULES, transformed, through_custom_derivatives=through_custom_derivatives
        )
        outs = run(interpreter, traced, traced.operands)
        _uses.announce(call.paths, interpreter.uses, on_materialize, on_unused)
        return traced.rebuild(outs)

    return wrapped


def _several(value: Any, kind: type, name: str) -> tuple[Any, ...]:
    """Returns a position or a name, or several of them, as a tuple."""
    values = plain_axes(plain_number(value))
    values = values if isinstance(values, tuple) else (values,)
    if not all(isinstance(each, kind) for each in values):
        raise ArgumentError(
            f"lora: {name}={value!r}; it must be one {kind.__name__}, or a sequence of them."
        )
    return values


class FlatPair(NamedTuple):
    """One pair among the arguments of a call."""

    leaves: list[Leaf]
    structure: Any


class Call(NamedTuple):
    """The arguments of one call, with its pairs flattened.

    `pairs` maps the position or the name of an argument to its flattened pair.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pairs: dict[int | str, FlatPair]

    @property
    def leaves(self) -> list[Leaf]:
        """The leaves of all pairs, in order."""
        return [leaf for pair in self.pairs.values() for leaf in pair.leaves]

    @property
    def paths(self) -> list[str]:
        """The paths of all adapters."""
        return [leaf.path for leaf in self.leaves if leaf.is_adapted]

    def arguments(self, of: Callable[[Leaf], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments, with a tree of `of(leaf)` in place of each pair."""
        trees = {
            where: jax.tree.unflatten(pair.structure, map(of, pair.leaves))
            for where, pair in self.pairs.items()
        }
        args = tuple(trees.get(k, arg) for k, arg in enumerate(self.args))
        kwargs = {name: trees.get(name, arg) for name, arg in self.kwargs.items()}
        return args, kwargs


def bind_call(
    fn: Callable[..., Any],
    argnums: Sequence[int],
    argnames: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    """Finds and flattens the pairs among the arguments of a call of `fn`.

    Raises:
        PairError: if an argument that takes a pair is missing or is not a pair.
    """
    name = getattr(fn, "__name__", type(fn).__name__)
    places: list[int | str] = []
    for argnum in argnums:
        # Counts from the end like Python; an argument passed by keyword is not in `args`.
        place = argnum if argnum >= 0 else len(args) + argnum
        places.append(place if 0 <= place < len(args) else _keyword(fn, name, argnum, kwargs))
    places += argnames
    pairs: dict[int | str, FlatPair] = {}
    for place in places:
        if isinstance(place, str) and place not in kwargs:
            raise PairError(f"{name} was called without `{place}`, which takes a pair.")
        label = f"argument {place!r} of {name}"
        value = args[place] if isinstance(place, int) else kwargs[place]
        # [frozen, tunable] side by side, one `Leaf` per parameter
        leaves, structure = flatten_pair(*split_pair(value, label), label)
        if len(places) > 1:
            # Two pairs may contain the same path, so messages need the argument as well.
            leaves = [leaf._replace(path=f"{place}/{leaf.path}") for leaf in leaves]
        pairs[place] = FlatPair(leaves, structure)
    return Call(args, kwargs, pairs)


def _keyword(fn: Callable[..., Any], name: str, argnum: int, kwargs: dict[str, Any]) -> str:
    """Returns the keyword under which a positional argument was passed."""
    try:
        # The argument may have been passed by keyword: `argnums` counts positions of the signature.
        parameters = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        parameters = []
    if 0 <= argnum < len(parameters) and parameters[argnum] in kwargs:
        return parameters[argnum]
    raise PairError(
        f"{name} takes a pair (frozen, tunable) as argument {argnum}, but the call has no such "
        "argument."
    )


class Traced(NamedTuple):
    """A function as a jaxpr over arrays, with its operands and a function that rebuilds its output.

    `is_data` has one entry per constant and then one per operand: whether that is data, an argument
    other than the parameters.
    """

    jaxpr: jex.ClosedJaxpr
    operands: list[Any]
    rebuild: Callable[[Sequence[jax.Array]], Any]
    is_data: list[bool]


def trace(fn: Callable[..., Any], call: Call, adapt: Callable[[Leaf], Any] | None = None) -> Traced:
    """Traces `fn` at its base weights; each adapted weight is a `FactoredArray` in `operands`.

    All arrays in pairs become inputs of the jaxpr, and so do JAX arrays in other arguments. Any
    other argument reaches `fn` as the Python value that it is.
    """
    if adapt is None:
        adapt = lambda leaf: leaf.applied(leaf.path)  # noqa: E731

    def tagged(leaf: Leaf) -> "_OfPair":
        # Wrapped, so that it is one leaf. `fn` sees an array of the base's shape, whatever the
        # kind.
        return _OfPair(adapt(leaf) if leaf.is_weight else leaf.plain)

    leaves, structure = jax.tree.flatten(
        call.arguments(tagged), is_leaf=lambda x: isinstance(x, _OfPair)
    )
    # Dynamic leaves become inputs of the jaxpr; the others are captured as Python values.
    dynamic = [_is_dynamic(leaf) for leaf in leaves]
    data = [not isinstance(leaf, _OfPair) for leaf in leaves]
    leaves = [leaf.value if isinstance(leaf, _OfPair) else leaf for leaf in leaves]
    operands = [leaf for leaf, moves in zip(leaves, dynamic, strict=True) if moves]
    returned: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        rest = iter(arrays)
        filled = [
            next(rest) if moves else leaf for leaf, moves in zip(leaves, dynamic, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, filled)
        outs, out_structure = jax.tree.flatten(fn(*args, **kwargs))
        kept = [None if isinstance(out, jax.Array) else out for out in outs]
        # A side channel: `make_jaxpr` keeps arrays only, so everything else is passed around it.
        returned[:] = [out_structure, kept, [isinstance(out, jax.Array) for out in outs]]
        return [out for out in outs if isinstance(out, jax.Array)]

    functools.update_wrapper(flat, fn, assigned=("__name__", "__qualname__"), updated=())
    # JAX would read the signature of `fn` through `__wrapped__`; `flat` takes arrays only.
    flat.__dict__.pop("__wrapped__", None)
    jaxpr = jax.make_jaxpr(flat)(*map(traced_as, operands))

    def rebuild(arrays: Sequence[jax.Array]) -> Any:
        out_structure, kept, is_traced = returned
        rest = iter(arrays)
        outs = [next(rest) if dyn else out for out, dyn in zip(kept, is_traced, strict=True)]
        return jax.tree.unflatten(out_structure, outs)

    of_operands = [is_data for is_data, moves in zip(data, dynamic, strict=True) if moves]
    # NumPy arguments are not traced, so they are constants of the jaxpr, recognized by shape. If no
    # argument is data, any constant may be: the function may close over its data.
    given = [leaf.shape for leaf in leaves if isinstance(leaf, np.ndarray)]
    closed_over = not given and not any(of_operands)
    of_consts = [closed_over or const.shape in given for const in jaxpr.consts]
    return Traced(jaxpr, operands, rebuild, [*of_consts, *of_operands])


def traced_as(value: Any) -> Any:
    """Returns the array, or its shape, that replaces an operand while the function is traced."""
    base = base_of(value)
    return base.struct if is_coded(base) else base


@dataclasses.dataclass(frozen=True)
class _OfPair:
    """Marks a leaf of a pair while the arguments are flattened; a weight is a `FactoredArray`."""

    value: Any


def _is_dynamic(leaf: Any) -> bool:
    if isinstance(leaf, _OfPair):
        return isinstance(leaf.value, FactoredArray) or is_array(leaf.value)
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def run(interpreter: Interpreter, traced: Traced, operands: Sequence[Any]) -> list[jax.Array]:
    """Evaluates a traced function on weights; returned weights are materialized."""
    values = [v if isinstance(v, FactoredArray | jax.Array) else jnp.asarray(v) for v in operands]
    values = [
        # The base may be a NumPy array, or a bundle of codes and scales, each of which may be.
        v.replace_base(jax.tree.map(jnp.asarray, v.base)) if isinstance(v, FactoredArray) else v
        for v in values
    ]
    # Each input that is not data is a weight of its own, named by its position.
    kinds = [DATA if is_data else k for k, is_data in enumerate(traced.is_data)]
    interpreter.beside_data = beside_data(traced.jaxpr, kinds)
    return [interpreter.returned(out) for out in interpreter.run(traced.jaxpr, values)]


def uses(traced: Traced, through_custom_derivatives: bool = False) -> list[_uses.Use]:
    """Returns the uses of every weight, found by abstract evaluation."""
    interpreter = Interpreter(RULES, through_custom_derivatives=through_custom_derivatives)
    # Abstract evaluation: rules run on shapes, and record the same uses as on arrays.
    jax.eval_shape(lambda operands: run(interpreter, traced, operands), traced.operands)
    return interpreter.uses
