"""How other libraries serialize adapters: `jax.export` and `flax.serialization`.

All else that writes pytrees (Orbax, Equinox, pickle) sees arrays and needs nothing.
"""

import json
import sys
from typing import Any

import jax.export

from ._statics import with_tuples


def register_with_export(cls: type) -> None:
    """`jax.export` writes the structure of arguments into the file, statics included."""
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"lorax.{cls.__name__}",
        serialize_auxdata=_static_to_bytes,
        deserialize_auxdata=_static_from_bytes,
    )


def _static_to_bytes(static: Any) -> bytes:
    return json.dumps(static).encode()


def _static_from_bytes(data: bytes) -> Any:
    return with_tuples(json.loads(data))


def register_with_flax(cls: type) -> None:
    """Teaches `flax.serialization` the class, where Flax has been imported.

    Flax looks classes up in its own table, and the core does not import Flax. So every new
    adapter asks, and each `jax.tree.map` makes new ones: they are known before a state is saved.
    """
    flax: Any = sys.modules.get("flax.serialization")
    # An import that is still running has not defined the functions yet.
    if hasattr(flax, "register_serialization_state") and not flax.is_serializable(cls):
        flax.register_serialization_state(cls, _to_state, _from_state)


def _to_state(weight: Any) -> dict[str, Any]:
    """The factors; what is static comes from the target at restore, as in `flax.struct`."""
    to_state = sys.modules["flax.serialization"].to_state_dict
    return {name: to_state(factor) for name, factor in weight.factors().items()}


def _from_state(weight: Any, state: dict[str, Any]) -> Any:
    factors = weight.factors()
    if state.keys() != factors.keys():
        raise ValueError(
            f"A {weight.kind} adapter has the factors {' and '.join(factors)}, but the state has "
            f"{sorted(state)}."
        )
    from_state = sys.modules["flax.serialization"].from_state_dict
    return weight.with_factors(
        {name: from_state(factor, state[name], name) for name, factor in factors.items()}
    )
