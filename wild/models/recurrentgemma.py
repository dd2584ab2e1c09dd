"""Griffin: gated linear recurrences and local attention."""

import jax
import jax.numpy as jnp
from recurrentgemma import common
from recurrentgemma.jax import Griffin

from ..catalog import Subject, model
from ..frameworks import linen, tokens


@model("Griffin")
def griffin() -> Subject:
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=17,
        width=16,
        mlp_expanded_width=22,
        num_heads=2,
        block_types=(kinds.RECURRENT, kinds.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=5,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    positions = jnp.tile(jnp.arange(7), (2, 1))
    subject = linen(Griffin(config), tokens(17, 2, 7), positions)

    def fn(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        return subject.fn(params, ids, positions)[0]

    return Subject(fn, subject.params, subject.args[:1])
