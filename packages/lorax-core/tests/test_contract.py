"""The one place that emits products with factors: their order, form and dtype."""

import functools
import itertools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import DoraSpec, IA3Spec, LoraSpec, _contract, _order, init_lora, lora
from lorax._terms import Label

B, I, O, R, S, E, T, K = (  # noqa: E741
    Label(k, size) for k, size in enumerate((19, 11, 7, 2, 3, 5, 13, 4))
)


def arrays(*labels, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(labels))
    return [
        (jax.random.normal(key, [label.size for label in names]).astype(dtype), names)
        for key, names in zip(keys, labels, strict=True)
    ]


def einsum(operands, out):
    letters = {label: chr(97 + label.id) for label in (B, I, O, R, S, E, T, K)}
    spell = lambda labels: "".join(letters[label] for label in labels)  # noqa: E731
    equation = ",".join(spell(names) for _, names in operands) + "->" + spell(out)
    return np.einsum(equation, *(np.asarray(array, np.float64) for array, _ in operands))


def shapes_made(operands, out, **keywords):
    keywords = {"dtype": jnp.float32} | keywords
    names = [labels for _, labels in operands]

    def fn(*factors):
        pairs = list(zip(factors, names, strict=True))
        return _contract.contract(pairs, out, **keywords)

    jaxpr = jax.make_jaxpr(fn)(*(array for array, _ in operands))
    return [(eqn.primitive.name, eqn.outvars[0].aval) for eqn in jaxpr.jaxpr.eqns]


