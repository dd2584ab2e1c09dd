"""Serialization of adapters by other libraries: `jax.export` and `flax.serialization`.

Other libraries that write pytrees (Orbax, Equinox, pickle) handle adapters without registration.
"""

import json
import sys
from typing import Any

import jax.export

from ._errors import ArgumentError
from ._statics import with_tuples


def register_with_export(cls: type) -> None:
    """Registers a class with `jax.export`, which serializes the structure of arguments."""
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
    """Registers a class with `flax.serialization`, if Flax has been imported.

    Flax has a table of classes, and the core does not import Flax. So each new adapter tries to
    register its class; `jax.tree.map` makes new adapters, so this happens before a state is saved.
    """
    flax: Any = sys.modules.get("flax.serialization")
    # While Flax is being imported, the functions may not be defined yet.
    if hasattr(flax, "register_serialization_state") and not flax.is_serializable(cls):
        flax.register_serialization_state(cls, _to_state, _from_state)


def _to_state(weight: Any) -> dict[str, Any]:
    """Returns the factors; static fields come from the target at restore, as in `flax.struct`."""
    to_state = sys.modules["flax.serialization"].to_state_dict
    return {name: to_state(factor) for name, factor in weight.factors().items()}


def _from_state(weight: Any, state: dict[str, Any]) -> Any:
    factors = weight.factors()
    if state.keys() != factors.keys():
        raise ArgumentError(
            f"A {weight.kind} adapter has the factors {' and '.join(factors)}, but the state has "
            f"{sorted(state)}."
        )
    from_state = sys.modules["flax.serialization"].from_state_dict
    return weight.with_factors(
        {name: from_state(factor, state[name], name) for name, factor in factors.items()}
    )
