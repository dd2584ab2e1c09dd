"""Indexing into a weight: lookups, gathers and dynamic slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import LokrSpec, LoraSpec, init_lora, lora, merge_params, testing

struct = jax.ShapeDtypeStruct
TABLE = {"w": (19, 5)}  # (words, features)
LAYERS = {"w": (3, 11, 7)}
STACKED = LoraSpec(2, shared_axes=[0])
BY_FEATURE = LoraSpec(2, in_axes=[1])
IDS = np.array([[0, 3, 18], [7, 7, 1]], np.int32)
# Negative indices count from the end; 19 and -20 are out of range.
BEYOND = np.array([[0, -1, 19], [-19, -20, 400]], np.int32)


def take(mode, **keywords):
    return lambda p, ids: jnp.take(p["w"], ids, axis=0, mode=mode, **keywords)


def at(mode, **keywords):
    return lambda p, ids: p["w"].at[ids].get(mode=mode, **keywords)


def gather(numbers, sizes, mode=None, **keywords):
    return lambda p, ids: lax.gather(p["w"], ids, numbers, sizes, mode=mode, **keywords)


def windows(*args, **keywords):
    """A window of a weight is still a weight, so it is multiplied by the argument."""
    pick = gather(*args, **keywords)
    return lambda p, x, ids: jnp.einsum("...ro,...r->...o", pick(p, ids), x)


def layer_by_layer(length, pick):
    def fn(p, x):
        return lax.fori_loop(0, length, lambda i, x: jnp.tanh(x @ pick(p["w"], i)), x)

    return fn


def numbers(offset, collapsed, start, operand=(), indices=()):
    return lax.GatherDimensionNumbers(offset, collapsed, start, operand, indices)


ROWS = [
    # Embedding tables.
    ("embedding", lambda p, ids: p["w"][ids], TABLE, {"w": 2}, [IDS]),
    ("embedding-by-feature", lambda p, ids: p["w"][ids], TABLE, {"w": BY_FEATURE}, [IDS]),
    ("embedding-one-word", lambda p, x: x * p["w"][4][None], TABLE, {"w": 2}, [(3, 5)]),
    ("embedding-negative", lambda p, ids: p["w"][ids], TABLE, {"w": 2}, [-1 - IDS]),
    ("take-default", lambda p, ids: jnp.take(p["w"], ids, axis=0), TABLE, {"w": 2}, [BEYOND]),
    ("take-default-by-feature", lambda p, ids: jnp.take(p["w"], ids, axis=0), TABLE,
     {"w": BY_FEATURE}, [BEYOND]),
    ("take-clip", take("clip"), TABLE, {"w": 2}, [BEYOND]),
    ("take-wrap", take("wrap"), TABLE, {"w": 2}, [BEYOND]),
    ("take-fill-nan", take("fill"), TABLE, {"w": 2}, [BEYOND]),
    ("take-fill-value", take("fill", fill_value=3.5), TABLE, {"w": 2}, [BEYOND]),
    ("take-columns-in-range",
     lambda p, ids: jnp.take(p["w"], ids, axis=1, mode="fill", fill_value=-1.0), {"w": (5, 19)},
     {"w": 2}, [IDS]),
    ("take-unsigned", take("clip"), TABLE, {"w": 2}, [IDS.astype(np.uint32)]),
    ("take-unique-and-sorted", take("fill", unique_indices=True, indices_are_sorted=True), TABLE,
     {"w": 2}, [np.array([1, 4, 11], np.int32)]),
    ("at-get-in-bounds", at("promise_in_bounds"), TABLE, {"w": 2}, [IDS]),
    ("at-get-fill", at("fill", fill_value=0.25), TABLE, {"w": 2}, [BEYOND]),
    ("at-get-drop", at("drop"), TABLE, {"w": 2}, [BEYOND]),
    ("embedding-by-one-hot", lambda p, ids: jax.nn.one_hot(ids, 19) @ p["w"], TABLE, {"w": 2},
     [IDS]),
    ("embedding-and-tied-head", lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, TABLE, {"w": 2},
     [IDS]),
    ("embedding-then-layer", lambda p, ids: p["w"][ids] @ p["v"], {"w": (19, 5), "v": (5, 7)},
     {"w": 2, "v": 3}, [IDS]),
    ("embedding-bfloat16", lambda p, ids: p["w"][ids], {"w": struct((19, 5), jnp.bfloat16)},
     {"w": 2}, [IDS], {"tolerance": 0.01}),
    ("embedding-cast-first", lambda p, ids: p["w"].astype(jnp.bfloat16)[ids], TABLE, {"w": 2},
     [IDS], {"tolerance": 0.01}),
    ("embedding-scaled", lambda p, ids: (p["w"] * 2.0)[ids], TABLE, {"w": 2}, [IDS]),
    ("embedding-two-tables", lambda p, ids: jnp.concatenate([p["w"], p["v"]])[ids],
     {"w": (11, 5), "v": (8, 5)}, {"w": 2, "v": 3}, [IDS]),
    ("embedding-heads", lambda p, ids: p["w"][ids], {"w": (19, 2, 5)},
     {"w": LoraSpec(2, in_axes=[0])}, [IDS]),
    ("embedding-merged-axes", lambda p, ids: p["w"].reshape(20, 7)[ids], {"w": (4, 5, 7)},
     {"w": LoraSpec(2, out_axes=[2])}, [IDS]),
    ("vmap-of-an-embedding", lambda p, ids: jax.vmap(lambda i: p["w"][i])(ids), TABLE, {"w": 2},
     [IDS]),
    # Along an axis.
    ("take-along-axis-0", lambda p, ids: jnp.take_along_axis(p["w"], ids, axis=0), TABLE, {"w": 2},
     [np.array([[0, 3, 18, 1, 7], [2, 2, 2, 5, 4]], np.int32)]),
    ("take-along-axis-1", lambda p, ids: jnp.take_along_axis(p["w"], ids, axis=1), {"w": (3, 11)},
     {"w": 2}, [np.array([[0, 10], [3, 3], [7, -1]], np.int32)]),
    ("take-along-axis-clip", lambda p, ids: jnp.take_along_axis(p["w"], ids, axis=1, mode="clip"),
     {"w": (3, 11)}, {"w": 2}, [np.array([[0, 30], [3, 3], [7, 1]], np.int32)]),
    ("batched-gather-under-vmap", lambda p, ids: jax.vmap(lambda w, i: w[i])(p["w"], ids),
     {"w": (2, 19, 5)}, {"w": STACKED}, [IDS]),
    ("batched-gather-not-owned", lambda p, ids: jax.vmap(lambda w, i: w[i])(p["w"], ids),
     {"w": (2, 19, 5)}, {"w": LoraSpec(2, in_axes=[1])}, [IDS]),
    # Indices into several axes.
    ("two-indices", lambda p, i, j: p["w"][i, j], TABLE, {"w": 2},
     [IDS, np.array([[0, 4, 2], [1, 1, 0]], np.int32)]),
    ("two-indices-fill", lambda p, i, j: p["w"].at[i, j].get(mode="fill", fill_value=7.0), TABLE,
     {"w": 2}, [BEYOND, np.array([[0, 4, 2], [1, 9, -6]], np.int32)]),
    ("indices-on-a-grid", lambda p, i, j: p["w"][i[:, None], j[None]], TABLE, {"w": 2},
     [np.array([0, 18, 7], np.int32), np.array([4, 1], np.int32)]),
    ("index-and-slice", lambda p, ids: p["w"][ids, 1:4], TABLE, {"w": 2}, [IDS]),
    ("separated-indices", lambda p, i, j: p["w"][i, :, j], LAYERS, {"w": STACKED},
     [np.array([0, 2], np.int32), np.array([6, 3], np.int32)]),
    ("expert-of-each-token", lambda p, x, e: jnp.einsum("ti,tio->to", x, p["w"][e]), LAYERS,
     {"w": STACKED}, [(4, 11), np.array([2, 0, 2, 1], np.int32)]),
    ("expert-of-each-token-not-shared",
     lambda p, x, e: jnp.einsum("ti,tio->to", x, p["w"][e]), LAYERS,
     {"w": LoraSpec(2, in_axes=[1])}, [(4, 11), np.array([2, 0, 2, 1], np.int32)]),
    # Windows.
    ("gather-window", windows(numbers((1, 2), (), (0, 1)), (2, 3)), TABLE, {"w": 2},
     [(4, 2), np.array([[0, 1], [5, 2], [17, 0], [30, 30]], np.int32)]),
    ("gather-window-fill",
     windows(numbers((1, 2), (), (0, 1)), (2, 3), mode="fill", fill_value=-2.0), TABLE, {"w": 2},
     [(4, 2), np.array([[0, 1], [18, 2], [-1, 0], [3, 3]], np.int32)]),
    ("gather-window-rows", windows(numbers((1, 2), (), (0,)), (4, 5), mode="clip"), TABLE,
     {"w": 2}, [(3, 4), np.array([[0], [14], [18]], np.int32)]),
    ("gather-swapped-start-map", windows(numbers((1, 2), (), (1, 0)), (2, 3)), TABLE, {"w": 2},
     [(3, 2), np.array([[1, 0], [2, 5], [0, 17]], np.int32)]),
    ("gather-partly-collapsed", gather(numbers((1,), (0,), (0, 1)), (1, 3)), TABLE, {"w": 2},
     [np.array([[0, 1], [5, 2], [17, 0]], np.int32)]),
    ("gather-batched", gather(numbers((2,), (1,), (1,), (0,), (0,)), (1, 1, 7)), LAYERS,
     {"w": STACKED}, [np.array([[[0], [4]], [[10], [2]], [[5], [5]]], np.int32)]),
    ("gather-batched-window",
     windows(numbers((2, 3), (), (1,), (0,), (0,)), (1, 3, 7), mode="fill"), LAYERS,
     {"w": 2}, [(3, 2, 3), np.array([[[0], [4]], [[9], [2]], [[5], [-1]]], np.int32)]),
    # Scalar indices.
    ("layer-by-traced-index", lambda p, x, i: x @ p["w"][i], LAYERS, {"w": STACKED},
     [(2, 11), np.array(1, np.int32)]),
    ("layer-in-fori-loop", layer_by_layer(3, lambda w, i: w[i]), {"w": (3, 11, 11)},
     {"w": STACKED}, [(2, 11)]),
    ("layer-in-fori-loop-not-shared", layer_by_layer(3, lambda w, i: w[i]), {"w": (3, 11, 11)},
     {"w": 2}, [(2, 11)]),
    ("layer-by-dynamic-index",
     layer_by_layer(3, lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False)),
     {"w": (3, 11, 11)}, {"w": STACKED}, [(2, 11)]),
    ("layer-in-the-middle", lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 1, False),
     {"w": (11, 3, 7)}, {"w": LoraSpec(2, shared_axes=[1])}, [(2, 11), np.array(2, np.int32)]),
    ("dynamic-slice-rows", lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 4), TABLE,
     {"w": 2}, [(3, 4), np.array(6, np.int32)]),
    ("dynamic-slice-both", lambda p, x, i, j: x @ lax.dynamic_slice(p["w"], (i, j), (4, 2)), TABLE,
     {"w": 2}, [(3, 4), np.array(-3, np.int32), np.array(2, np.int32)]),
    ("dynamic-slice-beyond-the-end", lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 4),
     TABLE, {"w": 2}, [(3, 4), np.array(17, np.int32)]),
    ("dynamic-entry-of-a-merged-axis",
     lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"].reshape(33, 5), i, 0), {"w": (11, 3, 5)},
     {"w": LoraSpec(2, in_axes=[0], out_axes=[1, 2])}, [(4, 1), np.array(29, np.int32)]),
    ("dynamic-entry-beyond-blocks",
     lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 0), {"w": (12, 8)},
     {"w": LokrSpec(2, factor=4)}, [(4, 1), np.array(77, np.int32)]),
    ("dynamic-slice-columns", lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 3, 1),
     {"w": (5, 19)}, {"w": 2}, [(4, 5), np.array(6, np.int32)]),
    ("dynamic-slice-a-merged-axis",
     lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"].reshape(33, 5), i, 4), {"w": (11, 3, 5)},
     {"w": LoraSpec(2, in_axes=[0])}, [(2, 4), np.array(6, np.int32)], {"materializes": True}),
    ("vmap-over-slice-starts",
     lambda p, x, i: jax.vmap(lambda x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 4))(x, i),
     TABLE, {"w": 2}, [(3, 4), np.array([6, 0, 15], np.int32)]),
    # What no rule covers.
    ("boolean-mask-of-a-weight", lambda p, x: x @ p["w"][np.arange(11) % 2 == 0], {"w": (11, 7)},
     {"w": 2}, [(3, 6)]),
    ("dynamic-update-slice",
     lambda p, x: x @ lax.dynamic_update_slice(p["w"], x[:2, :3], (1, 1)), {"w": (11, 7)},
     {"w": 2}, [(3, 11)], {"materializes": True}),
    ("argsort-of-a-weight", lambda p, x: x * jnp.argsort(p["w"], 0)[0].astype(jnp.float32)[None],
     {"w": (11, 7)}, {"w": 2}, [(3, 7)], {"materializes": True}),
]  # fmt: skip

# XLA of JAX 0.8 folds two fill-mode gathers at the same constant indices into wrong numbers, in
# plain JAX too.
if jax.__version_info__ >= (0, 10):
    ROWS.append(
        (
            "take-columns",
            lambda p, ids: jnp.take(p["w"], ids, axis=1, mode="fill", fill_value=-1.0),
            {"w": (5, 19)},
            {"w": 2},
            [BEYOND],
        )
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_indexing(check_row, row):
    check_row(*row)


@pytest.mark.parametrize("mode", [None, "promise_in_bounds", "clip", "fill"])
def test_out_of_range_indices_act_as_in_the_model(mode):
    # For the mode of `w[ids]` JAX leaves gradients at such indices undefined, so only values.
    params = {"w": jax.random.normal(jax.random.key(0), (19, 5))}
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(1))
    tunable = testing.random_factors(tunable, jax.random.key(2))
    fn = lambda p: p["w"].at[BEYOND].get(mode=mode)  # noqa: E731
    got = lora(fn, on_materialize="error")((frozen, tunable))
    expected = fn(merge_params(frozen, tunable))
    assert np.allclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert np.isnan(got).any() == (mode == "fill")
