"""PEFT folders of every kind of adapter."""

import json

import jax
import jax.numpy as jnp
import pytest
from comparing import assert_close, assert_same
from kinds_of_adapters import NAMES, OTHERS, make_pair, make_params

import lorax
from lorax import (
    DoraSpec,
    LoraSpec,
    init_lora,
    merge_params,
)
from lorax_io import (
    AdapterMismatchError,
    AdapterWarning,
    Experts,
    Linear,
    UnsupportedAdapterError,
    load_peft,
    save_diffusers,
    save_peft,
)

REFUSED = [
    *((save_diffusers, kind) for kind in OTHERS if kind != "lora-fa"),
    (save_peft, "locon"),
]


@pytest.mark.parametrize(("save", "kind"), REFUSED)
def test_unsupported_kinds_raise_on_save(tmp_path, save, kind):
    tunable = make_pair(kind).tunable
    name = tunable["kernel"].kind
    message = f"`kernel` is of the kind '{name}'.*`save_adapter`.*`save_merged`"
    with pytest.raises(UnsupportedAdapterError, match=message):
        save(tmp_path / "folder", tunable, NAMES)
    assert not list(tmp_path.iterdir())


# Without `lokr` and `gralora`, which split other axes here than in PEFT, `ia3`, which has a bias,
# and `tokens`, which are rows of tables. test_tuners.py tests them.
COMES_BACK = ["lora", "rslora", "dora", "loha", "ia3-in", "vera", "delora", "miss", "bdlora", "oft"]


@pytest.mark.parametrize("kind", COMES_BACK)
def test_peft_folder_round_trips_with_frozen_factors(tmp_path, kind):
    pair, params = make_pair(kind), make_params()
    save_peft(tmp_path, pair, NAMES)
    loaded = load_peft(tmp_path, params, NAMES)
    assert_same(loaded.tunable, pair.tunable)
    assert_close(loaded.frozen, pair.frozen)


@pytest.mark.parametrize("kind", ["vera", "delora", "lora-fa"])
def test_saving_without_required_frozen_factors_raises(tmp_path, kind):
    pair = make_pair(kind)
    with pytest.raises(AdapterMismatchError, match="the whole pair, `lorax.Pair"):
        save_peft(tmp_path / "folder", pair.tunable, NAMES)
    assert not list(tmp_path.iterdir())
    if kind == "delora":  # norms follow from the base
        save_peft(tmp_path, pair.tunable, NAMES, params=make_params())
        assert_same(load_peft(tmp_path, make_params(), NAMES).tunable, pair.tunable)


def test_lora_fa_is_saved_as_lora(tmp_path):
    """In PEFT, LoRA-FA is an optimizer, so its files are those of LoRA."""
    pair = make_pair("lora-fa")
    save_peft(tmp_path, pair, NAMES)
    loaded = load_peft(tmp_path, make_params(), NAMES)
    assert {row.kind for row in loaded.tunable.values() if hasattr(row, "kind")} == {"lora"}
    assert_close(merge_params(loaded), merge_params(pair))


def test_norm_with_gradient_warns(tmp_path):
    pair = make_pair("dora-with-gradient")
    with pytest.warns(AdapterWarning, match="the norm of `kernel` has a gradient, but PEFT"):
        save_peft(tmp_path, pair.tunable, NAMES)
    loaded = load_peft(tmp_path, make_params(), NAMES)
    assert loaded.tunable["kernel"].detached
    assert_close(merge_params(loaded), merge_params(pair))


def test_mixed_lora_and_dora_raises(tmp_path):
    tunable = make_pair("dora").tunable | {"kernel": make_pair("lora").tunable["kernel"]}
    with pytest.raises(
        UnsupportedAdapterError, match="`kernel` has a lora adapter and `stack` a dora"
    ):
        save_peft(tmp_path / "folder", tunable, NAMES)
    assert not list(tmp_path.iterdir())


def test_experts_without_an_adapter_are_unchanged(tmp_path):
    experts = {name: Experts("moe", parameter=name, shared_axes=(0,)) for name in ("up", "down")}
    names = {**experts, "q": Linear("q")}
    params = {"up": jnp.ones((3, 4, 5)), "down": jnp.ones((3, 5, 4)), "q": jnp.ones((4, 6))}
    spec = {"up": lorax.LORA_FREEZE, "down": lorax.LORA_FREEZE, "q": LoraSpec(2)}
    tunable = init_lora(params, spec, jax.random.key(0)).tunable
    save_peft(tmp_path / "folder", tunable, names)
    loaded = load_peft(tmp_path / "folder", params, names).tunable
    assert jax.tree.map(lambda leaf: leaf.tolist(), loaded) == jax.tree.map(
        lambda leaf: leaf.tolist(), tunable
    )


def test_dora_of_experts_raises(tmp_path):
    axes = lorax.Axes((0,), (1,), (2,))
    spec = {"down": DoraSpec(LoraSpec(2)).with_axes(axes)}
    names = {"down": Experts("experts", parameter="down", shared_axes=(0,))}
    params = {"down": jnp.ones((3, 4, 5))}
    tunable = init_lora(params, spec, jax.random.key(0)).tunable
    with pytest.raises(UnsupportedAdapterError, match="`down` has DoRA, which PEFT.*Experts"):
        save_peft(tmp_path / "folder", tunable, names)
    assert not list(tmp_path.iterdir())
    save_peft(tmp_path / "folder", {"down": tunable["down"].delta}, names)
    config = tmp_path / "folder" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(UnsupportedAdapterError, match="is DoRA, which PEFT.*`down`.*Experts"):
        load_peft(tmp_path / "folder", params, names)
