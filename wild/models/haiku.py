"""Networks from Haiku."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from .. import frameworks
from ..catalog import Subject, model
from ..frameworks import normal, tokens


@model("ResNet")
def resnet() -> Subject:
    def forward(x: jax.Array, is_training: bool = False) -> jax.Array:
        network = hk.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=5,
            bottleneck=False,
            channels_per_group=(8, 10, 12, 14),
            use_projection=(False, True, True, True),
            initial_conv_config={"output_channels": 8},
        )
        return network(x, is_training)

    return frameworks.haiku(forward, normal(2, 32, 32, 3), is_training=True)


@model("MobileNet")
def mobilenet() -> Subject:
    def forward(x: jax.Array, is_training: bool = False) -> jax.Array:
        network = hk.nets.MobileNetV1((1, 2, 2), (8, 10, 12), num_classes=7)
        return network(x, is_training)

    return frameworks.haiku(forward, normal(5, 16, 16, 3), is_training=True)


@model("VQ-VAE")
def vqvae() -> Subject:
    def forward(x: jax.Array) -> Any:
        encoded = hk.Conv2D(6, 3, stride=2)(jax.nn.relu(hk.Conv2D(9, 3)(x)))
        coded = hk.nets.VectorQuantizer(6, 11, commitment_cost=0.25)(encoded, is_training=False)
        return hk.Conv2DTranspose(3, 3, stride=2)(coded["quantize"]), coded["loss"]

    return frameworks.haiku(forward, normal(2, 8, 8, 3))


@model("attention over an embedding", transforms=True)
def attention() -> Subject:
    def forward(ids: jax.Array) -> jax.Array:
        x = hk.Embed(17, 12)(ids)
        start = hk.initializers.VarianceScaling()
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
        x = x + hk.MultiHeadAttention(3, 5, w_init=start, model_size=12)(x, x, x, mask)
        return hk.nets.MLP([22, 5])(hk.LayerNorm(-1, True, True)(x))

    return frameworks.haiku(forward, tokens(17, 2, 7))


@model("LSTM and GRU, unrolled by scan")
def recurrent() -> Subject:
    def forward(x: jax.Array) -> jax.Array:
        core = hk.DeepRNN([hk.LSTM(8), jax.nn.relu, hk.GRU(6), hk.Linear(3)])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return frameworks.haiku(forward, normal(9, 2, 5))
