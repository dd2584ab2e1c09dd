"""Random files, configs, trees and layouts: what is loaded is what was saved, or it is refused."""

import dataclasses
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

import lorax
from lorax import LoraWeight
from lorax_io import (
    AdapterError,
    AdapterWarning,
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Tensor,
    load_adapter,
    load_frozen,
    load_peft,
    save_adapter,
    save_frozen,
    save_peft,
)


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


NAMES = {
    "q": Linear("layers.0.q_proj"),
    "v": Linear("layers.{}.v_proj", shared_axes=(0,)),
    "norm": Tensor("norm", parameter="weight"),
}


def make_params():
    return {"q": np.ones((5, 3)), "v": np.ones((2, 5, 3)), "norm": np.ones(3, np.float32)}


def make_tunable():
    q = LoraWeight(numbers(0, (5, 2)), numbers(1, (2, 3)), rank=2, alpha=3)
    v = LoraWeight(
        numbers(2, (2, 5, 2), "bfloat16"),
        numbers(3, (2, 2, 3), "bfloat16"),
        rank=2,
        scaling="rslora",
        in_axes=(1,),
        out_axes=(2,),
        shared_axes=(0,),
    )
    return {"q": q, "v": v, "norm": numbers(4, (3,))}


def numbers(seed, shape, dtype="float32"):
    """Numbers of random bits, of which none is NaN or infinite."""
    dtype, size = jnp.dtype(dtype), math.prod(shape)
    random = np.random.default_rng(seed)
    if dtype == np.bool_:
        return random.integers(2, size=shape).astype(bool)
    array = random.integers(256, size=size * dtype.itemsize, dtype=np.uint8).view(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        with np.errstate(invalid="ignore"):
            array[~np.isfinite(array)] = 1
    return array.reshape(shape)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def assert_alike(left, right):
    """The same paths and shapes."""
    shapes = [jax.tree_util.tree_leaves_with_path(jax.tree.map(np.shape, t)) for t in (left, right)]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


class Damage:
    """Changes to the bytes of a file, most of them in its header."""

    edit = st.tuples(
        st.sampled_from(("flip", "set", "insert", "delete", "cut", "repeat")),
        st.one_of(st.integers(0, 700), st.integers(0, 2**20), st.integers(-40, -1)),
        st.integers(0, 255),
        st.integers(1, 9),
    )
    edits = st.lists(edit, min_size=1, max_size=3)

    @staticmethod
    def apply(data, edits):
        for kind, place, value, count in edits:
            k = place % max(len(data), 1)
            part = data[k : k + count]
            flipped = bytes(x ^ (1 << value % 8) for x in data[k : k + 1])
            data = {
                "flip": data[:k] + flipped + data[k + 1 :],
                "set": data[:k] + bytes([value]) + data[k + 1 :],
                "insert": data[:k] + bytes([value]) * count + data[k:],
                "delete": data[:k] + data[k + count :],
                "cut": data[:k],
                "repeat": data[:k] + part + data[k:],
            }[kind]
        return data


def load_or_refuse(load, expected):
    """Loads what is like `expected`, or raises the one error type; no other, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        try:
            loaded = load()
        except AdapterError:
            return
    assert_alike(loaded, expected)


@given(edits=Damage.edits)
@examples(250)
def test_a_damaged_native_file(home, edits):
    tunable, file = make_tunable(), home / "sound.safetensors"
    if not file.exists():
        save_adapter(file, tunable, base=make_params(), metadata={"task": "x"})
    damaged = home / "damaged.safetensors"
    damaged.write_bytes(Damage.apply(file.read_bytes(), edits))
    load_or_refuse(lambda: load_adapter(damaged, params=make_params()), tunable)
    load_or_refuse(lambda: load_adapter(damaged, like=tunable), tunable)


@given(edits=Damage.edits)
@examples(150)
def test_a_damaged_frozen_tree(home, edits):
    file = home / "sound.frozen"
    if not file.exists():
        weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)))
        save_frozen(file, lorax.quantize({"w": weight, "b": jnp.ones(5)}, {"w": "nf4", "b": None}))
    params = {"w": jnp.ones((64, 5)), "b": jnp.ones(5)}
    damaged = home / "damaged.frozen"
    damaged.write_bytes(Damage.apply(file.read_bytes(), edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        try:
            loaded = load_frozen(damaged, params=params)
        except AdapterError:
            return
    assert {path: leaf.shape for path, leaf in loaded.items()} == {"w": (64, 5), "b": (5,)}


@given(edits=Damage.edits, name=st.sampled_from(("model.safetensors", "config.json")))
@examples(250)
def test_a_damaged_folder_of_peft(home, edits, name):
    tunable, sound, folder = make_tunable(), home / "sound", home / "damaged"
    if not sound.exists():
        save_peft(sound, tunable, NAMES, base_model="me/model", task_type="CAUSAL_LM")
    folder.mkdir(exist_ok=True)
    for path in sound.iterdir():
        data = path.read_bytes()
        spoiled = Damage.apply(data, edits) if path.name == f"adapter_{name}" else data
        (folder / path.name).write_bytes(spoiled)
    load_or_refuse(lambda: load_peft(folder, make_params(), NAMES)[1], tunable)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@examples(60)
def test_other_numbers_are_loaded_as_they_are(home, place, bit):
    """One bit of the data, in which no structure is."""
    tunable, file = {"w": numbers(0, (4, 8))}, home / "numbers.safetensors"
    save_adapter(file, tunable)
    data = bytearray(file.read_bytes())
    data[-1 - place % (4 * 8 * 4)] ^= 1 << bit
    file.write_bytes(data)
    expected = np.frombuffer(data[-4 * 8 * 4 :], np.float32).reshape(4, 8)
    if np.isfinite(expected).all():
        assert_same(load_adapter(file, like=tunable), {"w": expected})
    else:
        with pytest.raises(AdapterError, match="holds NaN"):
            load_adapter(file, like=tunable)


# Configs.

KEYS = (
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules target_parameters"
    " exclude_modules layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out"
    " lora_dropout task_type base_model_name_or_path revision init_lora_weights use_dora lora_bias"
    " inference_mode auto_mapping runtime_config another"
)
SOUND = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["norm"],
}
WORDS = st.sampled_from(
    ["LORA", "q_proj", "v_proj", "layers", "layers.0.q_proj", ".*_proj", "(q|v)_proj", "^layers"]
    + ["norm", "none", "all", "lora_only", "all-linear", "", ".", "(", "(?x)#", "a|b", r"\d"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), WORDS, st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS | st.text(), inner, max_size=4)
    ),
    max_leaves=6,
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS.split()), VALUES, max_size=3)


@given(changes=CONFIGS, sound=st.sampled_from((SOUND, {})) | st.just(SOUND))
@examples(250)
def test_a_random_config(home, changes, sound):
    folder = home / "configs"
    if not folder.exists():
        save_peft(folder, make_tunable(), NAMES)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b'"lorax"', b'"other"'))
    (folder / "adapter_config.json").write_text(json.dumps(sound | changes))
    load_or_refuse(lambda: load_peft(folder, make_params(), NAMES)[1], make_tunable())


@given(value=VALUES)
@examples(60)
def test_random_invalid_configs_raise(home, value):
    folder = home / "values"
    if not folder.exists():
        save_peft(folder, make_tunable(), NAMES)
    (folder / "adapter_config.json").write_text(json.dumps(value))
    with pytest.raises(AdapterError):
        load_peft(folder, make_params(), NAMES)


@given(changes=st.dictionaries(st.sampled_from(("q", "v", "norm", "other")), VALUES, max_size=2))
@examples(60)
def test_random_settings_of_a_native_file(home, changes):
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


# Trees.

DTYPES = (
    "bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64"
    " float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
).split()
SEEDS = st.integers(0, 2**32)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
ARRAYS = st.builds(numbers, SEEDS, SHAPES, st.sampled_from(DTYPES))
ALPHAS = st.none() | st.integers(0, 64) | st.floats(-100, 100)
SCALINGS = st.sampled_from(("standard", "rslora"))


@st.composite
def weights(draw):
    """A LoRA weight with axes in any roles."""
    axes = draw(st.permutations(range(draw(st.integers(2, 4)))))
    first = draw(st.integers(1, len(axes) - 1))
    second = draw(st.integers(first + 1, len(axes)))
    return make_weight(
        draw, sorted(axes[:first]), sorted(axes[first:second]), sorted(axes[second:])
    )


def make_weight(draw, inputs, outputs, shared, dtypes=("float32", "bfloat16", "float16")):
    ndim = len(inputs) + len(outputs) + len(shared)
    size = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    of = lambda axes: tuple(size[d] for d in axes)  # noqa: E731
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(dtypes))
    return LoraWeight(
        numbers(draw(SEEDS), (*of(shared), *of(inputs), rank), dtype),
        numbers(draw(SEEDS), (*of(shared), rank, *of(outputs)), dtype),
        rank=rank,
        alpha=draw(ALPHAS),
        scaling=draw(SCALINGS),
        in_axes=tuple(inputs),
        out_axes=tuple(outputs),
        shared_axes=tuple(shared),
    )


def shape_of(weight):
    """The shape of the base that a weight fits."""
    shared = len(weight.shared_axes)
    sizes = (*weight.a.shape[:-1], *weight.b.shape[shared + 1 :])
    axes = (*weight.shared_axes, *weight.in_axes, *weight.out_axes)
    return tuple(size for _, size in sorted(zip(axes, sizes, strict=True)))


def base_of(leaf):
    if isinstance(leaf, LoraWeight):
        return jax.ShapeDtypeStruct(shape_of(leaf), jnp.float32)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


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


# Layouts.


@st.composite
def layouts(draw, module):
    """A layout, and a weight that fits it."""
    kind = draw(st.sampled_from((Linear, Conv1D, Embedding, Conv, Experts)))
    counts = [draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))]
    counts[0] += kind is Conv
    counts[2] += kind is Experts
    axes = draw(st.permutations(range(sum(counts))))
    inputs = sorted(axes[: counts[0]])
    outputs = sorted(axes[counts[0] : counts[0] + counts[1]])
    shared = sorted(axes[counts[0] + counts[1] :])
    weight = make_weight(draw, inputs, outputs, shared)
    more = {}
    if kind is Conv:
        more["channel_axis"] = draw(st.none() | st.sampled_from(inputs))
    if kind is Experts:
        more["out_first"] = draw(st.booleans())
        more["swapped"] = draw(st.sampled_from((None, True, False)))
        more["parameter"] = "down_proj"
    module += ".{}" * (len(shared) - (kind is Experts)) + ".proj"
    layout = kind(module, in_axes=inputs, out_axes=outputs, shared_axes=shared, **more)
    return layout, weight


@st.composite
def adapters(draw):
    """Names, and a tree that fits them."""
    names, tree = {}, {}
    for k in range(draw(st.integers(1, 3))):
        names[f"w{k}"], tree[f"w{k}"] = draw(layouts(f"m{k}"))
    dtypes = st.sampled_from(("float32", "bfloat16", "float16"))
    if draw(st.booleans()):  # the bias of an adapted module
        names["bias"] = Tensor("own.proj", flat=True)
        names["own"] = Linear("own.proj")
        tree["bias"] = numbers(draw(SEEDS), (3, 2), draw(dtypes))
        tree["own"] = make_weight(draw, [0], [1], [])
    if draw(st.booleans()):  # a module that is saved whole
        names["head"] = Linear("head{}", shared_axes=(1,), out_axes=(0, 2))
        names["head bias"] = Tensor("head{}", shared_axes=(0,))
        tree["head"] = numbers(draw(SEEDS), (3, 2, 5, 4), draw(dtypes))
        tree["head bias"] = numbers(draw(SEEDS), (2, 15), draw(dtypes))
    if draw(st.booleans()):  # two parameters of one module of experts
        orders = draw(st.permutations((3, 8)))
        for order, name in zip(orders, ("up", "down"), strict=True):
            names[name] = Experts("moe.experts", shared_axes=(0,), parameter=name, order=order)
            tree[name] = make_weight(draw, [1], [2], [0])
    return names, tree


@given(adapter=adapters())
@examples(80)
def test_random_layouts_round_trip(home, adapter):
    names, tree = adapter
    params = {path: base_of(leaf) for path, leaf in tree.items()}
    save_peft(home / "layouts", tree, names)
    frozen, tunable = load_peft(home / "layouts", params, names)
    assert_same(tunable, tree)
    full = {path for path, leaf in tree.items() if not isinstance(leaf, LoraWeight)}
    assert frozen == {path: None if path in full else leaf for path, leaf in params.items()}


@given(adapter=adapters())
@examples(25)
def test_random_layouts_keep_their_delta_with_the_scale_folded(home, adapter):
    names, tree = adapter
    tree = {
        path: leaf
        for path, leaf in tree.items()
        if isinstance(leaf, LoraWeight) and (leaf.scale == 0 or abs(leaf.scale) > 1e-3)
    }
    assume(tree)
    names = {path: names[path] for path in tree}
    rescaled = {
        path: dataclasses.replace(leaf, b=numbers(0, leaf.b.shape, "int8") / np.float32(8))
        for path, leaf in tree.items()
    }
    params = {path: base_of(leaf) for path, leaf in tree.items()}
    save_peft(home / "folded", rescaled, names, fold_scale=True)
    _, tunable = load_peft(home / "folded", params, names)
    for path, leaf in rescaled.items():
        loaded = tunable[path]
        np.testing.assert_array_equal(loaded.a, leaf.a)
        np.testing.assert_allclose(
            np.float64(loaded.b) * loaded.scale, np.float64(leaf.b) * leaf.scale, rtol=1e-6
        )
