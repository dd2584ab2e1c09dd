"""The one place that emits products with factors: their order, form and dtype."""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import _contract
from lorax._terms import Label

B, I, O, R, S, E = (Label(k, size) for k, size in enumerate((19, 11, 7, 2, 3, 5)))  # noqa: E741


def arrays(*labels, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(labels))
    return [
        (jax.random.normal(key, [label.size for label in names]).astype(dtype), names)
        for key, names in zip(keys, labels, strict=True)
    ]


def einsum(operands, out):
    letters = {label: chr(97 + label.id) for label in (B, I, O, R, S, E)}
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


def test_products_stand_under_a_scope_of_their_own():
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
    "operand, out, expected",
    [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float16, jnp.float16, jnp.float16),
        (jnp.int8, jnp.float32, jnp.float32),
        (jnp.int8, jnp.int32, jnp.float32),
        (jnp.float8_e4m3fn, jnp.bfloat16, jnp.bfloat16),
        (jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float32),
        (jnp.complex64, jnp.complex64, jnp.complex64),
    ],
    ids=str,
)
def test_product_dtype(operand, out, expected):
    assert _contract.product_dtype(operand, out) == expected


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