CASES = [
    ([(B, I), (I, R), (R, O)], (B, O), 0),
    ([(I, R), (R, O), (O, B)], (I, B), 2),
    ([(B, I), (I, R), (R, O)], (O, B), 0),
    ([(E, B, I), (E, I, R), (E, R, O)], (E, B, O), 0),
    ([(E, B, I), (I, R), (E, R, O)], (E, B, O), 0),
    ([(B, I), (I, R), (R, S), (S, O)], (B, O), 0),
    ([(B, I), (I, R), (R, O), (O,)], (B, O), 0),
    ([(B, I), (I,), (I, R), (R, O)], (B, O), 0),
    ([(B, I), (R,), (R, O)], (B, O), 0),
    ([(I, R), (R, O)], (I, O), None),
    ([(I, R), (R,), (R, O)], (O, I), None),
    ([(I, R), (R, O), (I, S), (S, O)], (I, O), None),
    ([(I, R)], (I,), None),
    ([(B, I, O), (I, R), (R, O)], (B,), 0),
    ([(B, T, I), (I, R), (R, O)], (B, T, O), 0),
    ([(B, T, I), (I, R), (R, O)], (T, B, O), 0),
    ([(B, I, T), (I, R), (R, O, K)], (B, T, O, K), 0),
    ([(B, T, I, K), (I, K, R), (R, O)], (B, T, O), 0),
    ([(B, E, T, I), (E, I, R), (E, R, O)], (E, B, T, O), 0),
    ([(B, T, I), (I, R), (R,), (R, S), (S, O)], (B, T, O), 0),
    ([(B, T, R), (R, O)], (B, T, O), None),
    ([(B, T, I), (I,), (I, R), (R, O)], (B, T, O), 0),
    ([(R, O), (O, R)], (O,), None),
    ([(B, R, O), (O, B, R)], (O, B), None),
    ([(I, O), (I, R), (R, O)], (O,), 0),
    ([(), (B, T, I), (I, R), (R, O)], (B, T, O), 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case):
    names, out, meets = case
    operands = arrays(*names)
    got = _contract.contract(operands, out, dtype=jnp.float32, precision="highest", meets=meets)
    assert np.allclose(got, einsum(operands, out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c[2] is not None], ids=str)
def test_factors_are_never_multiplied_into_the_weight(case):
    names, out, meets = case
    met = set(names[meets])
    weight = {label for k, labels in enumerate(names) if k != meets for label in labels}
    weight &= met | set(out)
    size = np.prod([label.size for label in weight])
    for _, aval in shapes_made(arrays(*names), out, meets=meets):
        assert not (aval.size == size and B.size not in aval.shape), aval


@pytest.mark.parametrize("rows", [1, 2, 10_000], ids=str)
def test_the_order_does_not_depend_on_the_batch(rows):
    # At this rank, and many rows, the delta would be cheaper to multiply by: it is not built.
    many, rank = B._replace(size=rows), R._replace(size=6)
    names = [(many, I), (I, rank), (rank, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (many, O), meets=0)]
    assert (I.size, O.size) not in made and (O.size, I.size) not in made
    assert (rows, rank.size) in made or (rank.size, rows) in made


@pytest.mark.parametrize("rows", [1, 10_000], ids=str)
def test_no_part_of_the_delta_is_built_beside_a_factor_of_another_input(rows):
    # W[e, i, o] = scale[e] · a[i, r] · b[r, o]: one slice of it is as bad as all of it.
    many, rank = B._replace(size=rows), R._replace(size=6)
    names = [(many, E, I), (E,), (I, rank), (rank, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (many, O), meets=0)]
    assert (I.size, O.size) not in made and (O.size, I.size) not in made


def test_the_cheapest_order_is_taken():
    # With one row, or a rank of 2: x·a first, whatever the order of the factors.
    for order in itertools.permutations([(B, I), (I, R), (R, O)]):
        made = [a.shape for n, a in shapes_made(arrays(*order), (B, O), meets=order.index((B, I)))
                if n == "dot_general"]  # fmt: skip
        assert sorted(made[0]) == [R.size, B.size]


def all_orders(operands, out):
    """Every order of pairwise products: its steps, and (met, left, right, found) of each."""
    if len(operands) < 2:
        yield [], []
        return
    for left, right in itertools.combinations(range(len(operands)), 2):
        rest = [labels for k, labels in enumerate(operands) if k not in (left, right)]
        elsewhere = set(out).union(*rest)
        met = {*operands[left], *operands[right]}
        product = tuple(label for label in dict.fromkeys((*operands[left], *operands[right]))
                      if label in elsewhere)  # fmt: skip
        for steps, made in all_orders([*rest, product], out):
            yield [(left, right), *steps], [(met, product), *made]


def multiplications(made):
    return sum(int(np.prod([label.size for label in met])) for met, _ in made)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_no_order_is_cheaper(count):
    generator = np.random.default_rng(count)
    pool = [Label(k, int(size)) for k, size in enumerate(generator.choice(range(1, 17), 6))]
    for _ in range(40 if count < 5 else 10):
        order = [generator.permutation(6)[: generator.integers(0, 4)] for _ in range(count)]
        operands = [tuple(pool[k] for k in chosen) for chosen in order]
        out = tuple({label for labels in operands for label in labels if label.id % 2})
        orders = list(all_orders(operands, out))
        taken = _order.pairwise_order(tuple(operands), out, None)
        (cost,) = [multiplications(made) for steps, made in orders if steps == taken]
        assert cost == min(multiplications(made) for _, made in orders)


def test_a_scale_of_one_side_joins_its_factor():
    # As in a product of weights of which one is scaled: V[o, p] meets b[r, o] and gain[o].
    names = [(R, I), (I,), (I, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (R, O), meets=2)]
    assert (I.size, O.size) not in made


def chain(length, sizes=(19, 11, 2, 7, 3, 13)):
    """The labels of x and of so many factors, each of which hangs on the one before."""
    labels = [Label(k, sizes[k % len(sizes)]) for k in range(length + 2)]
    return list(itertools.pairwise(labels)), (labels[0], labels[-1])


@pytest.mark.parametrize("length", [_order.MOST_ORDERED + 1, 20, 40])
def test_many_factors_are_put_in_an_order_without_trying_all(length):
    names, out = chain(length)
    steps = _order.pairwise_order(tuple(names), out, 0)
    assert len(steps) == length
    operands = [(array / 8, labels) for array, labels in arrays(*names)]
    got = _contract.contract(operands, out, dtype=jnp.float32, precision="highest", meets=0)
    expected = functools.reduce(np.matmul, [np.asarray(a, np.float64) for a, _ in operands])
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_many_factors_are_not_multiplied_into_the_weight():
    # One row: the delta would be cheap. Scales of both sides, and matrices in between.
    one = B._replace(size=1)
    inner = [Label(10 + k, 2) for k in range(8)]
    names = [(one, I), (I,), (I,), (I, inner[0]), *itertools.pairwise(inner), (inner[-1], O), (O,)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (one, O), meets=0)]
    assert len(names) > _order.MOST_ORDERED
    assert (I.size, O.size) not in made and (O.size, I.size) not in made


