"""Loops, branches, calls, and opaque bodies."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from lorax import LoraSpec, MaterializeError, init_lora, lora, merge_params, testing

W = {"w": (11, 7)}
SQUARE = {"w": (11, 11)}
LAYERS = {"w": (3, 11, 11)}
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}
TRUE, FALSE = np.array(True), np.array(False)


@jax.jit
def layer(w, x):
    return jnp.tanh(x @ w)


@functools.partial(jax.jit, static_argnums=2)
def tower(w, x, depth):
    return layer(w, x) if depth == 0 else tower(w, layer(w, x), depth - 1)


def two_layers(w, v, x):
    return jnp.tanh(x @ w) @ v


def called_swapped(block):
    """One body, called with an adapted and a plain weight, and then with the two swapped."""
    return lambda p, x: block(p["v"], p["w"], block(p["w"], p["v"], x))


def swapped(w, v):
    return v, w


# Loops


def scan(body, **keywords):
    return lambda p, *args: lax.scan(*body(p, *args), **keywords)


def over_layers(**keywords):
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["w"], **keywords)

    return fn


def carried(p, x):
    """The weight is in the carry, as in a loop over (params, state)."""

    def step(carry, _):
        w, x = carry
        return (w, jnp.tanh(x @ w)), None

    return lax.scan(step, (p["w"], x), None, length=3)[0][1]


def carried_through_jit(p, x):
    step = jax.jit(lambda carry: (carry[0], layer(*carry)))
    return lax.scan(lambda carry, _: (step(carry), None), (p["w"], x), None, length=3)[0][1]


def carried_and_changed(p, x):
    step = lambda carry, _: ((0.5 * carry[0], jnp.tanh(carry[1] @ carry[0])), None)  # noqa: E731
    return lax.scan(step, (p["w"], x), None, length=3)[0][1]


def carried_and_swapped(p, x):
    def step(carry, _):
        w, v, x = carry
        return (v, w, jnp.tanh(x @ w)), None

    return lax.scan(step, (p["w"], p["v"], x), None, length=2)[0][2]


def scan_stacks_weights(p, x):
    _, scaled = lax.scan(lambda i, _: (i + 1.0, p["w"] * i), jnp.float32(1), None, length=3)
    return jnp.einsum("ebi,eio->ebo", x, scaled)


def scan_stacks_slices(p, x):
    _, transposed = lax.scan(lambda c, w: (c, w.T), 0, p["w"])
    return jnp.einsum("ebo,eoi->ebi", x, transposed)


def scan_over_rows(p, x):
    return lax.scan(lambda total, row: (total + x @ row, row.sum()), jnp.zeros(3), p["w"])


def scan_of_scans(p, x):
    def outer(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0], None

    return lax.scan(outer, x, p["w"])[0]


def scan_with_grad_inside(p, x):
    """A few steps of gradient descent on x, as an energy-based model takes them."""
    energy = lambda x: jnp.sum(jnp.sin(x @ p["w"]))  # noqa: E731
    return lax.scan(lambda x, _: (x - 0.1 * jax.grad(energy)(x), None), x, None, length=2)[0]


def while_body(p, x):
    def body(carry):
        i, x = carry
        return i + 1, jnp.tanh(x @ p["w"])

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def while_condition(p, x):
    small = lambda carry: jnp.sum((carry[1] @ p["w"]) ** 2) < 1e3 * carry[0]  # noqa: E731
    return lax.while_loop(small, lambda c: (c[0] - 1, 1.5 * c[1]), (jnp.float32(4), x))[1]


def while_carries(p, x):
    def body(carry):
        i, w, x = carry
        return i + 1, w, jnp.tanh(x @ w)

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, p["w"], x))[2]


def while_changes(p, x):
    def body(carry):
        i, w, x = carry
        return i + 1, -w, jnp.tanh(x @ w)

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, p["w"], x))[2]


def fori_static(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)


# Branches


def cond(true, false):
    return lambda p, x, flag: lax.cond(flag, true, false, p, x)


def cond_returns(true, false, *, after=lambda w, x: x @ w):
    return lambda p, x, flag: after(lax.cond(flag, true, false, p), x)


def switch(p, x, index):
    branches = [lambda w, x: x @ w, lambda w, x: jnp.tanh(x @ w), lambda w, x: -(x @ w)]
    return lax.switch(index, branches, p["w"], x)


# Custom derivatives of the model


@jax.custom_jvp
def clipped(x):
    return jnp.minimum(x, 1.0)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), 3.0 * tangents[0]))


@jax.custom_jvp
def jvp_product(x, w):
    return x @ w


@jvp_product.defjvp
def _(primals, tangents):
    # Three times the derivative, so that losing the rule would show.
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 3.0 * (dx @ w + x @ dw)


@jax.custom_vjp
def vjp_product(x, w):
    return x @ w


vjp_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, ct: (2.0 * ct @ saved[1].T, 5.0 * saved[0].T @ ct),
)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))


def inner_grad(block):
    """A model that takes a gradient itself, through `block`."""
    return lambda p, x: jax.grad(lambda x: jnp.sum(block(p["w"], x)))(x)


def sine(w, x):
    return jnp.sin(0.3 * jnp.sin(x @ w) @ w.T)


SAVE_DOTS = jax.checkpoint_policies.dots_saveable


ROWS = [
    # jit.
    ("jit", lambda p, x: layer(p["w"], x), W, {"w": 2}, [(3, 11)]),
    ("jit-nested", lambda p, x: tower(p["w"], x, 2), SQUARE, {"w": 2}, [(3, 11)]),
    ("jit-called-with-several-weights", lambda p, x: layer(p["v"], layer(p["w"], x)),
     {"w": (11, 11), "v": (11, 11)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("jit-called-with-and-without", lambda p, x: layer(p["v"], layer(p["w"], x)),
     {"w": (11, 11), "v": (11, 11)}, {"w": 2, "v": 0}, [(3, 11)]),
    ("jit-called-with-either-weight-adapted", called_swapped(jax.jit(two_layers)),
     {"w": (11, 11), "v": (11, 11)}, {"w": 2, "v": 0}, [(3, 11)]),
    ("jit-returns-weights", lambda p, x: [x @ w for w in jax.jit(swapped)(p["w"], p["v"])],
     {"w": (11, 7), "v": (11, 5)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("jit-transposes", lambda p, x: x @ jax.jit(jnp.transpose)(p["w"]), W, {"w": 2}, [(3, 7)]),
    ("jit-closes-over-the-weight", lambda p, x: jax.jit(lambda x: x @ p["w"])(x), W, {"w": 2},
     [(3, 11)]),
    ("jit-ignores-a-weight", lambda p, x: jax.jit(lambda w, x: x, keep_unused=True)(p["w"], x)
     @ p["w"], W, {"w": 2}, [(3, 11)]),
    ("jit-inline", lambda p, x: jax.jit(lambda w, x: x @ w, inline=True)(p["w"], x), W, {"w": 2},
     [(3, 11)]),
    ("jit-donates", lambda p, x: jax.jit(lambda w, x: x + x @ w, donate_argnums=1)(p["w"], x + 1),
     SQUARE, {"w": 2}, [(3, 11)]),
    ("jit-uses-a-weight-twice", lambda p, x: jax.jit(lambda w, v, x: x @ w @ v.T)(
        p["w"], p["w"], x), W, {"w": 2}, [(3, 11)]),
    ("jit-of-an-embedding", lambda p, ids: jax.jit(lambda w, i: w[i])(p["w"], ids), {"w": (19, 5)},
     {"w": 2}, [np.array([3, 1, 18], np.int32)]),
    # scan.
    ("scan-constant", lambda p, x: lax.scan(lambda c, x: (c + 1, x @ p["w"]), 0, x), W, {"w": 2},
     [(3, 2, 11)]),
    ("scan-stacked", over_layers(), LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-stacked-not-shared", over_layers(), LAYERS, {"w": 2}, [(2, 11)]),
    ("scan-stacked-owned-by-b", over_layers(), LAYERS, {"w": LoraSpec(2, in_axes=[1])},
     [(2, 11)]),
    ("scan-reverse", over_layers(reverse=True), LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-unroll", over_layers(unroll=2), LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-unroll-all", over_layers(unroll=True), LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-length", over_layers(length=3), LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-carries", carried, SQUARE, {"w": 2}, [(3, 11)]),
    ("scan-carries-through-jit", carried_through_jit, SQUARE, {"w": 2}, [(3, 11)]),
    ("scan-carries-and-changes", carried_and_changed, SQUARE, {"w": 2}, [(3, 11)], MATERIALIZED),
    ("scan-carries-and-swaps", carried_and_swapped, {"w": (11, 11), "v": (11, 11)},
     {"w": 2, "v": 2}, [(3, 11)], MATERIALIZED),
    ("scan-stacks-weights", scan_stacks_weights, W, {"w": 2}, [(3, 2, 11)]),
    ("scan-stacks-slices", scan_stacks_slices, {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 7)]),
    ("scan-over-rows", scan_over_rows, {"w": (5, 7)}, {"w": 2}, [(3, 7)]),
    ("scan-in-scan", scan_of_scans, LAYERS, {"w": STACKED}, [(2, 11)]),
    ("scan-with-a-gradient-inside", scan_with_grad_inside, W, {"w": 2}, [(3, 11)]),
    ("scan-of-remat", lambda p, x: lax.scan(
        jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0], LAYERS,
     {"w": STACKED}, [(2, 11)]),
    ("scan-over-several-stacks", lambda p, x: lax.scan(
        lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, p)[0],
     {"up": (3, 11, 13), "down": (3, 13, 11)}, {"up": STACKED, "down": STACKED}, [(2, 11)]),
    ("associative-scan-of-activations", lambda p, x: lax.associative_scan(jnp.add, x @ p["w"]), W,
     {"w": 2}, [(3, 11)]),
    ("map", lambda p, x: lax.map(lambda x: x @ p["w"], x), W, {"w": 2}, [(3, 11)]),
    # while and fori_loop. Reverse mode needs a static trip count.
    ("fori-loop", fori_static, SQUARE, {"w": 2}, [(3, 11)]),
    ("fori-loop-unrolled", lambda p, x: lax.fori_loop(
        0, 4, lambda i, x: jnp.tanh(x @ p["w"]), x, unroll=2), SQUARE, {"w": 2}, [(3, 11)]),
    # Branches.
    ("cond-true", cond(lambda p, x: x @ p["w"], lambda p, x: jnp.sin(x @ p["w"])), W, {"w": 2},
     [(3, 11), TRUE]),
    ("cond-false", cond(lambda p, x: x @ p["w"], lambda p, x: jnp.sin(x @ p["w"])), W, {"w": 2},
     [(3, 11), FALSE]),
    ("cond-in-one-branch", cond(lambda p, x: x @ p["w"], lambda p, x: x[:, :7]), W, {"w": 2},
     [(3, 11), TRUE]),
    ("cond-returns-equal-ranks", cond_returns(lambda p: p["w"], lambda p: -p["w"]), W, {"w": 2},
     [(3, 11), FALSE]),
    ("cond-chooses-a-weight", cond_returns(lambda p: p["w"], lambda p: p["v"]),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 2}, [(3, 11), FALSE]),
    ("cond-returns-unequal-ranks", cond_returns(lambda p: p["w"], lambda p: p["v"]),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 3}, [(3, 11), TRUE], MATERIALIZED),
    ("cond-returns-a-weight-or-an-array", cond_returns(lambda p: p["w"], lambda p: 2 * p["v"]),
     {"w": (11, 7), "v": (11, 7)}, {"w": 2, "v": 0}, [(3, 11), TRUE], MATERIALIZED),
    ("cond-returns-a-weight-and-a-product", lambda p, x, flag: (lambda w, y: y + x @ w)(*lax.cond(
        flag, lambda w, x: (w, x @ w), lambda w, x: (-w, jnp.sin(x @ w)), p["w"], x)), W,
     {"w": 2}, [(3, 11), TRUE]),
    ("cond-in-scan", lambda p, x: lax.scan(lambda c, xs: (c, lax.cond(
        xs[0] > 1, lambda x: x @ p["w"], lambda x: jnp.tanh(x @ p["w"]), xs[1])), 0,
        (jnp.arange(3), x)), W, {"w": 2}, [(3, 2, 11)]),
    ("cond-on-a-weight", lambda p, x: lax.cond(
        (x @ p["w"]).sum() > 0, lambda x: x @ p["w"], lambda x: -x @ p["w"], x), W, {"w": 2},
     [(3, 11)]),
    ("switch", switch, W, {"w": 2}, [(3, 11), np.array(2, np.int32)]),
    ("switch-beyond-the-end", switch, W, {"w": 2}, [(3, 11), np.array(9, np.int32)]),
    ("platform-dependent", lambda p, x: lax.platform_dependent(
        x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: 1e3 * (x @ w)), W, {"w": 2},
     [(3, 11)]),
    ("platform-dependent-shares", lambda p, x: lax.platform_dependent(
        x, p["w"], tpu=lambda x, w: 1e3 * (x @ w), default=lambda x, w: jnp.tanh(x @ w)), W,
     {"w": 2}, [(3, 11)]),
    # remat.
    ("remat", lambda p, x: jax.checkpoint(layer)(p["w"], x), W, {"w": 2}, [(3, 11)]),
    ("remat-called-with-either-weight-adapted", called_swapped(jax.checkpoint(two_layers)),
     {"w": (11, 11), "v": (11, 11)}, {"w": 2, "v": 0}, [(3, 11)]),
    ("remat-policy", lambda p, x: jax.checkpoint(sine, policy=SAVE_DOTS)(p["w"], x), W, {"w": 2},
     [(3, 11)]),
    ("remat-names", lambda p, x: jax.checkpoint(
        lambda w, x: jnp.sin(checkpoint_name(x @ w, "y")) @ w.T,
        policy=jax.checkpoint_policies.save_only_these_names("y"))(p["w"], x), W, {"w": 2},
     [(3, 11)]),
    ("remat-without-prevent-cse", lambda p, x: jax.checkpoint(sine, prevent_cse=False)(p["w"], x),
     W, {"w": 2}, [(3, 11)]),
    ("remat-closes-over-the-weight", lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x),
     W, {"w": 2}, [(3, 11)]),
    ("remat-returns-a-weight", lambda p, x: x @ jax.checkpoint(lambda w: 2.0 * w)(p["w"]), W,
     {"w": 2}, [(3, 11)]),
    ("remat-in-remat", lambda p, x: jax.checkpoint(
        lambda w, x: jax.checkpoint(layer)(w, jnp.sin(x)))(p["w"], x), W, {"w": 2}, [(3, 11)]),
    ("remat-in-a-gradient", inner_grad(jax.checkpoint(sine)), W, {"w": 2}, [(3, 11)]),
    ("remat-policy-in-a-gradient", inner_grad(jax.checkpoint(sine, policy=SAVE_DOTS)), W,
     {"w": 2}, [(3, 11)]),
    ("gradient-in-the-model", inner_grad(sine), W, {"w": 2}, [(3, 11)]),
    ("jvp-in-the-model", lambda p, x: jax.jvp(lambda x: layer(p["w"], x), (x,), (jnp.cos(x),)), W,
     {"w": 2}, [(3, 11)]),
    # Custom derivatives.
    ("custom-jvp-of-an-activation", lambda p, x: clipped(x @ p["w"]), W, {"w": 2}, [(3, 11)]),
    ("custom-jvp-of-the-library", lambda p, x: jax.nn.relu(x @ p["w"]), W, {"w": 2}, [(3, 11)]),
    ("custom-jvp-takes-the-weight", lambda p, x: jvp_product(x, p["w"]), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("custom-vjp-of-an-activation", lambda p, x: straight_through(3 * (x @ p["w"])), W, {"w": 2},
     [(3, 11)]),
    ("custom-vjp-takes-the-weight", lambda p, x: vjp_product(x, p["w"]), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("custom-vjp-takes-one-of-two", lambda p, x: vjp_product(x @ p["v"], p["w"]),
     {"w": (7, 5), "v": (11, 7)}, {"w": 2, "v": 3}, [(3, 11)], MATERIALIZED),
    ("custom-vjp-in-scan", lambda p, x: lax.scan(
        lambda x, w: (straight_through(3 * jnp.tanh(x @ w)), None), x, p["w"])[0], LAYERS,
     {"w": STACKED}, [(2, 11)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_bodies(check_row, row):
    check_row(*row)


# Loops without reverse mode, which `check` needs: values and forward mode.


def adapted(shapes, spec, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    frozen, tunable = init_lora(params, spec, jax.random.key(seed + 1))
    return frozen, testing.random_factors(tunable, jax.random.key(seed + 2))


def check_forward(fn, shapes, spec, x, *, materializes=False):
    frozen, tunable = adapted(shapes, spec)
    model = lora(fn, on_materialize="allow" if materializes else "error")
    if materializes:
        with pytest.raises(MaterializeError):
            lora(fn, on_materialize="error")((frozen, tunable), x)
    else:
        assert not testing.weight_sized(fn, frozen, tunable, x)
    adapted_fn = lambda t: model((frozen, t), x)  # noqa: E731
    merged_fn = lambda t: fn(merge_params(frozen, t), x)  # noqa: E731
    tangent = jax.tree.map(jnp.cos, tunable)
    got = jax.jit(lambda: jax.jvp(adapted_fn, (tunable,), (tangent,)))()
    expected = jax.jit(lambda: jax.jvp(merged_fn, (tunable,), (tangent,)))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


FORWARD = [
    ("while-body", while_body, SQUARE, {"w": 2}, {}),
    ("while-condition", while_condition, W, {"w": 2}, {}),
    ("while-carries", while_carries, SQUARE, {"w": 2}, {}),
    ("while-carries-and-changes", while_changes, SQUARE, {"w": 2}, MATERIALIZED),
    ("fori-loop-traced-bound", lambda p, x: lax.fori_loop(
        0, jnp.int32(x.sum() * 0) + 2, lambda i, x: jnp.tanh(x @ p["w"]), x), SQUARE, {"w": 2}, {}),
]  # fmt: skip


@pytest.mark.parametrize("row", FORWARD, ids=lambda row: row[0])
def test_loops_without_reverse_mode(row):
    _, fn, shapes, spec, expectation = row
    x = jax.random.normal(jax.random.key(9), (3, 11))
    check_forward(fn, shapes, spec, x, **expectation)


# Opaque bodies.


def matmul_kernel(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]


def pallas(p, x):
    shape = jax.ShapeDtypeStruct((x.shape[0], p["w"].shape[1]), x.dtype)
    return pl.pallas_call(matmul_kernel, out_shape=shape, interpret=True)(x, p["w"])


def callback(p, x):
    shape = jax.ShapeDtypeStruct((x.shape[0], p["w"].shape[1]), x.dtype)
    return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, p["w"])


def mutable(p, x):
    ref = jax.new_ref(p["w"])
    ref[0] = ref[0] * 2.0
    return x @ ref[...]


@pytest.mark.parametrize(
    "fn, primitive",
    [
        (pallas, "pallas_call"),
        (callback, "pure_callback"),
        pytest.param(
            mutable,
            "ref",
            marks=pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="no refs in this JAX"),
        ),
    ],
    ids=["pallas", "callback", "ref"],
)
def test_opaque_bodies_materialize_the_weight(fn, primitive):
    frozen, tunable = adapted(W, {"w": 2})
    x = jax.random.normal(jax.random.key(9), (3, 11))
    with pytest.raises(MaterializeError, match=f"`w` is used by `.*{primitive}.*`"):
        lora(fn, on_materialize="error")((frozen, tunable), x)
    got = jax.jit(lora(fn, on_materialize="allow"))((frozen, tunable), x)
    assert np.allclose(got, fn(merge_params(frozen, tunable), x), rtol=1e-5, atol=1e-5)


def test_ref_does_not_materialize_the_weight():
    if not hasattr(jax, "new_ref"):
        pytest.skip("no refs in this JAX")

    def fn(p, x):
        total = jax.new_ref(jnp.zeros((3, 7)))
        total[...] += x @ p["w"]
        return total[...]

    frozen, tunable = adapted(W, {"w": 2})
    x = jax.random.normal(jax.random.key(9), (3, 11))
    got = jax.jit(lora(fn, on_materialize="error"))((frozen, tunable), x)
    assert np.allclose(got, x @ merge_params(frozen, tunable)["w"], rtol=1e-5, atol=1e-5)


# Parameters and metadata that transformed equations keep.


def equations(jaxpr, name):
    """The equations of a primitive, in nested bodies too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == name:
            yield eqn
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple) else (value,):
                if isinstance(body, jex.Jaxpr | jex.ClosedJaxpr):
                    yield from equations(body, name)


