"""A selective state-space model, with a language head."""

from flax.nnx import Rngs
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

from ..catalog import Subject, model
from ..frameworks import nnx, tokens


@model("Mamba 2", single=True)
def mamba() -> Subject:
    sizes = {"vocab_size": 17, "hidden_size": 12, "state_size": 5, "head_dim": 8}
    config = Mamba2Config(**sizes, chunk_size=4, num_hidden_layers=2)
    module = Mamba2ForCausalLM(config, rngs=Rngs(0))
    return nnx(module, lambda module, ids: module(ids)["logits"], tokens(17, 2, 8))
