"""Products of a weight with data, and of weights with each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import (
    LoraSpec,
    MaterializeWarning,
    init_lora,
    lora,
    merge_params,
    testing,
)

BF16, F16, C64 = jnp.bfloat16, jnp.float16, jnp.complex64
struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}


def einsum(equation, **keywords):
    return lambda p, x: jnp.einsum(equation, x, p["w"], **keywords)


def dot(contract, batch=((), ()), *, left=False, **keywords):
    def fn(p, x):
        operands = (p["w"], x) if left else (x, p["w"])
        return lax.dot_general(*operands, (contract, batch), **keywords)

    return fn


# The default of `check` is wider for 16-bit results than these need.
TIGHTER = {"tolerance": 0.05}

ROWS = [
    # One contraction, either side.
    ("right", lambda p, x: x @ p["w"], W, {"w": 2}, [(3, 11)]),
    ("left", lambda p, x: p["w"] @ x, W, {"w": LoraSpec(2, in_axes=[1])}, [(7, 3)]),
    ("right-vector", lambda p, x: x @ p["w"], W, {"w": 2}, [(11,)]),
    ("left-vector", lambda p, x: p["w"] @ x, W, {"w": 2}, [(7,)]),
    ("right-many-axes", lambda p, x: x @ p["w"], W, {"w": 2}, [(2, 5, 3, 11)]),
    ("left-many-axes", lambda p, x: p["w"] @ x, W, {"w": 2}, [(2, 5, 7, 3)]),
    ("no-rows", lambda p, x: x @ p["w"], W, {"w": 2}, [(0, 11)]),
    ("no-batch-axis-of-its-own", dot(((1,), (0,)), left=True), W, {"w": 2}, [(7, 3, 5)]),
    ("contracts-the-output-axis", einsum("bo,io->bi"), W, {"w": 2}, [(3, 7)]),
    ("tied-head", einsum("bd,vd->bv"), {"w": (19, 5)}, {"w": LoraSpec(2, in_axes=[1])}, [(3, 5)]),
    ("rank-one", lambda p, x: x @ p["w"], W, {"w": 1}, [(3, 11)]),
    ("rank-as-large-as-the-weight", lambda p, x: x @ p["w"], W, {"w": 7}, [(3, 11)]),
    ("alpha", lambda p, x: x @ p["w"], W, {"w": LoraSpec(3, alpha=16.0)}, [(3, 11)]),
    (
        "rslora",
        lambda p, x: x @ p["w"],
        W,
        {"w": LoraSpec(3, alpha=16.0, scaling="rslora")},
        [(5, 11)],
    ),
    # Several contractions.
    ("two-inputs", einsum("bhk,hkd->bd"), {"w": (5, 7, 11)}, {"w": 2}, [(3, 5, 7)]),
    (
        "two-inputs-in-another-order",
        dot(((2, 1), (0, 1))),
        {"w": (5, 7, 11)},
        {"w": 2},
        [(3, 7, 5)],
    ),
    (
        "two-outputs",
        einsum("bd,dhk->bhk"),
        {"w": (11, 5, 7)},
        {"w": LoraSpec(2, in_axes=[0])},
        [(3, 11)],
    ),
    (
        "three-separated-inputs",
        einsum("bacd,atcod->bto"),
        {"w": (2, 5, 3, 7, 4)},
        {"w": LoraSpec(3, out_axes=[1, 3])},
        [(9, 2, 3, 4)],
    ),
    ("one-of-two-inputs", einsum("bi,ijo->bjo"), {"w": (5, 3, 11)}, {"w": 2}, [(2, 5)]),
    (
        "an-input-and-an-output",
        einsum("bik,iok->bo"),
        {"w": (5, 7, 3)},
        {"w": LoraSpec(2, in_axes=[0])},
        [(2, 5, 3)],
    ),
    ("every-axis", einsum("bio,io->b"), W, {"w": 2}, [(3, 11, 7)]),
    ("to-a-scalar", einsum("io,io->"), W, {"w": 2}, [(11, 7)]),
    ("bilinear", lambda p, x, y: jnp.einsum("bi,io,bo->b", x, p["w"], y), W, {"w": 2},
     [(3, 11), (3, 7)]),
    ("tensordot", lambda p, x: jnp.tensordot(x, p["w"], [[1, 2], [1, 0]]), {"w": (5, 3, 11)},
     {"w": 2}, [(2, 3, 5)]),
    # Batch axes.
    ("batch-shared", einsum("eni,eio->eno"), {"w": (3, 11, 7)},
     {"w": LoraSpec(2, shared_axes=[0])}, [(3, 2, 11)]),
    ("batch-owned-by-a", einsum("eni,eio->eno"), {"w": (3, 11, 7)}, {"w": 2}, [(3, 2, 11)]),
    ("batch-owned-by-b", einsum("eni,eio->eno"), {"w": (3, 11, 7)},
     {"w": LoraSpec(2, in_axes=[1])}, [(3, 2, 11)]),
    ("batch-left", dot(((2,), (2,)), ((0,), (1,)), left=True), {"w": (3, 11, 7)},
     {"w": LoraSpec(2, in_axes=[2], shared_axes=[0])}, [(5, 3, 7)]),
    ("two-batch-axes", einsum("aebi,eiao->eabo"), {"w": (3, 7, 2, 11)},
     {"w": LoraSpec(2, in_axes=[1], shared_axes=[0, 2])}, [(2, 3, 5, 7)]),
    ("batch-only", einsum("beo,eo->be"), W, {"w": 2}, [(3, 11, 7)]),
    ("vmap-over-stacked-weights", lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]),
     {"w": (3, 11, 7)}, {"w": LoraSpec(2, shared_axes=[0])}, [(3, 5, 11)]),
    ("vmap-over-a-middle-axis",
     lambda p, x: jax.vmap(jnp.matmul, in_axes=(None, 1), out_axes=1)(x, p["w"]),
     {"w": (11, 3, 7)}, {"w": LoraSpec(2, shared_axes=[1])}, [(5, 11)]),
    ("vmap-over-the-operand", lambda p, x: jax.vmap(lambda row: p["w"] @ row)(x), W, {"w": 2},
     [(3, 7)]),
    # Weights times weights.
    ("weight-by-weight", lambda p, x: x @ (p["w"] @ p["v"]), {"w": (11, 7), "v": (7, 13)},
     {"w": 2, "v": 3}, [(3, 11)]),
    ("weight-by-weight-transposed", lambda p, x: x @ jnp.einsum("io,vo->iv", p["w"], p["v"]),
     {"w": (11, 7), "v": (13, 7)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("weight-by-itself", lambda p, x: x @ (p["w"].T @ p["w"]), W, {"w": 2}, [(3, 7)]),
    ("weight-by-frozen", lambda p, x: x @ (p["w"] @ p["v"]), {"w": (11, 7), "v": (7, 5)},
     {"w": 2, "v": 0}, [(3, 11)]),
    ("three-weights", lambda p, x: x @ (p["w"] @ p["v"] @ p["u"]),
     {"w": (11, 7), "v": (7, 13), "u": (13, 5)}, {"w": 2, "v": 1, "u": 2}, [(3, 11)]),
    ("stacked-weight-by-stacked-weight",
     lambda p, x: jnp.einsum("eni,eio->eno", x, jnp.einsum("eio,eok->eik", p["w"], p["v"])),
     {"w": (3, 11, 7), "v": (3, 7, 13)},
     {"w": LoraSpec(2, shared_axes=[0]), "v": LoraSpec(2, shared_axes=[0])}, [(3, 2, 11)]),
    ("weight-power", lambda p, x: x @ jnp.linalg.matrix_power(p["w"], 5) / 16, {"w": (7, 7)},
     {"w": 2}, [(3, 7)]),
    ("weight-power-in-a-scan",
     lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ (w @ w)), None), x, p["w"])[0],
     {"w": (3, 7, 7)}, {"w": LoraSpec(2, shared_axes=[0])}, [(5, 7)]),
    ("weight-by-weight-left", lambda p, x: (p["w"] @ p["v"]) @ x, {"w": (11, 7), "v": (7, 13)},
     {"w": 2, "v": 3}, [(13, 3)]),
    ("weight-by-weight-precisions",
     lambda p, x: x @ lax.dot_general(p["w"], p["v"], (((1,), (0,)), ((), ())),
                                      precision=(lax.Precision.HIGHEST, lax.Precision.HIGH)),
     {"w": (11, 7), "v": (7, 13)}, {"w": 2, "v": 3}, [(3, 11)]),
    ("weight-by-weight-several-axes",
     lambda p, x: jnp.einsum("bihk,ihkd->bd", x, jnp.einsum("ihjk,jkdh->ihkd", p["w"], p["v"])),
     {"w": (5, 3, 7, 2), "v": (7, 2, 13, 3)},
     {"w": LoraSpec(2, in_axes=[0, 1]), "v": LoraSpec(2, in_axes=[0, 3])}, [(4, 5, 3, 2)],
     {"sizes": False}),
    ("weight-by-weight-over-both-axes",
     lambda p, x: x * jnp.einsum("io,iop->p", p["w"], p["v"])[None],
     {"w": (11, 7), "v": (11, 7, 13)}, {"w": 2, "v": LoraSpec(3, in_axes=[0])}, [(4, 13)]),
    ("weight-by-scaled-weight",
     lambda p, x: x @ ((p["w"] * jnp.cos(x[0, :7])[None]) @ p["v"]), {"w": (11, 7), "v": (7, 13)},
     {"w": 2, "v": 3}, [(3, 11)]),
    ("weight-by-broadcast-weight",
     lambda p, x: x @ (jnp.broadcast_to(p["w"][:, None], (11, 5, 7)).reshape(11, 35)
                       @ jnp.broadcast_to(p["v"][None], (35, 2, 13)).sum(1)),
     {"w": (11, 7), "v": (2, 13)}, {"w": 3, "v": 1}, [(4, 11)]),
    ("outer-product-of-weights",
     lambda p, x: jnp.einsum("bij,iojp->bop", x, jnp.einsum("io,jp->iojp", p["w"], p["v"])),
     {"w": (5, 7), "v": (3, 13)}, {"w": 2, "v": 2}, [(2, 5, 3)]),
    ("tensor-train",
     lambda p, x: x @ jnp.einsum("air,rbjs,sck->abcijk", *p.values()).reshape(30, 616),
     {"g0": (2, 7, 9), "g1": (9, 3, 8, 10), "g2": (10, 5, 11)}, {"g0": 2, "g1": 2, "g2": 2},
     [(4, 30)], {"sizes": False}),
    ("cayley", lambda p, x: x @ jnp.linalg.solve(jnp.eye(7) + (p["w"] - p["w"].T) / 9,
                                                 jnp.eye(7) - (p["w"] - p["w"].T) / 9),
     {"w": (7, 7)}, {"w": 2}, [(3, 7)], {"materializes": True}),
    ("learned-queries",
     lambda p, x: jnp.einsum("bqhk,bthk->bhqt", jnp.einsum("bqd,dhk->bqhk",
         jnp.tile(p["probe"], (x.shape[0], 1, 1)), p["q"]), jnp.einsum("btd,dhk->bthk", x, p["k"])),
     {"probe": (1, 5, 11), "q": (11, 2, 7), "k": (11, 2, 7)},
     {name: LoraSpec(2, in_axes=[axis]) for name, axis in (("probe", 1), ("q", 0), ("k", 0))},
     [(3, 4, 11)], {"transforms": False}),
    ("two-layers", lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], {"w": (11, 7), "v": (7, 13)},
     {"w": 2, "v": 3}, [(3, 11)]),
    ("weight-and-its-transpose", lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, W, {"w": 2},
     [(3, 11)]),
    ("attention-scores",
     lambda p, x: jnp.einsum("bqk,bsk->bqs", x @ p["q"], x @ p["k"]),
     {"q": (11, 7), "k": (11, 7)}, {"q": 2, "k": 2}, [(2, 3, 11)]),
    ("with-full-and-frozen", lambda p, x: (x @ p["w"] + p["b"][None]) @ p["v"],
     {"w": (11, 7), "b": (7,), "v": (7, 5)}, {"w": 2, "b": -1, "v": 0}, [(3, 11)]),
    # Parameters of the equation.
    ("precision", einsum("bi,io->bo", precision="highest"), W, {"w": 2}, [(3, 11)]),
    ("precision-pair", dot(((1,), (0,)), precision=(lax.Precision.HIGHEST, lax.Precision.HIGH)),
     W, {"w": 2}, [(3, 11)]),
    ("precision-pair-left",
     dot(((1,), (0,)), left=True, precision=(lax.Precision.HIGHEST, lax.Precision.DEFAULT)),
     W, {"w": 2}, [(7, 3)]),
    ("precision-algorithm", dot(((1,), (0,)), precision=lax.DotAlgorithmPreset.F32_F32_F32),
     W, {"w": 2}, [(3, 11)]),
    ("default-precision-context", jax.default_matmul_precision("highest")(einsum("bi,io->bo")),
     W, {"w": 2}, [(3, 11)]),
    ("preferred-wide", dot(((1,), (0,)), preferred_element_type=jnp.float32),
     {"w": struct((11, 7), BF16)}, {"w": 2}, [struct((3, 11), BF16)], TIGHTER),
    ("preferred-wide-left", dot(((1,), (0,)), left=True, preferred_element_type=jnp.float32),
     {"w": struct((11, 7), F16)}, {"w": 2}, [struct((7, 3), F16)], {"tolerance": 0.01}),
    ("bfloat16", lambda p, x: x @ p["w"], {"w": struct((11, 7), BF16)}, {"w": 2},
     [struct((3, 11), BF16)], TIGHTER),
    ("float16", lambda p, x: x @ p["w"], {"w": struct((11, 7), F16)}, {"w": 2},
     [struct((3, 11), F16)], {"tolerance": 0.01}),
    ("complex", lambda p, x: x @ p["w"], {"w": struct((11, 7), C64)}, {"w": 2},
     [struct((3, 11), C64)]),
    ("integer-operand", dot(((1,), (0,)), preferred_element_type=jnp.float32), W, {"w": 2},
     [np.arange(-16, 17, dtype=np.int8).reshape(3, 11)]),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_contraction(check_row, row):
    check_row(*row)


def products(fn, shapes, spec, x):
    """The equations of the transformed function that multiply."""
    frozen, tunable = jax.eval_shape(lambda p, k: init_lora(p, spec, k), shapes, jax.random.key(0))
    jaxpr = jax.make_jaxpr(lora(fn, on_materialize="error"))((frozen, tunable), x)
    return [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_products_keep_the_parameters_of_the_equation(left):
    # Values cannot tell: only one product of several would round differently.
    fn = dot(((1,), (0,)), left=left, precision="highest", preferred_element_type=jnp.float32)
    x = struct((7, 3) if left else (3, 11), BF16)
    eqns = products(fn, {"w": struct((11, 7), BF16)}, {"w": 2}, x)
    highest = (lax.Precision.HIGHEST,) * 2
    assert [eqn.params["precision"] for eqn in eqns] == [highest] * 3
    # In order: x @ w, x @ a, and the product with b.
    types = [eqn.outvars[0].aval.dtype for eqn in eqns]
    assert types == [jnp.float32, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_each_operand_keeps_its_precision(left):
    pair = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
    fn = dot(((1,), (0,)), left=left, precision=pair)
    x = struct((7, 3) if left else (3, 11), jnp.float32)
    eqns = products(fn, {"w": struct((11, 7), jnp.float32)}, {"w": 2}, x)
    assert len(eqns) == 3
    for eqn in eqns:
        # The activation has 3 rows; it keeps its precision in every product.
        rows = [3 in v.aval.shape for v in eqn.invars]
        by_operand = dict(zip(rows, eqn.params["precision"], strict=True))
        assert by_operand == {not left: pair[0], left: pair[1]}


# Each adds or multiplies its own result repeatedly, which multiplies terms or factors.
CHAINS = {
    "powers": lambda p, x: x @ jnp.linalg.matrix_power(p["w"], 64),
    "exponential": lambda p, x: x @ jax.scipy.linalg.expm(p["w"]),
    "doubled": lambda p, x: x @ functools.reduce(lambda w, _: w + w, range(8), p["w"]),
    "Neumann series": lambda p, x: (
        x @ functools.reduce(lambda s, _: jnp.eye(7) + s @ p["w"] @ s, range(6), p["w"])
    ),
    "deep linear": lambda p, x: x @ functools.reduce(jnp.matmul, [p["w"]] * 20),
    "scaled": lambda p, x: (
        x @ functools.reduce(lambda w, k: w * jnp.cos(x[0] + k)[None], range(20), p["w"])
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_long_chain_of_weights_materializes_and_warns(name):
    params, x = {"w": jnp.eye(7) / 3 + jnp.arange(49.0).reshape(7, 7) / 500}, jnp.ones((7, 7)) / 3
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
    tunable = jax.tree.map(
        lambda leaf: leaf / 9, testing.random_factors(tunable, jax.random.key(1))
    )
    with pytest.warns(MaterializeWarning) as caught:
        jaxpr = jax.make_jaxpr(lora(CHAINS[name]))((frozen, tunable), x)
    # A few hundred products each; without a bound, millions.
    assert len(str(jaxpr).splitlines()) < 5000
    reasons = " ".join(str(warning.message) for warning in caught)
    if name != "exponential":  # Its few powers stay below the bound; the solver materializes.
        assert re.search(
            r"would have (a term of )?\d+ (low-rank terms|factors), more than 16", reasons
        )
    got = lora(CHAINS[name], on_materialize="allow")((frozen, tunable), x)
    expected = CHAINS[name](merge_params(frozen, tunable), x)
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


def test_sum_of_many_weights_stays_factored():
    # One product with the summed base, and two for each of the 30 adapters.
    shapes = {f"w{k}": struct((11, 7), jnp.float32) for k in range(30)}
    fn = lambda p, x: x @ functools.reduce(jnp.add, p.values())  # noqa: E731
    assert len(products(fn, shapes, dict.fromkeys(shapes, 2), struct((3, 11), jnp.float32))) == 61


def test_a_chain_of_weights_has_as_many_terms_as_weights():
    shapes = {f"w{k}": struct((11 + k, 12 + k), jnp.float32) for k in range(6)}
    fn = lambda p, x: x @ functools.reduce(jnp.matmul, p.values())  # noqa: E731
    eqns = products(fn, shapes, dict.fromkeys(shapes, 2), struct((3, 11), jnp.float32))
    # x is multiplied by the base, and by six terms of two factors each.
    last = [eqn for eqn in eqns if 3 in eqn.outvars[0].aval.shape]
    assert len(last) == 1 + 2 * 6


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "w_spec, x_spec, out_spec",
    [
        (P(None, "m"), P("d", None), P("d", "m")),
        (P("m", None), P("d", "m"), P("d", None)),
        (P("d", "m"), P(), P(None, "m")),
    ],
    ids=["outputs", "inputs", "both"],
)
def test_out_sharding_on_an_explicit_mesh(w_spec, x_spec, out_spec):
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def fn(p, x):
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=out_spec)

    with jax.set_mesh(mesh):
        place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
        params = {"w": place(jnp.sin(jnp.arange(88.0)).reshape(8, 11)[:, :10], w_spec)}
        x = place(jnp.cos(jnp.arange(32.0)).reshape(4, 8), x_spec)
        frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
        tunable = jax.tree.map(lambda leaf: leaf + 0.5, tunable)
        model = jax.jit(lora(fn, on_materialize="error"))
        out = model((frozen, tunable), x)
        expected = fn(merge_params(frozen, tunable), x)
        assert jax.typeof(out).sharding.spec == jax.typeof(expected).sharding.spec
        assert np.allclose(out, expected, rtol=1e-5, atol=1e-5)
        actual = jax.grad(lambda t: (model((frozen, t), x) ** 2).sum())(tunable)
        wanted = jax.grad(lambda t: (fn(merge_params(frozen, t), x) ** 2).sum())(tunable)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-3)