def both_jaxprs(fn, shapes, spec, *args):
    """The jaxprs of a function and of its transform."""
    frozen, tunable = adapted(shapes, spec)
    transformed = jax.make_jaxpr(lora(fn, on_materialize="error"))((frozen, tunable), *args)
    return jax.make_jaxpr(fn)(frozen, *args), transformed


X = jnp.ones((3, 11))


def test_body_called_many_times_is_transformed_once():
    names = [f"w{k}" for k in range(6)]

    def fn(p, x):
        for name in names:
            x = layer(p[name], x)
        return x

    spec = dict.fromkeys(names, 2)
    _, transformed = both_jaxprs(fn, {name: (11, 11) for name in names}, spec, X)
    calls = [eqn for eqn in equations(transformed, "jit") if eqn.params["name"] == "layer"]
    assert len(calls) == 6
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == 1


def test_calls_with_different_weights_are_transformed_separately():
    fn = lambda p, x: layer(p["c"], layer(p["b"], layer(p["a"], x)))  # noqa: E731
    shapes = dict.fromkeys("abc", (11, 11))
    _, transformed = both_jaxprs(fn, shapes, {"a": 2, "b": 3, "c": 0}, X)
    calls = [eqn for eqn in equations(transformed, "jit") if eqn.params["name"] == "layer"]
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == len(calls) == 3


