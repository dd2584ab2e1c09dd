"""Convolutions with an adapted kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    LoraSpec,
    MaterializeWarning,
    explain,
    infer_spec,
    init_lora,
    lora,
    merge_params,
    testing,
)
from lorax.rules import _windows, convolution

struct = jax.ShapeDtypeStruct
HWIO = {"w": (3, 2, 5, 7)}  # (height, width, in, out)
OIHW = {"w": (7, 5, 3, 2)}
NHWC = (2, 8, 9, 5)
NCHW = (2, 5, 8, 9)
FROM_OUT = LoraSpec(2, out_axes=[0])
# The window is with the outputs: the kernel of `a` is one pixel wide, that of `b` has the window.
WINDOW_LAST = LoraSpec(2, in_axes=[2])
# One axis of the window on each side: a separable kernel.
SEPARABLE = LoraSpec(2, in_axes=[0, 2])


def conv(layout=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding: Any = "SAME", **keywords):
    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], strides, padding, dimension_numbers=layout, **keywords
        )

    return fn


def one_d(*args, **keywords):
    return conv(("NWC", "WIO", "NWC"), *args, **keywords)


def stacked(one, data_axis: int | None = 0):
    """`vmap` over stacked kernels, and over data unless its axis is None."""
    return lambda p, x: jax.vmap(lambda w, x: one({"w": w}, x), (0, data_axis))(p["w"], x)


def modulated(layout=("NHWC", "HWIO", "NHWC"), demodulate=False, **keywords):
    """As in StyleGAN2: each example scales the inputs, and may divide each output by its norm."""
    others = [d for d, axis in enumerate(layout[1]) if axis != "O"]

    def one(w, x, s):
        w = w * s.reshape([s.size if axis == "I" else 1 for axis in layout[1]])
        if demodulate:
            w = w * lax.rsqrt(0.1 + (w**2).sum(others, keepdims=True))
        return conv(layout, **keywords)({"w": w}, x[None])[0]

    return lambda p, x, s: jax.vmap(one, (None, 0, 0))(p["w"], x, s)


STACK = {"w": (2, 3, 2, 5, 7)}
OF_STACK = LoraSpec(2, shared_axes=[0])

TIGHTER = {"tolerance": 0.05}

ROWS = [
    ("nhwc-hwio", conv(), HWIO, {"w": 2}, [NHWC]),
    ("nchw-oihw", conv(("NCHW", "OIHW", "NCHW")), OIHW, {"w": FROM_OUT}, [NCHW]),
    ("nhwc-to-nchw", conv(("NHWC", "HWIO", "NCHW")), HWIO, {"w": 2}, [NHWC]),
    ("nhwc-oihw", conv(("NHWC", "OIHW", "NHWC")), OIHW, {"w": FROM_OUT}, [NHWC]),
    ("odd-layouts", conv(("CWNH", "IWOH", "WHCN")), {"w": (5, 2, 7, 3)},
     {"w": LoraSpec(2, out_axes=[2])}, [(5, 9, 2, 8)]),
    ("batch-last-of-the-output", conv(("HWNC", "OHIW", "CHWN")), {"w": (7, 3, 5, 2)},
     {"w": FROM_OUT}, [(8, 9, 2, 5)]),
    ("one-d", one_d((1,)), {"w": (3, 5, 7)}, {"w": 2}, [(2, 11, 5)]),
    ("three-d", conv(("NDHWC", "DHWIO", "NDHWC"), (1, 1, 1)), {"w": (2, 3, 2, 5, 7)}, {"w": 2},
     [(1, 3, 4, 4, 5)]),
    ("no-window", conv(("NC", "IO", "NC"), (), ()), {"w": (5, 7)}, {"w": 2}, [(3, 5)]),
    ("one-by-one", conv(), {"w": (1, 1, 5, 7)}, {"w": 2}, [NHWC]),
    ("rank-one", conv(), HWIO, {"w": 1}, [NHWC]),
    ("rslora", conv(), HWIO, {"w": LoraSpec(3, alpha=5.0, scaling="rslora")}, [NHWC]),
    # The spatial axes of the kernel.
    ("window-last", conv(), HWIO, {"w": WINDOW_LAST}, [NHWC]),
    ("window-last-oihw", conv(("NCHW", "OIHW", "NCHW")), OIHW, {"w": LoraSpec(2, in_axes=[1])},
     [NCHW]),
    ("separable", conv(), HWIO, {"w": SEPARABLE}, [NHWC]),
    ("window-last-everything",
     conv(strides=(2, 3), padding=((2, 1), (0, 3)), rhs_dilation=(2, 1)), HWIO,
     {"w": WINDOW_LAST}, [NHWC]),
    ("separable-everything",
     conv(strides=(2, 3), padding=((2, 1), (0, 3)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)),
     HWIO, {"w": SEPARABLE}, [NHWC]),
    ("factors-for-each-pixel", conv(), HWIO, {"w": LoraSpec(2, shared_axes=[0, 1])}, [NHWC],
     {"materializes": True}),
    # Strides, padding, dilations.
    ("valid", conv(padding="VALID"), HWIO, {"w": 2}, [NHWC]),
    ("strides", conv(strides=(2, 3)), HWIO, {"w": 2}, [NHWC]),
    ("padding", conv(padding=((2, 0), (1, 3))), HWIO, {"w": 2}, [NHWC]),
    ("negative-padding", conv(padding=((-1, 2), (0, -2))), HWIO, {"w": 2}, [NHWC]),
    ("kernel-dilation", conv(rhs_dilation=(2, 3)), HWIO, {"w": 2}, [NHWC]),
    ("input-dilation", conv(padding=((1, 2), (2, 0)), lhs_dilation=(2, 3)), HWIO, {"w": 2},
     [NHWC]),
    ("everything",
     conv(strides=(3, 2), padding=((2, 1), (0, 3)), lhs_dilation=(2, 1), rhs_dilation=(1, 2)),
     HWIO, {"w": 2}, [NHWC]),
    ("causal", one_d((1,), ((4, 0),), rhs_dilation=(2,)), {"w": (3, 5, 7)}, {"w": 2},
     [(2, 11, 5)]),
    ("patches", conv(strides=(3, 2), padding="VALID"), HWIO, {"w": 2}, [(2, 9, 8, 5)]),
    # Transposed.
    ("transposed", lambda p, x: lax.conv_transpose(x, p["w"], (2, 3), "SAME"), HWIO, {"w": 2},
     [(2, 4, 4, 5)]),
    ("transposed-kernel",
     lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "VALID", transpose_kernel=True),
     {"w": (3, 2, 7, 5)}, {"w": LoraSpec(2, in_axes=[0, 1, 3])}, [(2, 4, 4, 5)]),
    ("transposed-one-d",
     lambda p, x: lax.conv_transpose(x, p["w"], (3,), ((2, 1),), rhs_dilation=(2,)),
     {"w": (3, 5, 7)}, {"w": 2}, [(2, 4, 5)]),
    ("flipped-kernel", lambda p, x: conv()({"w": jnp.flip(p["w"], (0, 1))}, x), HWIO, {"w": 2},
     [NHWC]),
    # Groups.
    ("groups", conv(feature_group_count=2), {"w": (3, 2, 5, 6)}, {"w": 2}, [(2, 8, 9, 10)]),
    ("groups-oihw", conv(("NCHW", "OIHW", "NCHW"), (2, 1), feature_group_count=3),
     {"w": (9, 2, 3, 5)}, {"w": FROM_OUT}, [(2, 6, 8, 7)]),
    ("groups-window-last", conv(feature_group_count=2), {"w": (3, 2, 5, 6)}, {"w": WINDOW_LAST},
     [(2, 8, 9, 10)]),
    ("groups-separable", conv(strides=(2, 1), feature_group_count=3), {"w": (3, 2, 5, 6)},
     {"w": SEPARABLE}, [(2, 8, 9, 15)]),
    ("groups-features-first", conv(("CNHW", "HWIO", "NHWC"), feature_group_count=2),
     {"w": (3, 2, 5, 6)}, {"w": LoraSpec(2, in_axes=[0, 1, 2])}, [(10, 2, 8, 9)]),
    ("groups-of-no-examples", conv(feature_group_count=2), {"w": (3, 2, 5, 6)}, {"w": 2},
     [(0, 8, 9, 10)]),
    ("depthwise", conv(feature_group_count=5), {"w": (3, 2, 1, 5)}, {"w": 2}, [NHWC]),
    ("depthwise-multiplied", conv(strides=(2, 2), feature_group_count=5), {"w": (3, 2, 1, 10)},
     {"w": 3}, [NHWC]),
    ("depthwise-outputs-with-the-inputs", conv(feature_group_count=5), {"w": (3, 2, 1, 5)},
     {"w": LoraSpec(2, in_axes=[2, 3])}, [NHWC]),
    ("depthwise-one-d-causal", one_d((1,), ((2, 0),), feature_group_count=5), {"w": (3, 1, 5)},
     {"w": 2}, [(2, 11, 5)]),
    ("batch-groups", conv(batch_group_count=2), {"w": (3, 2, 5, 6)}, {"w": 2}, [(4, 8, 9, 5)]),
    ("batch-groups-nchw", conv(("NCHW", "OIHW", "CNHW"), batch_group_count=3),
     {"w": (6, 5, 3, 2)}, {"w": FROM_OUT}, [(6, 5, 8, 9)]),
    ("batch-groups-window-last", conv(strides=(2, 1), batch_group_count=2),
     {"w": (3, 2, 5, 6)}, {"w": WINDOW_LAST}, [(4, 8, 9, 5)]),
    # Parameters of the equation, dtypes, and changes of the kernel before it.
    ("precision", conv(precision="highest"), HWIO, {"w": 2}, [NHWC]),
    ("precision-pair", conv(precision=("highest", "default")), HWIO, {"w": 2}, [NHWC]),
    ("preferred", conv(preferred_element_type=jnp.float32), HWIO, {"w": 2}, [NHWC]),
    ("bfloat16", conv(), {"w": struct((3, 2, 5, 7), jnp.bfloat16)}, {"w": 2},
     [struct(NHWC, jnp.bfloat16)], TIGHTER),
    ("bfloat16-groups", conv(feature_group_count=2), {"w": struct((3, 2, 5, 6), jnp.bfloat16)},
     {"w": 2}, [struct((2, 8, 9, 10), jnp.bfloat16)], TIGHTER),
    ("transposed-layout-in-the-model", lambda p, x: conv()({"w": p["w"].transpose(2, 3, 1, 0)}, x),
     OIHW, {"w": FROM_OUT}, [NHWC]),
    ("merged-in-the-model", lambda p, x: conv()({"w": p["w"].reshape(3, 2, 5, 7)}, x),
     {"w": (6, 5, 7)}, {"w": 2}, [NHWC]),
    ("two-layers", lambda p, x: conv()({"w": p["v"]}, jnp.tanh(conv()(p, x))),
     {"w": (3, 2, 5, 7), "v": (2, 3, 7, 4)}, {"w": 2, "v": 3}, [NHWC]),
    # Stacked kernels: vmap merges the stack into the outputs, and with data into the groups.
    ("stacked", stacked(conv()), STACK, {"w": OF_STACK}, [(2, 1, 4, 5, 5)]),
    ("stacked-nchw", stacked(conv(("NCHW", "OIHW", "NCHW"))), {"w": (2, 7, 5, 3, 2)},
     {"w": LoraSpec(2, out_axes=[1], shared_axes=[0])}, [(2, 1, 5, 4, 5)]),
    ("stacked-strides", stacked(conv(strides=(2, 3), padding="VALID")), STACK, {"w": OF_STACK},
     [(2, 1, 7, 8, 5)]),
    ("stacked-groups", stacked(conv(feature_group_count=3)), {"w": (2, 3, 2, 5, 9)},
     {"w": OF_STACK}, [(2, 1, 4, 5, 15)]),
    ("stacked-depthwise", stacked(conv(feature_group_count=5)), {"w": (2, 3, 2, 1, 5)},
     {"w": OF_STACK}, [(2, 1, 4, 5, 5)]),
    ("stacked-separable", stacked(conv(strides=(2, 1))), STACK,
     {"w": LoraSpec(2, in_axes=[1, 3], shared_axes=[0])}, [(2, 1, 4, 5, 5)]),
    ("stacked-twice", stacked(stacked(conv())), {"w": (2, 3, 3, 2, 5, 7)},
     {"w": LoraSpec(2, shared_axes=[0, 1])}, [(2, 3, 1, 4, 5, 5)]),
    ("stacked-not-shared", stacked(conv()), STACK, {"w": LoraSpec(2, in_axes=[1, 2, 3])},
     [(2, 1, 4, 5, 5)]),
    ("stacked-last", lambda p, x: jax.vmap(
        lambda w, x: conv()({"w": w}, x), (-1, 0))(p["w"], x), {"w": (3, 2, 5, 7, 2)},
     {"w": LoraSpec(2, in_axes=[0, 1, 2], shared_axes=[4])}, [(2, 1, 4, 5, 5)]),
    ("stacked-kernels-alone", stacked(conv(), None), STACK, {"w": OF_STACK}, [(1, 4, 5, 5)]),
    ("stacked-kernels-alone-nchw", stacked(conv(("NCHW", "OIHW", "NCHW"), (2, 1)), None),
     {"w": (2, 7, 5, 3, 2)}, {"w": LoraSpec(2, out_axes=[1], shared_axes=[0])}, [(1, 5, 4, 5)]),
    ("stacked-kernels-alone-groups", stacked(conv(feature_group_count=3), None),
     {"w": (2, 3, 2, 5, 9)}, {"w": OF_STACK}, [(1, 4, 5, 15)]),
    ("stacked-kernels-alone-window-last", stacked(conv(strides=(2, 1)), None), STACK,
     {"w": LoraSpec(2, in_axes=[3], shared_axes=[0])}, [(1, 4, 5, 5)]),
    ("stacked-batch-groups", stacked(conv(batch_group_count=2)), {"w": (2, 3, 2, 5, 6)},
     {"w": OF_STACK}, [(2, 4, 4, 5, 5)], {"materializes": True}),
    ("stacked-one-input-factor", stacked(conv()), STACK,
     {"w": LoraSpec(2, in_axes=[0, 1, 2, 3])}, [(2, 1, 4, 5, 5)]),
    # A gain for each example.
    ("modulated", modulated(), HWIO, {"w": 2}, [(4, 8, 9, 5), (4, 5)]),
    ("modulated-nchw", modulated(("NCHW", "OIHW", "NCHW")), OIHW, {"w": FROM_OUT},
     [(4, 5, 8, 9), (4, 5)]),
    ("modulated-strides", modulated(strides=(2, 3), padding="VALID"), HWIO, {"w": 2},
     [(4, 8, 9, 5), (4, 5)]),
    ("modulated-groups", modulated(feature_group_count=2), {"w": (3, 2, 5, 6)}, {"w": 2},
     [(4, 8, 9, 10), (4, 5)]),
    ("modulated-window-last", modulated(), HWIO, {"w": WINDOW_LAST}, [(4, 8, 9, 5), (4, 5)]),
    ("demodulated", modulated(demodulate=True), HWIO, {"w": 2}, [(4, 8, 9, 5), (4, 5)]),
    ("gain-of-outputs-for-each-example",
     lambda p, x, s: jax.vmap(lambda x, s: conv()({"w": p["w"] * s}, x[None])[0])(x, s), HWIO,
     {"w": 2}, [(4, 8, 9, 5), (4, 1, 1, 1, 7)]),
    ("gain-for-each-channel", lambda p, x, s: conv()({"w": p["w"] * s[..., None]}, x), HWIO,
     {"w": 2}, [NHWC, (1, 1, 5)]),
    ("gain-for-each-example-as-large-as-the-kernel",
     lambda p, x, s: jax.vmap(lambda x, s: conv()({"w": p["w"] * s}, x[None])[0])(x, s), HWIO,
     {"w": 2}, [(4, 8, 9, 5), (4, 3, 2, 5, 7)], {"materializes": True}),
    ("kernel-from-the-input", lambda p, x: lax.conv_general_dilated(
        p["w"][None], x, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
     {"w": (8, 9, 5)}, {"w": 2}, [(3, 2, 5, 7)], {"materializes": True}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_convolution(check_row, row):
    check_row(*row)


# Rows whose groups become examples on one CPU, where one kernel of `a` serves all groups.
GROUPED = [
    row
    for row in ROWS
    if row[0].startswith(("groups", "depthwise", "bfloat16-groups"))
    and row[0] not in ("groups-window-last", "groups-separable")
]


@pytest.mark.parametrize("row", GROUPED, ids=lambda row: row[0])
def test_groups_on_other_platforms(check_row, row, monkeypatch):
    monkeypatch.setattr(convolution, "is_for_one_cpu", lambda _: False)
    check_row(*row)


@pytest.mark.parametrize("layout", ["NHWC", "HWCN", "CNHW"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "elsewhere"])
def test_groups_are_examples_on_one_cpu(layout, on_cpu, monkeypatch):
    monkeypatch.setattr(convolution, "is_for_one_cpu", lambda _: on_cpu)
    sizes = {"N": 2, "H": 8, "W": 9, "C": 10}
    shape = [sizes[axis] for axis in layout]
    fn = conv((layout, "HWIO", "NHWC"), feature_group_count=5)
    spec = {"w": LoraSpec(3, in_axes=[0, 1, 2])}
    frozen, tunable = init_lora({"w": jnp.ones((3, 2, 2, 15))}, spec, jax.random.key(0))
    jaxpr = jax.make_jaxpr(lora(fn))((frozen, tunable), jnp.ones(shape))
    convolutions = [
        (eqn.params["feature_group_count"], eqn.outvars[0].aval.shape)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    delta = (1, (10, 8, 9, 3)) if on_cpu else (5, (2, 8, 9, 15))
    assert sorted(convolutions) == sorted([(5, (2, 8, 9, 15)), delta])


@pytest.mark.parametrize("spec", [WINDOW_LAST, SEPARABLE], ids=["last", "separable"])
def test_groups_are_kept_where_the_kernel_of_b_has_a_window(spec):
    fn = conv(feature_group_count=2)
    frozen, tunable = init_lora({"w": jnp.ones((3, 2, 5, 6))}, {"w": spec}, jax.random.key(0))
    jaxpr = jax.make_jaxpr(lora(fn))((frozen, tunable), jnp.ones((2, 8, 9, 10)))
    groups = [
        (eqn.params["feature_group_count"], eqn.params["batch_group_count"])
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert groups == [(2, 1)] * 3


@pytest.mark.parametrize("groups, outputs", [(1, 7), (3, 6), (5, 5)], ids=str)
def test_infer_spec_finds_the_stack_of_kernels(groups, outputs):
    params = {"w": struct((2, 3, 2, 15 // groups, outputs), jnp.float32)}
    fn = stacked(conv(feature_group_count=groups))
    spec = infer_spec(fn, params, struct((2, 1, 4, 5, 15), jnp.float32), rank=2)
    assert spec["w"] == LoraSpec(2, in_axes=(1, 2, 3), out_axes=(4,), shared_axes=(0,))


def test_preferred_element_type():
    # Only values: JAX 0.8 has no gradient where the preferred type differs from the operands'.
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2, 5, 7)).astype(jnp.bfloat16)}
    x = jax.random.normal(jax.random.key(1), NHWC).astype(jnp.bfloat16)
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(2))
    tunable = testing.random_factors(tunable, jax.random.key(3))
    fn = conv(preferred_element_type=jnp.float32)
    got = lora(fn, on_materialize="error")((frozen, tunable), x)
    expected = fn(merge_params(frozen, tunable), x)
    assert got.dtype == expected.dtype == jnp.float32
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_convolution_of_two_weights_keeps_the_kernel_factored():
    """A learned input, as of a generator's first layer, is materialized instead."""

    def fn(p, x):
        grid = conv()({"w": p["kernel"]}, p["grid"][None])
        return (grid * x).sum((1, 2))

    key = iter(jax.random.split(jax.random.key(0), 3))
    params = {"grid": jax.random.normal(next(key), (4, 6, 5))}
    params["kernel"] = jax.random.normal(next(key), (3, 2, 5, 7))
    spec = {"grid": 2, "kernel": 2}
    x = jax.random.normal(next(key), (2, 1, 1, 7))
    testing.check(fn, params, spec, x, materializes=True)
    pair = init_lora(params, spec, jax.random.key(1))
    status = {row.path: row.status for row in explain(fn, pair, x).rows}
    assert status == {"grid": "materialized", "kernel": "covered"}
    with pytest.warns(MaterializeWarning, match="takes it as the input") as warnings:
        lora(fn)(pair, x)
    assert len(warnings) == 1


def test_pad_first_equals_padding_in_the_convolution():
    # This is done where "SAME" depends on a symbolic size.
    x, kernel = jnp.arange(44.0).reshape(2, 11, 2), jnp.arange(30.0).reshape(3, 2, 5)
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NWC", "WIO", "NWC"))
    window = _windows.Window(stride=2, padding=(4, -1), lhs_dilation=3, rhs_dilation=2)

    def convolve(x, window):
        stride, padding, lhs_dilation, rhs_dilation = ([value] for value in window)
        return lax.conv_general_dilated(
            x, kernel, stride, padding, lhs_dilation, rhs_dilation, numbers
        )

    padded, (rest,) = _windows._pad_first(x, numbers.lhs_spec, [window])
    assert np.allclose(convolve(padded, rest), convolve(x, window))
