"""The pair `(frozen, tunable)`: two trees with the structure of the parameters.

Each leaf is in one of them and None in the other; beside an adapter in `tunable` the base is in
`frozen`. Leaves that are not arrays stay in `frozen`.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export

from ._adapter import Adapter, Layout, sizes
from ._arrays import is_array, path_string
from ._base import QuantizedWeight, as_base
from ._boxes import bare, opened
from ._errors import PairError, SpecError
from ._factored import FactoredArray
from ._frozen_weight import FrozenWeight, base_and_held


class Pair(NamedTuple):
    """What `init_lora` returns, and what takes the place of parameters under `lora`.

    Attributes:
        frozen: the parameters that stay as they are, None where one is trained in full.
        tunable: the adapters and the parameters that are trained in full, None elsewhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, merge_params
        >>> pair = init_lora({"w": jnp.eye(3)}, {"w": 2}, jax.random.key(0))
        >>> frozen, tunable = pair
        >>> merge_params(pair)["w"].shape, pair.tunable["w"].a.shape
        ((3, 3), (3, 2))
    """

    frozen: Any
    tunable: Any


class Leaf(NamedTuple):
    """One parameter as the pair holds it; `held` is what stays frozen beside its base."""

    path: str
    frozen: Any
    tunable: Any
    held: Mapping[str, Any] = {}

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter."""
        return isinstance(self.tunable, Adapter)

    @property
    def is_weight(self) -> bool:
        """Whether it is more than an array: it has an adapter, or is held as codes."""
        return self.is_adapted or isinstance(self.frozen, QuantizedWeight)

    @property
    def plain(self) -> Any:
        """The parameter without an adapter, from the tree that has it."""
        return self.frozen if self.tunable is None or self.is_adapted else self.tunable

    def applied(self, source: Hashable = None) -> FactoredArray:
        """The weight, adapted or held as codes."""
        base = as_base(self.frozen, source)
        if not self.is_adapted:
            return FactoredArray(base, ())
        return self.tunable.applied(base, self.held, source)


jax.export.register_namedtuple_serialization(Pair, serialized_name="lorax.Pair")

# What a call without the second tree has in its place; None is a tree, too.
ABSENT: Any = object()


def two_trees(frozen: Any, tunable: Any, function: str) -> Pair:
    """The trees of a call that was given a pair, or both trees."""
    if tunable is not ABSENT:
        return Pair(frozen, tunable)
    if _is_two(frozen):
        return Pair(*frozen)
    raise PairError(
        f"{function} takes a pair, as `init_lora` returns it, or its two trees, and was given "
        f"{type(frozen).__name__}: {function}(frozen, tunable)."
    )


def pair_of_call(args: tuple[Any, ...], function: str) -> tuple[Pair, tuple[Any, ...]]:
    """The trees of a call whose arguments begin with a pair, or with both trees; and the others."""
    first, *others = args
    is_pair = isinstance(first, Pair) or not others
    if not is_pair and (has_adapters(others[0]) or not _is_two(first)):
        _, structure = flatten_params(first)
        if has_adapters(others[0]) or flatten_tunable(others[0], first, structure)[1] == structure:
            return Pair(first, others[0]), tuple(others[1:])
    return Pair(*split_pair(first, f"{function}: the argument after the function")), tuple(others)


def _is_frozen_leaf(node: Any) -> bool:
    return node is None or isinstance(node, FrozenWeight | QuantizedWeight)


def is_tunable_leaf(node: Any) -> bool:
    """Whether a node of the tunable tree represents one parameter."""
    return node is None or isinstance(node, Adapter)


def flatten_params(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a parameter tree with their paths, None among them, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_frozen_leaf)
    return [(path_string(path), leaf) for path, leaf in leaves], structure


def flatten_tunable(tunable: Any, params: Any, structure: Any) -> tuple[list[Any], Any]:
    """The leaves of a tunable tree, and `structure`, that of `params`, if it is the tree's too."""
    leaves, other = jax.tree.flatten(tunable, is_leaf=is_tunable_leaf)
    if other != structure:
        # Boxes are around the factors in one tree, and around the base in the other.
        without = jax.tree.structure(opened(tunable), is_leaf=is_tunable_leaf)
        if without == jax.tree.structure(opened(params), is_leaf=_is_frozen_leaf):
            other = structure
    return [bare(leaf) for leaf in leaves], other


