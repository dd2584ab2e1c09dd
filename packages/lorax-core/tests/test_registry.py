"""The rule table."""

import ast
import pathlib
from collections.abc import Iterator

import jax
import pytest

from lorax import _compat, _registry, rules
from lorax._registry import RULES, defrule

# What the oldest JAX lacks; the newest has them all.
SINCE_0_10 = {"stack", "tile", "unstack"}


def registered_names() -> Iterator[str]:
    """Every name that a rules file registers."""
    for path in pathlib.Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("def"):
                yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                yield from (str(e.value) for e in node.iter.elts if isinstance(e, ast.Constant))


def test_a_second_rule_for_a_primitive_is_an_error():
    with pytest.raises(ValueError, match="a rule for `dot_general` already"):
        defrule("dot_general")(lambda eqn, *operands: None)


def test_a_refused_rule_leaves_the_table_alone():
    before = dict(RULES)
    with pytest.raises(ValueError, match="already"):
        defrule("transpose")(lambda eqn, *operands: None)
    assert before == RULES


def test_a_primitive_that_this_jax_lacks_is_skipped():
    before = dict(RULES)
    defrule("no_such_primitive")(lambda eqn: None)
    assert before == RULES


@pytest.mark.parametrize("name", sorted(set(registered_names())))
def test_every_registered_name_is_a_primitive_with_a_rule(name):
    primitive = _compat.find_primitive(name)
    if primitive is None:
        assert name in SINCE_0_10, f"JAX {jax.__version__} has no primitive `{name}`"
        pytest.skip(f"JAX {jax.__version__} has no `{name}`")
    assert primitive in _registry.RULES


def test_the_table_covers_the_families():
    names = {primitive.name for primitive in RULES}
    assert {"dot_general", "conv_general_dilated", "gather", "reshape", "scan", "jit"} <= names
