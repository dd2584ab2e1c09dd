"""Every kind of adapter on disk: native files, the command line, merged models.

A new kind is one row of `KINDS`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import (
    MXFP4,
    AdaloraSpec,
    BdloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    LoraFASpec,
    LoraSpec,
    MissSpec,
    OftSpec,
    Pair,
    TokensSpec,
    VeraSpec,
    _adapter,
    dequantize,
    init_lora,
    merge_params,
    quantize,
)
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    AdapterWarning,
    Experts,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    load_adapter,
    load_pair,
    load_peft,
    save_adapter,
    save_diffusers,
    save_merged,
    save_peft,
)
from lorax_io._command import main

KINDS = {
    "lora": LoraSpec(2, alpha=4),
    "rslora": LoraSpec(3, alpha=4, scaling="rslora"),
    "dora": DoraSpec(LoraSpec(2, alpha=4)),
    "dora-with-gradient": DoraSpec(LoraSpec(2, alpha=4), detached=False),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "lora-fa": LoraFASpec(2, alpha=4),
    "vera": VeraSpec(4),
    "adalora": AdaloraSpec(2, alpha=4),
    "delora": DeloraSpec(2),
    "tokens": TokensSpec([3, 1]),
    "loha": LohaSpec(2, alpha=4),
    "lokr": LokrSpec(2, alpha=4),
    "lokr-narrow": LokrSpec(1, alpha=3, decompose_both=True),
    "locon": LoconSpec(2, alpha=4),
    "miss": MissSpec(2),
    "gralora": GraloraSpec(2, alpha=4, blocks=2),
    "bdlora": BdloraSpec(2, alpha=4),
    "oft": OftSpec(2),
}
# Kinds whose frozen factors do not follow from the base: only a pair can be saved.
HELD = ("lora-fa", "vera")
OTHERS = [name for name in KINDS if not isinstance(KINDS[name], LoraSpec)]
AXES = {"kernel": lorax.Axes((), (0,), (1,)), "stack": lorax.Axes((0,), (1,), (2, 3))}
NAMES = {
    "kernel": Linear("q"),
    "stack": Linear("layers.{}.v", in_axes=(1,), shared_axes=(0,)),
    "bias": Tensor("q"),
    "scale": Tensor("norm", parameter="weight"),
}


@pytest.fixture(autouse=True)
def _settings():
    """What the command line sets of JAX goes with the test."""
    before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_platforms")}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


def make_params():
    numbers = np.random.default_rng(0)
    shapes = {"kernel": (8, 6), "stack": (2, 8, 3, 4), "bias": (6,), "scale": (8,)}
    return {path: jnp.asarray(numbers.normal(size=s), jnp.float32) for path, s in shapes.items()}


def make_pair(kind):
    """A pair of which every trained number has changed since its start."""
    spec = {path: KINDS[kind].with_axes(axes) for path, axes in AXES.items()}
    params = make_params()
    frozen, tunable = init_lora(params, spec | {"bias": 0, "scale": -1}, jax.random.key(0))
    key = jax.random.key(1)
    return Pair(frozen, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), tunable))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6), left, right)


def run(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def metadata_of(file):
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata()


def test_every_kind_is_here():
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


@pytest.mark.parametrize("kind", HELD)
def test_a_tunable_tree_that_lacks_frozen_factors_raises(file, kind):
    with pytest.raises(AdapterError, match="lacks `kernel/a`, .* Save the whole pair"):
        save_adapter(file, make_pair(kind).tunable)
    assert not file.exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HELD])
def test_tunable_tree_round_trips_and_held_factors_follow_from_the_base(file, kind):
    pair = make_pair(kind)
    save_adapter(file, pair.tunable, base=pair.frozen)
    loaded = load_pair(file, make_params())
    assert_same(loaded.tunable, pair.tunable)
    assert_close(loaded.frozen, pair.frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_lora_is_of_the_first_format(file, kind):
    save_adapter(file, make_pair(kind))
    assert metadata_of(file)["lorax.format"] == ("2" if kind in OTHERS else "1")


@pytest.mark.parametrize(
    ("kind", "whole"),
    [(kind, True) for kind in KINDS] + [(kind, False) for kind in KINDS if kind not in HELD],
)
def test_the_command_line_reads_it(tmp_path, file, capsys, kind, whole):
    pair, params = make_pair(kind), make_params()
    saved = pair if whole else pair.tunable
    base, other, again = (tmp_path / name for name in ("base.safetensors", "other", "again"))
    safetensors.numpy.save_file({k: np.asarray(x) for k, x in params.items()}, base)
    save_adapter(file, saved)
    changed = jax.tree.map(lambda x: x * 1.5, pair.tunable)
    save_adapter(other, pair._replace(tunable=changed) if whole else changed)

    code, out = run(capsys, "inspect", file)
    assert code == 0 and pair.tunable["kernel"].kind in out
    assert run(capsys, "verify", file, "--base", base) == (
        0,
        f"{file}: 3 parameters, OK, fits {base}\n",
    )
    assert run(capsys, "diff", file, file)[0] == 0
    code, out = run(capsys, "diff", file, other)
    assert code == 1 and out.count("numbers") == 3
    assert run(capsys, "convert", file, again, "--to", "native")[0] == 0
    assert again.read_bytes() == file.read_bytes()

    run(capsys, "merge", file, "--base", base, "--out", tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / base.name)
    assert_close(merged, jax.tree.map(np.asarray, merge_params(pair)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_that_of_the_core(tmp_path, kind):
    pair = make_pair(kind)
    save_merged(tmp_path / "merged", pair, NAMES)
    tensors = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    merged = merge_params(pair)
    np.testing.assert_array_equal(tensors["q.weight"], merged["kernel"].T)
    for k in range(2):
        flat = merged["stack"][k].reshape(8, 12).T
        np.testing.assert_array_equal(tensors[f"layers.{k}.v.weight"], flat)


REFUSED = [
    *((save_diffusers, kind) for kind in OTHERS if kind != "lora-fa"),
    (save_peft, "locon"),
]


@pytest.mark.parametrize(("save", "kind"), REFUSED)
def test_a_form_refuses_kinds_that_it_does_not_have(tmp_path, save, kind):
    tunable = make_pair(kind).tunable
    name = tunable["kernel"].kind
    message = f"`kernel` is of the kind '{name}'.*`save_adapter`.*`save_merged`"
    with pytest.raises(UnsupportedAdapterError, match=message):
        save(tmp_path / "folder", tunable, NAMES)
    assert not list(tmp_path.iterdir())


# `lokr` and `gralora` cut other axes here than PEFT, `ia3` is beside a bias, and `tokens` are rows
# of tables: tests of tuners have them.
COMES_BACK = ["lora", "rslora", "dora", "loha", "ia3-in", "vera", "delora", "miss", "bdlora", "oft"]


@pytest.mark.parametrize("kind", COMES_BACK)
def test_peft_folder_round_trips_with_frozen_factors(tmp_path, kind):
    pair, params = make_pair(kind), make_params()
    save_peft(tmp_path, pair, NAMES)
    loaded = load_peft(tmp_path, params, NAMES)
    assert_same(loaded.tunable, pair.tunable)
    assert_close(loaded.frozen, pair.frozen)


@pytest.mark.parametrize("kind", ["vera", "delora", "lora-fa"])
def test_frozen_factors_that_peft_stores_are_asked_for(tmp_path, kind):
    pair = make_pair(kind)
    with pytest.raises(AdapterMismatchError, match="the whole pair, `lorax.Pair"):
        save_peft(tmp_path / "folder", pair.tunable, NAMES)
    assert not list(tmp_path.iterdir())
    if kind == "delora":  # norms follow from the base
        save_peft(tmp_path, pair.tunable, NAMES, params=make_params())
        assert_same(load_peft(tmp_path, make_params(), NAMES).tunable, pair.tunable)


def test_a_frozen_factor_of_lora_is_trained_in_peft(tmp_path):
    """PEFT has LoRA-FA as an optimizer: its files are those of LoRA."""
    pair = make_pair("lora-fa")
    save_peft(tmp_path, pair, NAMES)
    loaded = load_peft(tmp_path, make_params(), NAMES)
    assert {row.kind for row in loaded.tunable.values() if hasattr(row, "kind")} == {"lora"}
    assert_close(merge_params(loaded), merge_params(pair))


def test_norm_with_gradient_warns_that_peft_lacks_it(tmp_path):
    pair = make_pair("dora-with-gradient")
    with pytest.warns(AdapterWarning, match="the norm of `kernel` has a gradient, and PEFT"):
        save_peft(tmp_path, pair.tunable, NAMES)
    loaded = load_peft(tmp_path, make_params(), NAMES)
    assert loaded.tunable["kernel"].detached
    assert_close(merge_params(loaded), merge_params(pair))


def test_lora_and_dora_are_not_mixed_in_peft(tmp_path):
    tunable = make_pair("dora").tunable | {"kernel": make_pair("lora").tunable["kernel"]}
    with pytest.raises(
        UnsupportedAdapterError, match="`kernel` has a lora adapter and `stack` a dora"
    ):
        save_peft(tmp_path / "folder", tunable, NAMES)
    assert not list(tmp_path.iterdir())


def test_experts_beside_an_adapter_are_left_alone(tmp_path):
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


def test_experts_have_no_dora_in_peft(tmp_path):
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


def test_the_command_line_reads_pefts_dora(tmp_path, file, capsys):
    pair, params = make_pair("dora"), make_params()
    folder, base = tmp_path / "peft", tmp_path / "base.safetensors"
    save_peft(folder, {"kernel": pair.tunable["kernel"]}, NAMES)
    safetensors.numpy.save_file({"q.weight": np.asarray(params["kernel"].T, order="C")}, base)
    assert "dora" in run(capsys, "inspect", folder)[1]
    assert "1 parameters" in run(capsys, "verify", folder, "--base", base)[1]
    run(capsys, "convert", folder, file, "--to", "native")
    loaded = load_adapter(file, params={"q": {"kernel": params["kernel"]}})
    assert_same(loaded["q"]["kernel"], pair.tunable["kernel"])
    again = tmp_path / "again"
    run(capsys, "convert", file, again, "--to", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    run(capsys, "merge", folder, "--base", base, "--out", tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / base.name)
    assert_close(merged["q.weight"], np.asarray(merge_params(pair)["kernel"].T))


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_raises_as_like(file, kind):
    save_adapter(file, make_pair(kind))
    other = "ia3" if kind == "lora" else "lora"
    with pytest.raises(AdapterMismatchError, match="`kernel` with.*but `like` has"):
        load_adapter(file, like=make_pair(other).tunable)


def test_differing_frozen_factors_are_reported(file, capsys, tmp_path):
    pair = make_pair("dora")
    save_adapter(file, pair)
    other = tmp_path / "other"
    frozen = dict(pair.frozen)
    weight = frozen["kernel"]
    frozen["kernel"] = lorax.FrozenWeight(weight.base, {"square": weight.factors["square"] * 2})
    save_adapter(other, Pair(frozen, pair.tunable))
    code, out = run(capsys, "diff", file, other)
    assert code == 1 and out.count("frozen factors") == 1


def test_frozen_factors_follow_the_base_that_a_pair_is_loaded_onto(file):
    """A pair of float weights is loaded onto the same weights in few bits."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 6))}
    pair = init_lora(params, {"kernel": DoraSpec(LoraSpec(2))}, jax.random.key(1))
    save_adapter(file, pair)
    coded = quantize(params, {"kernel": MXFP4()})
    loaded = load_pair(file, coded).frozen["kernel"].factors["square"]
    expected = jnp.sum(dequantize(coded)["kernel"] ** 2, 0)
    assert_close(loaded, expected)
    assert not np.allclose(loaded, pair.frozen["kernel"].factors["square"], rtol=1e-3)


def test_a_damaged_frozen_factor_is_not_saved(file):
    pair = make_pair("dora")
    pair.frozen["kernel"].factors["square"] = jnp.full(6, jnp.nan)
    with pytest.raises(AdapterError, match="`kernel/square` holds NaN"):
        save_adapter(file, pair)
    assert not file.exists()


def test_a_pair_of_other_trees_is_not_saved(file):
    pair = make_pair("dora")
    for frozen in ({"stack": pair.frozen["stack"]}, pair.frozen | {"kernel": None}):
        with pytest.raises(AdapterMismatchError, match="adapts `kernel`, which"):
            save_adapter(file, Pair(frozen, pair.tunable))
    assert not file.exists()


def test_a_kind_whose_frozen_factors_do_not_follow_from_the_base_needs_the_pair(
    file, monkeypatch, capsys
):
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