def flatten_pair(frozen: Any, tunable: Any, function: str) -> tuple[list[Leaf], Any]:
    """The leaves of both trees side by side, and the structure of the parameters."""
    left, structure = flatten_params(frozen)
    right, other = flatten_tunable(tunable, frozen, structure)
    if structure != other:
        _check_order(frozen, tunable, function)
        raise PairError(
            f"{function}: frozen and tunable must both have the structure of the parameters, as "
            f"`init_lora` returns them, but frozen is {_brief(structure)} and tunable is "
            f"{_brief(other)}."
        )
    leaves = []
    for (path, leaf), new in zip(left, right, strict=True):
        base, held = base_and_held(leaf)
        leaves.append(Leaf(path, base, new, held))
        _check_leaf(function, leaves[-1])
    return leaves, structure


def _check_order(frozen: Any, tunable: Any, function: str) -> None:
    if not has_adapters(frozen):
        return
    if has_adapters(tunable):
        raise PairError(
            f"{function}: both trees have adapters. A pair is (frozen, tunable), as `init_lora` "
            "returns it, and frozen has arrays alone."
        )
    raise PairError(
        f"{function}: frozen and tunable are swapped: the first tree has the adapters. A pair is "
        "(frozen, tunable), as `init_lora` returns it."
    )


def has_adapters(tree: Any) -> bool:
    """Whether a tree has an adapter anywhere, as the tunable one of a pair."""
    leaves = jax.tree.leaves(tree, is_leaf=is_tunable_leaf)
    return any(isinstance(leaf, Adapter) for leaf in leaves)


def _brief(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _check_leaf(function: str, leaf: Leaf) -> None:
    path, base, new, held = leaf
    if not leaf.is_adapted:
        if base is not None and new is not None:
            raise PairError(
                f"{function}: `{path}` is in frozen and in tunable. A parameter is in one of them "
                "and None in the other; only an adapter needs its base beside it."
            )
        return
    if not is_array(base):
        raise PairError(
            f"{function}: tunable has an adapter at `{path}`, but frozen has "
            f"{type(base).__name__} there instead of its base weight."
        )
    # Under vmap and in trees of shapes or specs, leaves may be anything with a shape.
    shape = _shape(base)
    shapes = {name: _shape(factor) for name, factor in new.factors().items()}
    beside = {name: _shape(factor) for name, factor in held.items()}
    layout = _layout(new, shape)
    if layout is not None:
        needed = {name: sizes(labels) for name, labels in layout.held.items()}
        if needed.keys() - beside.keys():
            raise PairError(
                f"{function}: the {new.kind} adapter at `{path}` needs {_listed(needed)} beside "
                "its base in frozen. Pass the frozen tree of the same `init_lora` as the adapter."
            )
        if shapes == layout.shapes() and needed == {name: beside[name] for name in needed}:
            return
    settings = ", ".join(f"{name}={value}" for name, value in new.settings().items())
    raise PairError(
        f"{function}: the adapter at `{path}` has {_listed({**shapes, **beside})}, which do not "
        f"fit a base of shape {shape} with {settings}."
    )


def _layout(weight: Adapter, shape: tuple[int, ...]) -> Layout | None:
    """How factors run along a base of this shape; None where it cannot have such an adapter."""
    if sorted(axis for group in weight.axes for axis in group) != list(range(len(shape))):
        return None
    try:
        layout = weight.layout(shape)
    except SpecError:
        return None
    # An axis that is cut into blocks is as long as they are.
    fits = all(n == math.prod(sizes(labels)) for n, labels in zip(shape, layout.out, strict=True))
    return layout if fits else None


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(getattr(array, "shape", ()))


def _listed(shapes: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items())


def split_pair(value: Any, label: str) -> tuple[Any, Any]:
    """The two trees of a pair."""
    if _is_two(value):
        return value[0], value[1]
    raise PairError(
        f"{label} must be the pair (frozen, tunable) from `init_lora`, but it is "
        f"{type(value).__name__}."
    )


def _is_two(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def combine(leaves: list[Leaf], structure: Any, adapted: Callable[[Leaf], Any]) -> Any:
    """The parameter tree, with `adapted(leaf)` where the pair has an adapter."""
    return jax.tree.unflatten(
        structure, [adapted(leaf) if leaf.is_adapted else leaf.plain for leaf in leaves]
    )
