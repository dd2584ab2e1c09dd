"""The same programs with other LoRA libraries, each used as its documentation describes.

Every peer gets the same weights and factors as ours, so it must compute the same loss and, in JAX,
the same gradient. If a library does not support a model, its error is reported unchanged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from peers.nnx_lora import with_nnx
from peers.peft_lora import with_peft
from peers.quax_lora import with_quax
from peers.qwix_lora import with_qwix


class Peer(NamedTuple):
    """A library, and a function that adapts a workload's model with it."""

    package: str  # import name
    make: Callable[..., Any]  # returns a `Lora`, or outside JAX a function that runs the program


PEERS = {
    "flax.nnx.LoRA": Peer("flax", with_nnx),
    "qwix": Peer("qwix", with_qwix),
    "quax": Peer("quax", with_quax),
    "PEFT on torch": Peer("peft", with_peft),
}
