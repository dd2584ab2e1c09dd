"""Random damage to the bytes of files gives the same values or one error."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_same
from hypothesis import given, strategies as st
from random_files import NAMES, examples, load_or_refuse, make_params, make_tunable, numbers

import lorax
from lorax_io import (
    AdapterError,
    AdapterWarning,
    load_adapter,
    load_frozen,
    load_peft,
    save_adapter,
    save_frozen,
    save_peft,
)


class Damage:
    """Changes to the bytes of a file, mostly in its header."""

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


@given(edits=Damage.edits)
@examples(250)
def test_damaged_native_file_is_rejected_or_equal(home, edits):
    tunable, file = make_tunable(), home / "sound.safetensors"
    if not file.exists():
        save_adapter(file, tunable, base=make_params(), metadata={"task": "x"})
    damaged = home / "damaged.safetensors"
    damaged.write_bytes(Damage.apply(file.read_bytes(), edits))
    load_or_refuse(lambda: load_adapter(damaged, params=make_params()), tunable)
    load_or_refuse(lambda: load_adapter(damaged, like=tunable), tunable)


@given(edits=Damage.edits)
@examples(150)
def test_damaged_frozen_tree_is_rejected_or_equal(home, edits):
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
def test_damaged_peft_folder_is_rejected_or_equal(home, edits, name):
    tunable, sound, folder = make_tunable(), home / "sound", home / "damaged"
    if not sound.exists():
        save_peft(sound, tunable, NAMES, base_model="me/model", task_type="CAUSAL_LM")
    folder.mkdir(exist_ok=True)
    for path in sound.iterdir():
        data = path.read_bytes()
        content = Damage.apply(data, edits) if path.name == f"adapter_{name}" else data
        (folder / path.name).write_bytes(content)
    load_or_refuse(lambda: load_peft(folder, make_params(), NAMES)[1], tunable)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@examples(60)
def test_flipped_bits_in_values_are_loaded(home, place, bit):
    """Flips one bit in the data, which has no structure."""
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
