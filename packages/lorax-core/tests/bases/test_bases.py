"""Every format of a quantized base in every way that a model uses a weight.

A new format is one row of `FORMATS`, and is tested with `USES`. The reference is the same function
on the dequantized base.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import FP8, MXFP4, NF4, Axes, Int4, Int8, LoraSpec, dequantize, init_lora, lora, quantize
from lorax.bases import (
    FORMATS as REGISTERED,
    NVFP4,
    Affine,
    Format,
    LLMInt8,
    defformat,
)
from lorax.testing import random_factors


@defformat
class HalfSteps(Format):
    """A user's format: each entry is a multiple of half the largest entry of its column."""

    name = "half-steps"
    along: tuple[int, ...] | None = None

    def dtypes(self):
        return (jnp.int8,)

    def encode(self, entries, within, across):
        scale = jnp.max(jnp.abs(entries), within, keepdims=True)
        return {"codes": jnp.round(2 * entries / scale).astype(jnp.int8), "scales": scale}

    def decode(self, arrays: Mapping[str, jax.Array]):
        return arrays["codes"].astype(arrays["scales"].dtype) / 2 * arrays["scales"]


del REGISTERED["half-steps"]  # registered only while a test runs


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGISTERED, "half-steps", HalfSteps)


FORMATS = {
    "int8": Int8(),
    "int8-blocks": Int8(16),
    "int8-asymmetric": Int8(16, symmetric=False),
    "int4": Int4(16),
    "int4-asymmetric": Int4(32, symmetric=False),
    "nf4": NF4(32),
    "nf4-single": NF4(64, double=False),
    "e4m3": FP8(),
    "e5m2": FP8("e5m2"),
    "fp8-squares": FP8(block=2, square=True),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "affine": Affine(),
    "affine-groups": Affine(16, group=2),
    "affine-8-bits": Affine(16, group=2, bits=8, minimum=False),
    "llm-int8": LLMInt8(),
    "user-defined": HalfSteps(),
}


def conv(p, x, **keywords):
    return lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **keywords
    )


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def rematerialized(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]


def scanned_after_moves(p, x):
    return scanned({"w": p["w"].reshape(3, 64, 64).transpose(0, 2, 1)}, x)


def scanned_after_cast(p, x):
    return scanned({"w": p["w"].astype(jnp.float32).astype(jnp.float64)}, x)


def in_a_branch(p, x):
    return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ (2 * w), p["w"])


def looped(p, x):
    return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)


def split(p, x):
    return jnp.concatenate([jnp.tanh(x @ w) for w in jnp.split(p["w"], 2, 1)][::-1], 1)


def split_within_blocks(p, x):
    return sum(jnp.tanh(x[:, :16] @ w) for w in jnp.split(p["w"], 4, 0))


