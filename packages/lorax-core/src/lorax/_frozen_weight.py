"""A node of the frozen tree: a base, and the frozen factors of its adapter."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from ._adapter import Adapter, static
from ._base import decoded
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


def base_and_frozen_factors(leaf: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a leaf of the frozen tree into its base and its frozen factors."""
    return (leaf.base, leaf.factors) if isinstance(leaf, FrozenWeight) else (leaf, {})


def factors_from_base(
    adapter: Adapter, base: Any, shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the frozen factors that follow from the base, such as the norms of DoRA.

    They follow from the decoded weight of a quantized base: that is what the model multiplies by.

    Args:
        adapter: the adapter; only its settings are used.
        base: the frozen weight, quantized or not.
        shardings: the sharding of each factor by name; a factor that is not listed is placed as
            JAX chooses.

    Returns:
        The factors by name, computed under `jit`, so that processes may hold shards of the base.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import DoraSpec, LoraSpec, init_lora
        >>> from lorax.kinds import factors_from_base
        >>> params = {"w": jnp.full((2, 3), 2.0)}
        >>> frozen, tunable = init_lora(params, {"w": DoraSpec(LoraSpec(1))}, jax.random.key(0))
        >>> factors_from_base(tunable["w"], params["w"])["square"].tolist()
        [8.0, 8.0, 8.0]
    """
    blank = adapter.with_factors(dict.fromkeys(adapter.factors()))
    names = jax.eval_shape(_derived, blank, base)
    where = {name: (shardings or {}).get(name) for name in names}
    return jax.jit(_derived, out_shardings=where)(blank, base)


def _derived(adapter: Adapter, base: Any) -> dict[str, Any]:
    return adapter.derived(decoded(base))


register_with_export(FrozenWeight)
