"""Masks of a weight, writes into a weight, and a weight written into an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import LoraSpec, MaterializeWarning, init_lora, lora

struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}
TWO = {"w": (11, 7), "v": (11, 7)}
HEADS = {"w": (11, 3, 5)}
FROM_MODEL = LoraSpec(2, in_axes=[0])
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}
ROW_MASK = np.array([True, False, True, True, False, False, True, True, False, True, True])
COLUMN_MASK = np.array([True, True, False, False, True, False, True])
ROW_IDS = np.array([2, 9, 4], np.int32)
REPEATED = np.array([2, 9, 2], np.int32)
# 11 and 40 are out of range.
BEYOND = np.array([3, 11, 40, -1], np.int32)


def then_dot(change):
    return lambda p, x, *args: x @ change(p["w"], *args)


def switched(p, x, k):
    return x @ lax.select_n(k, p["w"], p["v"], p["u"])


def update(shape, start):
    return then_dot(lambda w: lax.dynamic_update_slice(w, jnp.full(shape, 0.5), start))


def layers_switched_off(p, x, keep):
    """A stack whose layers are kept or zeroed under vmap."""
    ws = jax.vmap(lambda w, k: jnp.where(k, w, 0.0))(p["w"], keep)
    return jnp.einsum("ebi,eio->ebo", x, ws)


ROWS = [
    # Scalar predicates.
    ("where-scalar", then_dot(lambda w, k: jnp.where(k > 0, w, 0.0)), W, {"w": 2}, [(3, 11), ()]),
    ("where-scalar-false", then_dot(lambda w, k: jnp.where(k * k < 0, w, 1.0)), W, {"w": 2},
     [(3, 11), ()], {"transforms": False}),
    ("where-scalar-two-weights",
     lambda p, x, k: x @ jnp.where(k > 0, p["w"], p["v"]), TWO, {"w": 2, "v": 3}, [(3, 11), ()]),
    ("where-scalar-literal", then_dot(lambda w: jnp.where(True, w, 0.0)), W, {"w": 2}, [(3, 11)]),
    ("select-n-of-three", switched, {"w": (11, 7), "v": (11, 7), "u": (11, 7)},
     {"w": 2, "v": 3, "u": 2}, [(3, 11), np.int32(1)]),
    ("where-under-vmap", layers_switched_off, {"w": (3, 11, 7)}, {"w": STACKED},
     [(3, 2, 11), np.array([True, False, True])]),
    # Masks along axes.
    ("mask-of-rows", then_dot(lambda w, m: jnp.where(m[:, None], w, 0.0)), W, {"w": 2},
     [(3, 11), ROW_MASK]),
    ("mask-of-columns", then_dot(lambda w, m: jnp.where(m[None], w, 0.0)), W, {"w": 2},
     [(3, 11), COLUMN_MASK]),
    ("mask-with-an-array", then_dot(lambda w, m, v: jnp.where(m[:, None], w, v)), W,
     {"w": 2}, [(3, 11), ROW_MASK, (11, 7)]),
    ("mask-of-two-weights", lambda p, x, m: x @ jnp.where(m[None], p["w"], p["v"]), TWO,
     {"w": 2, "v": 3}, [(3, 11), COLUMN_MASK]),
    ("mask-of-heads", lambda p, x, m: jnp.einsum("bi,iho->bho", x, jnp.where(m[:, None], p["w"],
     0.0)), HEADS, {"w": FROM_MODEL}, [(2, 11), np.array([True, False, True])]),
    ("mask-that-multiplies", then_dot(lambda w, m: w * m[:, None]), W, {"w": 2}, [(3, 11), (11,)]),
    ("mask-bfloat16", then_dot(lambda w, m: jnp.where(m[:, None], w, jnp.bfloat16(0))),
     {"w": struct((11, 7), jnp.bfloat16)}, {"w": 2}, [struct((3, 11), jnp.bfloat16), ROW_MASK],
     {"tolerance": 0.05}),
    ("mask-of-a-norm", lambda p, x, m: x * (jnp.where(m[:, None], p["w"], 0.0) ** 2).sum(0)[None],
     W, {"w": 2}, [(3, 7), ROW_MASK]),
    ("mask-of-entries", then_dot(lambda w, m: jnp.where(m > 0, w, 0.0)), W, {"w": 2},
     [(3, 11), (11, 7)], MATERIALIZED),
    ("mask-of-the-weight", then_dot(lambda w: jnp.where(w > 0, w, 0.0)), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("tril", then_dot(jnp.tril), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    ("triu", then_dot(lambda w: jnp.triu(w, 1)), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    # Updates of rows.
    ("set-a-row", then_dot(lambda w: w.at[0].set(0.0)), W, {"w": 2}, [(3, 11)]),
    ("set-a-row-to-numbers", then_dot(lambda w, v: w.at[3].set(v)), W, {"w": 2}, [(3, 11), (7,)]),
    ("set-a-column", then_dot(lambda w: w.at[:, -1].set(1.0)), W, {"w": 2}, [(3, 11)]),
    ("set-a-slice", then_dot(lambda w: w.at[2:5].set(0.5)), W, {"w": 2}, [(3, 11)]),
    ("set-strided", then_dot(lambda w: w.at[1::3].set(0.5)), W, {"w": 2}, [(3, 11)]),
    ("set-rows", then_dot(lambda w, i: w.at[i].set(0.0)), W, {"w": 2}, [(3, 11), ROW_IDS]),
    ("set-rows-twice", then_dot(lambda w, i: w.at[i].set(0.0)), W, {"w": 2}, [(3, 11), REPEATED]),
    ("set-rows-out-of-range", then_dot(lambda w, i: w.at[i].set(0.0)), W, {"w": 2},
     [(3, 11), BEYOND]),
    ("set-rows-clipped", then_dot(lambda w, i: w.at[i].set(0.0, mode="clip")), W, {"w": 2},
     [(3, 11), BEYOND]),
    ("set-a-head",
     lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"].at[:, 1].set(0.0)), HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("set-part-of-each-head",
     lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"].at[:, 1, 2:4].set(0.0)), HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("set-in-a-stack", lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"].at[1].set(0.0)),
     {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 11)]),
    ("set-under-vmap",
     lambda p, x, i: jnp.einsum("ebi,eio->ebo", x, jax.vmap(lambda w, i: w.at[i].set(0.0))(
         p["w"], i)), {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 11), ROW_IDS]),
    ("set-row-of-another-weight", lambda p, x: x @ p["w"].at[2:6].set(p["v"]),
     {"w": (11, 7), "v": (4, 7)}, {"w": 2, "v": 2}, [(3, 11)]),
    ("set-an-entry", then_dot(lambda w: w.at[2, 3].set(0.0)), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    ("set-a-block", then_dot(lambda w: w.at[:3, :4].set(0.0)), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("add-to-a-row", then_dot(lambda w, v: w.at[3].add(v)), W, {"w": 2}, [(3, 11), (7,)]),
    ("add-to-rows", then_dot(lambda w, i: w.at[i].add(0.5)), W, {"w": 2}, [(3, 11), REPEATED]),
    ("add-to-entries", then_dot(lambda w, v: w.at[2:5, 1:3].add(v)), W, {"w": 2},
     [(3, 11), (3, 2)]),
    ("subtract-from-a-row", then_dot(lambda w, v: w.at[3].subtract(v)), W, {"w": 2},
     [(3, 11), (7,)]),
    ("multiply-a-row", then_dot(lambda w: w.at[3].multiply(2.0)), W, {"w": 2}, [(3, 11)]),
    ("multiply-rows", then_dot(lambda w, i: w.at[i].multiply(2.0)), W, {"w": 2},
     [(3, 11), REPEATED]),
    ("multiply-rows-by-numbers",
     then_dot(lambda w, i, s: w.at[i].multiply(jnp.broadcast_to(s[:, None], (3, 7)))), W,
     {"w": 2}, [(3, 11), REPEATED, (3,)]),
    ("multiply-a-row-by-a-vector", then_dot(lambda w, s: w.at[3].multiply(s)), W, {"w": 2},
     [(3, 11), (7,)], MATERIALIZED),
    ("divide-a-column", then_dot(lambda w: w.at[:, 2].divide(3.0)), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("max-with-a-row", then_dot(lambda w: w.at[3].max(0.0)), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    # A weight that is written into an array or another weight.
    ("write-into-zeros", then_dot(lambda w: jnp.zeros((20, 7)).at[:11].set(w)), W, {"w": 2},
     [(3, 20)]),
    ("write-into-both-axes", then_dot(lambda w: jnp.zeros((20, 9)).at[4:15, 2:].set(w)), W,
     {"w": 2}, [(3, 20)]),
    ("write-a-layer", lambda p, x: jnp.einsum("bi,eio->ebo", x,
     jnp.ones((3, 11, 7)).at[1].set(p["w"])), W, {"w": 2}, [(2, 11)]),
    ("write-out-of-range", lambda p, x, k: jnp.einsum("bi,eio->ebo", x,
     jnp.ones((3, 11, 7)).at[k].set(p["w"])), W, {"w": 2}, [(2, 11), np.int32(3)]),
    ("add-into-numbers", lambda p, x, v: x @ v.at[3:14].add(p["w"]), W, {"w": 2},
     [(3, 20), (20, 7)]),
    ("write-rows", then_dot(lambda w, i: jnp.zeros((20, 7)).at[i].set(w)), {"w": (3, 7)},
     {"w": 2}, [(5, 20), ROW_IDS], MATERIALIZED),
    # dynamic_update_slice
    ("update-rows", update((3, 7), (2, 0)), W, {"w": 2}, [(3, 11)]),
    ("update-columns", update((11, 2), (0, 6)), W, {"w": 2}, [(3, 11)]),
    ("update-at-a-traced-row",
     then_dot(lambda w, i: lax.dynamic_update_slice(w, jnp.ones((2, 7)), (i, i))), W, {"w": 2},
     [(3, 11), np.int32(10)]),
    ("update-of-all", lambda p, x: x @ lax.dynamic_update_slice(p["w"], p["v"], (0, 0)) +
     (x @ p["w"]), TWO, {"w": 2, "v": 3}, [(3, 11)]),
    ("update-a-block", update((3, 2), (2, 0)), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    ("update-zeros-with-a-weight",
     then_dot(lambda w, i: lax.dynamic_update_slice(jnp.zeros((20, 9)), w, (i, 1))), W, {"w": 2},
     [(3, 20), np.int32(4)]),
    ("update-a-weight-with-another",
     lambda p, x: x @ lax.dynamic_update_slice(p["w"], p["v"], (4, 0)),
     {"w": (11, 7), "v": (4, 7)}, {"w": 2, "v": 2}, [(3, 11)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_selection(check_row, row):
    check_row(*row)


@pytest.mark.parametrize(
    "change, reason",
    [
        (jnp.tril, "gets an array mask of the weight's shape"),
        (lambda w: w * jnp.tril(jnp.ones((11, 7))), "multiplies it by an array of the weight's"),
        (lambda w: w.at[2, 3].set(0.0), "overwrites a part that is not made of whole rows"),
        (jnp.abs, "is not linear in the weight"),
        (lambda w: jnp.clip(w, -1, 1), "is not linear in the weight"),
    ],
    ids=["tril", "mul", "scatter", "abs", "clip"],
)
def test_warning_says_why_the_weight_is_materialized(change, reason):
    pair = init_lora({"w": jnp.ones((11, 7))}, {"w": 2}, jax.random.key(0))
    with pytest.warns(MaterializeWarning, match=f"which {reason}"):
        lora(lambda p, x: x @ change(p["w"]))(pair, jnp.ones((3, 11)))
