"""Adapters of a bank for each row: selected, mixed and interleaved, for every kind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    LORA_FULL,
    AdaloraSpec,
    ArgumentError,
    BdloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    LoraFASpec,
    LoraSpec,
    MissSpec,
    OftSpec,
    PairError,
    TokensSpec,
    VeraSpec,
    drop_adapter,
    init_lora,
    interleave_adapters,
    lora,
    merge_params,
    mix_adapters,
    select_adapters,
    set_adapter,
    stack_adapters,
    testing,
    unstack_adapters,
    with_dropout,
    with_scales,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def model(params, tokens):
    """A lookup, a scan over rematerialized layers, a tied head: one row of tokens."""

    @jax.checkpoint
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    x, _ = lax.scan(layer, params["table"][tokens], params["layers"])
    return x @ params["table"].T


with jax.enable_x64(True):
    PARAMS = {
        "table": random(0, 17, 6),
        "layers": {"up": random(1, 3, 6, 9) / 3, "down": random(2, 3, 9, 6) / 3},
    }
    TOKENS = jax.random.randint(jax.random.key(3), (5, 4), 0, 17)


def adapter(seed, rank, alpha=None, scaling: Any = "standard"):
    spec = {
        "table": LoraSpec(rank, alpha, scaling),
        "layers": dict.fromkeys(("up", "down"), LoraSpec(rank, alpha, scaling, shared_axes=[0])),
    }
    _, tunable = init_lora(PARAMS, spec, jax.random.key(0))
    return testing.random_factors(tunable, jax.random.key(seed))


def make_bank():
    without_up = adapter(3, 4)
    without_up["layers"]["up"] = None
    return stack_adapters(
        [adapter(1, 2, 0.3), adapter(2, 3, 2.0, "rslora"), without_up], slots=4, rank=4
    )


def test_each_row_has_its_own_adapter():
    bank = make_bank()
    index = jnp.array([2, 0, -1, 1, 0])
    row = lambda tokens, k: lora(model)((PARAMS, select_adapters(bank, k)), tokens)  # noqa: E731
    output = jax.jit(jax.vmap(row))(TOKENS, index)
    unstacked = unstack_adapters(bank)
    for k, (tokens, slot) in enumerate(zip(TOKENS, index, strict=True)):
        params = PARAMS if slot < 0 else merge_params(PARAMS, unstacked[slot])
        np.testing.assert_allclose(output[k], model(params, tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", ["eager", "inside"])
def test_index_without_an_adapter_is_bit_identical_to_the_base(where):
    bank = make_bank()
    run = lambda k: lora(model)((PARAMS, select_adapters(bank, k)), TOKENS[0])  # noqa: E731
    wanted = model(PARAMS, TOKENS[0])
    if where == "eager":
        np.testing.assert_array_equal(run(-1), wanted)
        np.testing.assert_array_equal(run(3), wanted)  # an empty slot
    else:
        wanted = jax.jit(model)(PARAMS, TOKENS[0])
        for k in (-1, -2, 4, 100):
            np.testing.assert_allclose(jax.jit(run)(jnp.asarray(k)), wanted, rtol=1e-13, atol=1e-13)


def test_nan_in_one_slot_does_not_reach_the_others():
    bank = set_adapter(make_bank(), 1, jax.tree.map(lambda x: x * jnp.nan, adapter(2, 3)))
    run = lambda k: lora(model)((PARAMS, select_adapters(bank, k)), TOKENS[0])  # noqa: E731
    assert jnp.isfinite(run(0)).all() and jnp.isfinite(run(-1)).all() and jnp.isnan(run(1)).any()


def test_the_base_has_one_product_for_all_rows():
    bank = make_bank()
    head = lambda params, x: x @ params["table"].T  # noqa: E731

    def row(x, k):
        tunable = select_adapters(bank, k)
        only = {"table": tunable["table"], "layers": {"up": None, "down": None}}
        return lora(head)((PARAMS, only), x)

    jaxpr = jax.make_jaxpr(jax.vmap(row))(random(5, 8, 6), jnp.zeros(8, int))
    base = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general"
        and any(v.aval.shape in ((6, 17), (17, 6)) for v in eqn.invars)
    ]
    assert len(base) == 1
    # Rows are a free axis of the product, not a batch axis.
    assert base[0].params["dimension_numbers"][1] == ((), ())


def test_a_bank_is_swapped_without_compiling_again():
    bank = make_bank()
    traces = []

    def row(bank, tokens, k):
        traces.append(k)
        return lora(model)((PARAMS, select_adapters(bank, k)), tokens)

    step = jax.jit(jax.vmap(row, in_axes=(None, 0, 0)))
    first = step(bank, TOKENS, jnp.zeros(5, int))
    other = set_adapter(bank, 0, adapter(9, 4, 7.0))
    second = step(other, TOKENS, jnp.zeros(5, int))
    assert len(traces) == 1
    assert not jnp.allclose(first, second)
    wanted = jax.vmap(lambda t: model(merge_params(PARAMS, adapter(9, 4, 7.0)), t))(TOKENS)
    np.testing.assert_allclose(second, wanted, rtol=1e-6, atol=1e-6)


def test_mixture_with_one_weight_is_that_adapter():
    bank = make_bank()
    index = jnp.array([2, 0, -1, 1, 0])

    def row(tokens, k):
        return lora(model)((PARAMS, mix_adapters(bank, jax.nn.one_hot(k, 4))), tokens)

    def same(tokens, k):
        return lora(model)((PARAMS, select_adapters(bank, k)), tokens)

    mixed, wanted = (jax.vmap(fn)(TOKENS, index) for fn in (row, same))
    np.testing.assert_allclose(mixed, wanted, rtol=1e-9, atol=1e-9)


def test_mixture_weights_have_gradients():
    bank = make_bank()
    weights = random(9, 4)
    unstacked = unstack_adapters(bank)

    def loss(weights):
        return lora(model)((PARAMS, mix_adapters(bank, weights)), TOKENS[0]).sum()

    def merged(weights):
        zero = jax.tree.map(jnp.zeros_like, PARAMS)
        deltas = [merge_params(zero, tree) for tree in unstacked[:3]]
        params = jax.tree.map(
            lambda base, *each: base + sum(w * d for w, d in zip(weights, each, strict=False)),
            PARAMS,
            *deltas,
        )
        return model(params, TOKENS[0]).sum()

    np.testing.assert_allclose(loss(weights), merged(weights), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(weights), jax.grad(merged)(weights), rtol=1e-5)


def test_interleaved_bank_gives_the_same_mixture():
    bank = make_bank()
    index = jnp.array([2, 0, -1, 1, 0])

    def outputs(bank):
        def row(tokens, k):
            return lora(model)((PARAMS, mix_adapters(bank, jax.nn.one_hot(k, 4))), tokens)

        return jax.vmap(row)(TOKENS, index)

    interleaved = interleave_adapters(bank)
    assert interleaved.tunable["table"].a.shape == (17, 4, 4)
    assert interleaved.tunable["layers"]["up"].a.shape == (3, 6, 4, 4)
    np.testing.assert_allclose(outputs(interleaved), outputs(bank), rtol=1e-9, atol=1e-12)
    compiled: Any = jax.jit(outputs)
    compiled(interleaved)
    other = set_adapter(bank, 0, adapter(9, 4, 7.0))
    swapped = compiled(interleave_adapters(other))
    assert compiled._cache_size() == 1
    np.testing.assert_allclose(swapped, outputs(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["miss", "vera"])
def test_interleaving_other_kinds_changes_nothing(kind):
    frozen, _, bank = kind_bank(kind)
    x, weights = random(1, 4, 10), jnp.array([0.3, 0.0, -0.7])
    one, two = (
        lora(dense)((frozen, mix_adapters(each, weights)), x)
        for each in (bank, interleave_adapters(bank))
    )
    np.testing.assert_array_equal(one, two)


def test_interleaved_bank_can_only_be_mixed():
    bank = interleave_adapters(make_bank())
    for call in (
        lambda: select_adapters(bank, 0),  # pyright: ignore[reportArgumentType]
        lambda: set_adapter(bank, 0, {}),  # pyright: ignore[reportArgumentType]
        lambda: unstack_adapters(bank),  # pyright: ignore[reportArgumentType]
        lambda: interleave_adapters(bank),  # pyright: ignore[reportArgumentType]
        lambda: mix_adapters({}, jnp.ones(4)),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match="_adapters? takes a bank, as `stack_adapters` returns"):
            call()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a count of XLA on the CPU")
def test_decoding_with_an_interleaved_bank_copies_no_factor():
    """64 rows of one token, and 16 adapters of rank 16."""
    params = {"w": jnp.zeros((2048, 1024), jnp.float32)}
    spec = {"w": 16}
    trees = [init_lora(params, spec, jax.random.key(k)).tunable for k in range(16)]
    bank, index = stack_adapters(trees), jnp.arange(64) % 16
    x = jnp.zeros((64, 2048), jnp.float32)
    run = lora(lambda params, x: x @ params["w"])

    def bytes_accessed(row, *more):
        compiled = jax.jit(jax.vmap(row, in_axes=(None, 0, 0, None))).lower(params, x, index, *more)
        analysis: Any = compiled.compile().cost_analysis()
        return analysis["bytes accessed"]

    def mixed(params, x, k, bank):
        weights = jax.nn.one_hot(k, 16, dtype=jnp.float32)
        return run((params, mix_adapters(bank, weights)), x)

    # A copy is written, and read again.
    copied = bytes_accessed(mixed, bank) - bytes_accessed(mixed, interleave_adapters(bank))
    assert copied >= 2 * bank.tunable["w"].a.nbytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a count of XLA on the CPU")
def test_rows_grouped_by_adapter_move_the_base_and_the_factors_once():
    """64 rows of one token, four for each of 16 adapters of rank 16 with their own scales."""
    params = {"w": jnp.zeros((2048, 1024), jnp.float32)}
    spec = {"w": LoraSpec(16, alpha=3)}
    trees = [init_lora(params, spec, jax.random.key(k)).tunable for k in range(16)]
    bank, x = stack_adapters(trees), jnp.zeros((16, 4, 2048), jnp.float32)
    run = lora(lambda params, x: x @ params["w"])

    def grouped(params, bank, x):
        def of_slot(tunable, scales, rows):
            pair = (params, with_scales(tunable, scales))
            return jax.vmap(lambda row: run(pair, row))(rows)

        return jax.vmap(of_slot)(bank.tunable, bank.scales, x)

    analysis: Any = jax.jit(grouped).lower(params, bank, x).compile().cost_analysis()
    inputs = sum(leaf.nbytes for leaf in jax.tree.leaves((params, bank.tunable)))
    # A scaled copy of one factor would add at least twice its 1 MiB. The rest are rows.
    assert inputs < analysis["bytes accessed"] < inputs + bank.tunable["w"].b.nbytes + 6 * x.nbytes
    assert analysis["flops"] <= 1.1 * 2 * 64 * (2048 * 1024 + 16 * (2048 + 1024))


def test_cost_of_rows_with_mixed_adapters():
    """No factor is gathered for a mixture; where rows are long, gathering costs no FLOPs."""
    params = {"w": jnp.zeros((256, 192), jnp.float32)}
    trees = [init_lora(params, {"w": 4}, jax.random.key(k)).tunable for k in range(4)]
    bank, index = stack_adapters(trees), jnp.arange(8) % 4
    run = lora(lambda params, x: x @ params["w"])

    def flops(pick, tokens):
        x = jnp.zeros((8, tokens, 256), jnp.float32)
        row = lambda x, k: run((params, pick(k)), x)  # noqa: E731
        analysis: Any = jax.jit(jax.vmap(row)).lower(x, index).compile().cost_analysis()
        return analysis["flops"]

    one = flops(lambda k: trees[0], 256)
    assert flops(lambda k: select_adapters(bank, k), 256) <= 1.001 * one
    mix = jax.make_jaxpr(
        jax.vmap(
            lambda x, k: run((params, mix_adapters(bank, jax.nn.one_hot(k, 4))), x),
            in_axes=(0, 0),
        )
    )(jnp.zeros((8, 1, 256), jnp.float32), index)
    # A factor of one adapter has 1024 entries, and those of all rows 8 times as many.
    assert max(v.aval.size for eqn in mix.eqns for v in eqn.outvars) < 8 * 1024


def test_adapters_trained_together_equal_adapters_trained_alone():
    """One step for four adapters of different ranks, scales and rates equals a step for each."""
    trees = [adapter(1, 2, 0.3), adapter(2, 3, 2.0, "rslora"), adapter(3, 4), adapter(4, 1, 5.0)]
    bank = stack_adapters(trees)
    rates = jnp.array([0.1, 0.02, 0.3, 0.05])
    batches = jax.random.randint(jax.random.key(8), (3, 4, 2, 4), 0, 17)  # [steps, slots, rows, 4]

    def loss(tunable, rows, scales=None):
        if scales is not None:
            tunable = with_scales(tunable, scales)
        out = jax.vmap(lambda row: lora(model)((PARAMS, tunable), row))(rows)
        return jnp.mean(jax.nn.log_softmax(out)[..., 0])

    def step(tunable, rows, rate, scales=None):
        grads = jax.grad(loss)(tunable, rows, scales)
        return jax.tree.map(lambda x, g: x - rate * g, tunable, grads)

    together = jax.jit(jax.vmap(step))
    tunable = bank.tunable
    for rows in batches:
        tunable = together(tunable, rows, rates, bank.scales)
    trained = unstack_adapters(dataclasses.replace(bank, tunable=tunable))
    one_by_one = jax.jit(step)
    for k, tree in enumerate(trees):
        for rows in batches:
            tree = one_by_one(tree, rows[k], rates[k])
        for one, two in zip(jax.tree.leaves(trained[k]), jax.tree.leaves(tree), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
    # The padding is still zero.
    assert not tunable["table"].a[3, :, 1:].any() and not tunable["table"].b[3, 1:].any()


def test_scales_get_no_gradient():
    bank = make_bank()

    def loss(scales, tunable):
        return lora(model)((PARAMS, with_scales(tunable, scales)), TOKENS[0]).sum()

    row = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
    grads = jax.grad(loss)(row(bank.scales), row(bank.tunable))
    assert all(grad == 0 for grad in grads.values())


def test_selected_adapter_with_dropout():
    bank = make_bank()
    run = lambda k: lora(model)(  # noqa: E731
        (PARAMS, with_dropout(select_adapters(bank, k), jax.random.key(0), 0.5)), TOKENS[0]
    )
    assert not jnp.allclose(run(0), lora(model)((PARAMS, select_adapters(bank, 0)), TOKENS[0]))
    np.testing.assert_array_equal(run(-1), model(PARAMS, TOKENS[0]))


# A spec of each kind, whose adapters are stacked.
KINDS = {
    "lora-fa": LoraFASpec(2, 4.0),
    "dora": DoraSpec(LoraSpec(2, 4.0)),
    "dora-of-lora-fa": DoraSpec(LoraFASpec(2)),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "vera": VeraSpec(3),
    "adalora": AdaloraSpec(2, 4.0),
    "delora": DeloraSpec(2),
    "loha": LohaSpec(2),
    "lokr": LokrSpec(1, factor=2),
    "locon": LoconSpec(2),
    "miss": MissSpec(5),
    "miss-remainder": MissSpec(4),
    "gralora": GraloraSpec(2, blocks=2),
    "bdlora": BdloraSpec(2, blocks=2),
    "oft": OftSpec(5),
    "oft-bound": OftSpec(2, "out", eps=0.4),
    "tokens": TokensSpec([7, 2, 3]),
}
WITH_DELTA = {kind for kind in KINDS if not kind.startswith(("dora", "ia3", "oft"))}


def kind_bank(kind):
    """Three adapters, their bank, and the frozen tree of all of them."""
    params = {"w": random(0, 10, 12)}
    frozen, tunable = init_lora(params, {"w": KINDS[kind]}, jax.random.key(0))
    trees = [testing.random_factors(tunable, jax.random.key(k)) for k in range(3)]
    return frozen, trees, stack_adapters(trees)


def dense(params, x):
    return jnp.tanh(x @ params["w"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_own_adapter_for_every_kind(kind):
    frozen, trees, bank = kind_bank(kind)
    x, index = random(1, 5, 10), jnp.array([2, 0, -1, 1, 2])
    adapted = lora(dense, on_materialize="error")

    def rows(tunable):
        of_bank = dataclasses.replace(bank, tunable=tunable)
        row = lambda x, k: adapted((frozen, select_adapters(of_bank, k)), x)  # noqa: E731
        return jax.vmap(row)(x, index)

    def one_by_one(trees):
        base = dense({"w": getattr(frozen["w"], "base", frozen["w"])}, x[2])
        rows = [adapted((frozen, trees[k]), x[r]) if k >= 0 else base
                for r, k in enumerate(index.tolist())]  # fmt: skip
        return jnp.stack(rows)

    np.testing.assert_allclose(rows(bank.tunable), one_by_one(trees), rtol=1e-9, atol=1e-12)
    actual = jax.grad(lambda tunable: jnp.sin(rows(tunable)).sum())(bank.tunable)
    wanted = jax.grad(lambda trees: jnp.sin(one_by_one(trees)).sum())(trees)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *wanted)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)
    step = jax.make_jaxpr(jax.grad(lambda tunable: jnp.sin(rows(tunable)).sum()))(bank.tunable)
    assert largest_size(step.jaxpr) < 5 * 10 * 12


def largest_size(jaxpr):
    """The largest size of an equation's results, in nested bodies too."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    bodies = [
        getattr(body, "jaxpr", body)
        for eqn in jaxpr.eqns
        for body in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        if hasattr(body, "eqns")
    ]
    return max([0, *sizes, *map(largest_size, bodies)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_adapter_is_bit_identical_to_the_base_for_every_kind(kind):
    frozen, _, bank = kind_bank(kind)
    x = random(1, 4, 10)
    wanted = dense({"w": getattr(frozen["w"], "base", frozen["w"])}, x)
    actual = lora(dense)((frozen, select_adapters(bank, -1)), x)
    np.testing.assert_array_equal(actual, wanted)
    if kind in ("tokens", "dora", "dora-of-lora-fa"):
        with pytest.raises(PairError, match="would have to be those of the base"):
            drop_adapter(bank, 1)
        return
    actual = lora(dense)((frozen, select_adapters(drop_adapter(bank, 1), 1)), x)
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("kind", sorted(WITH_DELTA))
def test_mixture_weighs_the_deltas_for_every_kind(kind):
    frozen, trees, bank = kind_bank(kind)
    x, weights = random(1, 4, 10), jnp.array([0.3, 0.0, -0.7])
    base = getattr(frozen["w"], "base", frozen["w"])
    deltas = [merge_params(frozen, tree)["w"] - base for tree in trees]
    wanted = x @ (base + sum(w * d for w, d in zip(weights, deltas, strict=True)))
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    actual = lora(linear, on_materialize="error")((frozen, mix_adapters(bank, weights)), x)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - WITH_DELTA))
def test_mixture_of_kinds_without_a_delta_raises(kind):
    _, _, bank = kind_bank(kind)
    with pytest.raises(PairError, match="adapters at `w`, which have no delta .* jax.vmap"):
        mix_adapters(bank, jnp.ones(3))


