"""Primitives that move, merge, repeat or cut the axes of a weight, or change how it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import LoraSpec, init_lora, lora, merge_params, testing

BF16, F16, F8, C64 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64
struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}
HEADS = {"w": (11, 3, 5)}  # (model, heads, head)
FROM_MODEL = LoraSpec(2, in_axes=[0])
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}


def then_dot(change, *, left=False):
    """A model that changes its weight and multiplies by it."""
    if left:
        return lambda p, x: change(p["w"]) @ x
    return lambda p, x: x @ change(p["w"])


def pad(*config):
    return then_dot(lambda w: lax.pad(w, jnp.zeros((), w.dtype), config))


def sharding(*spec):
    mesh = jax.make_mesh((1, 1), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P(*spec))


def cast_through(*dtypes):
    def change(w):
        for dtype in dtypes:
            w = w.astype(dtype)
        return w

    return then_dot(change)


def fused_qkv(p, x):
    qkv = x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
    q, k, v = jnp.split(qkv, [5, 10], axis=-1)
    return jnp.sin(0.1 * q * k) + v[:, :5]


ROWS = [
    # Axes that move.
    ("transpose", then_dot(lambda w: w.T), W, {"w": 2}, [(3, 7)]),
    ("transpose-twice", then_dot(lambda w: w.T.T), W, {"w": 2}, [(3, 11)]),
    ("transpose-three", lambda p, x: jnp.einsum("bi,ohi->boh", x, p["w"].transpose(2, 1, 0)),
     HEADS, {"w": FROM_MODEL}, [(2, 11)]),
    ("swapaxes", lambda p, x: jnp.einsum("bi,ioh->boh", x, jnp.swapaxes(p["w"], 1, 2)),
     HEADS, {"w": FROM_MODEL}, [(2, 11)]),
    ("moveaxis-of-a-stack", lambda p, x: jnp.einsum("bi,ieo->beo", x, jnp.moveaxis(p["w"], 0, 1)),
     {"w": (3, 11, 7)}, {"w": STACKED}, [(2, 11)]),
    ("expand-and-squeeze", then_dot(lambda w: jnp.squeeze(w[None, :, None], (0, 2))), W, {"w": 2},
     [(3, 11)]),
    ("expand-dims", lambda p, x: jnp.einsum("bi,nio->nbo", x, p["w"][None]), W, {"w": 2},
     [(3, 11)]),
    ("squeeze-a-parameter", then_dot(lambda w: w.squeeze((0, 2))), {"w": (1, 11, 1, 7)},
     {"w": 2}, [(3, 11)]),
    ("rev-input", then_dot(lambda w: w[::-1]), W, {"w": 2}, [(3, 11)]),
    ("rev-output", then_dot(lambda w: jnp.flip(w, 1)), W, {"w": 2}, [(3, 11)]),
    ("rev-both", then_dot(lambda w: jnp.flip(w)), W, {"w": 2}, [(3, 11)]),
    ("rev-stack", lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"][::-1]), {"w": (3, 11, 7)},
     {"w": STACKED}, [(3, 2, 11)]),
    ("rev-merged", then_dot(lambda w: jnp.flip(w.reshape(55, 3), 0)), {"w": (11, 5, 3)},
     {"w": LoraSpec(2, in_axes=[0])}, [(2, 55)]),
    ("rot90", then_dot(lambda w: jnp.rot90(w)), W, {"w": 2}, [(3, 7)]),
    ("roll", then_dot(lambda w: jnp.roll(w, 2, axis=0)), W, {"w": 2}, [(3, 11)]),
    # Reshapes.
    ("merge-outputs", then_dot(lambda w: w.reshape(11, 15)), HEADS, {"w": FROM_MODEL}, [(2, 11)]),
    ("merge-inputs", then_dot(lambda w: w.reshape(15, 11)), {"w": (3, 5, 11)}, {"w": 2},
     [(2, 15)]),
    ("merge-input-with-output", then_dot(lambda w: w.reshape(33, 5)), HEADS, {"w": FROM_MODEL},
     [(2, 33)]),
    ("split-output", lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(11, 3, 5)),
     {"w": (11, 15)}, {"w": 2}, [(2, 11)]),
    ("split-input", lambda p, x: jnp.einsum("bhk,hko->bo", x, p["w"].reshape(3, 5, 11)),
     {"w": (15, 11)}, {"w": 2}, [(2, 3, 5)]),
    ("split-both", lambda p, x: jnp.einsum("bij,ijhk->bhk", x, p["w"].reshape(3, 7, 2, 5)),
     {"w": (21, 10)}, {"w": 2}, [(4, 3, 7)]),
    ("split-and-merge-back", then_dot(lambda w: w.reshape(7, 3, 2, 5).reshape(21, 10)),
     {"w": (21, 10)}, {"w": 2}, [(4, 21)]),
    ("split-three-ways", lambda p, x: jnp.einsum("ni,iabc->ncab", x, p["w"].reshape(11, 2, 3, 5)),
     {"w": (11, 30)}, {"w": 2}, [(4, 11)]),
    ("regroup-12-as-4x3-as-6x2",
     lambda p, x: jnp.einsum("bi,iac->bac", x, p["w"].reshape(11, 4, 3).reshape(11, 6, 2)),
     {"w": (11, 12)}, {"w": 2}, [(5, 11)]),
    ("interleave-heads", then_dot(lambda w: w.reshape(11, 3, 5).swapaxes(1, 2).reshape(11, 15)),
     {"w": (11, 15)}, {"w": 2}, [(2, 11)]),
    ("ravel-and-back", then_dot(lambda w: w.ravel().reshape(11, 7)), W, {"w": 2}, [(3, 11)]),
    ("composite-axis-against-a-split-operand",
     lambda p, x: jnp.einsum("bhi,hio->bo", x, p["w"].reshape(33, 5).reshape(11, 3, 5)), HEADS,
     {"w": FROM_MODEL}, [(2, 11, 3)]),
    ("reshape-in-another-order", then_dot(lambda w: lax.reshape(w, (11, 15), (0, 2, 1))), HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("unit-axes", lambda p, x: jnp.einsum("bi,aico->bo", x, p["w"].reshape(1, 11, 1, 7)), W,
     {"w": 2}, [(3, 11)]),
    ("merge-a-stack-with-inputs", then_dot(lambda w: w.reshape(33, 7)), {"w": (3, 11, 7)},
     {"w": STACKED}, [(2, 33)]),
    ("regroup-across-owners", then_dot(lambda w: w.reshape(35, 2)), {"w": (7, 10)}, {"w": 2},
     [(3, 35)]),
    ("regroup-sizes-that-do-not-divide", then_dot(lambda w: w.reshape(15, 14)), {"w": (21, 10)},
     {"w": 2}, [(4, 15)], MATERIALIZED),
    # Axes that are repeated.
    ("broadcast-a-new-axis",
     lambda p, x: jnp.einsum("nbi,nio->nbo", x, jnp.broadcast_to(p["w"], (5, 11, 7))), W,
     {"w": 2}, [(5, 2, 11)]),
    ("broadcast-then-contract-it",
     lambda p, x: jnp.einsum("bni,nio->bo", x, jnp.broadcast_to(p["w"], (5, 11, 7))), W,
     {"w": 2}, [(2, 5, 11)]),
    ("broadcast-a-unit-axis",
     lambda p, x: jnp.einsum("bin,ino->bo", x, jnp.broadcast_to(p["w"], (11, 5, 7))),
     {"w": (11, 1, 7)}, {"w": 2}, [(2, 11, 5)]),
    ("repeat-heads",
     lambda p, x: jnp.einsum("bi,ihk->bhk", x, jnp.repeat(p["w"], 2, axis=1)), HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("tile", lambda p, x: jnp.einsum("bi,io->bo", x, jnp.tile(p["w"], (2, 3))), W, {"w": 2},
     [(5, 22)]),
    ("tile-a-new-axis", lambda p, x: jnp.einsum("bni,nio->bo", x, jnp.tile(p["w"], (3, 1, 1))), W,
     {"w": 2}, [(5, 3, 11)]),
    # Axes that are cut.
    ("slice-input", then_dot(lambda w: w[2:9]), W, {"w": 2}, [(3, 7)]),
    ("slice-output", then_dot(lambda w: w[:, 3:]), W, {"w": 2}, [(3, 11)]),
    ("slice-both", then_dot(lambda w: w[1:6, 2:]), W, {"w": 2}, [(3, 5)]),
    ("slice-strided", then_dot(lambda w: w[1::3, ::2]), W, {"w": 2}, [(3, 4)]),
    ("slice-negative-stride", then_dot(lambda w: w[::-2]), W, {"w": 2}, [(3, 6)]),
    ("slice-one-row", lambda p, x: x @ p["w"][4], W, {"w": 2}, [(3, 7)]),
    ("slice-one-layer", then_dot(lambda w: w[1]), {"w": (3, 11, 7)}, {"w": STACKED}, [(2, 11)]),
    ("slice-a-merged-axis", then_dot(lambda w: w.reshape(33, 5)[6:12]), HEADS, {"w": FROM_MODEL},
     [(2, 6)]),
    ("slice-a-merged-axis-between-steps", then_dot(lambda w: w.reshape(33, 5)[7:12]), HEADS,
     {"w": FROM_MODEL}, [(2, 5)], MATERIALIZED),
    ("split", lambda p, x: [x @ part for part in jnp.split(p["w"], [5, 10], axis=1)],
     {"w": (11, 15)}, {"w": 2}, [(3, 11)]),
    ("split-inputs", lambda p, x: [x[:, :5] @ part[:5] for part in jnp.split(p["w"], [5], axis=0)],
     W, {"w": 2}, [(3, 11)]),
    ("split-a-merged-axis", lambda p, x: [x @ h for h in jnp.split(p["w"].reshape(11, 15), 3, 1)],
     HEADS, {"w": FROM_MODEL}, [(2, 11)]),
    ("unstack", lambda p, x: [x @ layer for layer in jnp.unstack(p["w"])], {"w": (3, 11, 7)},
     {"w": STACKED}, [(2, 11)]),
    ("unstack-heads", lambda p, x: [x @ head for head in jnp.unstack(p["w"], axis=1)], HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("loop-over-layers", lambda p, x: [x @ layer for layer in p["w"]], {"w": (3, 11, 7)},
     {"w": STACKED}, [(2, 11)]),
    ("rows-of-a-matrix", lambda p, x: [x @ row for row in jnp.unstack(p["w"])], {"w": (3, 7)},
     {"w": 2}, [(5, 7)]),
    # Axes that grow.
    ("pad-input", pad((2, 1, 0), (0, 0, 0)), W, {"w": 2}, [(3, 14)]),
    ("pad-output", pad((0, 0, 0), (0, 3, 0)), W, {"w": 2}, [(3, 11)]),
    ("pad-interior", pad((1, 0, 2), (0, 2, 1)), W, {"w": 2}, [(2, 32)]),
    ("pad-negative", pad((-2, -1, 0), (-1, 0, 0)), W, {"w": 2}, [(3, 8)]),
    ("pad-negative-and-interior", pad((-1, 2, 1), (0, 0, 0)), W, {"w": 2}, [(2, 22)]),
    ("pad-with-ones", then_dot(lambda w: jnp.pad(w, ((1, 2), (0, 1)), constant_values=1.0)), W,
     {"w": 2}, [(3, 14)]),
    ("pad-a-merged-axis",
     then_dot(lambda w: jnp.pad(w.reshape(33, 5), ((3, 6), (0, 0)))), HEADS, {"w": FROM_MODEL},
     [(2, 42)]),
    ("concatenate-fused-qkv", fused_qkv, {"q": (11, 5), "k": (11, 5), "v": (11, 7)},
     {"q": 2, "k": 3, "v": 1}, [(3, 11)]),
    ("concatenate-with-frozen", fused_qkv, {"q": (11, 5), "k": (11, 5), "v": (11, 7)},
     {"q": 2, "k": 0, "v": -1}, [(3, 11)]),
    ("concatenate-inputs", lambda p, x: x @ jnp.concatenate([p["w"], p["v"]]),
     {"w": (11, 7), "v": (5, 7)}, {"w": 2, "v": 3}, [(3, 16)]),
    ("concatenate-with-itself", lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1), W,
     {"w": 2}, [(3, 11)]),
    ("stack", lambda p, x: jnp.einsum("nbi,nio->nbo", x, jnp.stack([p["w"], p["v"]])),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 3}, [(2, 3, 11)]),
    ("stack-in-the-middle",
     lambda p, x: jnp.einsum("bi,ino->bno", x, jnp.stack([p["w"], p["v"]], axis=1)),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 0}, [(3, 11)]),
    ("stack-and-unstack", lambda p, x: x @ jnp.unstack(jnp.stack([p["w"], p["v"]]))[1],
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("kron-block", lambda p, x: x @ jnp.block([[p["w"], p["v"]], [p["v"], p["w"]]]),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 3}, [(3, 22)]),
    # Casts, copies and placements.
    ("cast-to-bfloat16", lambda p, x: x @ p["w"].astype(BF16), W, {"w": 2},
     [struct((3, 11), BF16)], {"tolerance": 0.05}),
    ("cast-and-cast-back", cast_through(BF16, jnp.float32), W, {"w": 2}, [(3, 11)],
     {"tolerance": 0.02}),
    ("cast-to-float16", lambda p, x: x @ p["w"].astype(F16), W, {"w": 2}, [struct((3, 11), F16)],
     {"tolerance": 0.01}),
    ("cast-a-bfloat16-base", cast_through(jnp.float32), {"w": struct((11, 7), BF16)}, {"w": 2},
     [(3, 11)], {"tolerance": 0.02}),
    ("cast-a-float16-base", cast_through(jnp.float32), {"w": struct((11, 7), F16)}, {"w": 2},
     [(3, 11)], {"tolerance": 0.003}),
    ("cast-to-complex", lambda p, x: x @ p["w"].astype(C64), W, {"w": 2}, [struct((3, 11), C64)]),
    ("cast-to-integer", lambda p, x: x @ (4 * p["w"]).astype(jnp.int32).astype(jnp.float32), W,
     {"w": 2}, [(3, 11)], MATERIALIZED),
    ("cast-to-boolean", lambda p, x: x @ p["w"].astype(bool).astype(jnp.float32), W, {"w": 2},
     [(3, 11)], MATERIALIZED),
    ("reduce-precision", then_dot(lambda w: lax.reduce_precision(w, 8, 10)), W, {"w": 2},
     [(3, 11)], {"tolerance": 0.003}),
    ("copy", then_dot(lambda w: jnp.array(w, copy=True)), W, {"w": 2}, [(3, 11)]),
    ("checkpoint-name", then_dot(lambda w: checkpoint_name(w, "kernel")), W, {"w": 2}, [(3, 11)]),
    ("optimization-barrier", then_dot(lax.optimization_barrier), W, {"w": 2}, [(3, 11)]),
    ("optimization-barrier-on-several",
     lambda p, x: (lambda w, y, v: y @ w @ v)(*lax.optimization_barrier((p["w"], x, p["v"]))),
     {"w": (11, 7), "v": (7, 13)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("sharding-constraint",
     then_dot(lambda w: lax.with_sharding_constraint(w, sharding("d", "m"))), W, {"w": 2},
     [(3, 11)]),
    ("sharding-constraint-of-a-merged-axis",
     then_dot(lambda w: lax.with_sharding_constraint(w.reshape(33, 5), sharding("d"))), HEADS,
     {"w": FROM_MODEL}, [(2, 33)]),
    ("device-put", then_dot(lambda w: jax.device_put(w, sharding("d"))), W, {"w": 2}, [(3, 11)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_structural(check_row, row):
    check_row(*row)


def adapted(params, spec):
    frozen, tunable = init_lora(params, spec, jax.random.key(0))
    return frozen, testing.random_factors(tunable, jax.random.key(1))


def test_flattened_weight_is_not_materialized(check_row):
    # The operand is reshaped to the weight's axes, so the weight is not materialized.
    check_row("flattened", lambda p, x: x @ p["w"].ravel(), W, {"w": 2}, [(3, 77)])


def test_stop_gradient():
    # The merged model stops the gradient too, so `check` would compare zeros with zeros.
    frozen, tunable = adapted({"w": jnp.ones((11, 7))}, {"w": 2})
    x = jnp.ones((3, 11))
    model = lora(lambda p, x: x @ lax.stop_gradient(p["w"]), on_materialize="error")
    expected = x @ merge_params(frozen, tunable)["w"]
    assert jnp.allclose(model((frozen, tunable), x), expected, rtol=1e-5)
    grads = jax.grad(lambda t: model((frozen, t), x).sum())(tunable)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_an_eight_bit_base_does_not_round_the_factors():
    # A merged 8-bit weight rounds the delta away, so it is not the reference here.
    w = jax.random.normal(jax.random.key(2), (11, 7)).astype(F8)
    frozen, tunable = adapted({"w": w}, {"w": 2})
    x = jax.random.normal(jax.random.key(3), (3, 11))
    model = lora(lambda p, x: x @ p["w"].astype(jnp.float32), on_materialize="error")
    full = lambda t: w.astype(jnp.float32) + t["w"].a @ t["w"].b  # noqa: E731
    got = jax.value_and_grad(lambda t: jnp.sin(model((frozen, t), x)).sum())(tunable)
    expected = jax.value_and_grad(lambda t: jnp.sin(x @ full(t)).sum())(tunable)
    for actual, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_casting_to_eight_bits_does_not_round_the_factors():
    w = jax.random.normal(jax.random.key(2), (11, 7))
    frozen, tunable = adapted({"w": w}, {"w": 2})
    x = jax.random.normal(jax.random.key(3), (3, 11))
    round_trip = lambda w: w.astype(F8).astype(jnp.float32)  # noqa: E731
    got = lora(lambda p, x: x @ round_trip(p["w"]), on_materialize="error")((frozen, tunable), x)
    expected = x @ (round_trip(w) + tunable["w"].a @ tunable["w"].b)
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_sixteen_bit_bases_keep_the_delta_in_float32():
    # Merging rounds base + delta to bfloat16; a separate adapter does not.
    w = jax.random.normal(jax.random.key(2), (11, 7)).astype(BF16)
    frozen, tunable = adapted({"w": w}, {"w": 2})
    x = jax.random.normal(jax.random.key(3), (3, 11))
    model = lora(lambda p, x: x @ p["w"].astype(jnp.float32), on_materialize="error")
    expected = x @ (w.astype(jnp.float32) + tunable["w"].a @ tunable["w"].b)
    assert np.allclose(model((frozen, tunable), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.devices(4)
@pytest.mark.parametrize("spec", [P("d", "m"), P("m", None), P(None, "d")], ids=str)
def test_sharding_constraints_apply_to_the_factors(spec):
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    frozen, tunable = adapted({"w": jnp.ones((4, 6))}, {"w": 2})

    def fn(p, x):
        return x @ lax.with_sharding_constraint(p["w"], NamedSharding(mesh, spec))

    x = jnp.ones((3, 4))
    lowered = jax.jit(lora(fn, on_materialize="error")).lower((frozen, tunable), x)
    constrained = [line for line in lowered.as_text().splitlines() if "sharding_constraint" in line]
    assert len(constrained) == 3, constrained  # the base and the two factors
    got = jax.jit(lora(fn))((frozen, tunable), x)
    assert np.allclose(got, x @ merge_params(frozen, tunable)["w"], rtol=1e-5)