def test_terms_that_look_alike_share_one_search():
    names, out = chain(5)
    _order.pairwise_order(tuple(names), out, 0)
    searches = _order._ordered.cache_info().misses
    moved = [tuple(label._replace(id=label.id + 7) for label in pair) for pair in names]
    _order.pairwise_order(tuple(moved), (moved[0][0], moved[-1][-1]), 0)
    assert _order._ordered.cache_info().misses == searches


def test_the_result_is_not_transposed_where_the_product_can_be_turned():
    for out in ((B, O), (O, B)):
        names = [name for name, _ in shapes_made(arrays((B, I), (I, R), (R, O)), out, meets=0)]
        assert "transpose" not in names


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_factors_meet_in_the_dtype_asked_for(dtype):
    operands = arrays((B, I), (I, R), (R, O))
    made = shapes_made(operands, (B, O), dtype=dtype, meets=0)
    assert {aval.dtype for name, aval in made if name == "dot_general"} == {jnp.dtype(dtype)}


def test_only_the_last_product_has_the_preferred_type():
    operands = arrays((B, I), (I, R), (R, O), dtype=jnp.bfloat16)
    made = shapes_made(
        operands, (B, O), dtype=jnp.bfloat16, preferred_element_type=jnp.float32, meets=0
    )
    dots = [aval.dtype for name, aval in made if name == "dot_general"]
    assert dots == [jnp.bfloat16, jnp.float32]


def test_products_are_in_the_lora_scope():
    operands = arrays((B, I), (I, R), (R, O))
    fn = lambda *factors: _contract.contract(  # noqa: E731
        [(f, n) for f, (_, n) in zip(factors, operands, strict=True)],
        (B, O),
        dtype=jnp.float32,
        meets=0,
    )
    jaxpr = jax.make_jaxpr(fn)(*(array for array, _ in operands))
    assert isinstance(jaxpr, jex.ClosedJaxpr)
    assert all(str(eqn.source_info.name_stack) == "lora" for eqn in jaxpr.jaxpr.eqns)


@pytest.mark.parametrize(
    "operands, out, expected",
    [
        ((jnp.float32, jnp.float32), jnp.float32, jnp.float32),
        ((jnp.bfloat16, jnp.bfloat16), jnp.float32, jnp.bfloat16),
        ((jnp.bfloat16, jnp.float32), jnp.float32, jnp.float32),
        ((jnp.float32, jnp.bfloat16), jnp.bfloat16, jnp.float32),
        ((jnp.float16, jnp.bfloat16), jnp.bfloat16, jnp.float32),
        ((jnp.int8, jnp.float32), jnp.float32, jnp.float32),
        ((jnp.int32, jnp.bfloat16), jnp.bfloat16, jnp.bfloat16),
        ((jnp.int8, jnp.int8), jnp.int32, jnp.float32),
        ((jnp.float8_e4m3fn, jnp.bfloat16), jnp.bfloat16, jnp.bfloat16),
        ((jnp.float8_e4m3fn, jnp.float8_e5m2), jnp.bfloat16, jnp.bfloat16),
        ((jnp.float8_e4m3fn, jnp.float8_e4m3fn), jnp.float8_e4m3fn, jnp.float32),
        ((jnp.float32, jnp.complex64), jnp.complex64, jnp.complex64),
        ((jnp.complex64, jnp.bfloat16), jnp.complex64, jnp.complex64),
    ],
    ids=str,
)
def test_product_dtype(operands, out, expected):
    assert _contract.product_dtype(*operands, out=out) == expected


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
    ids=str,
)
def test_wide_dtype(dtype, expected):
    assert _contract.wide_dtype(dtype) == expected


