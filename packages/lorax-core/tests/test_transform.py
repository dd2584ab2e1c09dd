"""`lora`: signatures, tracing, transformations, precision, sharding, warnings, and training."""

import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad

from lorax import (
    LORA_FREEZE,
    LORA_FULL,
    ArgumentError,
    LoraSpec,
    MaterializeError,
    MaterializeWarning,
    PairError,
    UnusedAdapterError,
    UnusedAdapterWarning,
    _contract,
    init_lora,
    lora,
    merge_params,
)
from lorax._interpreter import Interpreter
from lorax.testing import random_factors


def pair(shape=(5, 7), rank: Any = 2, seed=0, dtype=jnp.float32, **others):
    params = {"w": jax.random.normal(jax.random.key(seed), shape).astype(dtype)} | others
    spec = {"w": rank} | dict.fromkeys(others, LORA_FREEZE)
    frozen, tunable = init_lora(params, spec, jax.random.key(seed))
    return frozen, random_factors(tunable, jax.random.key(seed + 1))


def ones(*shape):
    return jnp.ones(shape)


def model(params, x):
    return jnp.tanh(x @ params["w"])


def equal(got, expected):
    return bool(jnp.allclose(got, expected, atol=1e-5, rtol=1e-5))


X = jax.random.normal(jax.random.key(9), (3, 5))


# Signatures


def test_keeps_name_and_documentation():
    def documented(params, x):
        """Documentation."""

    wrapped = lora(documented)
    assert wrapped.__name__ == "documented" and wrapped.__doc__ == "Documentation."
    assert list(inspect.signature(wrapped).parameters) == ["params", "x"]


def test_several_positions_and_keywords():
    def fn(first, x, second, *, third):
        return x @ first["w"] @ second["w"] @ third["w"]

    pairs = [pair((5, 7)), pair((7, 3), seed=1), pair((3, 2), seed=2)]
    expected = fn(
        *(merge_params(*pairs[0]), X, merge_params(*pairs[1])), third=merge_params(*pairs[2])
    )
    for argnums in ((0, 2), (0, -1), [2, 0]):
        wrapped = lora(fn, argnums=argnums, argnames="third")
        assert equal(wrapped(pairs[0], X, pairs[1], third=pairs[2]), expected)


def test_argnums_may_be_a_numpy_integer():
    first: Any = np.int64(0)
    assert equal(lora(model, argnums=first)(pair(), X), lora(model)(pair(), X))


@pytest.mark.parametrize(
    "options",
    [
        {"argnums": "p"}, {"argnums": 1.5}, {"argnums": None}, {"argnums": (0, "x")},
        {"argnames": 3}, {"argnames": [0]},
    ],
)  # fmt: skip
def test_invalid_argnums_or_argnames_raise(options):
    (name,) = options
    with pytest.raises(ArgumentError, match=f"lora: {name}=.*; it must be one "):
        lora(model, **options)


def test_empty_argnums_or_a_non_function_raises():
    with pytest.raises(ArgumentError, match="so no argument is a pair"):
        lora(model, argnums=())
    with pytest.raises(ArgumentError, match="lora takes a function, not a str"):
        lora("model")  # pyright: ignore[reportArgumentType]


def test_positional_parameters_passed_by_name():
    adapters = pair()
    expected = lora(model)(adapters, X)
    assert equal(lora(model)(params=adapters, x=X), expected)
    assert equal(lora(lambda x, params: model(params, x), argnums=1)(X, params=adapters), expected)


def test_python_values_reach_the_function_unchanged():
    received = {}

    def fn(params, x, train, *, mode=None, act: Any = None, size=3, shape=None):
        received.update(train=train, mode=mode, act=act, size=size, shape=shape)
        return act(x @ params["w"])

    lora(fn)(pair(), X, True, mode="fast", act=jnp.tanh, shape=np.array([1, 2]))
    assert received["train"] is True and received["mode"] == "fast" and received["act"] is jnp.tanh
    assert received["size"] == 3 and isinstance(received["shape"], np.ndarray)


