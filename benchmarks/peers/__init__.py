"""The same programs with other LoRA libraries, each used as its own documentation says.

Every peer gets the weights and the factors of ours, and so has to compute the same loss and, in
JAX, the same gradient. What it says of a model that it cannot do is left as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from peers.nnx_lora import with_nnx
from peers.peft_lora import with_peft
from peers.quax_lora import with_quax
from peers.qwix_lora import with_qwix


class Peer(NamedTuple):
    """A library, and how it takes a work, its model and our adapters."""

    package: str  # as it is imported
    make: Callable[..., Any]  # `Lora`; or, outside JAX, what runs the program


PEERS = {
    "flax.nnx.LoRA": Peer("flax", with_nnx),
    "qwix": Peer("qwix", with_qwix),
    "quax": Peer("quax", with_quax),
    "PEFT on torch": Peer("peft", with_peft),
}
