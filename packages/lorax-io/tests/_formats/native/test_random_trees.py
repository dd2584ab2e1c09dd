"""Random trees are unchanged by a round trip through a native file."""

import json

import jax
from comparing import assert_same
from hypothesis import given, strategies as st
from random_files import (
    SEEDS,
    VALUES,
    base_of,
    examples,
    load_or_refuse,
    make_params,
    make_tunable,
    numbers,
    weights,
)

from lorax import LoraWeight
from lorax_io import (
    load_adapter,
    save_adapter,
)


@given(changes=st.dictionaries(st.sampled_from(("q", "v", "norm", "other")), VALUES, max_size=2))
@examples(60)
def test_random_native_settings_are_read_or_rejected(home, changes):
    tunable, file = make_tunable(), home / "settings.safetensors"
    save_adapter(file, tunable)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + size]), file.read_bytes()[8 + size :]
    settings = json.loads(header["__metadata__"]["lorax.adapter"])
    for name, value in changes.items():
        is_row = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = settings[name] | value if is_row else value
    header["__metadata__"]["lorax.adapter"] = json.dumps(settings)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    load_or_refuse(lambda: load_adapter(file, params=make_params()), tunable)


DTYPES = (
    "bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64"
    " float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
).split()


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


ARRAYS = st.builds(numbers, SEEDS, SHAPES, st.sampled_from(DTYPES))


def is_leaf(node):
    return isinstance(node, LoraWeight)


TREE_KEYS = st.text('abAB.{}%\u00e9\U0001f332 "\\\n', min_size=1, max_size=4)


TREES = st.recursive(
    st.one_of(ARRAYS, weights(), st.none()),
    lambda inner: st.one_of(
        st.dictionaries(TREE_KEYS, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=5,
)


@given(tree=TREES.filter(lambda tree: tree is not None))
@examples(120)
def test_random_trees_round_trip(home, tree):
    file = home / "tree.safetensors"
    save_adapter(file, tree)
    assert_same(load_adapter(file, like=tree), tree)
    params = jax.tree.map(base_of, tree, is_leaf=is_leaf)
    assert_same(load_adapter(file, params=params), tree)