def test_outputs_keep_non_array_leaves():
    def fn(params, x):
        return {
            "y": x @ params["w"],
            "none": None,
            "name": "n",
            "f": jnp.tanh,
            "n": 3,
            "np": np.ones(2),
        }

    out = lora(fn)(pair(), X)
    assert out["none"] is None and out["name"] == "n" and out["f"] is jnp.tanh
    assert out["n"] == 3 and isinstance(out["np"], np.ndarray) and out["y"].shape == (3, 7)


def test_parameter_leaves_that_are_not_arrays():
    def fn(params, x):
        return params["act"](x @ params["w"]) * params["scale"]

    adapters = pair(act=jnp.tanh, scale=2.0)
    assert equal(lora(fn)(adapters, X), fn(merge_params(*adapters), X))


def test_numpy_parameters():
    frozen, tunable = pair(table=np.ones((4, 7), np.float32))
    frozen["w"] = np.asarray(frozen["w"])

    def fn(params, x, i):
        return x @ params["w"] + params["table"][i]

    i = jnp.array([0, 1, 2])
    assert equal(
        lora(fn)((frozen, tunable), X, i),
        fn(jax.tree.map(jnp.asarray, merge_params(frozen, tunable)), X, i),
    )


def test_argument_that_is_also_a_parameter_is_not_converted():
    table = np.ones((4, 7), np.float32)

    def fn(params, x, table):
        assert isinstance(table, np.ndarray) and isinstance(params["table"], jax.Array)
        return x @ params["w"] + table[0][None] + params["table"][:1]

    adapters = pair(table=table)
    expected = X @ merge_params(*adapters)["w"] + 2
    assert equal(lora(fn)(adapters, X, table), expected)


def test_typed_keys_pass_through():
    def fn(params, x, key):
        return x @ params["w"] + jax.random.normal(key, (1, 7)), key

    out, key = lora(fn)(pair(), X, jax.random.key(3))
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and out.shape == (3, 7)


def test_effects_happen_once():
    received = []

    def fn(params, x):
        jax.debug.callback(lambda v: received.append(float(v)), x.sum())
        return x @ params["w"]

    for run in (lora(fn), jax.jit(lora(fn))):
        received.clear()
        run(pair(), X)
        jax.effects_barrier()
        assert len(received) == 1


def test_closed_over_tracers():
    frozen, tunable = pair()

    def loss(function, params):
        return lambda s: jnp.sum(function(lambda p, x: s * model(p, x))(params, X))

    got = jax.grad(loss(lora, (frozen, tunable)))(2.0)
    assert equal(got, jax.grad(loss(lambda f: f, merge_params(frozen, tunable)))(2.0))


def test_full_parameters_are_used_and_differentiated():
    params = {"w": ones(5, 7), "b": ones(7)}
    frozen, tunable = init_lora(params, {"w": LORA_FREEZE, "b": LORA_FULL}, jax.random.key(0))
    grad = jax.grad(lambda t: lora(lambda p, x: x @ p["w"] + p["b"][None])((frozen, t), X).sum())(
        tunable
    )
    assert grad["w"] is None and equal(grad["b"], jnp.full(7, 3.0))


def test_without_adapters_the_program_is_the_original_one():
    frozen, _ = pair()
    plain = jax.make_jaxpr(model)(frozen, X)
    adapted = jax.make_jaxpr(lambda f, x: lora(model)((f, {"w": None}), x))(frozen, X)
    assert str(plain) == str(adapted)


@pytest.mark.parametrize("x", [X, jnp.stack([X, X + 1])], ids=["rows", "rows-of-rows"])
def test_zero_b_is_bit_identical_to_the_base_model(x):
    params = {"w": jax.random.normal(jax.random.key(0), (5, 7))}
    adapters = init_lora(params, {"w": 2}, jax.random.key(1))
    assert (jax.jit(lora(model))(adapters, x) == jax.jit(model)(params, x)).all()


