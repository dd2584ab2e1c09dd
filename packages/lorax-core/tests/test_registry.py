"""The table of rules, and equations that a newer JAX has changed."""

import ast
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lorax
from lorax import (
    MaterializeError,
    MaterializeWarning,
    _compat,
    _registry,
    _transform,
    init_lora,
    merge_params,
    rules,
    testing,
)
from lorax._registry import RULES, defrule, unfit

# Primitives that the oldest supported JAX does not have.
SINCE_0_10 = {"stack", "tile", "unstack"}


def registered_names() -> Iterator[str]:
    """Every name that a rules file registers."""
    for path in pathlib.Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("def"):
                yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                yield from (str(e.value) for e in node.iter.elts if isinstance(e, ast.Constant))


def test_a_second_rule_for_a_primitive_raises():
    with pytest.raises(ValueError, match="`dot_general` already has a rule"):
        defrule("dot_general")(lambda eqn, *operands: None)


def test_rejected_rule_leaves_the_table_unchanged():
    before = dict(RULES)
    with pytest.raises(ValueError, match="already"):
        defrule("transpose")(lambda eqn, *operands: None)
    assert before == RULES


def test_a_primitive_that_this_jax_lacks_is_skipped():
    before = dict(RULES)
    defrule("no_such_primitive")(lambda eqn: None)
    assert before == RULES


@pytest.mark.parametrize("name", sorted(set(registered_names())))
def test_every_registered_name_is_a_primitive_with_a_rule_or_a_reason(name):
    primitive = _compat.find_primitive(name)
    if primitive is None:
        assert name in SINCE_0_10, f"JAX {jax.__version__} has no primitive `{name}`"
        pytest.skip(f"JAX {jax.__version__} has no `{name}`")
    assert (primitive in _registry.RULES) != (primitive in _registry.REASONS)


def test_every_family_of_rules_is_registered():
    names = {primitive.name for primitive in RULES}
    assert {"dot_general", "conv_general_dilated", "gather", "reshape", "scan", "jit"} <= names


# Parameters that a rule does not name


@pytest.mark.parametrize("primitive", RULES, ids=lambda primitive: primitive.name)
def test_every_rule_names_its_parameters(primitive):
    kinds = {p.kind for p in inspect.signature(RULES[primitive]).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def toy_rule(eqn, weight, *, axis, mode=None): ...


def test_rule_fits_an_equation_with_the_parameters_that_it_names():
    assert unfit(toy_rule, 1, {"axis": 0}) == unfit(toy_rule, 1, {"axis": 0, "mode": 1}) == ""


@pytest.mark.parametrize(
    "operands, parameters, differences",
    [
        (1, ["axis", "twist"], "the parameter `twist`"),
        (1, ["mode"], "no parameter `axis`"),
        (1, ["axes"], "the parameter `axes` and no parameter `axis`"),
        (2, ["axis"], "2 operands"),
    ],
)
def test_rule_mismatch_names_both_versions(operands, parameters, differences):
    assert unfit(toy_rule, operands, parameters) == (
        f"has {differences} in JAX {jax.__version__}, unlike what lorax-core "
        f"{lorax.__version__} was written for"
    )


def shard_mapped(w, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, x)


# For each kind of rule a parameter, and a program with that primitive.
PROGRAMS = {
    "transpose": ("permutation", lambda w, x: x @ w.T.T),
    "reduce_precision": ("mantissa_bits", lambda w, x: x @ lax.reduce_precision(w, 8, 23)),
    "broadcast_in_dim": ("sharding", lambda w, x: (x[None] @ w[None])[0]),
    "dot_general": ("precision", lambda w, x: x @ w),
    "conv_general_dilated": ("padding", lambda w, x: lax.conv(x[..., None], w.T[..., None], (1,),
                                                              "SAME")[..., 0]),
    "gather": ("mode", lambda w, x: x.T @ w[jnp.arange(3)]),
    "jit": ("inline", lambda w, x: jax.jit(lambda w, x: x @ w)(w, x)),
    "remat": ("policy", lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x)),
    "scan": ("unroll", lambda w, x: lax.scan(lambda c, x: (c, x @ w), 0, x)[1]),
    "while": ("body_nconsts", lambda w, x: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, x @ w), (0, x @ w))[1]),
    "cond": ("branches", lambda w, x: lax.cond(
        x.sum() > 0, lambda: x @ w, lambda: jnp.sin(x @ w))),
    "shard_map": ("check_vma", shard_mapped),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_equation_with_a_new_parameter_materializes_and_warns(monkeypatch, name):
    parameter, fn = PROGRAMS[name]
    primitive = _compat.find_primitive(name)
    assert primitive is not None

    @functools.wraps(RULES[primitive])
    def older_rule(*operands, **params):
        return RULES[primitive](*operands, **params)

    signature = inspect.signature(RULES[primitive])
    kept = [p for p in signature.parameters.values() if p.name != parameter]
    assert len(kept) == len(signature.parameters) - 1
    older_rule.__signature__ = signature.replace(parameters=kept)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(_transform, "RULES", {**RULES, primitive: older_rule})

    model, x = (lambda p, x: fn(p["w"], x)), jnp.ones((3, 5)) / 3
    frozen, tunable = init_lora({"w": jnp.ones((5, 7)) / 5}, {"w": 2}, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    reason = re.escape(
        f"which has the parameter `{parameter}` in JAX {jax.__version__}, unlike what"
    )
    with pytest.warns(MaterializeWarning, match=rf"`w` is used by `{primitive.name}` .*{reason}"):
        got = jax.jit(lorax.lora(model))((frozen, tunable), x)
    assert jnp.allclose(got, model(merge_params(frozen, tunable), x), rtol=1e-5, atol=1e-6)
    with pytest.raises(MaterializeError, match=reason):
        lorax.lora(model, on_materialize="error")((frozen, tunable), x)


def test_scan_without_carry_count_materializes_the_weight(monkeypatch):
    def split(params):
        raise KeyError("num_consts")

    monkeypatch.setattr(_compat, "scan_split", split)
    fn = PROGRAMS["scan"][1]
    pair = init_lora({"w": jnp.ones((5, 7)) / 5}, {"w": 2}, jax.random.key(0))
    with pytest.warns(MaterializeWarning, match="`scan` .* has no parameter 'num_consts' in JAX"):
        got = lorax.lora(lambda p, x: fn(p["w"], x))(pair, jnp.ones((3, 5)))
    assert jnp.allclose(got, 1.0)
