"""A node of the frozen tree: a base, and the frozen factors of its adapter."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from ._adapter import Adapter, static
from ._formats import register_with_export


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """A node of the frozen tree: a base, with the frozen factors of its adapter.

    `init_lora` makes one for kinds of adapters that need it, for the norms of DoRA or the matrices
    of VeRA; otherwise the frozen tree has the bare base.

    Attributes:
        base: the frozen weight.
        factors: arrays by name.
        settings: the settings of the adapter as JSON if some factors follow from the base, so that
            `quantize` can recompute them.
    """

    base: Any
    factors: dict[str, Any]
    settings: str = static("")

    @classmethod
    def beside(cls, base: Any, factors: Mapping[str, Any], adapter: "Adapter") -> Any:
        """Returns the frozen leaf for an adapter: the bare base if there are no factors."""
        if not factors:
            return base
        follows = type(adapter).derived is not Adapter.derived
        return cls(base, dict(factors), json.dumps(adapter.settings()) if follows else "")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype


def base_and_held(leaf: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a leaf of the frozen tree into its base and its frozen factors."""
    return (leaf.base, leaf.factors) if isinstance(leaf, FrozenWeight) else (leaf, {})


register_with_export(FrozenWeight)