# Tracing


def test_the_function_is_traced_once_per_call():
    calls = []

    def counted(params, x):
        calls.append(1)
        return model(params, x)

    for mode in ("warn", "allow", "error"):
        calls.clear()
        lora(counted, on_materialize=mode)(pair(), X)
        assert len(calls) == 1


def test_jitted_function_is_transformed_once_for_all_calls():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def stack(params, x):
        return functools.reduce(lambda x, w: layer(w, x), params, x)

    weights = [jax.random.normal(jax.random.key(k), (5, 5)) for k in range(6)]
    adapters = init_lora(weights, [2] * 6, jax.random.key(0), b_init="gaussian")
    text = jax.jit(lora(stack)).lower(adapters, X).as_text()
    assert text.count("func.func private @layer") == 1 and text.count("call @layer") == 6
    assert equal(lora(stack)(adapters, X), stack(merge_params(*adapters), X))


def test_jitted_function_is_transformed_only_by_the_first_eager_call(monkeypatch):
    runs = []
    run = Interpreter.run
    monkeypatch.setattr(Interpreter, "run", lambda *args: runs.append(1) or run(*args))
    layer = jax.jit(lambda w, x: x @ w)
    adapted = lora(lambda params, x: layer(params["w"], x))
    counts = []
    for seed in (0, 1):
        runs.clear()
        assert equal(adapted(pair(seed=seed), X), X @ merge_params(*pair(seed=seed))["w"])
        counts.append(len(runs))
    assert counts == [2, 1]  # the function and its jitted part, then the function alone


def test_uses_in_a_shared_function_are_reported_for_every_caller():
    @jax.jit
    def layer(w, x):
        return x @ jnp.sin(w)

    def stack(params, x):
        return functools.reduce(lambda x, w: layer(w, x), params, x)

    adapters = init_lora([ones(5, 5)] * 3, [2, 2, 2], jax.random.key(0))
    with pytest.raises(MaterializeError) as error:
        lora(stack, on_materialize="error")(adapters, X)
    assert [f"`{k}` is used by `sin`" in str(error.value) for k in range(3)] == [True] * 3


def test_scopes_and_lines_are_kept():
    def fn(params, x):
        with jax.named_scope("layer7"):
            return x @ params["w"]

    text = jax.jit(lora(fn)).lower(pair(), X).as_text(debug_info=True)
    assert "layer7/dot_general" in text and "layer7/lora/dot_general" in text
    line = inspect.getsourcelines(fn)[1] + 2
    assert f'{__file__}":{line}' in text


def test_scopes_and_lines_are_kept_in_gradients():
    def fn(params, x):
        with jax.named_scope("layer7"):
            return jnp.sin(x @ params["w"])

    frozen, tunable = pair()
    loss = lambda t: lora(fn)((frozen, t), X).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(tunable).as_text(debug_info=True)
    for name in ("jvp(layer7)/cos", "jvp(layer7)/lora/dot_general"):
        assert name in text
    assert "transpose(jvp(layer7))/lora/dot_general" in text
    line = inspect.getsourcelines(fn)[1] + 2
    assert f'{__file__}":{line}' in text


def test_equal_layers_share_the_trace_of_their_products(monkeypatch):
    products = []
    emit = _contract.contract
    monkeypatch.setattr(_contract, "contract", lambda *a, **k: products.append(1) or emit(*a, **k))

    def stack(params, x):
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x)

    weights = [ones(31, 31)] * 6  # a shape that no other test uses
    adapters = init_lora(weights, [2] * 6, jax.random.key(0))
    jax.make_jaxpr(lora(stack))(adapters, ones(3, 31))
    assert len(products) == 1


