"""Native files of every kind of adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from comparing import assert_close, assert_same
from kinds_of_adapters import KINDS, NEED_PAIR, OTHERS, make_pair, make_params

import lorax
from lorax import (
    MXFP4,
    DoraSpec,
    LoraSpec,
    Pair,
    _adapter,
    dequantize,
    init_lora,
    quantize,
)
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    load_adapter,
    load_pair,
    save_adapter,
)


def metadata_of(file):
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata()


def test_table_has_every_kind():
    kinds = {make_pair(kind).tunable["kernel"].kind for kind in KINDS}
    assert kinds == set(_adapter.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_pair_round_trips(file, kind):
    pair = make_pair(kind)
    save_adapter(file, pair, base=make_params(), hash_base=True)
    params = make_params()
    loaded = load_pair(file, params)
    assert_same(loaded, pair)
    assert loaded.frozen["bias"] is params["bias"]
    assert_same(load_adapter(file, params=params), pair.tunable)
    assert_same(load_adapter(file, params=pair.frozen | {"scale": params["scale"]}), pair.tunable)
    assert_same(load_adapter(file, like=pair.tunable), pair.tunable)
    shapes = load_pair(file, jax.eval_shape(make_params))
    assert_same(shapes.tunable, pair.tunable)
    assert jax.tree.structure(shapes) == jax.tree.structure(pair)


@pytest.mark.parametrize("kind", NEED_PAIR)
def test_tunable_tree_without_frozen_factors_raises(file, kind):
    with pytest.raises(AdapterError, match="lacks `kernel/a`, .* Save the whole pair"):
        save_adapter(file, make_pair(kind).tunable)
    assert not file.exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NEED_PAIR])
def test_frozen_factors_are_computed_from_the_base(file, kind):
    pair = make_pair(kind)
    save_adapter(file, pair.tunable, base=pair.frozen)
    loaded = load_pair(file, make_params())
    assert_same(loaded.tunable, pair.tunable)
    assert_close(loaded.frozen, pair.frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_lora_has_the_first_format_version(file, kind):
    save_adapter(file, make_pair(kind))
    assert metadata_of(file)["lorax.format"] == ("2" if kind in OTHERS else "1")


@pytest.mark.parametrize("kind", KINDS)
def test_like_of_another_kind_raises(file, kind):
    save_adapter(file, make_pair(kind))
    other = "ia3" if kind == "lora" else "lora"
    with pytest.raises(AdapterMismatchError, match="`kernel` with.*but `like` has"):
        load_adapter(file, like=make_pair(other).tunable)


def test_frozen_factors_are_computed_from_a_quantized_base(file):
    """A pair of float weights is loaded onto the same weights, quantized."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 6))}
    pair = init_lora(params, {"kernel": DoraSpec(LoraSpec(2))}, jax.random.key(1))
    save_adapter(file, pair)
    coded = quantize(params, {"kernel": MXFP4()})
    loaded = load_pair(file, coded).frozen["kernel"].factors["square"]
    expected = jnp.sum(dequantize(coded)["kernel"] ** 2, 0)
    assert_close(loaded, expected)
    assert not np.allclose(loaded, pair.frozen["kernel"].factors["square"], rtol=1e-3)


def test_damaged_frozen_factor_is_not_saved(file):
    pair = make_pair("dora")
    pair.frozen["kernel"].factors["square"] = jnp.full(6, jnp.nan)
    with pytest.raises(AdapterError, match="`kernel/square` holds NaN"):
        save_adapter(file, pair)
    assert not file.exists()


def test_mismatched_pair_is_not_saved(file):
    pair = make_pair("dora")
    for frozen in ({"stack": pair.frozen["stack"]}, pair.frozen | {"kernel": None}):
        with pytest.raises(AdapterMismatchError, match="adapts `kernel`, which"):
            save_adapter(file, Pair(frozen, pair.tunable))
    assert not file.exists()


def test_kind_with_independent_frozen_factors_needs_the_pair(file, monkeypatch, capsys):
    pair = make_pair("dora")
    save_adapter(file, pair.tunable)
    monkeypatch.setattr(lorax.DoraWeight, "derived", lambda self, base: {})
    message = "lacks `kernel/square`, which a dora adapter keeps.*lorax.Pair"
    with pytest.raises(AdapterMismatchError, match=message):
        save_adapter(file, pair.tunable)
    with pytest.raises(AdapterMismatchError, match=message):
        load_pair(file, make_params())
    assert_same(load_adapter(file, params=make_params()), pair.tunable)
    save_adapter(file, pair)
    assert_same(load_pair(file, make_params()), pair)
