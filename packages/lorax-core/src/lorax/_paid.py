"""Gains and dropout where a weight meets an operand: what they do to the operand and the result.

    x @ (g ⊙ W)  =  (x @ W) ⊙ g      for a gain over the outputs
                 =  (x ⊙ g) @ W      for a gain over the inputs

A gain over axes that are kept multiplies the result, one over axes that are summed multiplies the
operand. So does a block-diagonal matrix. Dropout zeroes entries of the operand before it meets the
terms; the base meets all of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import varying_axes
from ._contract import wide_dtype
from ._factored import FactoredArray, Keys, times_gain
from ._sharding import sharded_like
from ._terms import Inexpressible, Term
from ._turn import Turn


def varying(term: Term) -> list[int]:
    """The axes of a weight that a term varies along."""
    return [d for d, labels in enumerate(term.out) if any(map(term.owners, labels))]


def _gain_array(gain: Term, axes: Sequence[int], dtype) -> jax.Array:
    """A gain as an array of the weight's `axes`, which are all that it varies along."""
    return dataclasses.replace(gain, out=tuple(gain.out[d] for d in axes)).array(dtype)


def pay(
    weight: FactoredArray,
    operand: jax.Array,
    met: Mapping[int, int],
    shown: Mapping[int, int],
    entries: Callable[[jax.Array, Sequence[int]], jax.Array] = lambda array, axes: array,
    turned: Callable[..., jax.Array] = Turn.applied_to,
    precision: Any = None,
) -> tuple[FactoredArray, jax.Array, Callable[[jax.Array], jax.Array]]:
    """The weight without gains or a turn, the operand that it meets, and a function of the result.

    Args:
        weight: the weight.
        operand: what meets it.
        met: for each summed or batched axis of the weight, the operand's. The groups of a
            convolution repeat it there.
        shown: for each kept axis of the weight, the result's.
        entries: turns a gain along these axes of the weight into what the operand and the result
            have there.
        turned: multiplies the operand or the result by the weight's matrix, as `Turn.applied_to`.
        precision: of that product; a pair is that of the operand and of the weight.
    """
    weight = weight.resolved()
    wide = wide_dtype(weight.base.dtype)
    after: list[tuple[jax.Array, list[int]]] = []
    for gain in weight.gains:
        # x · (g ⊙ W)  =  g ⊙ (x · W) for a gain along outputs, and (g ⊙ x) · W for one along
        # inputs.
        axes = varying(gain)
        array = entries(_gain_array(gain, axes, wide), axes)
        if all(d in shown for d in axes):
            after.append((array, [shown[d] for d in axes]))
        elif all(d in met for d in axes) and _is_inexact(operand):
            places = [met[d] for d in axes]
            sizes = [operand.shape[d] for d in places]
            # A convolution's groups repeat the inputs, so the gain repeats as well.
            array = jnp.tile(array, [n // m for n, m in zip(sizes, array.shape, strict=True)])
            operand = times_gain(operand, spread(array, places, operand.ndim))
        else:
            raise Inexpressible("meets it along axes that leave no place for its gain")
    turn, turns_result = weight.turn, False
    if turn is not None:
        turns_result = all(d in shown for d in turn.varying)
        if not turns_result:
            if not (all(d in met for d in turn.varying) and _is_inexact(operand)):
                raise Inexpressible("meets it along axes that leave no place for its matrix")
            operand = turned(turn, operand, met, by_rows=True, precision=precision)

    def pay_result(result: jax.Array) -> jax.Array:
        if turn is not None and turns_result:
            result = turned(turn, result, shown, precision=precision)
        for array, places in after:
            result = times_gain(result, spread(array, places, result.ndim), joins=True)
        return result

    return dataclasses.replace(weight, gains=(), turn=None), operand, pay_result


def _is_inexact(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def spread(array: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """An array as one of `ndim` axes, its axis k at `axes[k]` and sizes of one elsewhere."""
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape = [1] * ndim
    for k, axis in enumerate(axes):
        shape[axis] = array.shape[k]
    # [k-th at axes[k]] -> sorted by axis -> ones elsewhere
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
    """A function's result for each key; its axes come last."""
    keys = jax.random.wrap_key_data(data, impl=impl)
    for _ in range(keys.ndim):
        of_key = jax.vmap(of_key)
    return of_key(keys)


def with_dropout_on(
    operand: jax.Array,
    weight: FactoredArray,
    batch: Mapping[int, int],
    function: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`function` of the operand as the terms see it.

    For the backward pass the mask is drawn again, and with it the products of the terms: what is
    dropped is as large as the operand, and each weight has its own. Under an outer `jax.checkpoint`
    saved products would keep the dropped operand beside them.

    Args:
        operand: what meets the weight.
        weight: the weight, whose keys are this use's own.
        batch: for each batched axis of the weight, the operand's.
        function: computes products.
    """
    if weight.keys is None:
        return function(operand)

    def dropped(operand: jax.Array, keys: Keys) -> jax.Array:
        return function(_drop_out(operand, keys, batch))

    # A compiler that undoes this saves time, and no more is kept than without dropout.
    return jax.checkpoint(dropped, prevent_cse=False)(operand, weight.keys)


def _drop_out(operand: jax.Array, keys: Keys, batch: Mapping[int, int]) -> jax.Array:
    """The operand without some of its entries.

    Each entry of the weight along a batched axis has a key, and so a mask, of its own.
    """
    axes = varying(keys.term)
    data = _key_data(keys.term, axes)  # [*axes, words]
    if names := tuple(sorted(varying_axes(operand))):
        # Inside `shard_map` each device draws for the entries that it has.
        index = jax.lax.axis_index(names)
        data = _mapped(data, keys.impl, lambda key: jax.random.key_data(_fold(key, index)))
    data = data[tuple(slice(None) if d in batch else 0 for d in axes)]  # [*batched, words]
    places = [batch[d] for d in axes if d in batch]
    shape = [size for d, size in enumerate(operand.shape) if d not in places]
    of_key = lambda words: _noise(words, shape)  # noqa: E731
    for _ in places:
        of_key = jax.vmap(of_key)
    with jax.named_scope("lora"):
        noise = jnp.moveaxis(of_key(data), range(len(places)), places)
        # Uniform over 2³² numbers, so `rate` of them are below rate · 2³².
        mask = sharded_like(noise >= np.uint32(keys.rate * 2**32), operand)
        kept = operand * jnp.asarray(1 / (1 - keys.rate), operand.dtype)
        return jnp.where(mask, kept, jnp.zeros_like(operand))


def _noise(words: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Uniform 32-bit numbers: a hash of two words of a key and of the position of each entry.

    `jax.random.bits` would make temporary arrays as large as the operand. This is a few operations
    for each entry, which fuse into what reads them, and enough for a mask. It is the finalizer of
    MurmurHash3, once for each axis.
    """
    mixed = _mix(words[0] ^ _mix(words[-1]))
    for size in shape:
        position = jax.lax.iota(jnp.uint32, size) * np.uint32(0x9E3779B9)
        mixed = _mix(
            jnp.expand_dims(mixed, -1) ^ (position + words[-1]).reshape(*[1] * mixed.ndim, -1)
        )
    return mixed


def _mix(bits: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))


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
