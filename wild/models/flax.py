"""Flax: Linen modules and NNX modules."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from .. import frameworks
from ..catalog import Subject, model
from ..frameworks import linen, normal, tokens


class Normed(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        x = nn.gelu(self.norm(nn.Conv(8, (3, 3)))(x, **options))
        return self.norm(nn.Dense(5))(x.mean((1, 2)), **options)


@model("Linen: weight norm")
def weight_norm() -> Subject:
    return linen(Normed(nn.WeightNorm), normal(2, 8, 8, 3))


@model("Linen: spectral norm", single=True)
def spectral_norm() -> Subject:
    return linen(Normed(nn.SpectralNorm), normal(2, 8, 8, 3), update_stats=False)


@model("Linen: spectral norm, as it is updated", single=True)
def spectral_norm_updated() -> Subject:
    return linen(Normed(nn.SpectralNorm), normal(2, 8, 8, 3), update_stats=True)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.RNN(nn.LSTMCell(9))(x)
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(6)), nn.RNN(nn.OptimizedLSTMCell(6)))(x)
        return nn.Dense(7)(x)


@model("Linen: LSTM and GRU", single=True)
def recurrent() -> Subject:
    return linen(Recurrent(), normal(3, 11, 5))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.ConvTranspose(8, (3, 3), strides=(2, 2))(x)
        x = nn.GroupNorm(4)(nn.gelu(x))
        x = nn.ConvTranspose(5, (4, 4), strides=(2, 2), transpose_kernel=True)(x)
        x = nn.ConvLocal(4, (3, 3))(x)
        return nn.Conv(6, (3, 3), feature_group_count=2, kernel_dilation=2)(x)


@model("Linen: transposed, local and dilated convolutions")
def decoder() -> Subject:
    return linen(Decoder(), normal(2, 3, 3, 7))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(17, 12)
        x = embed(ids) + self.param("positions", nn.initializers.normal(), (ids.shape[1], 12))
        x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        x = nn.DenseGeneral((2, 9))(nn.RMSNorm()(x))
        return embed.attend(nn.DenseGeneral(12, axis=(-2, -1))(nn.silu(x)))


@model("Linen: attention, tied embedding", transforms=True)
def attention() -> Subject:
    return linen(Attention(), tokens(17, 2, 7))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attend = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.mix = nnx.Einsum("btd,de->bte", (12, 12), (12,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nnx.gelu(self.mix(self.attend(self.norm(x))))


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(17, 12, rngs=rngs)
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = make(rngs.fork(split=2))
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(self.embed(ids), self.blocks))


@model("NNX: attention, blocks scanned", single=True)
def scanned() -> Subject:
    return frameworks.nnx(Network(nnx.Rngs(0)), lambda module, ids: module(ids), tokens(17, 2, 7))


class Cells(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(5, 8, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs))
        self.conv = nnx.Conv(6, 7, (3,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.gru(self.lstm(x)))


@model("NNX: LSTM and GRU", single=True, transforms=True)
def cells() -> Subject:
    return frameworks.nnx(Cells(nnx.Rngs(0)), lambda module, x: module(x), normal(4, 11, 5))
