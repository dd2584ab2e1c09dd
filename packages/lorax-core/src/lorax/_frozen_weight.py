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
    """A base, and the factors of its adapter that stay frozen: a node of the frozen tree.

    `init_lora` puts one where a kind of adapter needs it, such as the norms of DoRA or the matrices
    of VeRA; elsewhere the frozen tree has the base alone.

    Attributes:
        base: the frozen weight.
        factors: arrays by name.
        settings: those of the adapter as JSON, where some factors follow from the base, so that
            `quantize` can compute them again.
    """

    base: Any
    factors: dict[str, Any]
    settings: str = static("")

    @classmethod
    def beside(cls, base: Any, factors: Mapping[str, Any], adapter: "Adapter") -> Any:
        """The leaf of the frozen tree for an adapter: the base alone where it has no factors."""
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
    """A leaf of the frozen tree as its base and the frozen factors beside it."""
    return (leaf.base, leaf.factors) if isinstance(leaf, FrozenWeight) else (leaf, {})


register_with_export(FrozenWeight)