# The form: neighboring axes are one axis, where that is fast


def products(fn, *args):
    """The shapes that the products of a function make, nested bodies included."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.outvars[0].aval.shape
            for value in eqn.params.values():
                if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


def contraction(names, out, meets=0):
    """A contraction as a function of its operands, and the operands."""
    operands = arrays(*names)
    fn = lambda *given: _contract.contract(  # noqa: E731
        list(zip(given, names, strict=True)), out, dtype=jnp.float32, meets=meets
    )
    return fn, [array for array, _ in operands]


def sizes(*labels):
    """The shape of an array with an axis for each group of labels."""
    return tuple(
        int(np.prod([label.size for label in group])) if isinstance(group, list) else group.size
        for group in labels
    )


JOINED = [
    # x keeps its axes: JAX would keep it in both forms for the backward pass.
    ([(B, T, I), (I, R), (R, O)], (B, T, O), 0, [sizes(B, T, R), sizes([B, T], O)]),
    ([(B, T, I, K), (I, K, R), (R, O)], (B, T, O), 0, [sizes(B, T, R), sizes([B, T], O)]),
    ([(B, T, I), (I, R), (R, O, K)], (B, T, O, K), 0, [sizes(B, T, R), sizes([B, T], [O, K])]),
    # Experts.
    (
        [(B, E, T, I), (E, I, R), (E, R, O)],
        (E, B, T, O),
        0,
        [sizes(E, B, T, R), sizes(E, [B, T], O)],
    ),
    # An embedding's rows, or what a convolution made of its windows: nobody else has them.
    ([(B, T, R), (R, O)], (B, T, O), None, [sizes([B, T], O)]),
    # Nothing to join.
    ([(B, I), (I, R), (R, O)], (B, O), 0, [sizes(B, R), sizes(B, O)]),
]


@pytest.mark.parametrize("case", JOINED, ids=str)
def test_axes_are_joined_on_cpu(case):
    names, out, meets, expected = case
    fn, operands = contraction(names, out, meets)
    assert products(fn, *operands) == expected
    assert fn(*operands).shape == sizes(*out)


@pytest.mark.parametrize("case", JOINED, ids=str)
def test_joining_axes_moves_no_data(case):
    names, out, meets, _ = case
    made = shapes_made(arrays(*names), out, meets=meets)
    assert {name for name, _ in made} <= {"dot_general", "reshape"}


def test_no_axes_are_joined_on_other_platforms(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fn, operands = contraction([(B, T, I), (I, R), (R, O)], (B, T, O))
    assert products(fn, *operands) == [sizes(B, T, R), sizes(B, T, O)]


def adapted(kind):
    """A model and its adapters; an argument off a mesh, and the same argument on one."""
    params = {"w": jnp.ones((6, 10))}
    adapters = init_lora(params, {"w": LoraSpec(2)}, jax.random.key(0))
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(kind, kind))
    x = jnp.ones((4, 8, 6))
    fn = lora(lambda p, x: jnp.sin(jnp.cos(x) @ p["w"]))
    return fn, adapters, x, mesh, NamedSharding(mesh, P("d", "m"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "around", [lambda fn: fn, jax.jit, jax.checkpoint], ids=["bare", "jit", "checkpoint"]
)
def test_no_axes_are_joined_on_a_mesh(kind, around):
    fn, adapters, x, mesh, sharding = adapted(kind)
    alone = [(4, 8, 10), (4, 8, 2), (32, 10)]
    spread = [(4, 8, 10), (4, 8, 2), (4, 8, 10)]
    # Off the mesh again at last: nothing remembers the other form.
    assert products(around(fn), adapters, x) == alone
    on_mesh = jax.device_put(x, sharding)
    with jax.set_mesh(mesh):
        placed = jax.device_put(adapters, NamedSharding(mesh, P()))
        assert products(around(fn), placed, on_mesh) == spread
        if kind == AxisType.Auto:
            # Whatever `in_shardings` will say.
            assert products(around(fn), adapters, x) == spread
    if kind == AxisType.Auto:
        assert products(around(fn), adapters, on_mesh) == spread
    assert products(around(fn), adapters, x) == alone


def test_no_axes_are_joined_for_shapes_on_a_mesh():
    # As when compiling ahead of time for a topology that this host does not have.
    fn, adapters, x, _, sharding = adapted(AxisType.Auto)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    text = jax.jit(fn).lower(adapters, shape).as_text()
    assert "tensor<32x10xf32>" not in text
    assert "tensor<32x10xf32>" in jax.jit(fn).lower(adapters, x).as_text()


def test_a_mesh_of_one_device_is_a_mesh():
    fn, adapters, x, _, _ = adapted(AxisType.Auto)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    assert (32, 10) not in products(fn, adapters, jax.device_put(x, NamedSharding(mesh, P("d"))))


def test_the_gradient_of_b_contracts_one_axis():
    fn, (frozen, tunable), x, _, _ = adapted(AxisType.Auto)
    loss = lambda tunable: fn((frozen, tunable), x).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(tunable).as_text()
    wide = [line for line in text.splitlines() if "dot_general" in line and "4x8x10xf32" in line]
    assert not any("contracting_dims = [0, 1] x [0, 1]" in line for line in wide), wide


def test_axes_summed_first_are_joined():
    # As the blocks of MiSS: what meets the factor is another array than the one that others share.
    fn, operands = contraction([(B, T, K, R), (R, O)], (B, T, O))
    assert products(fn, *operands) == [sizes([B, T], O)]


def test_whole_rows_move_where_the_result_is_transposed():
    # As the blocks of GraLoRA, whose label is shown between those of the examples and the outputs.
    fn, operands = contraction([(B, E, I), (E, I, R), (E, R, O)], (B, E, O))
    assert products(fn, *operands)[-1] == sizes(E, B, O)


GAINS = {
    "beside terms, on one CPU": (DoraSpec(LoraSpec(2)), True, (0,)),
    "beside terms": (DoraSpec(LoraSpec(2)), False, (0, 1)),
    "alone, on one CPU": (IA3Spec(), True, (0, 1)),
    "alone": (IA3Spec(), False, (0, 1)),
}


@pytest.mark.parametrize("row", GAINS)
def test_the_gradient_of_a_gain_sums_over_one_axis_of_examples_beside_terms(row, monkeypatch):
    spec, on_cpu, axes = GAINS[row]
    params, x = {"w": jnp.ones((6, 10))}, jnp.ones((4, 8, 6))
    frozen, tunable = init_lora(params, {"w": spec}, jax.random.key(0))
    fn = lora(lambda p, x: x @ p["w"])
    monkeypatch.setattr(_contract, "is_for_one_cpu", lambda _: on_cpu)
    grad = jax.make_jaxpr(jax.grad(lambda tunable: (fn((frozen, tunable), x) ** 2).sum()))
    sums = [eqn for eqn in grad(tunable).eqns if eqn.primitive.name == "reduce_sum"]
    of_examples = [eqn for eqn in sums if eqn.invars[0].aval.size == 4 * 8 * 10]
    loss, gain = (eqn.params["axes"] for eqn in of_examples)
    assert (loss, gain) == ((0, 1, 2), axes)


def test_a_gain_alone_costs_what_a_hand_written_one_costs():
    params, x = {"w": jnp.ones((64, 48))}, jnp.ones((4, 32, 64))
    frozen, tunable = init_lora(params, {"w": IA3Spec()}, jax.random.key(0))
    fn = lora(lambda p, x: x @ p["w"])
    ours = lambda tunable, x: jnp.sin(fn((frozen, tunable), x)).sum()  # noqa: E731
    by_hand = lambda gain, x: jnp.sin((x @ params["w"]) * gain[None, None]).sum()  # noqa: E731

    def costs(loss, trained):
        compiled: Any = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(trained, x).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert costs(ours, tunable) == costs(by_hand, tunable["w"].gain)


ELEMENTWISE = {
    "a scale": ([(R, O), (O,)], (R, O), ["mul"]),
    "a scale in front": ([(O,), (R, O)], (R, O), ["mul"]),
    "a number": ([(), (R, O)], (R, O), ["mul"]),
    "rows by rows": ([(R, O), (R, O)], (O,), ["mul", "reduce_sum"]),
    "rows by columns": ([(R, O), (O, R)], (O,), ["transpose", "mul", "reduce_sum"]),
    "an outer product": ([(R,), (O,)], (R, O), ["dot_general"]),
    "a matrix by a vector": ([(R, O), (O,)], (R,), ["dot_general"]),
}


@pytest.mark.parametrize("row", ELEMENTWISE)
def test_products_without_free_labels_of_one_side_are_elementwise(row):
    operands, out, primitives = ELEMENTWISE[row]
    found = [name for name, _ in shapes_made(arrays(*operands), out)]
    layout = {"reshape", "broadcast_in_dim", "expand_dims", "pjit", "jit"}
    assert [name for name in found if name not in layout] == primitives


def test_rows_by_rows_in_half_precision_are_summed_in_a_dot_product():
    names = [name for name, _ in shapes_made(arrays((R, O), (R, O), dtype=jnp.bfloat16), (O,),
             dtype=jnp.bfloat16)]  # fmt: skip
    assert names == ["dot_general"]


def test_an_operand_that_is_summed_over_its_first_axis_is_on_the_right():
    # As W [in, out] in the norm of DoRA: aᵀ W reads W as it is, Wᵀ a would transpose it.
    made = shapes_made(arrays((I, O), (I, R), (R, O)), (O,), meets=0)
    assert [aval.shape for name, aval in made if name == "dot_general"] == [(R.size, O.size)]


def test_many_directions_and_many_adapters():
    # Each direction and each adapter is an axis that the joined ones do not know of.
    fn, (frozen, tunable), x, _, _ = adapted(AxisType.Auto)
    tunable = jax.tree.map(lambda leaf: leaf + 0.1, tunable)
    merged = lambda t, x: jnp.sin(jnp.cos(x) @ (frozen["w"] + t["w"].a @ t["w"].b))  # noqa: E731
    ours = lambda t, x: fn((frozen, t), x)  # noqa: E731
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), tunable)

    def hessian_products(f):
        gradient = jax.grad(lambda t: (f(t, x) ** 2).sum())
        return lambda ts: jax.vmap(lambda t: jax.jvp(gradient, (tunable,), (t,)))(ts)

    def per_example(f):
        gradient = jax.grad(lambda t, x: (f(t, x[None]) ** 2).sum())
        return lambda ts: jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(ts, x)

    for transform in (hessian_products, per_example):
        got, expected = transform(ours)(several), transform(merged)(several)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        assert all(np.allclose(one, two, rtol=1e-3, atol=1e-3) for one, two in pairs)