def test_reverse_mode_differentiates_equal_equations_once():
    derivatives = []
    scale = Primitive("scale")
    scale.def_abstract_eval(lambda x, *, by: x)

    @functools.partial(ad.primitive_jvps.__setitem__, scale)
    def _(primals, tangents, *, by):
        derivatives.append(1)
        return scale.bind(*primals, by=by), tangents[0] * by

    def stack(params, x):
        return functools.reduce(lambda x, w: scale.bind(x @ w, by=3.0), params, x).sum()

    frozen, tunable = init_lora([ones(5, 5)] * 4, [2] * 4, jax.random.key(0))
    jaxpr = jax.make_jaxpr(jax.grad(lambda t: lora(stack)((frozen, t), X)))(tunable)
    assert [e.primitive for e in jaxpr.jaxpr.eqns].count(scale) >= 3
    assert len(derivatives) == 1


def test_jit_keeps_its_name_and_donation():
    @functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
    def named(w, x, unused):
        return x @ w

    def fn(params, x, unused):
        return named(params["w"], x, unused)

    plain = jax.make_jaxpr(fn)({"w": ones(5, 5)}, ones(3, 5), ones(2)).eqns[0]
    adapted = jax.make_jaxpr(lora(fn))(pair((5, 5)), ones(3, 5), ones(2)).eqns[0]
    assert adapted.params["name"] == plain.params["name"] == "named"
    assert adapted.params["keep_unused"] is True
    assert sum(adapted.params["donated_invars"]) == 1
    donated = [
        v.aval.shape
        for v, is_donated in zip(adapted.invars, adapted.params["donated_invars"], strict=True)
        if is_donated
    ]
    assert donated == [(3, 5)]


# Under transformations


def losses(x=X):
    frozen, tunable = pair()
    return (
        tunable,
        lambda t: lora(model)((frozen, t), x).sum(),
        lambda t: model(merge_params(frozen, t), x).sum(),
    )


@pytest.mark.parametrize("x", [X, jnp.stack([X, X + 1])], ids=["rows", "rows-of-rows"])
@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        jax.jacrev,
        jax.jacfwd,
        lambda f: lambda t: jax.jvp(f, (t,), (jax.tree.map(jnp.ones_like, t),)),
        lambda f: lambda t: jax.linearize(f, t)[1](jax.tree.map(jnp.ones_like, t)),
        lambda f: lambda t: jax.jvp(jax.grad(f), (t,), (jax.tree.map(jnp.ones_like, t),)),
        jax.hessian,
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.jit(jax.value_and_grad(f)),
        lambda f: lambda t: jax.vmap(jax.grad(f))(jax.tree.map(lambda x: jnp.stack([x, -x]), t)),
    ],
    ids=["grad", "jacrev", "jacfwd", "jvp", "linearize", "hvp", "hessian", "remat", "jit", "vmap"],
)
def test_transformations_agree_with_the_merged_model(transform, x):
    tunable, adapted, merged = losses(x)
    got, expected = transform(adapted)(tunable), transform(merged)(tunable)
    assert all(map(equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


def test_vmap_over_adapters_keeps_one_base_product():
    frozen, tunable = pair()
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), tunable)
    run = jax.vmap(lora(model), in_axes=((None, 0), None))
    jaxpr = jax.make_jaxpr(run)((frozen, several), X)
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert shapes.count((3, 7)) == 1
    assert run((frozen, several), X).shape == (4, 3, 7)


def test_vmap_over_adapters_and_data():
    frozen, tunable = pair()
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tunable)
    out = jax.vmap(lora(model), in_axes=((None, 0), 0))((frozen, several), jnp.stack([X, X + 1]))
    second = model(merge_params(frozen, jax.tree.map(lambda leaf: 2 * leaf, tunable)), X + 1)
    assert equal(out[1], second)


