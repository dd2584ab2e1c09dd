"""`explain`: statuses, costs, kept bytes, and how the report is shown."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lorax import LORA_FULL, NF4, Int8, LoraSpec, explain, init_lora, lora, quantize
from lorax._base import bytes_of

PARAMS = {
    "used": jnp.ones((50, 70)),
    "nonlinear": jnp.ones((50, 70)),
    "typo": jnp.ones((50, 70)),
    "bias": jnp.ones(70),
}


def model(params, x):
    return (
        x @ params["used"]
        + x @ jnp.sin(params["nonlinear"])
        + x @ params["used"]
        + params["bias"][None]
    )


def explained():
    spec = {"used": 2, "nonlinear": 3, "typo": 4, "bias": LORA_FULL}
    pair = init_lora(PARAMS, spec, jax.random.key(0))
    return explain(model, pair, jnp.ones((5, 50)))


def test_rows_have_status_uses_and_counts():
    rows = {row.path: row for row in explained().rows}
    assert {path: row.status for path, row in rows.items()} == {
        "used": "covered",
        "nonlinear": "materialized",
        "typo": "never used",
        "bias": "full",
    }
    assert rows["used"].uses == ("dot_general ×2",) and rows["nonlinear"].uses == ("sin",)
    assert rows["nonlinear"].rank == 3 and rows["bias"].rank is None
    assert rows["used"].trainable == 2 * (50 + 70) and rows["bias"].trainable == 70


def test_totals_and_costs():
    report = explained()
    assert report.trainable == 120 * 9 + 70
    assert report.total == 3 * 50 * 70 + 70
    products = 2 * 5 * 50 * 70
    assert report.base.flops is not None and report.adapted.flops is not None
    assert 3 * products <= report.base.flops < 3.2 * products
    # Products with factors of rank 2 for two uses of `used`; the delta of `nonlinear`.
    added = 2 * (2 * 5 * 2 * 120) + 2 * 50 * 3 * 70
    assert added <= report.adapted.flops - report.base.flops < 1.6 * added


def test_str_is_a_table():
    text = str(explained())
    assert "parameter" in text.splitlines()[0]
    line = next(line for line in text.splitlines() if line.startswith("used"))
    assert line.split() == ["used", "50×70", "2", "240", "covered", "dot_general", "×2"]
    assert "1,150 of 10,570 parameters are trained (10.88 %)." in text
    assert " × the base model's" in text


def test_repr_html_is_a_table():
    page = explained()._repr_html_()
    assert page.count("<tr>") == 5 and "<td>never used</td>" in page


def test_the_function_does_not_run():
    ran = []

    def noisy(params, x):
        jax.debug.callback(lambda: ran.append(1))
        return x @ params

    explain(noisy, init_lora(jnp.ones((5, 7)), 2, jax.random.key(0)), jnp.ones((3, 5)))
    jax.effects_barrier()
    assert not ran


def test_takes_shapes():
    shapes = jax.eval_shape(
        lambda: init_lora(
            PARAMS, {"used": 2, "nonlinear": 0, "typo": 0, "bias": 0}, jax.random.key(0)
        )
    )
    report = explain(model, shapes, jax.ShapeDtypeStruct((5, 50), jnp.float32))
    assert [row.path for row in report.rows] == ["used"]


def test_a_product_in_a_branch_counts_once():
    # The branches return weights of different structure, so each is traced twice.
    def fn(params, x):
        product, w = jax.lax.cond(
            x.sum() > 0,
            lambda: (x @ params["used"], params["used"]),
            lambda: (x @ params["used"], params["nonlinear"]),
        )
        return product + x @ w

    pair = init_lora(PARAMS, {"used": 2, "nonlinear": 3, "typo": 0, "bias": 0}, jax.random.key(0))
    rows = {row.path: row.uses for row in explain(fn, pair, jnp.ones((5, 50))).rows}
    assert rows == {"used": ("dot_general ×2", "cond"), "nonlinear": ("cond",)}


def layer(x, weights):
    up, down = weights
    return x + jnp.tanh(x @ up) @ down, None


def stacked(params, x, layer=layer):
    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0]


def rematerialized(params, x):
    return stacked(params, x, jax.checkpoint(layer))


LAYERS = {"up": jnp.ones((3, 64, 96)) / 64, "down": jnp.ones((3, 96, 64)) / 96}
SPEC = dict.fromkeys(LAYERS, LoraSpec(2, shared_axes=[0]))
TOKENS = jnp.ones((40, 64))


@pytest.mark.parametrize("format", [None, Int8(), NF4(32)], ids=str)
@pytest.mark.parametrize("function", [stacked, rematerialized])
def test_kept_bytes_match_a_compiled_forward_pass(function, format):
    frozen, tunable = init_lora(LAYERS, SPEC, jax.random.key(0))
    frozen = quantize(frozen, format, fn=function, args=(TOKENS,)) if format else frozen

    def forward(frozen, tunable, x):
        return jax.vjp(lambda t: lora(function)((frozen, t), x), tunable)

    compiled = jax.jit(forward).lower(frozen, tunable, TOKENS).compile()
    memory: Any = compiled.memory_analysis()
    returned = memory.output_size_in_bytes
    # Not kept for the backward pass: the result, copies of arguments (a program cannot return an
    # argument itself), and a pointer to each.
    _, pullback = jax.eval_shape(forward, frozen, tunable, TOKENS)
    arguments = [(x.shape, x.dtype) for x in jax.tree.leaves((frozen, tunable, TOKENS))]
    residuals = jax.tree.leaves(pullback)
    copies = sum(bytes_of(x) for x in residuals if (x.shape, x.dtype) in arguments)
    expected = returned - TOKENS.nbytes - copies - 8 * (1 + len(residuals))
    kept = explain(function, (frozen, tunable), TOKENS).kept_bytes
    assert kept is not None and abs(kept - expected) <= 0.05 * expected, (kept, expected)


def test_function_without_a_backward_pass():
    def model(params, x):
        body = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["w"]))  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    pair = init_lora({"w": jnp.ones((5, 5))}, {"w": 1}, jax.random.key(0))
    report = explain(model, pair, jnp.ones((2, 5)))
    assert report.kept_bytes is None and "while" in report.no_derivative
    assert "The function has no backward pass: " in str(report)


def test_nothing_trained_keeps_nothing():
    report = explain(model, (PARAMS, dict.fromkeys(PARAMS)), jnp.ones((5, 50)))
    assert report.kept_bytes == 0
