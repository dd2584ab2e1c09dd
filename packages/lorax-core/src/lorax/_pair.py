"""The pair `(frozen, tunable)`: two trees with the structure of the parameters.

Each parameter is in one of the two trees, and None in the other. For an adapted parameter, the
adapter is in `tunable` and its base in `frozen`. Leaves that are not arrays stay in `frozen`.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from ._adapter import Adapter, Layout, sizes
from ._arrays import is_array, path_string
from ._base import QuantizedWeight, as_base
from ._boxes import bare, opened
from ._errors import PairError, SpecError
from ._factored import FactoredArray
from ._frozen_weight import FrozenWeight, base_and_frozen_factors


class Pair(NamedTuple):
    """The two trees that replace the parameters under `lora`, as `init_lora` returns them.

    Attributes:
        frozen: the parameters that are not trained, and the bases of adapters; None elsewhere.
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
    """One parameter of a pair; `frozen_factors` are those of its adapter."""

    path: str
    frozen: Any
    tunable: Any
    frozen_factors: Mapping[str, Any] = {}

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter."""
        return isinstance(self.tunable, Adapter)

    @property
    def is_weight(self) -> bool:
        """Whether the parameter has an adapter or is stored as codes."""
        return self.is_adapted or isinstance(self.frozen, QuantizedWeight)

    @property
    def plain(self) -> Any:
        """The parameter without an adapter, from the tree that contains it."""
        return self.frozen if self.tunable is None or self.is_adapted else self.tunable

    def applied(self, source: Hashable = None) -> FactoredArray:
        """Returns the weight as `lora` evaluates it, adapted or stored as codes."""
        base = as_base(self.frozen, source)
        if not self.is_adapted:
            return FactoredArray(base, ())
        return self.tunable.applied(base, self.frozen_factors, source)


jax.export.register_namedtuple_serialization(Pair, serialized_name="lorax.Pair")

# The default for a second tree that was not passed; None is a valid tree.
ABSENT: Any = object()


def two_trees(frozen: Any, tunable: Any, function: str) -> Pair:
    """Returns the pair of a call that was given either a pair or both trees."""
    if tunable is not ABSENT:
        return Pair(frozen, tunable)
    if _is_two(frozen):
        return Pair(*frozen)
    raise PairError(
        f"{function} takes a pair, as `init_lora` returns it, or its two trees, but got "
        f"{type(frozen).__name__}: {function}(frozen, tunable)."
    )


def pair_of_call(args: tuple[Any, ...], function: str) -> tuple[Pair, tuple[Any, ...]]:
    """Returns the pair that arguments begin with, as one or two of them, and the rest."""
    first, *others = args
    is_pair = isinstance(first, Pair) or not others
    # A tuple (x, y) may be a pair or a frozen tree that happens to have two children: the second
    # argument decides, by having adapters or the structure of the first.
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
    """Returns the leaves of a parameter tree with paths, including None, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_frozen_leaf)
    return [(path_string(path), leaf) for path, leaf in leaves], structure


def flatten_tunable(tunable: Any, params: Any, structure: Any) -> tuple[list[Any], Any]:
    """Returns the leaves of a tunable tree and its structure.

    The structure is `structure`, that of `params`, if the two trees differ in boxes only.
    """
    leaves, other = jax.tree.flatten(tunable, is_leaf=is_tunable_leaf)
    if other != structure:
        # Boxes are around factors in the tunable tree, and around bases in the other.
        without = jax.tree.structure(opened(tunable), is_leaf=is_tunable_leaf)
        if without == jax.tree.structure(opened(params), is_leaf=_is_frozen_leaf):
            other = structure
    return [bare(leaf) for leaf in leaves], other


def flatten_pair(frozen: Any, tunable: Any, function: str) -> tuple[list[Leaf], Any]:
    """Returns the leaves of both trees side by side and the structure of the parameters.

    Raises:
        PairError: if the trees are not a pair.
    """
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
        base, factors = base_and_frozen_factors(leaf)
        leaves.append(Leaf(path, base, new, factors))
        check_leaf_of_pair(function, leaves[-1])
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
    """Whether a tree contains an adapter, as the tunable tree of a pair does."""
    leaves = jax.tree.leaves(tree, is_leaf=is_tunable_leaf)
    return any(isinstance(leaf, Adapter) for leaf in leaves)


def _brief(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= 300 else f"{text[:300]}…"


def check_leaf_of_pair(function: str, leaf: Leaf) -> None:
    """Raises `PairError` where a parameter has two values, or an adapter does not fit its base."""
    path, base, new, frozen_factors = leaf
    if not leaf.is_adapted:
        if base is not None and new is not None:
            raise PairError(
                f"{function}: `{path}` is in frozen and in tunable. A parameter is in one of them "
                "and None in the other, unless it has an adapter, whose base is in frozen."
            )
        return
    if not is_array(base):
        raise PairError(
            f"{function}: tunable has an adapter at `{path}`, but frozen has "
            f"{type(base).__name__} there instead of its base weight."
        )
    dtype = getattr(base, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise PairError(
            f"{function}: tunable has an adapter at `{path}`, whose base holds {dtype}. A sum with "
            "its delta would be rounded to integers."
        )
    # Leaves may be anything with a shape: tracers under vmap, `ShapeDtypeStruct`s, or specs.
    shape = _shape(base)
    shapes = {name: _shape(factor) for name, factor in new.factors().items()}
    beside = {name: _shape(factor) for name, factor in frozen_factors.items()}
    layout = layout_on(new, shape)
    if layout is not None:
        needed = {name: sizes(labels) for name, labels in layout.frozen.items()}
        # DoRA, VeRA and others need frozen factors; a bare base lacks them.
        if needed.keys() - beside.keys():
            raise PairError(
                f"{function}: the {new.kind} adapter at `{path}` needs {_listed(needed)} next to "
                "its base in frozen. Pass the frozen tree of the same `init_lora` as the "
                "adapter."
            )
        if shapes == layout.shapes() and needed == {name: beside[name] for name in needed}:
            return
    settings = ", ".join(f"{name}={value}" for name, value in new.settings().items())
    raise PairError(
        f"{function}: the adapter at `{path}` has {_listed({**shapes, **beside})}, which do not "
        f"fit a base of shape {shape} with {settings}."
    )


def layout_on(weight: Adapter, shape: tuple[int, ...]) -> Layout | None:
    """Returns the layout of the factors on a base of this shape, or None if it cannot have them."""
    if sorted(axis for group in weight.axes for axis in group) != list(range(len(shape))):
        return None
    try:
        layout = weight.layout(shape)
    except SpecError:
        return None
    # The labels of an axis must multiply to its size, also where it is cut into blocks.
    fits = all(n == math.prod(sizes(labels)) for n, labels in zip(shape, layout.out, strict=True))
    return layout if fits else None


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(getattr(array, "shape", ()))


def _listed(shapes: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items())


def split_pair(value: Any, label: str) -> tuple[Any, Any]:
    """Returns the two trees of a pair; raises `PairError` for anything else."""
    if _is_two(value):
        return value[0], value[1]
    raise PairError(
        f"{label} must be the pair (frozen, tunable) from `init_lora`, but it is "
        f"{type(value).__name__}."
    )


def _is_two(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def combine(leaves: list[Leaf], structure: Any, adapted: Callable[[Leaf], Any]) -> Any:
    """Returns the parameter tree, with `adapted(leaf)` for each parameter with an adapter."""
    return jax.tree.unflatten(
        structure, [adapted(leaf) if leaf.is_adapted else leaf.plain for leaf in leaves]
    )