def test_eval_shape_and_export():
    frozen, tunable = pair(rank=LoraSpec(2, alpha=3))
    assert jax.eval_shape(lora(model), (frozen, tunable), X).shape == (3, 7)
    exported = jax.export.export(jax.jit(lora(model)), platforms=["cpu", "cuda", "rocm", "tpu"])(
        (frozen, tunable), X
    )
    reloaded = jax.export.deserialize(exported.serialize())
    assert equal(reloaded.call((frozen, tunable), X), lora(model)((frozen, tunable), X))


# Precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_with_factors_run_in_the_dtype_of_the_model(dtype):
    frozen, tunable = pair(dtype=dtype)
    x = X.astype(dtype)
    assert tunable["w"].a.dtype == jnp.float32
    assert lora(model)((frozen, tunable), x).dtype == dtype
    jaxpr = jax.make_jaxpr(lora(model))((frozen, tunable), x)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(dtype)}
    grads = jax.grad(lambda t: lora(model)((frozen, t), x).astype(jnp.float32).sum())(tunable)
    assert grads["w"].a.dtype == grads["w"].b.dtype == jnp.float32


def test_an_integer_base_needs_no_special_case():
    def fn(params, x):
        return x @ (params["q"].astype(jnp.float32) * params["s"]) + x @ params["w"]

    frozen, tunable = pair(q=jnp.ones((5, 7), jnp.int8), s=ones(1, 7))
    grads = jax.grad(lambda t: lora(fn)((frozen, t), X).sum())(tunable)
    assert grads["q"] is None and grads["w"].a.any()


def test_an_8_bit_base_does_not_round_the_factors():
    frozen, tunable = pair((11, 7), dtype=jnp.float8_e4m3fn)
    exact = frozen["w"].astype(jnp.float32) + tunable["w"].a @ tunable["w"].b
    rows = lora(lambda p, i: p["w"][i].astype(jnp.bfloat16))((frozen, tunable), jnp.array([3, 1]))
    # One unit of rounding of bfloat16, where float8 itself would be off by 1/16.
    assert (
        jnp.abs(rows.astype(jnp.float32) - exact[jnp.array([3, 1])]).max()
        < 2**-7 * jnp.abs(exact).max()
    )


# Sharding


@pytest.mark.devices(4)
def test_explicit_mesh_keeps_the_sharding_of_the_base_product():
    from jax.sharding import AxisType, PartitionSpec as P

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (4, 6)), P("x", "y"))}
        adapters = init_lora(params, {"w": 2}, jax.random.key(0), b_init="gaussian")
        x = jax.device_put(ones(8, 4), P(None, "x"))

        def fn(params, x):
            return jnp.einsum("bi,io->bo", x, params["w"], out_sharding=P(None, "y"))

        got = jax.jit(lora(fn))(adapters, x)
        assert jax.typeof(got).sharding.spec == P(None, "y")
        assert equal(jax.device_get(got), jax.device_get(fn(merge_params(*adapters), x)))
        jax.jit(jax.grad(lambda t: lora(fn)((adapters[0], t), x).sum()))(adapters[1])


# Warnings and messages


def test_materialize_warning_names_the_weight_and_the_line():
    def fn(params, x):
        return x @ jnp.sin(params["w"])

    adapters = pair()
    line = inspect.getsourcelines(fn)[1] + 1
    with pytest.warns(MaterializeWarning) as caught:
        got = lora(fn)(adapters, X)
    (warning,) = caught
    for part in ("`w`", "`sin`", "(5, 7)", f"{__file__}:{line}", "merge_params", "LORA_FREEZE"):
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert equal(got, fn(merge_params(*adapters), X))


