"""Gains and dropout where a weight meets an operand: their effect on operand and result.

    x @ (g ⊙ W)  =  (x @ W) ⊙ g      for a gain over the outputs
                 =  (x ⊙ g) @ W      for a gain over the inputs

A gain over axes that are kept multiplies the result, and a gain over axes that are summed over
multiplies the operand. The same holds for a block-diagonal matrix. Dropout zeroes entries of the
operand before it meets the terms; the base meets the whole operand.
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
    """Returns the axes of a weight that a term varies along."""
    return [d for d, labels in enumerate(term.out) if any(map(term.owners, labels))]


def _gain_array(gain: Term, axes: Sequence[int], dtype) -> jax.Array:
    """Returns a gain as an array of the weight's `axes`, which are all that it varies along."""
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
    """Moves the gains and the turn of a weight to its operand and its result.

    Args:
        weight: the weight.
        operand: the array that meets it.
        met: maps each summed or batched axis of the weight to an axis of the operand, which the
            groups of a convolution repeat.
        shown: maps each kept axis of the weight to an axis of the result.
        entries: converts a gain along these axes of the weight to the entries that operand and
            result have there.
        turned: multiplies operand or result by the weight's matrix, as `Turn.applied_to` does.
        precision: of that product; a pair is for the operand and for the weight.

    Returns:
        The weight without gains and turn, the operand for it, and a function to apply to the
        result.

    Raises:
        Inexpressible: if a gain or a matrix varies along kept and summed axes at once.
    """
    # A pending norm must be computed before its gain can multiply anything.
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
            raise Inexpressible("uses it along axes where its gain cannot be applied")
    turn, turns_result = weight.turn, False
    if turn is not None:
        # The matrix is along a kept axis, so it multiplies the result; else along a summed one.
        turns_result = all(d in shown for d in turn.varying)
        if not turns_result:
            if not (all(d in met for d in turn.varying) and _is_inexact(operand)):
                raise Inexpressible(
                    "uses it along axes where its block-diagonal matrix cannot be applied"
                )
            operand = turned(turn, operand, met, by_rows=True, precision=precision)

    def pay_result(result: jax.Array) -> jax.Array:
        if turn is not None and turns_result:
            result = turned(turn, result, shown, precision=precision)
        # After the turn: gains multiply turn · W.
        for array, places in after:
            # The products of terms have joined axes as well; a gain alone fuses as it is.
            joins = bool(weight.terms)
            result = times_gain(result, spread(array, places, result.ndim), joins=joins)
        return result

    return dataclasses.replace(weight, gains=(), turn=None), operand, pay_result


def _is_inexact(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def spread(array: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Returns an array with `ndim` axes: axis k goes to `axes[k]`, the others have size one."""
    # Axes are put in the order of their places, so that a reshape can insert the ones.
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape = [1] * ndim
    for k, axis in enumerate(axes):
        shape[axis] = array.shape[k]
    # [k-th at axes[k]] -> sorted by axis -> ones elsewhere
    return jnp.transpose(array, order).reshape(shape)


# Dropout.


def fold_keys(keys: Keys, number: int | jax.Array) -> Keys:
    """Returns the keys of one use of the weight: `number` is folded into each."""
    (data,) = keys.term.factors
    folded = _mapped(data, keys.impl, lambda key: jax.random.key_data(_fold(key, number)))
    return dataclasses.replace(keys, term=dataclasses.replace(keys.term, factors=(folded,)))


def _fold(key: jax.Array, number: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(key, number)


def _mapped(data: jax.Array, impl: str, of_key: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies a function to each key; the axes of its result come last."""
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
    """Returns `function` of the operand after dropout, as the terms see it.

    For the backward pass, the mask and the products of the terms are recomputed: a dropped operand
    is as large as the operand itself, and every weight has one of its own. Under an outer
    `jax.checkpoint`, saved products would keep the dropped operand as well.

    Args:
        operand: the array that meets the weight.
        weight: the weight, with the keys of this use.
        batch: maps each batched axis of the weight to an axis of the operand.
        function: computes the products.
    """
    if weight.keys is None:
        return function(operand)

    def dropped(operand: jax.Array, keys: Keys) -> jax.Array:
        return function(_drop_out(operand, keys, batch))

    # If a compiler undoes the recomputation, that saves time and costs no more memory than a
    # saved mask would.
    return jax.checkpoint(dropped, prevent_cse=False)(operand, weight.keys)


def _drop_out(operand: jax.Array, keys: Keys, batch: Mapping[int, int]) -> jax.Array:
    """Returns the operand with a fraction of its entries zeroed, and the rest scaled up.

    Each entry of the weight along a batched axis has a key, and therefore a mask, of its own.
    """
    axes = varying(keys.term)
    data = _key_data(keys.term, axes)  # [*axes, words]
    if names := tuple(sorted(varying_axes(operand))):
        # Inside `shard_map`, each device draws an independent mask for its own entries.
        index = jax.lax.axis_index(names)
        data = _mapped(data, keys.impl, lambda key: jax.random.key_data(_fold(key, index)))
    data = data[tuple(slice(None) if d in batch else 0 for d in axes)]  # [*batched, words]
    places = [batch[d] for d in axes if d in batch]
    shape = [size for d, size in enumerate(operand.shape) if d not in places]
    # [words] -> [*shape]
    of_key = lambda words: _noise(words, shape)  # noqa: E731
    for _ in places:
        of_key = jax.vmap(of_key)
    with jax.named_scope("lora"):
        noise = jnp.moveaxis(of_key(data), range(len(places)), places)
        # The noise is uniform over 2³² numbers, of which a fraction `rate` is below rate · 2³².
        mask = sharded_like(noise >= np.uint32(keys.rate * 2**32), operand)
        # Scaled up by 1 / (1 − rate), which leaves the expected value unchanged.
        kept = operand * jnp.asarray(1 / (1 - keys.rate), operand.dtype)
        return jnp.where(mask, kept, jnp.zeros_like(operand))


def _noise(words: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns uniform 32-bit numbers: a hash of two words of a key and the position of each entry.

    `jax.random.bits` would make temporary arrays as large as the operand. This takes a few
    operations per entry that fuse into the consumer, and is random enough for a mask. It applies
    the finalizer of MurmurHash3 once per axis.
    """
    mixed = _mix(words[0] ^ _mix(words[-1]))
    for size in shape:
        # Multiples of 2³² / golden ratio spread adjacent positions over all bits.
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
    """Returns key data along the weight's axes; labels without a key of their own repeat it."""
    (data,), ((*owned, words),) = term.factors, term.labels
    shown = [label for d in axes for label in term.out[d]]
    # Labels that a squeeze has dropped have one entry.
    data = data[tuple(slice(None) if label in shown else 0 for label in owned)]
    labels = [label for label in owned if label in shown]
    order = sorted(range(len(labels)), key=lambda k: shown.index(labels[k]))
    data = jnp.transpose(data, [*order, len(labels)])
    places = [k for k, label in enumerate(shown) if label in labels]
    sizes = [*(label.size for label in shown), words.size]
    full = jax.lax.broadcast_in_dim(data, sizes, [*places, len(shown)])
    return full.reshape([*(math.prod(x.size for x in term.out[d]) for d in axes), words.size])
