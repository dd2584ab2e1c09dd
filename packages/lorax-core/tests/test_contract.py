"""Products with factors, which `_contract` alone emits: their order, form and dtype."""

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
def test_value_of_a_contraction(case):
    names, out, meets = case
    operands = arrays(*names)
    got = _contract.contract(operands, out, dtype=jnp.float32, precision="highest", meets=meets)
    assert np.allclose(got, einsum(operands, out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c[2] is not None], ids=str)
def test_factors_are_never_multiplied_into_the_weight(case):
    names, out, meets = case
    common = set(names[meets])
    weight = {label for k, labels in enumerate(names) if k != meets for label in labels}
    weight &= common | set(out)
    size = np.prod([label.size for label in weight])
    for _, aval in shapes_made(arrays(*names), out, meets=meets):
        assert not (aval.size == size and B.size not in aval.shape), aval


@pytest.mark.parametrize("rows", [1, 2, 10_000], ids=str)
def test_the_order_does_not_depend_on_the_batch(rows):
    # At this rank and with many rows, multiplying by the delta would be cheaper; it is not formed.
    batch, rank = B._replace(size=rows), R._replace(size=6)
    names = [(batch, I), (I, rank), (rank, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (batch, O), meets=0)]
    assert (I.size, O.size) not in made and (O.size, I.size) not in made
    assert (rows, rank.size) in made or (rank.size, rows) in made


@pytest.mark.parametrize("rows", [1, 10_000], ids=str)
def test_no_slice_of_the_delta_is_formed(rows):
    # W[e, i, o] = scale[e] · a[i, r] · b[r, o]: not even one slice over e is formed.
    batch, rank = B._replace(size=rows), R._replace(size=6)
    names = [(batch, E, I), (E,), (I, rank), (rank, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (batch, O), meets=0)]
    assert (I.size, O.size) not in made and (O.size, I.size) not in made


def test_the_cheapest_order_is_chosen():
    # x @ a comes first, whatever the order of the factors.
    for order in itertools.permutations([(B, I), (I, R), (R, O)]):
        made = [a.shape for n, a in shapes_made(arrays(*order), (B, O), meets=order.index((B, I)))
                if n == "dot_general"]  # fmt: skip
        assert sorted(made[0]) == [R.size, B.size]


def all_orders(operands, out):
    """Every order of pairwise products: its steps, and each step's labels and result labels."""
    if len(operands) < 2:
        yield [], []
        return
    for left, right in itertools.combinations(range(len(operands)), 2):
        rest = [labels for k, labels in enumerate(operands) if k not in (left, right)]
        needed = set(out).union(*rest)
        common = {*operands[left], *operands[right]}
        product = tuple(label for label in dict.fromkeys((*operands[left], *operands[right]))
                      if label in needed)  # fmt: skip
        for steps, made in all_orders([*rest, product], out):
            yield [(left, right), *steps], [(common, product), *made]


def multiplications(made):
    return sum(int(np.prod([label.size for label in common])) for common, _ in made)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_chosen_order_is_as_cheap_as_any(count):
    generator = np.random.default_rng(count)
    labels = [Label(k, int(size)) for k, size in enumerate(generator.choice(range(1, 17), 6))]
    for _ in range(40 if count < 5 else 10):
        order = [generator.permutation(6)[: generator.integers(0, 4)] for _ in range(count)]
        operands = [tuple(labels[k] for k in chosen) for chosen in order]
        out = tuple({label for labels in operands for label in labels if label.id % 2})
        orders = list(all_orders(operands, out))
        chosen_steps = _order.pairwise_order(tuple(operands), out, None)
        (cost,) = [multiplications(made) for steps, made in orders if steps == chosen_steps]
        assert cost == min(multiplications(made) for _, made in orders)


def test_scale_is_multiplied_into_its_factor():
    # As in a product of weights, one of which is scaled.
    names = [(R, I), (I,), (I, O)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (R, O), meets=2)]
    assert (I.size, O.size) not in made


def chain(length, sizes=(19, 11, 2, 7, 3, 13)):
    """The labels of x and of `length` factors, each of which shares a label with the one before."""
    labels = [Label(k, sizes[k % len(sizes)]) for k in range(length + 2)]
    return list(itertools.pairwise(labels)), (labels[0], labels[-1])


