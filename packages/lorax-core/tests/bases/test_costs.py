"""Compiled programs on a quantized base: no stack of floats, and no added work but decoding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lorax import NF4, Int8, LoraSpec, init_lora, lora, quantize
from lorax.testing import random_factors

# Large enough for products to dominate decoding.
LAYERS, WIDTH, TOKENS = 16, 128, 256


@pytest.fixture(autouse=True)
def optimized():
    """Other tests compile without most of the optimizations that are checked here."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def unrolled(params, x):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]


def rematerialized(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params)[0]


def programs(function, format, tokens=TOKENS):
    """The gradient of the factors on codes, and on floats, compiled."""
    stacked = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    params = list(stacked) if function is unrolled else stacked
    spec = [2] * LAYERS if function is unrolled else LoraSpec(2, shared_axes=[0])
    x = jnp.ones((tokens, WIDTH))
    coded = quantize(params, format, fn=function, args=(x,))
    _, tunable = init_lora(params, spec, jax.random.key(1))
    tunable = random_factors(tunable, jax.random.key(2))

    def loss(tunable, frozen, x):
        return jnp.mean(lora(function)((frozen, tunable), x) ** 2)

    compiled: list[Any] = []
    for frozen in (coded, params):
        compiled.append(jax.jit(jax.grad(loss)).lower(tunable, frozen, x).compile())
    return compiled


FULL_PRODUCT = pytest.mark.full_product


@pytest.mark.parametrize(
    ("function", "format"),
    [
        (scanned, NF4(64)),
        pytest.param(scanned, Int8(), marks=FULL_PRODUCT),
        *(
            pytest.param(function, format, marks=FULL_PRODUCT)
            for function in (unrolled, rematerialized)
            for format in (NF4(64), Int8())
        ),
    ],
)
def test_no_stack_of_floats_and_few_more_flops(function, format):
    on_codes, on_floats = programs(function, format)
    flops = [compiled.cost_analysis()["flops"] for compiled in (on_codes, on_floats)]
    # XLA counts the body of a loop once; decoding is as large a share of it as of the whole loop.
    assert flops[0] <= 1.03 * flops[1], flops
    text = on_codes.as_text()
    stack = rf"{LAYERS},(?:{WIDTH}|{WIDTH // 64},64),{WIDTH}\]"
    made = [line for line in text.splitlines() if re.search(rf" = f\d+\[{stack}", line)]
    assert not made, made
    copies = [
        line
        for line in text.splitlines()
        if re.search(rf" = (?:u4|s8)\[{stack}\S* (?:copy|transpose|fusion)\(", line)
    ]
    assert not copies, copies


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="an older XLA drops barriers of `jax.checkpoint` on a CPU and keeps decoded weights",
)
@pytest.mark.parametrize("format", [NF4(64), Int8()], ids=str)
def test_one_weight_is_decoded_at_a_time(format):
    compiled, _ = programs(unrolled, format, tokens=8)
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp <= 2.5 * 4 * WIDTH * WIDTH, temp / (4 * WIDTH * WIDTH)
