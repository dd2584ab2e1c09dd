"""The rule table: which function handles an equation that reads a weight.

A rule gets the equation and its operands, plain arrays or `FactoredArray`s, and the parameters
it names:

    @defrule("transpose")
    def _transpose(eqn, weight, *, permutation):
        ...

`eqn(*arrays)` evaluates the original equation on plain arrays: the base always goes through it.
A rule returns the output (a list of them if the primitive has several), or `NotImplemented`
if this call is not covered, or the algebra of terms raises `Inexpressible`: then the
interpreter materializes the weight and warns.

Parameters are named one by one: if a JAX version has a parameter that the rule does not
name, or lacks one that it needs, the weight is materialized and the warning names the parameter.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Primitive

from . import _compat
from ._coded import MOVES
from ._errors import ArgumentError
from ._factored import FactoredArray, is_weight
from ._terms import Term

Rule = Callable[..., Any]

RULES: dict[Primitive, Rule] = {}

# The primitives whose rules also take weights with gains, a pending norm or dropout.
CARRIERS: set[Primitive] = set()

# Why some primitives have no rule, as in `Use.reason`.
REASONS: dict[Primitive, str] = {}


def defreason(reason: str, *names: str) -> None:
    """Registers why the named primitives materialize a weight; names this JAX lacks are skipped."""
    primitives = map(_compat.find_primitive, names)
    REASONS.update(dict.fromkeys((primitive for primitive in primitives if primitive), reason))


def defrule(*primitives: Primitive | str, gains: bool = False) -> Callable[[Rule], Rule]:
    """Registers the function below as the rule of some primitives.

    A rule gets the equation, its operands, and the equation's parameters by name. An operand is an
    array, or a `FactoredArray` if a weight is used. The rule returns what the primitive returns:
    arrays, or a `FactoredArray` if the result is still a weight; a list of them if the
    primitive has several results. It evaluates the base through the equation itself,
    `eqn(x, weight.base)`, and adds what the terms contribute. If it does not cover a call, it
    returns `NotImplemented`, and the weight is materialized with a warning.

    Args:
        primitives: JAX's primitives, or the names of those that JAX exports. A name that the
            installed JAX does not have is skipped.
        gains: whether the rule also handles weights with gains, a pending norm or dropout, such as
            those of DoRA and IA³. Without it, such a weight is materialized.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        ArgumentError: if a primitive has a rule already.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.extend.core import Primitive
        >>> from lorax import init_lora, lora
        >>> from lorax.rules import add_product, defrule, is_weight
        >>> matmul = Primitive("my_matmul")  # as a kernel of your own might be
        >>> _ = matmul.def_impl(jnp.matmul)
        >>> _ = matmul.def_abstract_eval(lambda x, w: jax.typeof(jnp.ones((4, 2))))
        >>> @defrule(matmul)
        ... def rule(eqn, x, weight):
        ...     if is_weight(x):
        ...         return NotImplemented
        ...     eqn.use(weight, "product")
        ...     return add_product(eqn(x, weight.base), x, weight, (((1,), (0,)), ((), ())))
        >>> pair = init_lora({"w": jnp.ones((3, 2))}, {"w": 1}, jax.random.key(0))
        >>> lora(lambda params, x: matmul.bind(x, params["w"]))(pair, jnp.ones((4, 3))).shape
        (4, 2)
    """

    def register(rule: Rule) -> Rule:
        for given in primitives:
            is_name = isinstance(given, str)
            primitive = _compat.find_primitive(given) if is_name else given
            if primitive is None:
                continue
            if primitive in RULES:
                name = primitive.name
                raise ArgumentError(f"`{name}` already has a rule: {RULES[primitive]}.")
            RULES[primitive] = rule
            if gains:
                CARRIERS.add(primitive)
        return rule

    return register


def unfit(rule: Rule, operands: int, parameters: Iterable[str]) -> str:
    """Returns why a rule cannot handle such an equation, as in `Use.reason`, or an empty string."""
    return _unfit(rule, operands, tuple(parameters))


@functools.lru_cache(maxsize=4096)
def _unfit(rule: Rule, operands: int, parameters: tuple[str, ...]) -> str:
    signature = inspect.signature(rule)
    try:
        # The first argument is the equation.
        signature.bind(None, *[None] * operands, **dict.fromkeys(parameters))
        return ""
    except TypeError:
        pass
    # The rest words the reason: a JAX version has added or removed a parameter.
    named = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = {p.name for p in named}
    unknown = [f"the parameter `{name}`" for name in parameters if name not in names]
    missing = [
        f"no parameter `{p.name}`"
        for p in named
        if p.default is p.empty and p.name not in parameters
    ]
    differences = " and ".join(unknown + missing) or f"{operands} operands"
    version = importlib.metadata.version("lorax-core")
    return (
        f"has {differences} in JAX {jax.__version__}, unlike what lorax-core {version} was "
        "written for"
    )


def _with_parameters(rule: Rule, parameters: Iterable[inspect.Parameter]) -> Rule:
    """Gives a rule that takes `**params` a signature that names them, which `unfit` checks."""
    signature = inspect.signature(rule)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rule.__signature__ = signature.replace(parameters=[*kept, *parameters])  # pyright: ignore[reportFunctionMemberAccess]
    return rule


def defstructural(name: str, change: Callable[..., Term], *, moves: bool = True) -> None:
    """Defines the rule of a primitive that is linear in its one operand.

    `change(term, **params)` returns the term of the result. With `moves`, the primitive only moves
    or cuts axes, so gains are changed the same way as terms.
    """

    def rule(eqn, weight, *others, **params):
        if not isinstance(weight, FactoredArray) or any(map(is_weight, others)):
            return NotImplemented
        moved = weight.moved(lambda term: change(term, *others, **params))
        return eqn.rows_or_weight(moved.replace_base(eqn(weight.base, *others)))

    named = inspect.signature(change).parameters.values()
    keywords = [p for p in named if p.kind is p.KEYWORD_ONLY]
    defrule(name, gains=moves)(_with_parameters(rule, keywords))
    if moves:
        defmove(name)(change)


def defmove(*names: str) -> Callable[[Any], Any]:
    """Registers how primitives that move or cut axes change a term, for bases stored as codes.

    `change(term, *others, **params)` returns a term, or a list of terms for a primitive with
    several results.
    """

    def register(change: Any) -> Any:
        for name in names:
            primitive = _compat.find_primitive(name)
            if primitive is not None:
                MOVES[primitive] = change
        return change

    return register


def defdirect(name: str, *, parameters: Iterable[str] = ()) -> None:
    """Defines the rule of a primitive that changes how a weight is stored but not its values.

    The factors stay unchanged: each product casts them to the dtype of its operands anyway.
    `parameters` are the names of the primitive's parameters.
    """

    def rule(eqn, weight, **params):
        return eqn.rows_or_weight(weight.replace_base(eqn(weight.base)))

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(p, keyword_only) for p in parameters]
    defrule(name, gains=True)(_with_parameters(rule, named))
