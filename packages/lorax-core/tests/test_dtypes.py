"""Products with factors use the dtype of their equation, for every pair of operand dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    DeloraSpec,
    DoraSpec,
    IA3Spec,
    LoraSpec,
    OftSpec,
    _compared,
    init_lora,
    lora,
    merge_params,
    testing,
)

# The derivative of a complex product in its real operand is real. JAX warns of that in plain models
# too: in `dot_general` up to 0.8, and in `ragged_dot_general` up to 0.12.
pytestmark = pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128]
FLOAT8 = jnp.float8_e4m3fn


@pytest.fixture(autouse=True)
def x64():
    """With 64 bits, so that float32 is not the widest dtype."""
    with jax.enable_x64(True):
        yield


def joint(*dtypes):
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def promoted(*arrays):
    """The arrays in their joint dtype, for equations that require equal dtypes."""
    dtype = joint(*(array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]


def dot(x, w, *, left=False):
    operands = (w.T, x.T) if left else (x, w)
    result_dtype = joint(x.dtype, w.dtype)
    return lax.dot_general(*operands, (((1,), (0,)), ((), ())), preferred_element_type=result_dtype)


def ragged(x, w):
    stack = jnp.stack([w, w[::-1]])
    sizes = jnp.array([1, 2], jnp.int32)
    return lax.ragged_dot(x, stack, sizes, preferred_element_type=joint(x.dtype, w.dtype))


def convolution(x, w):
    x, w = promoted(x[None], w.reshape(11, 1, 7).transpose(1, 0, 2))
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def rows(x, w):
    x, picked = promoted(x[:, :7], w[jnp.array([4, 0, 10])])
    return x * picked


def scaled(x, w):
    gain, w = promoted(x[0, :7], w)
    return jnp.ones((2, 11), w.dtype) @ (w * gain[None])


def divided(x, w):
    gain, w = promoted(x[0, :7], w)
    return jnp.ones((2, 11), w.dtype) @ (w / (gain + 2)[None])


def scaled_by_a_number(x, w):
    number, w = promoted(x[0, 0], w)
    return jnp.ones((2, 11), w.dtype) @ (w * number)


ROWS = {
    "dot": dot,
    "dot-left": lambda x, w: dot(x, w, left=True),
    "ragged-dot": ragged,
    "convolution": convolution,
    "rows": rows,
    "scaled": scaled,
    "divided": divided,
    "scaled-by-a-number": scaled_by_a_number,
}


def draw(seed, shape, dtype):
    """Numbers that float8 and int8 can represent; complex ones for a complex dtype."""
    numbers = np.random.default_rng(seed).integers(-4, 5, (2, *shape))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray((numbers[0] + 1j * numbers[1]) / 4, dtype)
    return jnp.asarray(numbers[0] / (1 if jnp.issubdtype(dtype, jnp.integer) else 4)).astype(dtype)


def rounding(dtype):
    """The tolerance for a merged weight of this dtype, as in `testing.check`."""
    info = jnp.finfo(dtype)
    return float(info.eps) * (100 if info.bits >= 32 else 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("row", ROWS)
def test_operands_of_every_dtype(row, dtype):
    params = {"w": draw(0, (11, 7), dtype)}
    operands = [draw(k, (3, 11), other) for k, other in enumerate([*DTYPES, jnp.int8], 1)]
    testing.check(
        lambda p, xs: [ROWS[row](x, p["w"]) for x in xs],
        params,
        {"w": 2},
        operands,
        transforms=False,
        tolerance=rounding(dtype),
    )


@pytest.mark.parametrize("first", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("second", [jnp.bfloat16, jnp.float32, jnp.complex64],
                         ids=lambda dtype: dtype.__name__)  # fmt: skip
def test_product_of_weights(first, second):
    coarser = max(rounding(first), rounding(second))

    def model(p, x):
        return dot(x, dot(p["w"], p["v"]))

    params = {"w": draw(0, (11, 7), first), "v": draw(1, (7, 13), second)}
    x = draw(2, (3, 11), jnp.float32)
    testing.check(model, params, {"w": 2, "v": 3}, x, transforms=False, tolerance=coarser)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64],
                         ids=lambda dtype: dtype.__name__)  # fmt: skip
def test_8_bit_operand(dtype):
    # JAX does not promote 8-bit floats with others, so the equation names its dtype.
    def model(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=dtype)

    params, x = {"w": draw(0, (11, 7), dtype)}, draw(1, (3, 11), FLOAT8)
    testing.check(model, params, {"w": 2}, x, transforms=False, tolerance=rounding(dtype))


@pytest.mark.parametrize("looked_up", [False, True], ids=["product", "lookup"])
def test_an_8_bit_base_is_cast_before_the_delta_is_added(looked_up):
    base, x = draw(0, (11, 7), FLOAT8), draw(1, (3, 11), jnp.float32)
    ids = jnp.array([4, 0, 10])

    def model(w, x):
        w = w[ids] if looked_up else w
        w = w.astype(jnp.float32) * jnp.float32(0.5)
        return w if looked_up else x @ w

    frozen, tunable = init_lora({"w": base}, {"w": 2}, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    adapted = lora(lambda p, x: model(p["w"], x), on_materialize="error")
    merged = base.astype(jnp.float32) + tunable["w"].a @ tunable["w"].b
    assert np.allclose(adapted((frozen, tunable), x), model(merged, x), rtol=1e-5, atol=1e-5)


def test_integer_result_materializes_the_weight():
    # Products with factors would each be rounded, and the merged model rounds once.
    params, x = {"w": draw(0, (11, 7), jnp.float32)}, draw(1, (3, 11), jnp.float32)
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))

    def model(p, x):
        numbers = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], numbers, preferred_element_type=jnp.int32)

    with pytest.warns(UserWarning, match="`dot_general`.*computes in int32, which cannot hold"):
        got = lora(model)((frozen, tunable), x)
    assert (got == model(merge_params(frozen, tunable), x)).all()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_operands_are_not_copied_to_another_dtype(left):
    # The backward pass would keep the operand in both dtypes.
    params, x = {"w": draw(0, (11, 7), jnp.float32)}, draw(1, (3, 11), jnp.bfloat16)
    pair = init_lora(params, {"w": 2}, jax.random.key(0))
    jaxpr = jax.make_jaxpr(lora(lambda p, x: dot(x, p["w"], left=left)))(pair, x)
    copies = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type"]
    assert not [eqn for eqn in copies if eqn.outvars[0].aval.size == x.size]


def test_loss_of_check_depends_on_the_imaginary_part():
    grad = jax.grad(_compared.loss_of(lambda x: lax.complex(jnp.zeros_like(x), x), ()))
    assert (jnp.abs(grad(jnp.ones(5))) > 0.1).all()


def test_real_and_imaginary_parts_in_one_stack():
    def model(p, u):
        re, im = (p["B"][..., k].astype(jnp.complex128) for k in (0, 1))
        state = dot(u, re + np.complex128(1j) * im)
        return jnp.tanh(state.real) + state.imag

    params = {"B": draw(0, (11, 7, 2), jnp.float64)}
    spec = {"B": LoraSpec(2, in_axes=[0], out_axes=[1], shared_axes=[2])}
    u = draw(1, (3, 11), jnp.float64)
    testing.check(model, params, spec, u, transforms=False)
    frozen, tunable = init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    gradient = jax.grad(lambda t: (lora(model)((frozen, t), u) ** 2).sum())(tunable)
    assert (jnp.abs(gradient["B"].b).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize(
    "spec",
    [IA3Spec(), IA3Spec("in"), DeloraSpec(2), DoraSpec(LoraSpec(2)), OftSpec(3)],
    ids=["ia3", "ia3-in", "delora", "dora", "oft"],
)
def test_gain_of_a_complex_weight_on_a_real_operand(spec):
    params, u = {"w": draw(0, (6, 7), jnp.complex128)}, draw(1, (3, 6), jnp.float64)

    def model(p, u):
        state = dot(u, p["w"])
        return jnp.tanh(state.real) + state.imag

    testing.check(model, params, {"w": spec}, u, transforms=False)
