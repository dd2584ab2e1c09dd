"""The oracle must be able to fail: each of its checks gets a wrong rule."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lorax
from lorax import _transform, init_lora, testing
from lorax._factored import FactoredArray
from lorax._registry import RULES

PARAMS, X = {"w": jnp.ones((7, 5)) / 3}, jnp.ones((3, 7)) / 7


def model(params, x):
    return x @ params["w"]


def rule_returning(result):
    """A rule that claims to cover the product, and returns `result(eqn, x, w)`."""

    def run(eqn, x, w, **_):
        eqn.use(w, "product")
        return result(eqn, x, w)

    return run


@pytest.fixture
def replace_dot_rule(monkeypatch):
    """Replaces the rule for dot_general in the table that `lora` reads."""

    def replace(rule):
        (primitive,) = [p for p in RULES if p.name == "dot_general"]
        monkeypatch.setattr(_transform, "RULES", {**RULES, primitive: rule})

    return replace


def test_check_passes_a_correct_function():
    testing.check(model, PARAMS, {"w": 2}, X)


def test_check_fails_for_a_dropped_term(replace_dot_rule):
    replace_dot_rule(rule_returning(lambda eqn, x, w: eqn(x, w.base)))
    with pytest.raises(AssertionError, match="value and gradient, result 0: differs by"):
        testing.check(model, PARAMS, {"w": 2}, X)


def test_check_fails_for_a_wrong_gradient(replace_dot_rule):
    (primitive,) = [p for p in RULES if p.name == "dot_general"]

    def halt_a(eqn, x, w, **params):
        (term,) = w.terms
        a, b = term.factors
        term = dataclasses.replace(term, factors=(jax.lax.stop_gradient(a), b))
        return RULES[primitive](eqn, x, FactoredArray(w.base, (term,)), **params)

    replace_dot_rule(halt_a)
    with pytest.raises(AssertionError, match="value and gradient, result 1: differs by"):
        testing.check(model, PARAMS, {"w": 2}, X)


def test_check_fails_for_a_silently_materialized_weight(replace_dot_rule):
    replace_dot_rule(rule_returning(lambda eqn, x, w: eqn(x, w.array())))
    with pytest.raises(AssertionError, match=r"as arrays of these shapes: .*\(7, 5\)"):
        testing.check(model, PARAMS, {"w": 2}, X)


def test_check_fails_without_a_materialize_warning(replace_dot_rule):
    replace_dot_rule(rule_returning(lambda eqn, x, w: eqn(x, w.array())))
    with pytest.raises(AssertionError, match="without a MaterializeWarning"):
        testing.check(model, PARAMS, {"w": 2}, X, materializes=True)


def test_random_factors_have_no_zeros():
    _, tunable = init_lora(PARAMS, {"w": 2}, jax.random.key(0))
    assert not tunable["w"].b.any()
    drawn = testing.random_factors(tunable, jax.random.key(1))["w"]
    assert drawn.a.all() and drawn.b.all() and not jnp.allclose(drawn.a, tunable["w"].a)


@pytest.mark.parametrize(
    "platform, precision, passes",
    [
        ("cpu", None, False),
        ("gpu", None, True),
        ("tpu", None, True),
        ("tpu", "bfloat16", True),
        ("gpu", "highest", False),
        ("tpu", "float32", False),
    ],
)
def test_tolerance_allows_for_matrix_units_that_round(
    replace_dot_rule, monkeypatch, platform, precision, passes
):
    (primitive,) = [p for p in RULES if p.name == "dot_general"]
    replace_dot_rule(
        lambda eqn, x, w, **params: RULES[primitive](eqn, x, w, **params) * (1 + 2.0**-9)
    )
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with jax.default_matmul_precision(precision or "default"):
        if passes:
            testing.check(model, PARAMS, {"w": 2}, X, transforms=False)
        else:
            with pytest.raises(AssertionError, match="differs by"):
                testing.check(model, PARAMS, {"w": 2}, X, transforms=False)


FORMS = {
    "a Pair": lambda pair: (pair,),
    "a tuple": lambda pair: (tuple(pair),),
    "two trees": lambda pair: (pair.frozen, pair.tunable),
}


@pytest.mark.parametrize(
    "as_params", [lambda w, v: {0: w, 1: v}, lambda w, v: [w, v]], ids=["dict", "list"]
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_functions_of_a_model_take_a_pair_or_two_trees(as_params, form):
    params = as_params(jnp.ones((3, 2)), jnp.ones((4, 2)))
    pair = init_lora(params, as_params(1, lorax.LORA_FULL), jax.random.key(0))
    call = (*form(pair), jnp.ones((4, 3)))

    def model(params, x):
        return x @ params[0] + params[1]

    assert testing.weight_sized(model, *call) == {}
    assert [row.uses for row in lorax.explain(model, *call).rows] == [("dot_general",), ()]


@pytest.mark.parametrize("function", [testing.weight_sized, lorax.explain])
@pytest.mark.parametrize("given", [(), ({"w": jnp.ones((5, 3))},)], ids=["nothing", "another tree"])
def test_functions_of_a_model_reject_plain_parameters(function, given):
    params = {"w": jnp.ones((3, 2)), "v": jnp.ones(2)}
    with pytest.raises(lorax.PairError, match=r"must be the pair|the structure of the parameters"):
        function(lambda params, x: x @ params["w"], params, *given, jnp.ones((4, 3)))


def test_a_quantized_base_is_checked():
    params = lorax.quantize({"w": jnp.ones((32, 5)) / 3}, {"w": lorax.NF4(32)})
    x = jnp.ones((3, 32)) / 7
    testing.check(model, params, {"w": 2}, x)
    nonlinear = lambda params, x: x @ jnp.tanh(params["w"])  # noqa: E731
    testing.check(nonlinear, params, {"w": 2}, x, materializes=True)
    with pytest.raises(AssertionError, match="adapted weights are materialized"):
        testing.check(nonlinear, params, {"w": 2}, x)


def test_weight_sized_takes_adapters_of_a_single_call():
    frozen, tunable = init_lora(PARAMS, {"w": 2}, jax.random.key(0))
    bank = lorax.stack_adapters([tunable, tunable])
    nonlinear = lambda params, x: x @ jnp.tanh(params["w"])  # noqa: E731
    selected = lorax.select_adapters(bank, 1)
    dropped = lorax.with_dropout(tunable, jax.random.key(1), 0.5)
    for tree in (selected, dropped, lorax.mix_adapters(bank, jnp.ones(2))):
        assert testing.weight_sized(model, (frozen, tree), X) == {}
    for tree in (selected, dropped):
        assert (7, 5) in testing.weight_sized(nonlinear, (frozen, tree), X)


@pytest.mark.parametrize("spec", [2, lorax.LohaSpec(2)])
def test_an_empty_batch_passes(spec):
    testing.check(model, PARAMS, {"w": spec}, X[:0], transforms=False)
