"""Adapters: factors with labeled axes, and settings. One class per kind.

All code outside `kinds/` handles adapters through this file, and names no kind:

* `Adapter` is a node of the tunable tree. Its arrays are trained; everything else is static.
* `FrozenWeight` is a node of the frozen tree: a base and the frozen factors of its adapter.
* `AdapterSpec` is a leaf of the spec tree, which makes the initial factors.

`Layout` maps the axes of each factor to axes of the weight. Shapes, placement, boxes, files and the
oracle follow from it, and for most kinds also the delta: the einsum of all factors.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax

from ._axes import Axes
from ._errors import ArgumentError, SpecError
from ._factored import FactoredArray
from ._formats import register_with_export, register_with_flax
from ._statics import is_of, make_plain, with_tuples
from ._terms import Label, Labels, Term

Neutral = float | Callable[[Mapping[str, Any]], Any]
"""A number for all entries of a factor, or a function of the frozen factors."""

KINDS: "dict[str, type[Adapter]]" = {}
"""The adapter classes, by the name that files use for them."""


def static(default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """Declares a field of an adapter that is a static setting instead of an array.

    Args:
        default: the default value.
        **options: as in `dataclasses.field`.

    Returns:
        The field.

    Example:
        >>> from lorax.kinds import static
        >>> static(4).default
        4
    """
    return dataclasses.field(metadata={"static": True}, default=default, **options)


class Layout(NamedTuple):
    """How factors run along the axes of a weight.

    Attributes:
        out: the labels of each axis of the weight, most significant first.
        factors: the labels of each trained factor, by name.
        frozen: the labels of each frozen factor, by name.
        gains: the names of factors that multiply the sum instead of being part of a delta.
    """

    out: tuple[Labels, ...]
    factors: Mapping[str, Labels]
    frozen: Mapping[str, Labels] = {}
    gains: frozenset[str] = frozenset()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each trained factor."""
        return {name: sizes(labels) for name, labels in self.factors.items()}

    def axis_of(self, label: Label) -> int | None:
        """Returns the axis of the weight whose only label is this one, or None."""
        return next((d for d, labels in enumerate(self.out) if labels == (label,)), None)


def sizes(labels: Sequence[Label]) -> tuple[int, ...]:
    """Returns the shape of an array with these labels."""
    return tuple(label.size for label in labels)