@pytest.mark.parametrize("length", [_order.MOST_ORDERED + 1, 20, 40])
def test_many_factors_get_an_order_without_trying_all(length):
    names, out = chain(length)
    steps = _order.pairwise_order(tuple(names), out, 0)
    assert len(steps) == length
    operands = [(array / 8, labels) for array, labels in arrays(*names)]
    got = _contract.contract(operands, out, dtype=jnp.float32, precision="highest", meets=0)
    expected = functools.reduce(np.matmul, [np.asarray(a, np.float64) for a, _ in operands])
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_many_factors_are_not_multiplied_into_the_weight():
    # With one row the delta would be cheap. Scales of both sides, and matrices in between.
    one = B._replace(size=1)
    inner = [Label(10 + k, 2) for k in range(8)]
    names = [(one, I), (I,), (I,), (I, inner[0]), *itertools.pairwise(inner), (inner[-1], O), (O,)]
    made = [aval.shape for _, aval in shapes_made(arrays(*names), (one, O), meets=0)]
    assert len(names) > _order.MOST_ORDERED
    assert (I.size, O.size) not in made and (O.size, I.size) not in made


def test_equal_terms_share_one_search():
    names, out = chain(5)
    _order.pairwise_order(tuple(names), out, 0)
    searches = _order._ordered.cache_info().misses
    moved = [tuple(label._replace(id=label.id + 7) for label in pair) for pair in names]
    _order.pairwise_order(tuple(moved), (moved[0][0], moved[-1][-1]), 0)
    assert _order._ordered.cache_info().misses == searches


def test_result_is_not_transposed():
    for out in ((B, O), (O, B)):
        names = [name for name, _ in shapes_made(arrays((B, I), (I, R), (R, O)), out, meets=0)]
        assert "transpose" not in names


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_products_have_the_requested_dtype(dtype):
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


# The form: adjacent axes are joined where that is faster