def test_jit_keeps_its_parameters():
    def fn(p, x):
        def named(w, x, y):
            return x + x @ w

        jitted = jax.jit(named, donate_argnums=1, keep_unused=True, inline=False)
        return jitted(p["w"], x * 1.0, x)

    plain, transformed = both_jaxprs(fn, SQUARE, {"w": 2}, X)
    (before,), (after,) = (list(equations(j, "jit")) for j in (plain, transformed))
    assert after.params["name"] == "named"
    assert after.params["keep_unused"] == before.params["keep_unused"]
    donated = [
        v.aval.shape
        for v, is_donated in zip(after.invars, after.params["donated_invars"], strict=True)
        if is_donated
    ]
    assert before.params["donated_invars"].count(True) == 1 and donated == [(3, 11)]


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_remat_keeps_its_parameters(prevent_cse):
    fn = lambda p, x: jax.checkpoint(sine, policy=SAVE_DOTS, prevent_cse=prevent_cse)(p["w"], x)  # noqa: E731
    plain, transformed = both_jaxprs(fn, W, {"w": 2}, X)
    (before,), (after,) = ([*equations(j, "remat2"), *equations(j, "checkpoint"), *equations(
        j, "remat")] for j in (plain, transformed))  # fmt: skip
    for name in ("policy", "prevent_cse", "differentiated"):
        assert after.params[name] == before.params[name]


