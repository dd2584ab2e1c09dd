"""Adapters that live within one call of a model: another one, and something around it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ._adapter import Adapter, Layout
from ._axes import Axes


class Within(Adapter):
    """An adapter around another one; a dataclass below it has `adapter` and what it adds.

    It is made inside the function that is differentiated, so it is never stored: its kind, settings
    and factors are those of the adapter within.
    """

    adapter: Any

    def __post_init__(self) -> None:
        """Nothing to check: no user writes its settings, and no file has them."""

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of the adapter within."""
        return self.adapter.kind

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return self.adapter.axes

    @property
    def rank(self) -> int | None:
        """The rank of the adapter within, if it has one."""
        return getattr(self.adapter, "rank", None)

    def summary(self) -> str:
        """The kind and size of the adapter within."""
        return self.adapter.summary()

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the factors run along a weight of `shape`."""
        return self.adapter.layout(shape)

    def factors(self) -> dict[str, Any]:
        """The trained arrays by name."""
        return self.adapter.factors()

    def with_factors(self, factors: Mapping[str, Any]) -> Self:
        """The same around an adapter with other arrays."""
        adapter = self.adapter.with_factors(factors)
        return dataclasses.replace(self, adapter=adapter)  # pyright: ignore[reportArgumentType]
