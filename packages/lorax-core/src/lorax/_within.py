"""Adapters that exist within one call of a model and wrap another adapter."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ._adapter import Adapter, Layout
from ._axes import Axes


class Within(Adapter):
    """An adapter that wraps another one; subclasses are dataclasses with an `adapter` field.

    It is made inside the function that is differentiated and never stored, so its kind, settings
    and factors are those of the wrapped adapter.
    """

    adapter: Any

    def __post_init__(self) -> None:
        """Validates nothing: users do not write its settings, and files do not contain them."""

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of the wrapped adapter."""
        return self.adapter.kind

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return self.adapter.axes

    @property
    def rank(self) -> int | None:
        """The rank of the wrapped adapter, if it has one."""
        return getattr(self.adapter, "rank", None)

    def summary(self) -> str:
        """Returns the kind and size of the wrapped adapter."""
        return self.adapter.summary()

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns how the factors run along a weight of `shape`."""
        return self.adapter.layout(shape)

    def factors(self) -> dict[str, Any]:
        """Returns the trained arrays by name."""
        return self.adapter.factors()

    def with_factors(self, factors: Mapping[str, Any]) -> Self:
        """Returns the same wrapper around an adapter with other arrays."""
        adapter = self.adapter.with_factors(factors)
        return dataclasses.replace(self, adapter=adapter)  # pyright: ignore[reportArgumentType]
