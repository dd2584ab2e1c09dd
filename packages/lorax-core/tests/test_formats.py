"""What needs Flax itself is in integration-tests/; here another module is in its place."""

import sys
import types

import jax
import numpy as np
import pytest

from lorax import LoraWeight


def make_weight():
    return LoraWeight(np.ones((3, 2)), np.ones((2, 5)), 2)


@pytest.fixture
def flax(monkeypatch):
    module = types.ModuleType("flax.serialization")
    monkeypatch.setitem(sys.modules, "flax.serialization", module)
    return module


def test_a_new_adapter_is_made_known_once(flax):
    known = {}
    make_weight()  # while Flax is being imported
    flax.is_serializable = known.__contains__
    flax.register_serialization_state = lambda cls, to, from_: known.update({cls: (to, from_)})
    flax.to_state_dict = flax.from_state_dict = lambda x, state=None, name=".": (
        x if state is None else state
    )
    weight = make_weight()
    assert list(known) == [LoraWeight]
    to_state, from_state = known[LoraWeight]
    assert to_state(weight) == {"a": weight.a, "b": weight.b}
    assert from_state(weight, {"a": "new a", "b": "new b"}) == LoraWeight("new a", "new b", 2)
    with pytest.raises(ValueError, match="factors a and b"):
        from_state(weight, {"a": 1})


def test_an_old_adapter_is_made_known_by_its_next_tree_map(flax):
    del sys.modules["flax.serialization"]
    weight = make_weight()
    sys.modules["flax.serialization"] = flax
    known = []
    flax.is_serializable = known.__contains__
    flax.register_serialization_state = lambda cls, *_: known.append(cls)
    jax.tree.map(lambda x: x, weight)
    assert known == [LoraWeight]