def test_invalid_arguments_raise():
    bank = make_bank()
    for k in (-2, 4):
        with pytest.raises(IndexError, match=f"no slot {k}; .* 0 to 3, and -1 is the base"):
            select_adapters(bank, k)
    for k in (1.0, jnp.array([0, 1]), "1"):
        with pytest.raises(TypeError, match=r"scalar integer|not a valid JAX type|dtype"):
            select_adapters(bank, k)
    params = {"w": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    other = init_lora(params, {"w": 2, "bias": LORA_FULL}, jax.random.key(0)).tunable
    for call in (select_adapters, mix_adapters):
        argument = 0 if call is select_adapters else jnp.ones(1)
        with pytest.raises(PairError, match="full parameters at `bias`.*jax.vmap"):
            call(stack_adapters([other]), argument)
    for weights in (jnp.ones(3), jnp.ones((5, 4)), jnp.ones(4, int)):
        with pytest.raises(ValueError, match="one for each of the 4 slots"):
            mix_adapters(bank, weights)
    with pytest.raises(PairError, match="no adapter at `other`"):
        with_scales(bank.tunable, bank.scales | {"other": jnp.ones(4)})
    for call in (select_adapters, mix_adapters):
        with pytest.raises(ArgumentError, match=f"{call.__name__}: .* cannot be None"):
            call(bank, None)
    for scales in ([1.0], None, jnp.ones(3), {"w": "2"}):
        with pytest.raises(ArgumentError, match="with_scales.* not an? "):
            with_scales(other, scales)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PairError, match="no adapter at `bias`"):
        with_scales(other, {"bias": jnp.ones(())})
    # Over the slots, scales are vectors, which is an error without `jax.vmap`.
    scaled = with_scales(other, {"w": jnp.ones(2)})
    with pytest.raises(
        ArgumentError, match=r"at `w` has shape \(2,\), but an adapter has a single"
    ):
        lora(lambda p, x: x @ p["w"])(({"w": params["w"], "bias": None}, scaled), jnp.ones((2, 6)))


@pytest.mark.parametrize("how", ["select", "mix"])
# Rows of tokens, and those that a remainder of MiSS repeats, are looked up: data, to the oracle.
@pytest.mark.parametrize("kind", sorted(WITH_DELTA - {"tokens", "miss-remainder"}))
def test_oracle_finds_the_weight_that_a_bank_materializes(kind, how):
    frozen, _, bank = kind_bank(kind)
    tunable = (
        select_adapters(bank, 1) if how == "select" else mix_adapters(bank, random(2, bank.slots))
    )
    x = random(1, 4, 10)
    assert testing.weight_sized(dense, frozen, tunable, x) == {}
    materializing = lambda params, x: x @ jnp.tanh(params["w"])  # noqa: E731
    assert (10, 12) in testing.weight_sized(materializing, frozen, tunable, x)