class Labeled(NamedTuple):
    """The labels of a weight's axes by role; `inner(k, size)` is a label of no axis."""

    shared: Labels
    inputs: Labels
    outputs: Labels

    @classmethod
    def of(cls, axes: Axes, shape: Sequence[int]) -> Self:
        """Returns the labels of a weight of `shape`: axis d has label d."""
        return cls(*(tuple(Label(d, shape[d]) for d in group) for group in axes))

    @property
    def out(self) -> tuple[Labels, ...]:
        """The label of each axis, in order."""
        labels = sorted((*self.shared, *self.inputs, *self.outputs))
        return tuple((label,) for label in labels)

    def inner(self, k: int, size: int) -> Label:
        """Returns inner label number k, such as the rank."""
        # Axis d of the weight has label d, so inner labels are numbered from the number of axes.
        return Label(sum(map(len, self)) + k, size)

    def split(self, axis: int, count: int, k: int) -> Labels:
        """Returns two labels for one axis: `count` blocks, and inner label k within each."""
        size = self.out[axis][0].size
        # [size] -> [count, size / count]; the blocks keep the label of the axis.
        return Label(axis, count), self.inner(k, size // count)

    def out_with(self, names: Mapping[int, Labels]) -> tuple[Labels, ...]:
        """Returns the labels of each axis in order, with some axes replaced."""
        return tuple(names.get(d, labels) for d, labels in enumerate(self.out))


class Adapter:
    """The trained factors of one weight, and how they change it.

    A kind of adapter is a frozen dataclass under `@defkind`. Its fields are factors, nested
    adapters, and settings (`static`), three of which are `in_axes`, `out_axes` and `shared_axes`.
    `layout` defines how its factors run along the weight. If the weight is the base plus the einsum
    of all factors, nothing else is needed; other kinds override `applied`.
    """

    kind: ClassVar[str]

    # JAX rebuilds adapters with arbitrary objects in place of factors, so they are not validated.
    def __post_init__(self) -> None:
        make_plain(self)
        register_with_flax(type(self))

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return Axes(self.shared_axes, self.in_axes, self.out_axes)  # pyright: ignore

    @property
    def scale(self) -> float:
        """The scalar that multiplies the delta."""
        return 1.0

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns how the factors run along a weight of `shape`; it depends on settings alone."""
        raise NotImplementedError

    def check_settings(self, path: str) -> None:
        """Raises `SpecError` for settings of the right types with invalid values."""
        for name in ("rank", "blocks"):
            value = getattr(self, name, None)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise SpecError(f"`{path}` has {name} {value}; it must be positive.")

    def neutral(self) -> Mapping[str, Neutral] | None:
        """Returns the trained factors with which the weight equals its base, or None if unknown.

        These are zeros if the weight is the base plus the einsum of all factors.
        """
        is_einsum = type(self).applied is Adapter.applied and type(self).term is Adapter.term
        return dict.fromkeys(self.factors(), 0.0) if is_einsum else None

    def derived(self, base: Any) -> dict[str, Any]:
        """Returns the frozen factors that follow from the base, which files can omit."""
        return {}

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """Returns the adapted weight.

        Args:
            base: the frozen weight.
            frozen: the frozen factors of the adapter.
            source: the name of the weight in messages, its path.
        """
        return FactoredArray(base, (self.term(base.shape, frozen or {}, source),))

    def term(self, shape: tuple[int, ...], frozen: Mapping[str, Any], source: Hashable) -> Term:
        """Returns the einsum of all factors, scaled."""
        layout = self.layout(shape)
        labels = {**layout.factors, **layout.frozen}
        factors = {**self.factors(), **frozen}
        term = make_term({n: factors[n] for n in labels}, labels, layout.out, source)
        return term if self.scale == 1 else term.scale(self.scale)

    def _nodes(self, static: bool) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {
            field.name: getattr(self, field.name)
            for field in fields
            if field.metadata.get("static", False) == static
        }

    def factors(self) -> dict[str, Any]:
        """Returns the trained arrays by name, including those of nested adapters."""
        factors: dict[str, Any] = {}
        for name, value in self._nodes(static=False).items():
            factors |= value.factors() if isinstance(value, Adapter) else {name: value}
        return factors

    def with_factors(self, factors: Mapping[str, Any]) -> Self:
        """Returns the same adapter with other arrays."""
        return dataclasses.replace(
            self,  # pyright: ignore[reportArgumentType]
            **{
                name: value.with_factors(factors) if isinstance(value, Adapter) else factors[name]
                for name, value in self._nodes(static=False).items()
            },
        )

    def settings(self) -> dict[str, Any]:
        """Returns all settings that shape the weight, as JSON for `adapter_from_settings`."""
        settings: dict[str, Any] = {"kind": self.kind}
        for name, value in self._nodes(static=True).items():
            settings[name] = list(value) if isinstance(value, tuple) else value
        for name, value in self._nodes(static=False).items():
            if isinstance(value, Adapter):
                settings[name] = value.settings()
        return settings

    def summary(self) -> str:
        """Returns the kind and its size, for a table."""
        rank = getattr(self, "rank", None)
        return self.kind if rank is None else f"{self.kind} {rank}"


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter."""
    return isinstance(node, Adapter)


_DEEPEST = 4  # settings from an untrusted file may be nested without end


def adapter_from_settings(settings: Mapping[str, Any]) -> Adapter:
    """Returns an adapter without arrays from the result of `Adapter.settings`, validated.

    Args:
        settings: a JSON object, which may come from an untrusted file.

    Returns:
        The adapter, with None for each factor; `Adapter.with_factors` gives it arrays.

    Raises:
        ValueError, TypeError, KeyError: if the settings are not valid.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import adapter_from_settings, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((3, 2))}, {"w": 1}, jax.random.key(0))
        >>> adapter_from_settings(tunable["w"].settings()).layout((3, 2)).shapes()
        {'a': (3, 1), 'b': (1, 2)}
    """
    return _from_settings(settings, 0)


def _from_settings(settings: Mapping[str, Any], depth: int) -> Adapter:
    if depth == _DEEPEST:
        raise ArgumentError(
            f"The settings nest adapters {depth} levels deep; the limit is {_DEEPEST - 1}."
        )
    given = dict(settings)
    cls = KINDS[given.pop("kind")]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.metadata.get("static"):
            values[field.name] = with_tuples(given.pop(field.name))
            if not is_of(values[field.name], field.type):
                raise ArgumentError(
                    f"A {cls.kind} adapter cannot have {field.name}={values[field.name]!r}."
                )
        elif field.type is Adapter:
            values[field.name] = _from_settings(given.pop(field.name), depth + 1)
        else:
            values[field.name] = None
    if given:
        raise ArgumentError(f"A {cls.kind} adapter has no setting {min(given)!r}.")
    adapter = cls(**values)
    adapter.check_settings(f"a {cls.kind} adapter")
    return adapter


def defkind(cls: type[Any]) -> type[Any]:
    """Registers an adapter class: makes it a frozen dataclass and a pytree that files can name.

    Args:
        cls: a subclass of `lorax.Adapter`. Files refer to it by its `kind`.

    Returns:
        The class.

    Raises:
        ArgumentError: if a kind of that name exists.

    Example:
        >>> import lorax
        >>> from lorax.kinds import defkind, static
        >>> @defkind
        ... class GainOfAll(lorax.Adapter):
        ...     kind = "gain of all"
        ...     gain: object
        ...     in_axes: tuple = static((0,))
        ...     out_axes: tuple = static((1,))
        ...     shared_axes: tuple = static(())
        >>> GainOfAll(2.0).settings()
        {'kind': 'gain of all', 'in_axes': [0], 'out_axes': [1], 'shared_axes': []}
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    jax.tree_util.register_dataclass(cls)
    register_with_export(cls)
    if cls.kind in KINDS:
        raise ArgumentError(f"The kind {cls.kind!r} is already defined, by {KINDS[cls.kind]}.")
    KINDS[cls.kind] = cls
    return cls


def make_term(
    factors: Mapping[str, Any],
    labels: Mapping[str, Labels],
    out: tuple[Labels, ...],
    source: Hashable,
) -> Term:
    """Returns the term of named factors.

    Args:
        factors: the arrays, by name.
        labels: the labels of the axes of each array, by name.
        out: the labels that each axis of the weight shows.
        source: the name of the weight, as passed to `applied`.

    Returns:
        The term `einsum(*factors)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import Axes
        >>> from lorax.kinds import Labeled, make_term
        >>> axes = Labeled.of(Axes((), (0,), (1,)), (3, 2))
        >>> rank = axes.inner(0, 1)
        >>> labels = {"a": (*axes.inputs, rank), "b": (rank, *axes.outputs)}
        >>> factors = {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}
        >>> make_term(factors, labels, axes.out, None).shape
        (3, 2)
    """
    sources = () if source is None else (source,)
    return Term(tuple(factors.values()), tuple(labels[name] for name in factors), out, sources)
