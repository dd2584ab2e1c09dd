"""Registration with Flax's serialization, with a fake module (Flax: see integration-tests/)."""

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


def test_new_adapter_registers_its_class_once(flax):
    registered = {}
    make_weight()  # while Flax is being imported
    flax.is_serializable = registered.__contains__
    flax.register_serialization_state = lambda cls, to, from_: registered.update({cls: (to, from_)})
    flax.to_state_dict = flax.from_state_dict = lambda x, state=None, name=".": (
        x if state is None else state
    )
    weight = make_weight()
    assert list(registered) == [LoraWeight]
    to_state, from_state = registered[LoraWeight]
    assert to_state(weight) == {"a": weight.a, "b": weight.b}
    assert from_state(weight, {"a": "new a", "b": "new b"}) == LoraWeight("new a", "new b", 2)
    with pytest.raises(ValueError, match="factors a and b"):
        from_state(weight, {"a": 1})


def test_tree_map_registers_the_class_of_an_old_adapter(flax):
    del sys.modules["flax.serialization"]
    weight = make_weight()
    sys.modules["flax.serialization"] = flax
    registered = []
    flax.is_serializable = registered.__contains__
    flax.register_serialization_state = lambda cls, *_: registered.append(cls)
    jax.tree.map(lambda x: x, weight)
    assert registered == [LoraWeight]
