"""Errors for pairs in place of single trees, and for nonexistent axes."""

import jax
import jax.numpy as jnp
import pytest

import lorax
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    Conv,
    Linear,
    Tensor,
    load_adapter,
    load_peft,
    save_adapter,
    save_diffusers,
    save_merged,
    save_peft,
)

PARAMS = {"q": jnp.ones((5, 3)), "bias": jnp.ones(3)}
NAMES = {"q": Linear("m.q")}


@pytest.fixture
def pair():
    spec = {"q": 2, "bias": lorax.LORA_FREEZE}
    return lorax.init_lora(PARAMS, spec, jax.random.key(0))


SAVES = {
    "save_adapter": save_adapter,
    "save_peft": lambda place, tree: save_peft(place, tree, NAMES),
    "save_diffusers": lambda place, tree: save_diffusers(place, tree, NAMES),
}


@pytest.mark.parametrize("order", [1, -1], ids=["pair", "swapped"])
@pytest.mark.parametrize("save", SAVES)
def test_pair_in_place_of_the_tunable_tree_raises(tmp_path, pair, save, order):
    with pytest.raises(AdapterError, match=r"got the pair \(frozen, tunable\); pass only the"):
        SAVES[save](tmp_path / "adapter", tuple(pair)[::order])
    assert not list(tmp_path.iterdir())


def test_pair_of_one_parameter_raises(tmp_path):
    pair = lorax.init_lora(jnp.ones((5, 3)), 2, jax.random.key(0))
    with pytest.raises(AdapterError, match="got the pair"):
        save_adapter(tmp_path / "adapter", tuple(pair))


def test_pair_of_plain_lora_gives_the_file_of_its_tunable_tree(tmp_path, pair):
    files = tmp_path / "pair", tmp_path / "tunable"
    for file, tree in zip(files, (pair, pair.tunable), strict=True):
        save_adapter(file, tree)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_pair_is_merged_like_its_trees(tmp_path, pair):
    names = {**NAMES, "bias": Tensor("m.q")}
    save_merged(tmp_path / "trees", pair.frozen, pair.tunable, names)
    save_merged(tmp_path / "pair", pair, names)
    save_merged(tmp_path / "keyword", pair, names=names)
    files = {(f / "model.safetensors").read_bytes() for f in tmp_path.iterdir()}
    assert len(files) == 1
    with pytest.raises(TypeError, match="needs `names`"):
        save_merged(tmp_path / "none", pair)


def test_tree_of_two_parts_is_not_a_pair(tmp_path, pair):
    frozen, tunable = pair
    other = lorax.init_lora(PARAMS, {"q": 0, "bias": lorax.LORA_FULL}, jax.random.key(0))[1]
    for tree in [(other, tunable), (tunable, tunable), [frozen, tunable], (tunable, None)]:
        save_adapter(tmp_path / "adapter", tree)
        loaded = load_adapter(tmp_path / "adapter", like=tree)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)


def test_tunable_tree_in_place_of_the_base_raises(tmp_path, pair):
    frozen, tunable = pair
    save_adapter(tmp_path / "adapter", tunable)
    save_peft(tmp_path / "peft", tunable, NAMES)
    for call in (
        lambda: save_merged(tmp_path / "merged", tunable, frozen, NAMES),
        lambda: save_merged(tmp_path / "merged", pair, tunable, NAMES),
        lambda: save_adapter(tmp_path / "resaved", tunable, base=tunable),
        lambda: load_adapter(tmp_path / "adapter", params=tunable),
        lambda: load_peft(tmp_path / "peft", tunable, NAMES),
    ):
        with pytest.raises(AdapterError, match="an adapter at `(tunable/)?q`: this is a tunable"):
            call()


@pytest.mark.parametrize(
    "torch_name, message",
    [
        (
            Linear("m.q", in_axes=[4]),
            r"the entry of `m.q` .*in_axes=\(4,\) names an axis that it does not have",
        ),
        (Linear("m.q", out_axes=[-3]), r"out_axes=\(-3,\) names an axis"),
        (Linear("{}.q", shared_axes=[2]), r"shared_axes=\(2,\) names an axis"),
        (Linear("m.q", in_axes=[0], out_axes=[0]), "each axis must have exactly one role"),
        (Linear("m.q", in_axes=[0, -2]), "names an axis twice"),
    ],
)
def test_nonexistent_axes_raise(tmp_path, pair, torch_name, message):
    frozen, tunable = pair
    names = {"q": torch_name, "bias": Tensor("m.q")}
    save_peft(tmp_path / "peft", tunable, NAMES)
    for call in (
        lambda: save_peft(tmp_path / "other", tunable, {"q": torch_name}),
        lambda: load_peft(tmp_path / "peft", PARAMS, {"q": torch_name}),
        lambda: save_merged(tmp_path / "merged", frozen, tunable, names),
    ):
        with pytest.raises(AdapterMismatchError, match=message):
            call()


def conv_pair():
    spec = lorax.LoraSpec(2, in_axes=(0, 1, 2))
    return lorax.init_lora({"k": jnp.ones((2, 3, 5, 7))}, {"k": spec}, jax.random.key(0))


@pytest.mark.parametrize("channel_axis", [2, -2])
def test_negative_channel_axis_is_accepted(tmp_path, channel_axis):
    _, tunable = conv_pair()
    names = {"k": Conv("m.k", in_axes=(0, 1, 2), channel_axis=channel_axis)}
    save_peft(tmp_path / "peft", tunable, names)
    _, loaded = load_peft(tmp_path / "peft", {"k": jnp.ones((2, 3, 5, 7))}, names)
    assert jnp.array_equal(loaded["k"].a, tunable["k"].a)


@pytest.mark.parametrize(
    "channel_axis, message",
    [(3, r"channel_axis=3 is not among its in_axes=\(0, 1, 2\)"), (4, "its channel_axis=4")],
)
def test_channel_axis_that_is_not_an_input_raises(tmp_path, channel_axis, message):
    names = {"k": Conv("m.k", in_axes=(0, 1, 2), channel_axis=channel_axis)}
    with pytest.raises(AdapterMismatchError, match=message):
        save_peft(tmp_path / "peft", conv_pair()[1], names)