def test_error_mode_raises_before_the_function_runs():
    calls = []

    def fn(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return x @ jnp.sin(params["w"])

    with pytest.raises(MaterializeError, match="`w` is used by `sin`"):
        lora(fn, on_materialize="error")(pair(), X)
    jax.effects_barrier()
    assert not calls


def test_allow_mode_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora(lambda p, x: x @ jnp.sin(p["w"]), on_materialize="allow")(pair(), X)


def test_returned_weight_is_materialized_with_a_warning():
    adapters = pair()
    with pytest.warns(MaterializeWarning, match="`w` is returned by the function"):
        out = lora(lambda p, x: (x @ p["w"], p))(adapters, X)
    assert equal(out[1]["w"], merge_params(*adapters)["w"])


def test_unused_adapter_warns_or_raises():
    with pytest.warns(UnusedAdapterWarning, match="depends on the adapter of `w`"):
        lora(lambda p, x: x * 2)(pair(), X)
    with pytest.raises(UnusedAdapterError, match="`w`"):
        lora(lambda p, x: x * 2, on_unused="error")(pair(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora(lambda p, x: x * 2, on_unused="allow")(pair(), X)


@pytest.mark.parametrize("body", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_adapter_that_only_dead_code_reads_is_unused(body):
    def fn(params, x):
        body(lambda w, x: jnp.sin(x @ w))(jnp.cos(params["dead"]), x)
        return body(lambda p, x: (x @ jnp.cos(p["dead"]), x @ p["w"])[1])(params, x)

    params = {"w": ones(5, 7), "dead": ones(5, 7)}
    adapters = init_lora(params, {"w": 2, "dead": 2}, jax.random.key(0))
    # The cosine would materialize the weight if its result were used.
    with pytest.raises(UnusedAdapterError, match="depends on the adapter of `dead`"):
        lora(fn, on_materialize="error", on_unused="error")(adapters, X)


def test_an_adapter_that_only_an_effect_reads_is_used():
    received = []

    def fn(params, x):
        jax.debug.callback(lambda y: received.append(y.shape), x @ params["w"])
        return x

    lora(fn, on_unused="error")(pair(), X)
    jax.effects_barrier()
    assert received == [(3, 7)]


def test_unused_adapters_share_one_warning():
    adapters = init_lora([ones(5, 7)] * 11, [2] * 11, jax.random.key(0))
    with pytest.warns(UnusedAdapterWarning) as caught:
        lora(lambda p, x: x @ p[0])(adapters, X)
    (warning,) = caught
    assert "`1`, `2`" in str(warning.message) and "and 2 more" in str(warning.message)


@pytest.mark.parametrize("bad", ["loud", None, True])
def test_unknown_mode_raises(bad):
    with pytest.raises(ValueError, match="it must be 'warn', 'error' or 'allow'"):
        lora(model, on_materialize=bad)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({"w": ones(5, 7)}, X), r"argument 0 of model must be the pair \(frozen, tunable\)"),
        (((pair()[0], {"v": None}), X), "must both have the structure"),
        ((tuple(reversed(pair())), X), "argument 0 of model: frozen and tunable are swapped"),
        (((pair()[1], pair()[1]), X), "both trees have adapters"),
        (((pair()[0], {"w": ones(5, 7)}), X), "`w` is in frozen and in tunable"),
        ((), "the call has no such argument"),
    ],
)
def test_non_pair_raises(args, message):
    with pytest.raises(PairError, match=message):
        lora(model)(*args)


# Training


def test_optax_trains_only_the_tunable_tree():
    import optax

    frozen, tunable = init_lora(
        {"w": ones(5, 7), "v": ones(7)}, {"w": 2, "v": 0}, jax.random.key(0)
    )
    optimizer = optax.adam(0.05)
    state = optimizer.init(tunable)
    target = jax.random.normal(jax.random.key(3), (3, 7))

    @jax.jit
    def step(tunable, state):
        loss = lambda t: jnp.mean((lora(model)((frozen, t), X) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(tunable)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(tunable, updates), state, value

    values = []
    # optax itself mixes dtypes, which the tests' strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            tunable, state, value = step(tunable, state)
            values.append(float(value))
    assert values[-1] < 0.6 * values[0]
    # Two moments the size of the adapter, and a counter.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (5 * 2 + 2 * 7) + 1