def normalized(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


@jax.custom_vjp
def clipped(w):
    return jnp.clip(w, -0.2, 0.2)


clipped.defvjp(lambda w: (clipped(w), None), lambda _, g: (jnp.clip(g, -1, 1),))


class Use(NamedTuple):
    """A function, its weight, and what is expected of it.

    moves: it only moves entries. adapted: the weight can have an adapter. kept: the function makes
    an array as large as the weight, so one may be kept for the backward pass.
    """

    function: Callable[..., Any]
    shape: tuple[int, ...]
    axes: Axes
    args: list[Any]
    moves: bool = False
    adapted: bool = True
    kept: bool = False


KERNEL, STACK, TABLE = Axes((), (0,), (1,)), Axes((0,), (1,), (2,)), Axes((), (1,), (0,))
DENSE = ((64, 10), KERNEL, [(3, 64)])
IDS = np.array([3, 1, 0, 8])
USES = {
    "right": Use(lambda p, x: x @ p["w"], *DENSE),
    "left": Use(lambda p, x: p["w"] @ x, (10, 64), Axes((), (1,), (0,)), [(64, 3)]),
    "heads": Use(
        lambda p, x: jnp.einsum("bk,hdk->bhd", x, p["w"]),
        (4, 6, 64), Axes((), (2,), (0, 1)), [(3, 64)],
    ),
    "merged-heads": Use(
        lambda p, x: jnp.einsum("bhd,hdk->bk", x, p["w"]),
        (5, 64, 8), Axes((), (0, 1), (2,)), [(3, 5, 64)],
    ),
    "reshaped": Use(
        lambda p, x: x @ p["w"].reshape(64, 8), (64, 4, 2), Axes((), (0,), (1, 2)), [(3, 64)]
    ),
    "reshaped-within-blocks": Use(
        lambda p, x: x @ p["w"].reshape(16, 4, 10)[:, 1], *DENSE[:2], [(3, 16)]
    ),
    "transposed": Use(lambda p, x: x @ p["w"].T, (10, 64), Axes((), (1,), (0,)), [(3, 64)]),
    "batched": Use(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (3, 64, 10), STACK, [(3, 2, 64)]
    ),
    "one-expert": Use(lambda p, x, i: x @ p["w"][i], (3, 64, 10), STACK, [(2, 64), np.int32(2)]),
    "expert-for-each-example": Use(
        lambda p, x, i: jnp.einsum("bi,bio->bo", x, p["w"][i]),
        (5, 64, 10), STACK, [(2, 64), np.array([2, 0])],
    ),
    "ragged": Use(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        (3, 64, 10), STACK, [(6, 64), np.array([2, 0, 4], np.int32)],
    ),
    "vmapped": Use(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x), (3, 64, 10), STACK, [(3, 2, 64)]
    ),
    "scan": Use(scanned, (3, 64, 64), STACK, [(2, 64)]),
    "scan-and-remat": Use(rematerialized, (3, 64, 64), STACK, [(2, 64)]),
    "scan-after-moves": Use(
        scanned_after_moves, (3, 64, 8, 8), Axes((0,), (1,), (2, 3)), [(2, 64)]
    ),
    "scan-after-a-cast": Use(scanned_after_cast, (3, 64, 64), STACK, [(2, 64)]),
    "scan-along-blocks": Use(
        lambda p, x: lax.scan(lambda y, wx: (y + wx[1][:, None] @ wx[0][None], None),
                              jnp.zeros((3, 10)), (p["w"], x.T))[0], *DENSE, kept=True),
    "loop": Use(looped, (64, 64), KERNEL, [(2, 64)]),
    "jit": Use(lambda p, x: jax.jit(lambda w: x @ w)(p["w"].T), (10, 64), TABLE, [(3, 64)]),
    "remat": Use(lambda p, x: jax.checkpoint(lambda w: jnp.sin(x @ w))(p["w"]), *DENSE),
    "branch": Use(in_a_branch, *DENSE),
    "lookup": Use(lambda p, i: p["w"][i], (10, 64), TABLE, [IDS], moves=True),
    "lookup-out-of-range": Use(
        lambda p, i: jnp.take(p["w"], i, 0), (10, 64), TABLE, [np.array([3, 1, -1, 18])], moves=True
    ),
    "lookup-or-zero": Use(
        lambda p, i: jnp.take(p["w"], i, 0, mode="fill", fill_value=0),
        (10, 64), TABLE, [np.array([3, 18])], moves=True,
    ),
    "lookup-along-blocks": Use(lambda p, i: p["w"][i], *DENSE[:2], [IDS], moves=True),
    "lookup-past-the-end": Use(
        lambda p, i: p["w"][i], *DENSE[:2], [np.array([3, 70, -1])], moves=True
    ),
    "lookup-times-data": Use(
        lambda p, x, i: jnp.nan_to_num(jnp.take(p["w"] * jnp.sum(x), i, 0)),
        (10, 64), TABLE, [(3, 7), np.array([3, 18])], kept=True,
    ),
    "lookup-of-powers": Use(
        lambda p, i: jnp.take(1.0 ** p["w"], i, 0),
        (10, 64), TABLE, [np.array([3, 18])], moves=True,
    ),
    "tied": Use(lambda p, i: p["w"][i] @ p["w"].T, (10, 64), TABLE, [IDS]),
    "split": Use(split, *DENSE),
    "split-within-blocks": Use(split_within_blocks, *DENSE),
    "sliced-across-blocks": Use(lambda p, x: x[:, :50] @ p["w"][7:57], *DENSE),
    "dynamically-sliced": Use(
        lambda p, x, i: x[:, :5] @ lax.dynamic_slice_in_dim(p["w"], i, 5, 0),
        *DENSE[:2], [(3, 64), np.int32(30)],
    ),
    "row-gain": Use(lambda p, x: x @ (p["w"] * jnp.arange(1.0, 65.0)[:, None]) / 3, *DENSE),
    "scaled": Use(lambda p, x: x @ -(p["w"] * 0.3), *DENSE),
    "masked": Use(
        lambda p, x: x @ jnp.where(jnp.tri(64, 10) > 0, p["w"], 0), *DENSE, adapted=False
    ),
    "convolution": Use(conv, (3, 2, 64, 6), Axes((), (0, 1, 2), (3,)), [(1, 3, 3, 64)]),
    "grouped-convolution": Use(
        functools.partial(conv, feature_group_count=2),
        (3, 2, 64, 6), Axes((), (0, 1, 2), (3,)), [(1, 3, 3, 128)],
    ),
    "casts": Use(
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.float32).astype(jnp.bfloat16),
        *DENSE,
    ),
    "times-its-transpose": Use(lambda p, x: x @ (p["w"] @ p["w"].T), *DENSE, kept=True),
    "normalized": Use(normalized, *DENSE, kept=True),
    "added-to-itself": Use(lambda p, x: x @ (p["w"] + p["w"][::-1]), *DENSE),
    "joined": Use(lambda p, x: x @ jnp.concatenate([p["w"], p["w"][:, ::-1]], 1), *DENSE),
    "written-into": Use(lambda p, x: x @ p["w"].at[3].set(0.0), *DENSE),
    "tiled": Use(lambda p, x: x @ jnp.tile(p["w"], (1, 3)), *DENSE),
    "padded": Use(lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), *DENSE),
    "cumulative": Use(lambda p, x: x @ jnp.cumsum(p["w"], 0), *DENSE, kept=True),
    "not-linear": Use(lambda p, x: x @ jnp.tanh(p["w"]), *DENSE, kept=True),
    "sorted": Use(lambda p, x: x @ jnp.sort(p["w"], 0), *DENSE, kept=True),
    "custom-derivative": Use(lambda p, x: x @ clipped(p["w"]), *DENSE, kept=True),
    "stop-gradient": Use(lambda p, x: x @ lax.stop_gradient(p["w"]), *DENSE, adapted=False),
    "optimization-barrier": Use(lambda p, x: x @ lax.optimization_barrier(p["w"]), *DENSE),
    "returned": Use(lambda p, x: (p["w"], x)[0], *DENSE, moves=True, kept=True),
    "returned-times-data": Use(
        jax.checkpoint(lambda p, x: p["w"].T * jnp.sum(x)), *DENSE[:2], [(3, 7)]
    ),
}  # fmt: skip

