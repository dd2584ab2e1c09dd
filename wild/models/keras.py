"""Keras 3 on JAX, through `stateless_call`."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import keras  # noqa: E402
from keras import layers  # noqa: E402

from .. import frameworks  # noqa: E402
from ..catalog import Subject, model  # noqa: E402
from ..frameworks import normal, tokens  # noqa: E402

keras.config.set_floatx("float64")


@model("convolutions and Dense")
def convolutions() -> Subject:
    network = keras.Sequential(
        [
            layers.Input((9, 9, 3)),
            layers.Conv2D(8, 3, padding="same", activation="gelu"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.BatchNormalization(),
            layers.SeparableConv2D(10, 3, padding="same", activation="relu"),
            layers.Conv2DTranspose(6, 2, strides=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ]
    )
    return frameworks.keras(network, normal(2, 9, 9, 3))


@model("attention, EinsumDense", transforms=True)
def attention() -> Subject:
    ids = keras.Input((7,), dtype="int32")
    x = layers.Embedding(17, 12)(ids)
    x = x + layers.MultiHeadAttention(3, 4)(x, x, use_causal_mask=True)
    x = layers.LayerNormalization()(x)
    x = layers.EinsumDense("btd,dhk->bthk", (None, 2, 9), activation="gelu")(x)
    x = layers.EinsumDense("bthk,hkd->btd", (None, 5), bias_axes="d")(x)
    return frameworks.keras(keras.Model(ids, x), tokens(17, 2, 7))


@model("LSTM and GRU")
def recurrent() -> Subject:
    network = keras.Sequential(
        [
            layers.Input((9, 5)),
            layers.LSTM(8, return_sequences=True),
            layers.Bidirectional(layers.GRU(6)),
            layers.Dense(7),
        ]
    )
    return frameworks.keras(network, normal(4, 9, 5))


@model("spectral norm")
def spectral_norm() -> Subject:
    network = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.SpectralNormalization(layers.Conv2D(7, 3, activation="gelu")),
            layers.Flatten(),
            layers.SpectralNormalization(layers.Dense(5)),
        ]
    )
    return frameworks.keras(network, normal(2, 8, 8, 3))
