"""Initial factors from inputs and gradients: what is collected, the factors, invalid input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    LORA_FREEZE,
    NF4,
    Axes,
    CordaStart,
    DoraSpec,
    EvaStart,
    Int8,
    LoraGAStart,
    LoraSpec,
    QuantizedWeight,
    SpecError,
    collect_starts,
    dequantize,
    eva_ranks,
    init_lora,
    lora,
    merge_params,
    quantize,
)
from lorax._collect import _Model, _moments, _summed, _wanted
from lorax._pair import flatten_params

normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
KEY = jax.random.key(0)
AXES = Axes((), (0,), (1,))
STACK = Axes((0,), (1,), (2,))


def moments_of(function, params, spec, *args):
    """What is collected for the only weight."""
    leaves, structure = flatten_params(params)
    wanted = _wanted(leaves, jax.tree.leaves(spec))
    model = _Model(function, leaves, structure, wanted, False)
    (moments,) = _summed(functools.partial(_moments, model), model, [args])
    return moments


def conv(params, x, **keywords):
    return lax.conv_general_dilated(
        x, params["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **keywords
    )


# Functions that are linear in the weight: (function, shape of the weight, its axes, arguments as
# shapes or arrays).
USES = {
    "right": (lambda p, x: x @ p["w"], (5, 3), AXES, [(2, 4, 5)]),
    "left": (lambda p, x: p["w"] @ x, (3, 5), Axes((), (1,), (0,)), [(5, 4)]),
    "merged heads": (
        lambda p, x: jnp.einsum("bhd,hdk->bk", x, p["w"]),
        (2, 3, 4),
        Axes((), (0, 1), (2,)),
        [(6, 2, 3)],
    ),
    "reshaped": (
        lambda p, x: x @ p["w"].reshape(6, 4),
        (2, 3, 4),
        Axes((), (0, 1), (2,)),
        [(5, 6)],
    ),
    "transposed and cut": (
        lambda p, x: x @ p["w"].T[:, 1:3],
        (4, 5),
        Axes((), (1,), (0,)),
        [(3, 5)],
    ),
    "batched last": (
        lambda p, x: jnp.einsum("ebi,ioe->ebo", x, p["w"]),
        (5, 4, 3),
        Axes((2,), (0,), (1,)),
        [(3, 2, 5)],
    ),
    "one expert": (lambda p, x, i: x @ p["w"][i], (3, 5, 4), STACK, [(2, 5), np.int32(2)]),
    "expert for each example": (
        lambda p, x, i: jnp.einsum("bi,bio->bo", x, p["w"][i]),
        (3, 5, 4),
        STACK,
        [(4, 5), np.array([2, 0, 2, 2])],
    ),
    "ragged": (
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        (3, 5, 4),
        STACK,
        [(6, 5), np.array([2, 0, 3], np.int32)],
    ),
    "vmapped": (
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x),
        (3, 5, 4),
        STACK,
        [(3, 2, 5)],
    ),
    "scan and remat": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda c, wx: (c, wx[1] @ wx[0])), 0.0, (p["w"], x)
        )[1],
        (3, 5, 4),
        STACK,
        [(3, 2, 5)],
    ),
    "in each step of a scan": (
        lambda p, x: lax.scan(lambda c, x: (c, jnp.sin(x) @ p["w"]), 0.0, x)[1],
        (5, 4),
        AXES,
        [(3, 2, 5)],
    ),
    "twice": (lambda p, x: (x @ p["w"], jax.jit(lambda w: x[:2] @ w)(p["w"])), (5, 4), AXES,
              [(3, 5)]),
    "convolution": (conv, (3, 2, 2, 4), Axes((), (0, 1, 2), (3,)), [(2, 5, 4, 2)]),
    "groups of features": (
        functools.partial(conv, feature_group_count=2),
        (3, 2, 2, 4),
        Axes((), (0, 1, 2), (3,)),
        [(2, 5, 4, 4)],
    ),
    # More rows than `fan_in²`, so their moments are kept instead of the rows.
    "many rows": (lambda p, x: x @ p["w"], (2, 3), AXES, [(9, 2)]),
    "many rows of a stack": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda c, wx: (c, wx[1] @ wx[0])), 0.0, (p["w"], x)
        )[1],
        (3, 2, 4),
        STACK,
        [(3, 9, 2)],
    ),
    "many rows of groups": (
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        (3, 2, 4),
        STACK,
        [(30, 2), np.array([9, 10, 8], np.int32)],
    ),
    "bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        (5, 3),
        AXES,
        [(4, 5)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("size, kept", [(1, "float32[3,1,1]"), (5, "float32[3,5,5]")])
def test_the_smaller_of_rows_and_moments_is_kept(size, kept):
    """A scan of three steps with four rows each stacks the rows or their moments."""
    params, spec = {"w": normal(0, size, 3)}, {"w": LoraSpec(1, init="eva")}

    def model(params, x):
        return lax.scan(lambda c, x: (c, jnp.sin(x) @ params["w"]), 0.0, x)[1]

    leaves, structure = flatten_params(params)
    wanted = _Model(model, leaves, structure, _wanted(leaves, [spec["w"]]), False)
    jaxpr = jax.make_jaxpr(lambda x: _moments(wanted, [params["w"]], (x,)))(jnp.ones((3, 4, size)))
    outs = [str(v.aval) for e in jaxpr.eqns if e.primitive.name == "scan" for v in e.outvars]
    rows = f"float32[3,4,{size}]"
    assert (rows in outs) == (size == 5) and (kept in outs) == (size == 1), outs


@pytest.mark.parametrize("use", USES)
def test_moments_match_those_of_the_jacobian(use):
    """An output is an input row times a column of the weight, so that row is its derivative."""
    function, shape, axes, args = USES[use]
    args = [
        normal(k, *arg) if isinstance(arg, tuple) else jnp.asarray(arg)
        for k, arg in enumerate(args)
    ]
    params = {"w": normal(7, *shape)}
    spec = {"w": LoraSpec(1, init="eva").with_axes(axes)}
    second, first, count = moments_of(function, params, spec, *args)

    def outputs(w):
        outs = jax.tree.leaves(function({"w": w}, *args))
        return jnp.concatenate([out.reshape(-1).astype(jnp.float32) for out in outs])

    out, transposed = jax.vjp(outputs, params["w"])
    # Not `jax.jacrev`: JAX has no batching rule for every way of mapping `ragged_dot`.
    jacobian = np.asarray(lax.map(lambda row: transposed(row)[0], jnp.eye(out.size)), np.float64)
    # [outputs, *shared, in, out]: an output depends only on the column that it uses.
    order = [0, *(1 + d for d in (*axes.shared, *axes.inputs, *axes.outputs))]
    fan_in, fan_out = axes.sizes(shape)
    matrices = jacobian.transpose(order).reshape(len(jacobian), -1, fan_in, fan_out)
    # How many outputs use each row: all, those that the cut keeps, or those of its group.
    repeats = {"transposed and cut": 2, "groups of features": 2}.get(use, fan_out)
    rows = np.abs(matrices).max(2) > 0  # [outputs, shared, out]
    expected = np.einsum("reio,rejo->eij", matrices, matrices) / repeats
    entries = len(expected)
    tolerance = 2e-2 if use == "bfloat16" else 1e-5
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(np.reshape(second, (entries, fan_in, fan_in)), expected)
    close(np.reshape(first, (entries, fan_in)), np.einsum("reio->ei", matrices) / repeats)
    close(np.reshape(count, entries), rows.sum((0, 2)) / repeats)


# A model of stacked layers, and the same layers one by one.

SHAPES = {"in": (5, 6), "layers": (3, 6, 6), "out": (6, 4)}
PARAMS = {name: normal(k, *shape) / 2 for k, (name, shape) in enumerate(SHAPES.items())}
BATCHES = [normal(10 + k, 7, 5) for k in range(3)]


def scanned(params, x):
    layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
    return lax.scan(layer, x @ params["in"], params["layers"])[0] @ params["out"]


def inputs_of(params, x):
    """The inputs of the layers, and of `out`."""
    inputs = [x @ params["in"]]
    for w in params["layers"]:
        inputs.append(inputs[-1] + jnp.tanh(inputs[-1] @ w))
    return inputs


def loss(params, x):
    return jnp.mean(scanned(params, x) ** 3)


def specs(init, rank=2, **keywords):
    stack = LoraSpec(rank, init=init, shared_axes=[0], **keywords)
    return {"in": LORA_FREEZE, "layers": stack, "out": LoraSpec(rank, init=init, **keywords)}


def test_eva_takes_the_principal_components_of_the_inputs():
    spec = specs("eva")
    collected = collect_starts(scanned, PARAMS, spec, BATCHES)
    assert list(collected) == ["layers", "out"]
    frozen, tunable = init_lora(PARAMS, spec, KEY, collected=collected)
    rows = [np.concatenate(x) for x in zip(*(inputs_of(PARAMS, x) for x in BATCHES), strict=True)]
    for k, x in enumerate(rows):
        x = x.astype(np.float64)
        _, values, right = np.linalg.svd(x - x.mean(0), full_matrices=False)
        name, entry = ("layers", k) if k < 3 else ("out", 0)
        a = tunable["layers"].a[k] if k < 3 else tunable["out"].a
        cosines = np.abs(np.sum(right[:2].T * a, 0))
        np.testing.assert_allclose(cosines, 1, rtol=1e-5)
        np.testing.assert_allclose(collected[name]["values"][entry], values[:2], rtol=1e-4)
        shares = values[:2] ** 2 / np.sum(values**2)
        np.testing.assert_allclose(collected[name]["ratios"][entry], shares, rtol=1e-4)
        assert (a.max(0) >= -a.min(0)).all()  # the sign of the largest entry
    assert not tunable["layers"].b.any() and tunable["layers"].b.shape == (3, 2, 6)
    assert frozen["out"] is PARAMS["out"]
    plain = init_lora(PARAMS, specs(None), KEY)
    got, expected = (lora(scanned)(pair, BATCHES[0]) for pair in ((frozen, tunable), plain))
    np.testing.assert_array_equal(got, expected)


BASE_CHANGING = {
    "corda": (CordaStart(), scanned),
    "corda-kpm": (CordaStart("kpm"), scanned),
    "lora_ga": (LoraGAStart(), loss),
    "lora_ga of the weight": (LoraGAStart("ArBr", "weight_svd"), loss),
}


@pytest.mark.parametrize(
    "init, dora", [*((init, False) for init in BASE_CHANGING), ("corda", True)]
)
def test_initial_adapter_and_changed_base_reproduce_the_weight(init, dora):
    init, function = BASE_CHANGING[init]
    spec = specs(init, alpha=3, scaling="rslora")
    if dora:
        spec = {name: DoraSpec(x) if x else x for name, x in spec.items()}
    collected = collect_starts(function, PARAMS, spec, BATCHES)
    pair = init_lora(PARAMS, spec, KEY, collected=collected)
    merged = merge_params(pair)
    for name in ("layers", "out"):
        base = getattr(pair.frozen[name], "base", pair.frozen[name])
        assert jnp.abs(base - PARAMS[name]).max() > 1e-3
        np.testing.assert_allclose(merged[name], PARAMS[name], atol=1e-4)


def test_corda_ipm_takes_the_largest_and_kpm_the_smallest_values():
    """Both take vectors of `W = C⁻¹ V diag(s) Uᵀ`, and share none."""
    layers = {}
    for method in ("ipm", "kpm"):
        collected = collect_starts(
            scanned, PARAMS, specs(CordaStart(method)), BATCHES
        )  # fmt: skip
        layers[method] = collected["layers"]
    largest, smallest = layers["ipm"]["ipm values"], layers["kpm"]["kpm values"]
    assert (largest.min(1) > smallest.max(1)).all()
    full_rank = collect_starts(
        scanned, PARAMS, specs("corda", 4) | {"layers": LORA_FREEZE}, BATCHES
    )
    a, values, b = (
        full_rank["out"][name][0] for name in ("ipm inputs", "ipm values", "ipm outputs")
    )
    np.testing.assert_allclose((a * values[None]) @ b, PARAMS["out"], atol=1e-4)


def test_lora_ga_draws_the_same_vectors_for_both_sides():
    spec = specs(LoraGAStart("random", "unit")) | {"layers": LORA_FREEZE}
    collected = collect_starts(loss, PARAMS, spec, BATCHES)
    kept = {name: np.asarray(x[0]) for name, x in collected["out"].items()}
    drawn = set()
    for seed in range(8):
        key = jax.random.key(seed)
        frozen, tunable = init_lora(PARAMS, spec, key, collected=collected)
        picked = np.argmax(np.abs(kept["inputs"].T @ np.asarray(tunable["out"].a)), 0)
        assert len(set(picked)) == 2
        np.testing.assert_allclose(tunable["out"].a, kept["inputs"][:, picked], atol=1e-6)
        expected = kept["values"][picked, None] * kept["outputs"][picked]
        np.testing.assert_allclose(tunable["out"].b, expected, atol=1e-6)
        merged = merge_params(frozen, tunable)["out"]
        np.testing.assert_allclose(merged, PARAMS["out"], atol=1e-5)
        drawn.add(tuple(picked))
    assert len(drawn) > 2


def test_lora_ga_factors_are_singular_vectors_of_the_mean_gradient():
    spec = specs(LoraGAStart(scale="unit"))
    collected = collect_starts(loss, PARAMS, spec, BATCHES)
    grads = [jax.grad(loss)(PARAMS, x) for x in BATCHES]
    mean = np.mean([np.asarray(grad["layers"], np.float64) for grad in grads], 0)
    _, tunable = init_lora(PARAMS, spec, KEY, collected=collected)
    left, values, right = np.linalg.svd(mean)
    a, b = np.asarray(tunable["layers"].a), np.asarray(tunable["layers"].b)
    np.testing.assert_allclose(np.abs(np.sum(left[..., :2] * a, 1)), 1, rtol=1e-4)
    cosines = np.sum(right[:, 2:4] * b, 2) / values[:, 2:4]
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-3)


def test_at_once_does_not_change_the_result():
    spec = specs("eva") | {"out": LoraSpec(2, init="lora_ga"), "in": LoraSpec(2, init="corda")}
    together = collect_starts(loss, PARAMS, spec, BATCHES)
    one_by_one = collect_starts(loss, PARAMS, spec, iter(BATCHES), at_once=1)
    assert list(together) == list(one_by_one) == ["in", "layers", "out"]
    for actual, wanted in zip(*map(jax.tree.leaves, (together, one_by_one)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_batches_may_hold_any_arguments():
    def model(params, batch, flag, name=None):
        assert isinstance(flag, bool)
        return {"y": batch["x"] @ params["w"], "flag": flag, "ids": jnp.arange(3)}

    params, spec = {"w": normal(0, 5, 3)}, {"w": LoraSpec(2, init="eva")}
    flags = (True, False, True)
    batches = [
        ({"x": np.asarray(x), "name": "text"}, flag) for x, flag in zip(BATCHES, flags, strict=True)
    ]
    expected = collect_starts(lambda p, x: x @ p["w"], params, spec, BATCHES)
    got = collect_starts(model, params, spec, batches)
    np.testing.assert_allclose(got["w"]["values"], expected["w"]["values"], rtol=1e-5)


# Ranks.


def test_eva_ranks_follow_the_variance():
    init = EvaStart(rho=2.0)
    spec = {
        "a": LoraSpec(2, 4, init=init),
        "b": DoraSpec(LoraSpec(2, 4, "rslora", init=init)),
        "c": LoraSpec(1, init=init),
        "stack": LoraSpec(1, init=init, shared_axes=[0]),
        "other": 3,
    }
    ratios = {
        "a": [[0.5, 0.3, 0.19, 0.01]],
        "b": [[0.4, 0.1, 0.1, 0.1]],
        "c": [[0.05, 0.01]],
        "stack": [[0.2, 0.1], [0.4, 0.1]],
    }
    collected = {path: {"ratios": jnp.asarray(x)} for path, x in ratios.items()}
    ranked = eva_ranks(spec, collected)
    # A budget of 7 goes to a, b, a, the stack (which costs 2), a, and b.
    assert (ranked["a"].rank, ranked["a"].alpha) == (3, 6)
    assert (ranked["b"].spec.rank, ranked["stack"].rank) == (2, 1)
    assert ranked["b"].spec.alpha == 4 and ranked["c"] == LORA_FREEZE and ranked["other"] == 3
    with pytest.raises(SpecError, match="`collected` has `c`, which the spec does not"):
        eva_ranks({name: spec[name] for name in ("a", "b", "stack")}, collected)
    with pytest.raises(SpecError, match="`c` has the spec 0, whose rank cannot be redistributed"):
        eva_ranks(ranked, collected)


def test_init_lora_takes_redistributed_ranks():
    spec = specs(EvaStart(rho=2.0))
    collected = collect_starts(scanned, PARAMS, spec, BATCHES)
    collected["out"]["ratios"] = jnp.ones((1, 4))
    changed = eva_ranks(spec, collected)
    assert changed["out"].rank == 4 and changed["layers"].rank == 1  # of 3 · 2 + 2
    _, tunable = init_lora(PARAMS, changed, KEY, collected=collected)
    assert tunable["layers"].a.shape == (3, 6, 1) and tunable["out"].a.shape == (6, 4)


def test_weight_left_without_a_rank_is_frozen():
    params, one = {"v": normal(0, 6, 3), "w": normal(1, 6, 3)}, LoraSpec(1, init=EvaStart(rho=2.0))
    spec = {"v": one, "w": one}
    model = lambda p, x: (x @ p["v"], x @ p["w"])  # noqa: E731
    collected = collect_starts(model, params, spec, [normal(2, 20, 6)])
    collected["w"]["ratios"] = jnp.zeros((1, 2))
    frozen, tunable = init_lora(params, eva_ranks(spec, collected), KEY, collected=collected)
    assert tunable["v"].rank == 2 and tunable["w"] is None and frozen["w"] is params["w"]


# Invalid input.

W = {"w": normal(0, 6, 6)}
ROWS = normal(1, 7, 6)
EVA = {"w": LoraSpec(2, init="eva")}


@pytest.mark.parametrize(
    "function, batch, message",
    [
        (lambda p, x: x @ p["w"].T, ROWS, "`dot_general` at .*test_collected.* reads it along its"),
        (lambda p, i: p["w"][i], np.arange(6), "The inputs of `w` cannot be collected: `gather`"),
        (lambda p, x: x[:, :3] @ p["w"][:3], ROWS, "`slice` .* reads only a part of its inputs"),
        (lambda p, x: lax.scan(lambda c, w: (c + w, None), x[0], p["w"])[0], ROWS, "`scan`"),
        (lambda p, x: jnp.exp(p["w"]).sum() + x, ROWS, "`exp` .* is not linear in the weight"),
        (lambda p, x: (x @ p["w"], p["w"]), ROWS, "`w` is returned by the function"),
        (lambda p, x: lax.stop_gradient(x @ p["w"]), ROWS, "No input of `w` .*stop_grad"),
        (lambda p, x: jnp.argmax(x @ p["w"], -1), ROWS, "No input of `w` was collected"),
        (lambda p, x: x, ROWS, "No input of `w` was collected"),
        (lambda p, x: x @ p["w"], ROWS[:1], "`w` got 1 input rows .* fewer than its rank 2"),
    ],
    ids=["outputs", "lookup", "part", "steps", "not linear", "returned", "stopped", "integers",
         "unused", "few rows"],
)  # fmt: skip
def test_inputs_that_cannot_be_collected_raise(function, batch, message):
    with pytest.raises(SpecError, match=message):
        collect_starts(function, W, EVA, [jnp.asarray(batch)])


def test_expert_without_rows_raises():
    experts = {"w": normal(0, 3, 6, 6)}
    spec = {"w": LoraSpec(2, init="corda", shared_axes=[0])}

    def model(params, x):
        return lax.ragged_dot(x, params["w"], jnp.array([4, 0, 3]))

    with pytest.raises(SpecError, match="No input of `w` of one entry of its shared axes"):
        collect_starts(model, experts, spec, [ROWS])


def test_inputs_of_zeros_raise():
    spec = {"w": LoraSpec(2, init="corda")}
    with pytest.raises(SpecError, match="`w` has CordaStart.* inputs of an entry are all zero"):
        collect_starts(lambda p, x: x @ p["w"], W, spec, [0 * ROWS])


def test_function_that_is_not_a_loss_raises():
    spec = {"w": LoraSpec(2, init="lora_ga")}
    with pytest.raises(ValueError, match=r'init="lora_ga" of `w` .* returned \(7, 6\)'):
        collect_starts(lambda p, x: x @ p["w"], W, spec, [ROWS])


def test_invalid_arguments_raise():
    with pytest.raises(SpecError, match="No leaf of the spec has an init that uses inputs"):
        collect_starts(lambda p, x: x @ p["w"], W, {"w": 2}, [ROWS])
    with pytest.raises(ValueError, match="at least one batch"):
        collect_starts(lambda p, x: x @ p["w"], W, EVA, [])
    with pytest.raises(ValueError, match="at_once is 0"):
        collect_starts(lambda p, x: x @ p["w"], W, EVA, [ROWS], at_once=0)
    with pytest.raises(SpecError, match="`w` is complex"):
        collect_starts(lambda p, x: x @ p["w"], {"w": W["w"].astype(complex)}, EVA, [ROWS])


@pytest.mark.parametrize(
    "init, rank, message",
    [
        ("eva", 7, "rank 7 and init='eva', which takes its factors from inputs of rank 6 at most"),
        ("corda", 7, "rank 7 and init='corda'"),
        ("lora_ga", 4, "rank 4 and init='lora_ga', which takes twice as many vectors"),
        ("evva", 2, "it must be one of 'pissa', .*'eva', 'corda', 'lora_ga', or None"),
        (EvaStart(rho=0.5), 2, "rho=0.5; it must be at least 1"),
        (CordaStart("all"), 2, "method 'all'; it must be one of 'ipm', 'kpm'"),  # pyright: ignore
        (LoraGAStart("BrAr"), 2, "direction 'BrAr'"),  # pyright: ignore
        (LoraGAStart(scale="big"), 2, "scale 'big'"),  # pyright: ignore
        (LoraGAStart(stable_gamma=0), 2, "stable_gamma=0; it must be above 0"),
        ("eva", 2, r"EvaStart\(.*takes its factors from inputs. Pass init_lora\(collected="),
    ],
    ids=range(10),
)
def test_invalid_spec_raises(init, rank, message):
    with pytest.raises(SpecError, match=f"`w` has .*{message}"):
        init_lora(W, {"w": LoraSpec(rank, init=init)}, KEY)


def test_negative_scale_raises():
    for init in ("corda", LoraGAStart(scale="gd_scale")):
        with pytest.raises(SpecError, match="alpha must be positive"):
            init_lora(W, {"w": LoraSpec(2, -1, init=init)}, KEY)


def test_collected_for_another_spec_raises():
    collected = collect_starts(lambda p, x: x @ p["w"], W, EVA, [ROWS])
    with pytest.raises(SpecError, match="rank 3, and what was collected for it belongs to another"):
        init_lora(W, {"w": LoraSpec(3, init="eva")}, KEY, collected=collected)
    with pytest.raises(SpecError, match="what was collected for it belongs to another"):
        init_lora(W, {"w": LoraSpec(2, init="corda")}, KEY, collected=collected)
    loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    of_gradient = collect_starts(loss, W, {"w": LoraSpec(1, init="lora_ga")}, [ROWS])
    of_inputs = collect_starts(loss, W, {"w": LoraSpec(2, init="corda")}, [ROWS])
    for other, init, rank in (
        (of_gradient, "lora_ga", 2),  # of rank 1
        (of_gradient, "corda", 2),
        (of_inputs, "lora_ga", 1),
        (of_inputs, CordaStart("kpm"), 2),
    ):
        with pytest.raises(SpecError, match="what was collected for it belongs to another"):
            init_lora(W, {"w": LoraSpec(rank, init=init)}, KEY, collected=other)
    with pytest.raises(SpecError, match="`collected` has `w`, whose spec has no `init`"):
        init_lora(W, {"w": 2}, KEY, collected=collected)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_quantized_base_collects_the_same_as_its_floats(init):
    params = {"layers": normal(0, 3, 32, 32) / 6, "head": normal(1, 32, 5) / 6}

    def loss(params, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((x @ params["head"]) ** 2)

    quantized = quantize(params, {"layers": NF4(32), "head": Int8()})
    spec = {"layers": LoraSpec(2, init=init, shared_axes=[0]), "head": LoraSpec(2, init=init)}
    batches = [normal(2, 7, 32), normal(3, 7, 32)]
    actual, wanted = (
        collect_starts(loss, tree, spec, batches) for tree in (quantized, dequantize(quantized))
    )
    for path, arrays in wanted.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(actual[path][name], array, rtol=1e-4, atol=1e-5)
    frozen, _ = init_lora(quantized, spec, KEY, collected=actual)
    assert isinstance(frozen["layers"], QuantizedWeight)


class _Opaque:
    """A setting whose repr does not tell its factor."""

    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return "Opaque()"


class _Unhashable(_Opaque):
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other):
        return True


@pytest.mark.parametrize("kind", [_Opaque, _Unhashable])
def test_settings_with_equal_reprs_are_traced_separately(kind):
    model = lambda p, x, setting: setting.factor * x @ p["w"]  # noqa: E731
    params, spec = {"w": normal(0, 5, 3)}, {"w": LoraSpec(2, init="eva")}
    batches = [(normal(1, 7, 5), kind(1.0)), (normal(2, 7, 5), kind(100.0))]
    got = collect_starts(model, params, spec, batches)
    scaled = [(x * setting.factor, kind(1.0)) for x, setting in batches]
    expected = collect_starts(model, params, spec, scaled)
    for actual, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4)
