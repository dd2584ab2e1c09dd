"""Gains and dropout where a weight meets an operand: what they do to the operand and the result.

    x @ (g ⊙ W)  =  (x @ W) ⊙ g      for a gain over the outputs
                 =  (x ⊙ g) @ W      for a gain over the inputs

A gain over axes that are kept multiplies the result, one over axes that are summed multiplies the
operand. Dropout zeroes entries of the operand before it meets the terms; the base meets all of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from ._compat import varying_axes
from ._contract import wide_dtype
from ._factored import FactoredArray, Keys, times_gain
from ._terms import Inexpressible, Term


def varying(term: Term) -> list[int]:
    """The axes of a weight that a term varies along."""
    return [d for d, labels in enumerate(term.out) if any(map(term.owners, labels))]


def gain_array(gain: Term, axes: Sequence[int], dtype) -> jax.Array:
    """A gain as an array of the weight's `axes`, which are all that it varies along."""
    return dataclasses.replace(gain, out=tuple(gain.out[d] for d in axes)).array(dtype)


def pay(
    weight: FactoredArray, operand: jax.Array, met: Mapping[int, int], shown: Mapping[int, int]
) -> tuple[FactoredArray, jax.Array, Callable[[jax.Array], jax.Array]]:
    """The weight without gains, the operand that it meets, and a function of the result.

    Args:
        weight: the weight.
        operand: what meets it.
        met: for each summed or batched axis of the weight, the operand's. The groups of a
            convolution repeat it there.
        shown: for each kept axis of the weight, the result's.
    """
    weight = weight.resolved()
    wide = wide_dtype(weight.base.dtype)
    after: list[tuple[jax.Array, list[int]]] = []
    for gain in weight.gains:
        axes = varying(gain)
        array = gain_array(gain, axes, wide)
        if all(d in shown for d in axes):
            after.append((array, [shown[d] for d in axes]))
        elif all(d in met for d in axes) and jnp.issubdtype(operand.dtype, jnp.inexact):
            places = [met[d] for d in axes]
            sizes = [operand.shape[d] for d in places]
            array = jnp.tile(array, [n // m for n, m in zip(sizes, array.shape, strict=True)])
            operand = times_gain(operand, spread(array, places, operand.ndim))
        else:
            raise Inexpressible("meets it along axes that leave no place for its gain")

    def pay_result(result: jax.Array) -> jax.Array:
        for array, places in after:
            result = times_gain(result, spread(array, places, result.ndim))
        return result

    return dataclasses.replace(weight, gains=()), operand, pay_result


def spread(array: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """An array as one of `ndim` axes, its axis k at `axes[k]` and sizes of one elsewhere."""
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape = [1] * ndim
    for k, axis in enumerate(axes):
        shape[axis] = array.shape[k]
    return jnp.transpose(array, order).reshape(shape)


# Dropout.


def fold_keys(keys: Keys, number: int | jax.Array) -> Keys:
    """Other keys, of one use of the weight."""
    (data,) = keys.term.factors
    folded = _mapped(data, keys.impl, lambda key: jax.random.key_data(_fold(key, number)))
    return dataclasses.replace(keys, term=dataclasses.replace(keys.term, factors=(folded,)))


def _fold(key: jax.Array, number: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(key, number)


def _mapped(data: jax.Array, impl: str, of_key: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """What a function makes of each key; its axes come last."""
    keys = jax.random.wrap_key_data(data, impl=impl)
    for _ in range(keys.ndim):
        of_key = jax.vmap(of_key)
    return of_key(keys)


def drop_out(weight: FactoredArray, operand: jax.Array, batch: Mapping[int, int]) -> jax.Array:
    """The operand as the terms see it; `batch` maps batched axes of the weight to the operand's.

    Each entry of the weight along a batched axis has a key, and so a mask, of its own.
    """
    if weight.keys is None:
        return operand
    keys = weight.keys
    axes = varying(keys.term)
    data = _key_data(keys.term, axes)  # [*axes, words]
    if names := tuple(sorted(varying_axes(operand))):
        # Inside `shard_map` each device draws for the entries that it has.
        index = jax.lax.axis_index(names)
        data = _mapped(data, keys.impl, lambda key: jax.random.key_data(_fold(key, index)))
    data = data[tuple(slice(None) if d in batch else 0 for d in axes)]
    places = [batch[d] for d in axes if d in batch]
    shape = [size for d, size in enumerate(operand.shape) if d not in places]
    # 16 random bits an entry: half the work of 32.
    kept = 65536 - min(max(round(keys.rate * 65536), 1), 65535)

    def masked(operand: jax.Array, data: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.bits(key, shape, jnp.uint16) < kept

        mask = jnp.moveaxis(_mapped(data, keys.impl, draw), range(len(places)), places)
        scale = jnp.asarray(65536 / kept, operand.dtype)
        return jnp.where(mask, operand * scale, jnp.zeros_like(operand))

    with jax.named_scope("lora"):
        return masked(operand, data)


def _key_data(term: Term, axes: Sequence[int]) -> jax.Array:
    """Key data along the weight's axes; a label that has no key of its own repeats them."""
    (data,), ((*owned, words),) = term.factors, term.labels
    shown = [label for d in axes for label in term.out[d]]
    # What a squeeze has dropped has one entry.
    data = data[tuple(slice(None) if label in shown else 0 for label in owned)]
    labels = [label for label in owned if label in shown]
    order = sorted(range(len(labels)), key=lambda k: shown.index(labels[k]))
    data = jnp.transpose(data, [*order, len(labels)])
    places = [k for k, label in enumerate(shown) if label in labels]
    sizes = [*(label.size for label in shown), words.size]
    full = jax.lax.broadcast_in_dim(data, sizes, [*places, len(shown)])
    return full.reshape([*(math.prod(x.size for x in term.out[d]) for d in axes), words.size])