def products(fn, *args):
    """The shapes of the results of a function's products, in nested bodies too."""

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
    # x keeps its axes: otherwise the backward pass would keep it in both forms.
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
    # Rows of an embedding, or the result of a convolution: no other equation uses them.
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
    """A model, its adapters, an argument, a mesh, and a sharding of the argument on it."""
    params = {"w": jnp.ones((6, 10))}
    adapters = init_lora(params, {"w": LoraSpec(2)}, jax.random.key(0))
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(kind, kind))
    x = jnp.ones((4, 8, 6))
    fn = lora(lambda p, x: jnp.sin(jnp.cos(x) @ p["w"]))
    return fn, adapters, x, mesh, NamedSharding(mesh, P("d", "m"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "wrap", [lambda fn: fn, jax.jit, jax.checkpoint], ids=["bare", "jit", "checkpoint"]
)
def test_no_axes_are_joined_on_a_mesh(kind, wrap):
    fn, adapters, x, mesh, sharding = adapted(kind)
    joined = [(4, 8, 10), (4, 8, 2), (32, 10)]
    separate = [(4, 8, 10), (4, 8, 2), (4, 8, 10)]
    # Off the mesh once more at the end: no cache returns the other form.
    assert products(wrap(fn), adapters, x) == joined
    on_mesh = jax.device_put(x, sharding)
    with jax.set_mesh(mesh):
        placed = jax.device_put(adapters, NamedSharding(mesh, P()))
        assert products(wrap(fn), placed, on_mesh) == separate
        if kind == AxisType.Auto:
            # `in_shardings` may place the argument later.
            assert products(wrap(fn), adapters, x) == separate
    if kind == AxisType.Auto:
        assert products(wrap(fn), adapters, on_mesh) == separate
    assert products(wrap(fn), adapters, x) == joined


def test_no_axes_are_joined_for_shapes_on_a_mesh():
    # As when compiling ahead of time for devices that this host does not have.
    fn, adapters, x, _, sharding = adapted(AxisType.Auto)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    text = jax.jit(fn).lower(adapters, shape).as_text()
    assert "tensor<32x10xf32>" not in text
    assert "tensor<32x10xf32>" in jax.jit(fn).lower(adapters, x).as_text()


def test_no_axes_are_joined_on_a_mesh_of_one_device():
    fn, adapters, x, _, _ = adapted(AxisType.Auto)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    assert (32, 10) not in products(fn, adapters, jax.device_put(x, NamedSharding(mesh, P("d"))))


def test_gradient_of_b_contracts_one_axis():
    fn, (frozen, tunable), x, _, _ = adapted(AxisType.Auto)
    loss = lambda tunable: fn((frozen, tunable), x).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(tunable).as_text()
    wide = [line for line in text.splitlines() if "dot_general" in line and "4x8x10xf32" in line]
    assert not any("contracting_dims = [0, 1] x [0, 1]" in line for line in wide), wide


def test_axes_of_an_intermediate_are_joined():
    # As for the blocks of MiSS: the factor is multiplied by an array that no other equation uses.
    fn, operands = contraction([(B, T, K, R), (R, O)], (B, T, O))
    assert products(fn, *operands) == [sizes([B, T], O)]


def test_result_is_transposed_by_whole_rows():
    # As for the blocks of GraLoRA, whose axis is between those of the examples and the outputs.
    fn, operands = contraction([(B, E, I), (E, I, R), (E, R, O)], (B, E, O))
    assert products(fn, *operands)[-1] == sizes(E, B, O)


GAINS = {
    "with a delta, on one CPU": (DoraSpec(LoraSpec(2)), True, (0,)),
    "with a delta": (DoraSpec(LoraSpec(2)), False, (0, 1)),
    "gain only, on one CPU": (IA3Spec(), True, (0, 1)),
    "gain only": (IA3Spec(), False, (0, 1)),
}


@pytest.mark.parametrize("row", GAINS)
def test_gradient_of_a_gain_sums_over_one_axis_of_examples(row, monkeypatch):
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


def test_gain_costs_the_same_as_a_hand_written_gain():
    params, x = {"w": jnp.ones((64, 48))}, jnp.ones((4, 32, 64))
    frozen, tunable = init_lora(params, {"w": IA3Spec()}, jax.random.key(0))
    fn = lora(lambda p, x: x @ p["w"])
    adapted_fn = lambda tunable, x: jnp.sin(fn((frozen, tunable), x)).sum()  # noqa: E731
    hand_written = lambda gain, x: jnp.sin((x @ params["w"]) * gain[None, None]).sum()  # noqa: E731

    def costs(loss, trained):
        compiled: Any = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(trained, x).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert costs(adapted_fn, tunable) == costs(hand_written, tunable["w"].gain)


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
def test_products_without_free_labels_on_one_side_are_elementwise(row):
    operands, out, primitives = ELEMENTWISE[row]
    names = [name for name, _ in shapes_made(arrays(*operands), out)]
    layout = {"reshape", "broadcast_in_dim", "expand_dims", "pjit", "jit"}
    assert [name for name in names if name not in layout] == primitives


def test_rows_by_rows_in_half_precision_are_summed_in_a_dot_product():
    names = [name for name, _ in shapes_made(arrays((R, O), (R, O), dtype=jnp.bfloat16), (O,),
             dtype=jnp.bfloat16)]  # fmt: skip
    assert names == ["dot_general"]


def test_operand_summed_over_its_first_axis_is_on_the_right():
    # As W [in, out] in the norm of DoRA: aᵀ W reads W as it is stored, and Wᵀ a would transpose it.
    made = shapes_made(arrays((I, O), (I, R), (R, O)), (O,), meets=0)
    assert [aval.shape for name, aval in made if name == "dot_general"] == [(R.size, O.size)]


def test_vmap_over_directions_and_adapters():
    # vmap adds an axis for the directions, and one for the adapters, to the joined axes.
    fn, (frozen, tunable), x, _, _ = adapted(AxisType.Auto)
    tunable = jax.tree.map(lambda leaf: leaf + 0.1, tunable)
    merged_fn = lambda t, x: jnp.sin(jnp.cos(x) @ (frozen["w"] + t["w"].a @ t["w"].b))  # noqa: E731
    adapted_fn = lambda t, x: fn((frozen, t), x)  # noqa: E731
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), tunable)

    def hessian_products(f):
        gradient = jax.grad(lambda t: (f(t, x) ** 2).sum())
        return lambda ts: jax.vmap(lambda t: jax.jvp(gradient, (tunable,), (t,)))(ts)

    def per_example(f):
        gradient = jax.grad(lambda t, x: (f(t, x[None]) ** 2).sum())
        return lambda ts: jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(ts, x)

    for transform in (hessian_products, per_example):
        got, expected = transform(adapted_fn)(several), transform(merged_fn)(several)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        assert all(np.allclose(actual, wanted, rtol=1e-3, atol=1e-3) for actual, wanted in pairs)