# One use for each way in which codes are read. One CI job runs all combinations.
SAMPLE = ("merged-heads", "scan", "lookup-out-of-range")
SAMPLE_OF_NF4 = (
    *SAMPLE,
    "lookup-past-the-end",
    "lookup-of-powers",
    "lookup-times-data",
    "scan-after-moves",
    "scan-along-blocks",
    "ragged",
    "tied",
    "sliced-across-blocks",
    "convolution",
    "returned-times-data",
)


def sampled(format, use):
    uses = {
        "nf4": SAMPLE_OF_NF4,
        "int8": SAMPLE[:1],
        "e4m3": SAMPLE[:1],
        "user-defined": SAMPLE[:1],
    }
    uses = uses.get(format, ())
    return pytest.param(format, use, marks=() if use in uses else pytest.mark.full_product)


ROWS = [sampled(format, use) for format in FORMATS for use in (USES if format == "nf4" else SAMPLE)]


def along_of(use):
    """The axes that share scales: the inputs, or the features of a row."""
    return use.axes.inputs


@pytest.mark.parametrize(("format", "use"), ROWS)
def test_equals_the_dequantized_base_and_keeps_only_codes(format, use):
    with jax.enable_x64(True):
        check(FORMATS[format], USES[use])


def check(format, use):
    drawn = [
        jax.random.normal(jax.random.key(k), shape, jnp.float64) / 4
        for k, shape in enumerate([use.shape, *use.args])
        if isinstance(shape, tuple)
    ]
    args = [drawn[k + 1] if isinstance(arg, tuple) else jnp.asarray(arg)
            for k, arg in enumerate(use.args)]  # fmt: skip
    format = dataclasses.replace(format, along=along_of(use))
    coded = quantize({"w": drawn[0]}, {"w": format})
    plain = dequantize(coded)
    assert plain["w"].shape == use.shape and plain["w"].dtype == jnp.float64
    adapters = [{"w": None}]
    if use.adapted:
        shared, inputs, outputs = use.axes
        spec = LoraSpec(2, in_axes=inputs, out_axes=outputs, shared_axes=shared)
        _, tunable = init_lora(coded, {"w": spec}, jax.random.key(5))
        _, same = init_lora({"w": drawn[0]}, {"w": spec}, jax.random.key(5))
        for got, expected in zip(*map(jax.tree.leaves, (tunable, same)), strict=True):
            np.testing.assert_array_equal(got, expected)
        drawn_factors = random_factors(tunable, jax.random.key(6))
        adapters.append(jax.tree.map(lambda factor: factor / 2, drawn_factors))
    trained = [x for x in args if jnp.issubdtype(x.dtype, jnp.floating)]
    rest = args[len(trained) :]
    model = lora(use.function, on_materialize="allow")

    def run_on(frozen, adapter, data):
        if adapter["w"] is None and frozen is plain:
            return use.function(plain, *data, *rest)
        return model((frozen, adapter), *data, *rest)

    for adapter in adapters:

        def run(frozen, adapter=adapter):
            def outputs(adapter, data):
                out = run_on(frozen, adapter, data)
                return jnp.sum(jnp.sin(jnp.nan_to_num(out.astype(jnp.float64)))), out

            # Codes are operands: XLA would decode constants at compile time.
            both = jax.value_and_grad(outputs, (0, 1), has_aux=True)
            (_, out), grads = jax.jit(both)(adapter, trained)
            return out, grads

        got, expected = run(coded), run(plain)
        # XLA may round the product with a scale and the sum with a minimum once.
        if use.moves and adapter["w"] is None and not getattr(format, "minimum", False):
            np.testing.assert_array_equal(got[0], expected[0])
        for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            one, other = (np.nan_to_num(np.asarray(x, np.float64)) for x in (one, other))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(np.abs(other).max(), 1))
        if not use.kept:
            _check_that_only_codes_are_kept(run_on, coded, adapter, trained)


