"""Arithmetic under which weights stay linear in their factors."""

import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, explain, init_lora, testing

struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}
TWO = {"w": (11, 7), "v": (11, 7)}
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}


def scaled(p, x):
    return x @ (p["w"] * p["s"])


ROWS = [
    # A scalar.
    ("neg", lambda p, x: x @ -p["w"], W, {"w": 2}, [(3, 11)]),
    ("mul-python-scalar", lambda p, x: x @ (3.0 * p["w"]), W, {"w": 2}, [(3, 11)]),
    ("mul-scalar-array", lambda p, x, s: x @ (p["w"] * s), W, {"w": 2}, [(3, 11), ()]),
    ("mul-trained-scalar", scaled, {"w": (11, 7), "s": ()}, {"w": 2, "s": -1}, [(3, 11)]),
    ("mul-one-by-one", lambda p, x, s: x @ (p["w"] * s), W, {"w": 2}, [(3, 11), (1, 1)]),
    ("mul-zero", lambda p, x: x @ (p["w"] * 0.0 + p["v"]), TWO, {"w": 2, "v": 2}, [(3, 11)]),
    ("div-scalar", lambda p, x: x @ (p["w"] / 7.0), W, {"w": 2}, [(3, 11)]),
    ("div-scalar-array", lambda p, x, s: x @ (p["w"] / (2 + jnp.sin(s))), W, {"w": 2},
     [(3, 11), ()]),
    ("mul-bfloat16", lambda p, x: x @ (p["w"] * jnp.bfloat16(0.5)),
     {"w": struct((11, 7), jnp.bfloat16)}, {"w": 2}, [struct((3, 11), jnp.bfloat16)],
     {"tolerance": 0.05}),
    ("mul-complex", lambda p, x: x @ (p["w"].astype(jnp.complex64) * (1 + 2j)), W, {"w": 2},
     [struct((3, 11), jnp.complex64)]),
    # Along axes.
    ("mul-along-inputs", lambda p, x, s: x @ (s[:, None] * p["w"]), W, {"w": 2}, [(3, 11), (11,)]),
    ("mul-along-outputs", lambda p, x, s: x @ (p["w"] * s[None]), W, {"w": 2}, [(3, 11), (7,)]),
    ("mul-along-both-in-turn", lambda p, x, s, t: x @ (p["w"] * s[None] * t[:, None]), W,
     {"w": 2}, [(3, 11), (7,), (11,)]),
    ("div-along-outputs", lambda p, x, s: x @ (p["w"] / (2 + jnp.sin(s))[None]), W, {"w": 2},
     [(3, 11), (7,)]),
    ("mul-trained-vector", lambda p, x: x @ (p["w"] * p["s"][None]), {"w": (11, 7), "s": (7,)},
     {"w": 2, "s": -1}, [(3, 11)]),
    ("mul-along-the-stack",
     lambda p, x, s: jnp.einsum("ebi,eio->ebo", x, p["w"] * s[:, None, None]),
     {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 11), (3,)]),
    ("mul-along-an-axis-that-no-factor-has",
     lambda p, x, s: jnp.einsum("ebi,eio->ebo", x, p["w"][None] * s[:, None, None]), W,
     {"w": 2}, [(5, 2, 11), (5,)]),
    ("mul-along-two-of-three-axes", lambda p, x, s: jnp.einsum("bi,iho->bho", x, p["w"] * s[None]),
     {"w": (11, 3, 5)}, {"w": LoraSpec(2, in_axes=[0])}, [(2, 11), (3, 5)]),
    ("mul-by-a-broadcast-array",
     lambda p, x, s: x @ (p["w"] * jnp.broadcast_to(s[None, :], (11, 7))), W, {"w": 2},
     [(3, 11), (7,)]),
    ("div-by-a-broadcast-array",
     lambda p, x, s: x @ (p["w"] / jnp.broadcast_to(2 + jnp.sin(s)[:, None], (11, 7))), W,
     {"w": 2}, [(3, 11), (11,)]),
    ("mul-by-an-array-of-the-same-shape", lambda p, x, s: x @ (p["w"] * s), W, {"w": 2},
     [(3, 11), (11, 7)], MATERIALIZED),
    ("mul-by-a-weight", lambda p, x: x @ (p["w"] * p["v"]), TWO, {"w": 2, "v": 3}, [(3, 11)],
     MATERIALIZED),
    ("divide-two-weights", lambda p, x: x @ (p["w"] / (2 + p["v"] ** 2)), TWO, {"w": 2, "v": 3},
     [(3, 11)], MATERIALIZED),
    ("divide-by-a-weight", lambda p, x: x @ (1 / (2 + p["w"] ** 2)), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("tanh-of-a-weight", lambda p, x: x @ jnp.tanh(p["w"]), W, {"w": 2}, [(3, 11)], MATERIALIZED),
    # Sums.
    ("add-weights", lambda p, x: x @ (p["w"] + p["v"]), TWO, {"w": 2, "v": 3}, [(3, 11)]),
    ("sub-weights", lambda p, x: x @ (p["w"] - p["v"]), TWO, {"w": 2, "v": 3}, [(3, 11)]),
    ("add-itself", lambda p, x: x @ (p["w"] + p["w"]), W, {"w": 2}, [(3, 11)]),
    ("add-its-transpose", lambda p, x: x @ (p["w"] + p["w"].T), {"w": (11, 11)}, {"w": 2},
     [(3, 11)]),
    ("add-frozen", lambda p, x: x @ (p["w"] + p["v"]), TWO, {"w": 2, "v": 0}, [(3, 11)]),
    ("sub-from-full", lambda p, x: x @ (p["v"] - p["w"]), TWO, {"w": 2, "v": -1}, [(3, 11)]),
    ("add-scalar", lambda p, x: x @ (p["w"] + 1.0), W, {"w": 2}, [(3, 11)]),
    ("sub-from-scalar", lambda p, x: x @ (1.0 - p["w"]), W, {"w": 2}, [(3, 11)]),
    ("add-a-vector", lambda p, x, s: x @ (p["w"] + s[None]), W, {"w": 2}, [(3, 11), (7,)]),
    ("add-an-array", lambda p, x, s: x @ (p["w"] + s), W, {"w": 2}, [(3, 11), (11, 7)]),
    ("add-to-a-smaller-weight", lambda p, x, s: jnp.einsum("ebi,eio->ebo", x, p["w"][None] + s),
     W, {"w": 2}, [(3, 2, 11), (3, 11, 7)]),
    ("sub-a-unit-axis", lambda p, x, s: jnp.einsum("bi,iho->bho", x, s - p["w"]),
     {"w": (11, 1, 7)}, {"w": 2}, [(2, 11), (11, 3, 7)]),
    ("interpolate", lambda p, x: x @ (0.3 * p["w"] + 0.7 * p["v"]), TWO, {"w": 2, "v": 2},
     [(3, 11)]),
    ("lower-rank-update", lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
     {"w": (11, 7), "a": (11, 2), "b": (2, 7)}, {"w": 2, "a": 0, "b": 0}, [(3, 11)]),
    # Reductions.
    ("sum-of-inputs", lambda p, x: x * p["w"].sum(0)[None], W, {"w": 2}, [(3, 7)]),
    ("sum-of-outputs", lambda p, x: x * p["w"].sum(1)[None], W, {"w": 2}, [(3, 11)]),
    ("sum-of-all", lambda p, x: x * p["w"].sum(), W, {"w": 2}, [(3, 5)]),
    ("sum-of-a-stack", lambda p, x: x @ p["w"].sum(0), {"w": (3, 11, 7)}, {"w": STACKED},
     [(2, 11)]),
    ("sum-of-heads", lambda p, x: x @ p["w"].sum(1), {"w": (11, 3, 5)},
     {"w": LoraSpec(2, in_axes=[0])}, [(2, 11)]),
    ("sum-of-a-broadcast", lambda p, x: x @ jnp.broadcast_to(p["w"], (5, 11, 7)).sum(0), W,
     {"w": 2}, [(3, 11)]),
    ("mean", lambda p, x: x @ p["w"].mean(1), {"w": (11, 3, 5)}, {"w": LoraSpec(2, in_axes=[0])},
     [(2, 11)]),
    ("centered", lambda p, x: x @ (p["w"] - p["w"].mean(0, keepdims=True)), W, {"w": 2},
     [(3, 11)]),
    ("max", lambda p, x: x * p["w"].max(0)[None], W, {"w": 2}, [(3, 7)], MATERIALIZED),
    ("where", lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0.0), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("mask", lambda p, x, m: x @ (p["w"] * m[:, None]), W, {"w": 2}, [(3, 11), (11,)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_arithmetic(check_row, row):
    check_row(*row)


TWO_WEIGHTS = [
    ("gain-of-outputs", lambda p, x: x @ (p["w"] * p["v"]), (11, 7), (1, 7)),
    ("gain-first", lambda p, x: x @ (p["v"] * p["w"]), (11, 7), (1, 7)),
    ("divided", lambda p, x: x @ (p["w"] / p["v"]), (11, 7), (11, 1)),
    ("coefficients-and-scales",
     lambda p, x: jnp.einsum("big,iog->bo", jnp.stack([x, x**2, jnp.sin(x)], -1),
                             p["w"] * p["v"][..., None]), (11, 7, 3), (11, 7)),
    ("grouped-scales",
     lambda p, x: x @ (p["w"].reshape(3, 4, 7) * p["v"][:, None]).reshape(12, 7), (12, 7), (3, 7)),
]  # fmt: skip


@pytest.mark.parametrize("row", TWO_WEIGHTS, ids=lambda row: row[0])
def test_smaller_of_two_weights_is_materialized(row):
    _, fn, w, v = row
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], w), "v": 2 + jax.random.uniform(keys[1], v)}
    spec = {"w": LoraSpec(2, out_axes=[1]), "v": LoraSpec(1, alpha=0.1)}
    x = jax.random.normal(keys[2], (3, w[0]))
    testing.check(fn, params, spec, x, materializes=True)
    pair = init_lora(params, spec, keys[0])
    status = {row.path: row.status for row in explain(fn, pair, x).rows}
    assert status == {"w": "covered", "v": "materialized"}
