"""`infer_spec`: roles of common layers, which weights are adapted, ranks, and errors."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import (
    LORA_FREEZE,
    Axes,
    DoraSpec,
    IA3Spec,
    LoraSpec,
    SpecError,
    UnadaptedWarning,
    infer_spec,
    init_lora,
    testing,
)


def conv(**keywords):
    return lambda p, x: lax.conv_general_dilated(
        x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **keywords
    )


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]


def looped(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p[i]), x)


ROWS = [
    ("dense", lambda p, x: x @ p, (5, 7), [(3, 5)], (0,), (1,), ()),
    ("transposed", lambda p, x: x @ p.T, (7, 5), [(3, 5)], (1,), (0,), ()),
    ("query", lambda p, x: jnp.einsum("bd,dhk->bhk", x, p), (5, 2, 7), [(3, 5)], (0,), (1, 2), ()),
    (
        "output",
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p),
        (2, 7, 5),
        [(3, 2, 7)],
        (0, 1),
        (2,),
        (),
    ),
    ("flattened", lambda p, x: x @ p.reshape(5, 14), (5, 2, 7), [(3, 5)], (0,), (1, 2), ()),
    ("merged-inputs", lambda p, x: x @ p.reshape(14, 5), (2, 7, 5), [(3, 14)], (0, 1), (2,), ()),
    ("scanned", scanned, (3, 5, 5), [(2, 5)], (1,), (2,), (0,)),
    ("looped", looped, (3, 5, 5), [(2, 5)], (1,), (2,), (0,)),
    (
        "batched",
        lambda p, x: jnp.einsum("eti,eio->eto", x, p),
        (3, 5, 7),
        [(3, 2, 5)],
        (1,),
        (2,),
        (0,),
    ),
    ("mapped", lambda p, x: jax.vmap(lambda w: x @ w)(p), (3, 5, 7), [(2, 5)], (1,), (0, 2), ()),
    (
        "experts",
        lambda p, x: jnp.einsum("ti,tio->to", x, p[jnp.array([0, 2])]),
        (3, 5, 7),
        [(2, 5)],
        (1,),
        (2,),
        (0,),
    ),
    (
        "ragged",
        lambda p, x: lax.ragged_dot(x, p, jnp.array([2, 0, 1])),
        (3, 5, 7),
        [(3, 5)],
        (1,),
        (2,),
        (0,),
    ),
    ("embedding", lambda p, x: p[jnp.array([1, 3])] * x, (11, 5), [(2, 5)], (0,), (1,), ()),
    ("tied", lambda p, x: p[jnp.array([1, 3])] @ p.T + x, (11, 5), [(2, 11)], (0,), (1,), ()),
    ("convolution", conv(), (3, 3, 4, 5), [(2, 7, 7, 4)], (0, 1, 2), (3,), ()),
    ("depthwise", conv(feature_group_count=4), (3, 3, 1, 4), [(2, 7, 7, 4)], (0, 1, 2), (3,), ()),
    ("in-jit", lambda p, x: jax.jit(lambda w: x @ w.T)(p), (7, 5), [(3, 5)], (1,), (0,), ()),
    (
        "checkpointed",
        lambda p, x: jax.checkpoint(lambda w: x @ w.T)(p),
        (7, 5),
        [(3, 5)],
        (1,),
        (0,),
        (),
    ),
    ("product", lambda p, x: x @ (p @ jnp.ones((7, 3))), (5, 7), [(2, 5)], (0,), (1,), ()),
]


@pytest.mark.parametrize(
    ("fn", "shape", "args", "inputs", "outputs", "shared"),
    [row[1:] for row in ROWS],
    ids=[row[0] for row in ROWS],
)
def test_roles_of_common_layers(fn, shape, args, inputs, outputs, shared):
    params = jax.random.normal(jax.random.key(0), shape)
    args = [jax.random.normal(jax.random.key(k), arg) for k, arg in enumerate(args)]
    spec = infer_spec(fn, params, *args, rank=2)
    assert (spec.in_axes, spec.out_axes, spec.shared_axes) == (inputs, outputs, shared)
    testing.check(fn, params, spec, *args, transforms=False)


def model(params, x):
    hidden = jax.nn.relu(x @ params["in"]["w"] + params["in"]["b"][None]) * params["scale"]
    return hidden @ params["out"] + params["table"]


PARAMS = {
    "in": {"w": jnp.ones((5, 7)), "b": jnp.ones(7)},
    "scale": jnp.ones((1, 7)),
    "out": jnp.ones((7, 3)),
    "table": jnp.ones((2, 3)),
    "unused": jnp.ones((5, 7)),
    "count": jnp.ones((5, 7), jnp.int32),
    "none": None,
}


def two_layers(p, x):
    return jnp.tanh(x @ p["in"]) @ p["out"]


TWO_LAYERS = {"in": jnp.ones((25, 7)), "out": jnp.ones((7, 3))}


def test_only_weights_are_adapted():
    spec = infer_spec(model, PARAMS, jnp.ones((2, 5)), rank=2, alpha=4, scaling="rslora")
    adapted = LoraSpec(2, 4, "rslora", (0,), (1,), ())
    assert spec == {
        "in": {"w": adapted, "b": LORA_FREEZE},
        "scale": LORA_FREEZE,
        "out": adapted,
        "table": LORA_FREEZE,
        "unused": LORA_FREEZE,
        "count": LORA_FREEZE,
        "none": None,
    }
    init_lora(PARAMS, spec, jax.random.key(0))


def test_traces_shapes_without_arrays():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    spec = infer_spec(model, shapes, jax.ShapeDtypeStruct((2, 5), jnp.float32), rank=2)
    assert spec["out"].rank == 2


@pytest.mark.parametrize("where", ["in/*", re.compile("^in/"), lambda path: path.startswith("in")])
def test_where_selects_paths(where):
    spec = infer_spec(model, PARAMS, jnp.ones((2, 5)), rank=2, where=where)
    assert spec["in"]["w"].rank == 2 and spec["out"] == LORA_FREEZE


def test_where_that_accepts_no_weight_raises():
    with pytest.raises(SpecError, match="no weight whose path 'inn/.*`in/w`"):
        infer_spec(model, PARAMS, jnp.ones((2, 5)), rank=2, where="inn/*")


def test_weight_no_larger_than_its_adapter_is_frozen_with_a_warning():
    message = (
        r"`out`: an adapter of rank 3 would have 30 parameters for 7 inputs × 3 outputs"
        r".*skip_small=False"
    )
    with pytest.warns(UnadaptedWarning, match=message):
        spec = infer_spec(two_layers, TWO_LAYERS, jnp.ones((2, 25)), rank=4)
    assert spec["in"].rank == 4 and spec["out"] == LORA_FREEZE


def test_small_weight_gets_the_highest_useful_rank():
    with pytest.warns(UnadaptedWarning, match="`out`: its rank is lowered to 3, the highest"):
        spec = infer_spec(two_layers, TWO_LAYERS, jnp.ones((2, 25)), rank=4, skip_small=False)
    assert spec["out"].rank == 3


def test_head_of_one_output():
    params = {"hidden": jnp.ones((16, 24)), "value": jnp.ones((24, 1))}
    with pytest.warns(
        UnadaptedWarning, match="`value`: an adapter of rank 1 would have 25 parameters"
    ):
        spec = infer_spec(
            lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["value"], params, jnp.ones((3, 16)), rank=2
        )
    assert spec["value"] == LORA_FREEZE
    testing.check(
        lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["value"], params, spec, jnp.ones((3, 16))
    )


def test_integer_weight_is_reported_with_its_dtype():
    def quantized(p, x):
        return x @ (p["codes"].astype(jnp.float32) * p["scale"]) + x @ p["w"]

    params = {"codes": jnp.ones((15, 13), jnp.int8), "scale": jnp.ones((1, 13))}
    with pytest.warns(UnadaptedWarning, match="`codes`: it holds int8, which has no gradient"):
        spec = infer_spec(quantized, params | {"w": jnp.ones((15, 13))}, jnp.ones((2, 15)), rank=2)
    assert spec["codes"] == LORA_FREEZE
    with pytest.raises(
        SpecError, match=r"(?s)Of them, `codes` \(int8\) have no gradient.*`codes`: it"
    ):
        infer_spec(
            lambda p, x: x @ p["codes"].astype(jnp.float32), params, jnp.ones((2, 15)), rank=2
        )


def test_failed_inference_names_matrices_behind_many_vectors():
    params = {f"bias{k}": jnp.ones(3) for k in range(20)} | {"w": jnp.ones((5, 7))}
    with pytest.raises(SpecError, match="two or more axes: `w`"):
        infer_spec(lambda p, x: x + p["bias0"], params, jnp.ones(3), rank=2)


ENSEMBLE = jax.vmap(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], in_axes=(0, None))
MEMBERS = {"in": jnp.ones((3, 11, 13)), "out": jnp.ones((3, 13, 17))}


@pytest.mark.parametrize("shared", [(0,), {"*in": (-3,)}, {re.compile("n$"): [0], "*": [0]}])
def test_shared_axes_give_each_member_its_own_factors(shared):
    x = jnp.ones((2, 11))
    assert infer_spec(ENSEMBLE, MEMBERS, x, rank=2)["in"].out_axes == (0, 2)
    spec = infer_spec(ENSEMBLE, MEMBERS, x, rank=2, shared_axes=shared)
    assert [leaf.shared_axes for leaf in spec.values()] == [(0,), (0,)]
    assert [leaf.in_axes for leaf in spec.values()] == [(1,), (1,)]
    testing.check(ENSEMBLE, MEMBERS, spec, x, transforms=False)


def test_shared_axes_that_match_no_weight_raise():
    x = jnp.ones((2, 11))
    with pytest.raises(SpecError, match=r"shared_axes: 'inn' matches no parameter.*`in`, `out`"):
        infer_spec(ENSEMBLE, MEMBERS, x, rank=2, shared_axes={"inn": [0]})
    with pytest.raises(SpecError, match=r"`in` has 3 axes; shared_axes=\(3,\)"):
        infer_spec(ENSEMBLE, MEMBERS, x, rank=2, shared_axes=[3])
    with pytest.raises(SpecError, match="at least one input and one output"):
        infer_spec(ENSEMBLE, MEMBERS, x, rank=2, shared_axes=[1])


def test_keywords_and_static_arguments_reach_the_function():
    def fn(params, x, *, train):
        return x @ params if train is True else x.sum()

    assert infer_spec(fn, jnp.ones((5, 7)), jnp.ones((2, 5)), rank=2, train=True).rank == 2


def test_spec_of_another_kind():
    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["head"]

    params = {"w": jnp.ones((9, 6)), "head": jnp.ones((6, 2))}
    dora = DoraSpec(LoraSpec(3, alpha=6))
    with pytest.warns(
        UnadaptedWarning, match=r"`head`: an adapter of rank 2 would have 18 parameters"
    ):
        spec = infer_spec(model, params, jnp.ones((4, 9)), spec=dora)
    assert spec == {"w": dora.with_axes(Axes((), (0,), (1,))), "head": 0}
    with pytest.warns(UnadaptedWarning, match="`head`: its rank is lowered to 2"):
        spec = infer_spec(model, params, jnp.ones((4, 9)), spec=dora, skip_small=False)
    assert spec["head"].spec.rank == 2
    spec = infer_spec(model, params, jnp.ones((4, 9)), spec=IA3Spec())
    assert spec == {
        name: IA3Spec(in_axes=(0,), out_axes=(1,), shared_axes=()) for name in ("w", "head")
    }


@pytest.mark.parametrize("rank", [0, -1, 2.5, "2", True])
def test_rank_that_is_not_a_positive_int_raises(rank):
    with pytest.raises(SpecError, match="the rank is .*; it must be a positive int"):
        infer_spec(lambda p, x: x @ p, jnp.ones((9, 6)), jnp.ones((4, 9)), rank=rank)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "spec": IA3Spec()}])
def test_rank_and_spec_exclude_each_other(options):
    with pytest.raises(TypeError, match="takes either `rank` or `spec`"):
        infer_spec(lambda p, x: x @ p, jnp.ones((9, 6)), jnp.ones((4, 9)), **options)