def _check_that_only_codes_are_kept(run_on, coded, adapter, data):
    """No residual is as large as the weight, except its own codes."""
    if not jax.tree.leaves((adapter, data)):
        return
    run = jax.jit(lambda *args: run_on(coded, *args))
    _, tangent = jax.linearize(run, adapter, data)
    kept = jax.make_jaxpr(tangent)(adapter, data).consts
    arrays = coded["w"].arrays
    size = coded["w"].size
    floats = [x for x in kept if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1]
    assert not [x.shape for x in floats if x.size >= size], [x.shape for x in floats]
    dtype = arrays["codes"].dtype
    codes = [x for x in kept if x.dtype == dtype]
    most = sum(x.size for x in arrays.values() if x.dtype == dtype)
    assert sum(x.size for x in codes) <= most, [x.shape for x in codes]


def test_a_look_up_past_a_number_decodes_rows_alone():
    coded = quantize({"w": jnp.ones((10, 64))}, {"w": NF4(32, along=(1,))})
    run = lambda coded, i: lora(lambda p: jnp.take(p["w"] * 3, i, 0))((coded, {"w": None}))  # noqa: E731
    text = str(jax.make_jaxpr(run)(coded, jnp.array([3, 18])))
    assert not re.findall(r"f32\[10,(?:64|2,32)\]", text)


def looped_rows(p, x):
    return lax.scan(lambda y, wx: (y + wx[0] * wx[1], None), jnp.zeros(10), (p["w"], x))[0]


def test_a_step_along_blocks_decodes_one_entry():
    coded = quantize({"w": jnp.ones((64, 10))}, {"w": NF4(32)})
    run = lambda coded, x: lora(looped_rows)((coded, {"w": None}), x)  # noqa: E731
    text = str(jax.make_jaxpr(run)(coded, jnp.ones(64)))
    assert "u4[2,32,10]" in text
    assert not re.findall(r"f32\[(?:2,32|64),10\]", text)
