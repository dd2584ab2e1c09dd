"""The check for weight-sized arrays: it catches every materialization, and no equal size."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import Axes, DoraSpec, LoraSpec, _transform, infer_spec, init_lora, testing
from lorax._built import Weights, built, excess
from lorax._made import Made
from lorax._registry import RULES

normal = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape) / 4  # noqa: E731


def model(params, x):
    return x @ params["w"]


SIDES = (0, "in"), (0, "out")

# Rules for `x @ w` that materialize the weight: functions of x, the base and the two factors.


@jax.custom_jvp
def custom(a, b):
    return a @ b


custom.defjvp(lambda primals, tangents: (custom(*primals), custom(tangents[0], primals[1])))


def while_loop(x, w, a, b):
    step = lambda carry: (carry[0] + 1, x @ (w + a @ b))  # noqa: E731
    return lax.while_loop(lambda carry: carry[0] < 1, step, (0, x @ w))[1]


def row_by_row(x, w, a, b):
    return x @ lax.map(lambda rows: rows[0] + rows[1] @ b, (w, a))


def column_by_column(x, w, a, b):
    return x @ w + x @ jnp.stack([a @ b[:, j] for j in range(b.shape[1])], axis=1)


def written_into_zeros(x, w, a, b):
    delta = jnp.zeros(w.shape)
    for j in range(w.shape[1]):
        delta = delta.at[:, j].set(a @ b[:, j])
    return x @ w + x @ delta


MATERIALIZING = {
    "merge": lambda x, w, a, b: x @ (w + a @ b),
    "delta-alone": lambda x, w, a, b: x @ w + x @ (a @ b),
    "einsum": lambda x, w, a, b: x @ w + x @ jnp.einsum("ir,ro->io", a, b),
    "transposed": lambda x, w, a, b: ((w.T + b.T @ a.T) @ x.T).T,
    "flat": lambda x, w, a, b: x @ (w.reshape(-1) + (a @ b).reshape(-1)).reshape(w.shape),
    "outer-products": lambda x, w, a, b: x @ (w + (a[:, :, None] * b[None]).sum(1)),
    "for-each-example": lambda x, w, a, b: x @ w + jnp.einsum(
        "nir,ro->nio", x[:, :, None] * a[None], b).sum(1),
    "for-each-example-merged": lambda x, w, a, b: (x[:, :, None] * (w + a @ b)[None]).sum(1),
    "half-of-the-outputs": lambda x, w, a, b: jnp.concatenate(
        [x @ (w[:, :2] + a @ b[:, :2]), x @ w[:, 2:] + (x @ a) @ b[:, 2:]], 1),
    "in-jit": lambda x, w, a, b: jax.jit(lambda w, a, b: x @ (w + a @ b))(w, a, b),
    "in-scan": lambda x, w, a, b: lax.scan(lambda c, _: (c, x @ (w + a @ b)), 0, None, 1)[1][0],
    "in-the-carry-of-a-scan": lambda x, w, a, b: x @ lax.scan(
        lambda w, ab: (w + jnp.outer(*ab), None), w, (a.T, b))[0],
    "in-cond": lambda x, w, a, b: lax.cond(
        x.sum() > 0, lambda: x @ (w + a @ b), lambda: x @ w + (x @ a) @ b),
    "in-while": while_loop,
    "in-checkpoint": lambda x, w, a, b: jax.checkpoint(lambda a, b: x @ (w + a @ b))(a, b),
    "in-custom-jvp": lambda x, w, a, b: x @ (w + custom(a, b)),
    "in-vmap": lambda x, w, a, b: jax.vmap(lambda x: x @ (w + a @ b))(x),
    "scaled-by-data": lambda x, w, a, b: x @ w + x @ ((x.sum() * a) @ b) / x.sum(),
    "scaled-by-a-vector-of-data": lambda x, w, a, b: (
        x @ w + x @ (a @ (jnp.exp(x[:1, :1]) * b)) / jnp.exp(x[:1, :1])),
    "scaled-by-its-own-outputs": lambda x, w, a, b: (
        x @ w + x @ (a @ (b * jnp.exp((x @ w)[:1]))) / jnp.exp((x @ w)[:1])),
    "row-by-row": row_by_row,
    "column-by-column": column_by_column,
    "written-into-zeros": written_into_zeros,
    "base-copied": lambda x, w, a, b: x @ (w * 2) / 2 + (x @ a) @ b,
    "base-copied-by-a-reshape": lambda x, w, a, b: (
        x @ lax.reshape(w, w.shape[::-1], (1, 0)).T + (x @ a) @ b),
}  # fmt: skip

FACTORED = {
    "factored": lambda x, w, a, b: x @ w + (x @ a) @ b,
    "in-jit": lambda x, w, a, b: jax.jit(lambda x, a, b: x @ w + (x @ a) @ b)(x, a, b),
    "transposed": lambda x, w, a, b: x @ w + (b.T @ (a.T @ x.T)).T,
    "scaled-by-data": lambda x, w, a, b: x @ w + (x @ (x.sum() * a)) @ b / x.sum(),
    "in-scan": lambda x, w, a, b: lax.map(lambda x: x @ w + (x @ a) @ b, x),
    "base-reshaped": lambda x, w, a, b: x @ w.reshape(-1).reshape(w.shape) + (x @ a) @ b,
}


@pytest.fixture
def rule_for_products(monkeypatch):
    """Lets `lora` compute `x @ w` with a function of x, the base and the two factors."""

    def replace(function):
        def rule(eqn, x, w, **_):
            (term,) = w.terms
            eqn.use(w, "product")
            return function(x, w.base, *term.factors)

        (primitive,) = [p for p in RULES if p.name == "dot_general"]
        monkeypatch.setattr(_transform, "RULES", {**RULES, primitive: rule})

    return replace


@pytest.mark.parametrize("sizes", [(3, 7, 5, 2), (7, 7, 7, 2), (7, 7, 7, 7)], ids=str)
@pytest.mark.parametrize("form", MATERIALIZING)
def test_a_materialized_weight_is_caught(rule_for_products, form, sizes):
    batch, inputs, outputs, rank = sizes
    rule_for_products(MATERIALIZING[form])
    params, x = {"w": normal(inputs, outputs)}, normal(batch, inputs)
    with pytest.raises(AssertionError, match="adapted weights are materialized"):
        testing.check(model, params, {"w": LoraSpec(rank)}, x, transforms=False)


@pytest.mark.parametrize("sizes", [(3, 7, 5, 2), (7, 7, 7, 7), (3, 7, 1, 1), (3, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("form", FACTORED)
def test_a_factored_product_passes(rule_for_products, form, sizes):
    batch, inputs, outputs, rank = sizes
    rule_for_products(FACTORED[form])
    params, x = {"w": normal(inputs, outputs)}, normal(batch, inputs)
    testing.check(model, params, {"w": LoraSpec(rank)}, x, transforms=False)


@pytest.mark.parametrize("form", ["merge", "delta-alone", "in-jit", "flat", "scaled-by-data"])
@pytest.mark.parametrize("sizes", [(3, 7, 1, 1), (3, 1, 5, 1)], ids=["one-output", "one-input"])
def test_a_materialized_vector_is_caught(rule_for_products, form, sizes):
    batch, inputs, outputs, rank = sizes
    rule_for_products(MATERIALIZING[form])
    params, x = {"w": normal(inputs, outputs)}, normal(batch, inputs)
    with pytest.raises(AssertionError, match="adapted weights are materialized"):
        testing.check(model, params, {"w": LoraSpec(rank)}, x, transforms=False)


def test_a_materialized_layer_of_a_stack_is_caught(rule_for_products):
    def layers(params, x):
        return lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    params, spec, x = {"w": normal(4, 7, 7)}, {"w": LoraSpec(2, shared_axes=[0])}, normal(3, 7)
    testing.check(layers, params, spec, x, transforms=False)
    rule_for_products(MATERIALIZING["merge"])
    with pytest.raises(AssertionError, match=r"as arrays of these shapes: {\(7, 7\): 2}"):
        testing.check(layers, params, spec, x, transforms=False)


def test_a_materialized_piece_for_each_head_is_caught(rule_for_products):
    def heads(params, x):
        return jnp.stack([x @ params["w"][:, 4 * h : 4 * h + 4] for h in range(3)])

    rule_for_products(MATERIALIZING["merge"])
    with pytest.raises(AssertionError, match="adapted weights are materialized"):
        testing.check(
            heads, {"w": normal(7, 12)}, {"w": LoraSpec(2)}, normal(3, 7), transforms=False
        )


# Shapes in which another array has the size of a weight.


def value_head(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["value"]


def tied(params, ids):
    return params["table"][ids] @ params["table"].T


def conv(params, x):
    return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME",
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip


COINCIDENCES = {
    "batch-of-inputs": (model, {"w": normal(16, 24)}, normal(16, 16)),
    "batch-as-wide-as-the-outputs": (model, {"w": normal(16, 24)}, normal(24, 16)),
    "square": (model, {"w": normal(16, 16)}, normal(16, 16)),
    "head-of-one-output": (value_head, {"hidden": normal(16, 24), "value": normal(24, 1)},
                           normal(3, 16)),
    "head-of-one-output-and-batch": (value_head, {"hidden": normal(16, 24), "value": normal(24, 1)},
                                     normal(24, 16)),
    "one-input": (model, {"w": normal(1, 24)}, normal(24, 1)),
    "as-many-tokens-as-entries": (tied, {"table": normal(19, 8)}, jnp.arange(19) % 7),
    "all-positions": (lambda p, x: x + p["w"][jnp.arange(6)][None] @ p["v"],
                      {"w": normal(6, 8), "v": normal(8, 8)}, normal(3, 6, 8)),
    "image-of-the-kernel's-size": (conv, {"w": normal(3, 3, 3, 3)}, normal(3, 3, 3, 3)),
    "scanned-square": (lambda p, x: lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), h), x[0],
                                             x)[1], {"w": normal(5, 5)}, normal(5, 5, 5)),
    "weight-and-its-transpose": (lambda p, x: x + jnp.tanh(x @ p["w"]) @ p["w"].T,
                                 {"w": normal(6, 6)}, normal(6, 6)),
    "product-with-itself": (lambda p, x: x @ (p["w"] @ p["w"]), {"w": normal(6, 6)}, normal(6, 6)),
    "rank-of-the-width": (model, {"w": normal(4, 3)}, normal(3, 4)),
    "scores-of-one-projection": (lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, {"w": normal(6, 6)},
                                 normal(6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("name", COINCIDENCES)
@pytest.mark.filterwarnings("ignore::lorax.UnadaptedWarning")
def test_activation_with_the_size_of_a_weight_passes(name, rank):
    fn, params, *args = COINCIDENCES[name]
    spec = infer_spec(fn, params, *args, rank=rank, skip_small=False)
    testing.check(fn, params, spec, *args, transforms=False)


def test_counts_how_often_a_weight_is_materialized(rule_for_products):
    rule_for_products(MATERIALIZING["merge"])
    frozen, tunable = init_lora({"w": normal(7, 5)}, {"w": 2}, jax.random.key(0))
    assert testing.weight_sized(model, frozen, tunable, normal(3, 7)) == {(7, 5): 2}


def test_a_piece_of_the_base_does_not_count():
    base = Made((frozenset({(0, "in")}), frozenset({(0, "out")})), frozenset(SIDES), False)
    weights = Weights(frozenset(), [35])
    piece = built(jax.make_jaxpr(lambda w: w[:3] * 2)(normal(7, 5)), [base], weights)
    entire = built(jax.make_jaxpr(lambda w: (w * 2)[:3])(normal(7, 5)), [base], weights)
    assert excess(piece, Counter()) == {} and excess(entire, Counter()) == {(7, 5): 1}
    assert excess(entire, entire) == {}


def test_axis_with_both_sides_is_not_a_weight():
    # The diagonal of a square weight is a vector whose axis belongs to both sides.
    a = Made((frozenset({SIDES[0]}), frozenset()), frozenset({SIDES[0]}), True)
    b = Made((frozenset(), frozenset({SIDES[1]})), frozenset({SIDES[1]}), True)
    weights = Weights(frozenset(), [49])

    def counted(fn):
        return excess(
            built(jax.make_jaxpr(fn)(normal(7, 2), normal(2, 7)), [a, b], weights), Counter()
        )

    assert counted(lambda a, b: (a * b.T).sum(1)) == {}
    assert counted(lambda a, b: (a @ b).reshape(49)) == {(7, 7): 1, (49,): 1}


def convolved_per_example(params, x):
    one = lambda w, x: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.vmap(one)(params["w"], x)


def heads_of_one_part(params, x):
    w = params["w"].reshape(7, 3, 2, 1).transpose(1, 0, 2, 3)
    return jnp.einsum("bi,kihd->kbhd", x, w)


def either(params, x):
    w = params["w"]
    return jax.vmap(lambda x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: (x * 2) @ w))(x)


DORA = DoraSpec(LoraSpec(2))


@pytest.mark.parametrize(
    ("function", "shape", "spec", "x_shape"),
    [
        (
            convolved_per_example,
            (3, 3, 2, 4, 6),
            DORA.with_axes(Axes((0,), (1, 2, 3), (4,))),
            (3, 2, 5, 5, 4),
        ),
        (heads_of_one_part, (7, 6), DORA, (3, 7)),
        (lambda p, x: x @ jnp.kron(jnp.ones((2, 1)), p["w"]), (7, 6), DORA, (3, 14)),
        (lambda p, x: x @ lax.stop_gradient(p["w"]), (7, 6), DORA, (3, 7)),
        # JAX selects between the weight and a copy without a gradient.
        (either, (7, 6), LoraSpec(2), (3, 7)),
    ],
    ids=["vmapped-convolution", "heads", "kronecker", "stopped", "branches-of-each-row"],
)
def test_a_base_that_is_only_rearranged_passes(function, shape, spec, x_shape):
    testing.check(function, {"w": normal(*shape)}, {"w": spec}, normal(*x_shape), transforms=False)