def test_each_call_of_a_body_keeps_its_own_parameters():
    options = [(SAVE_DOTS, False), (SAVE_DOTS, True), (None, True)]

    def checkpointed(p, x):
        return [
            jax.checkpoint(sine, policy=policy, prevent_cse=prevent_cse)(p["w"], x)
            for policy, prevent_cse in options
        ]

    _, transformed = both_jaxprs(checkpointed, W, {"w": 2}, X)
    calls = [eqn.params for eqn in transformed.eqns if "policy" in eqn.params]
    assert [(call["policy"], call["prevent_cse"]) for call in calls] == options

    def jitted(p, x):
        return [jax.jit(sine, keep_unused=keep)(p["w"], x) for keep in (True, False)] + [
            jax.jit(sine, donate_argnums=1)(p["w"], x * 1.0)
        ]

    _, transformed = both_jaxprs(jitted, W, {"w": 2}, X)
    calls = [eqn.params for eqn in transformed.eqns if eqn.primitive.name == "jit"]
    assert [call["keep_unused"] for call in calls] == [True, False, False]
    assert [any(call["donated_invars"]) for call in calls] == [False, False, True]


def test_scan_keeps_its_parameters():
    fn = over_layers(reverse=True, unroll=2)
    frozen, tunable = adapted(LAYERS, {"w": STACKED})
    transformed = jax.make_jaxpr(lora(fn))((frozen, tunable), X)
    (eqn,) = equations(transformed, "scan")
    assert eqn.params["reverse"] and eqn.params["unroll"] == 2 and eqn.params["length"] == 3


def test_custom_rules_on_activations_are_kept():
    fn = lambda p, x: straight_through(clipped(x @ p["w"]))  # noqa: E731
    _, transformed = both_jaxprs(fn, W, {"w": 2}, X)
    assert len(list(equations(transformed, "custom_jvp_call"))) == 1
    assert len(list(equations(transformed, "custom_vjp_call"))) == 1


def test_scopes_are_kept():
    @jax.named_scope("block")
    def fn(p, x):
        return layer(p["w"], x)

    _, transformed = both_jaxprs(fn, W, {"w": 2}, X)
    (call,) = equations(transformed, "jit")
    assert "block" in str(call.source_info.name_stack)
    dots = list(equations(transformed, "dot_general"))
    scopes = [str(eqn.source_info.name_stack) for eqn in dots]
    assert len(scopes) == 3 and sum("lora" in scope for scope in scopes) == 2
