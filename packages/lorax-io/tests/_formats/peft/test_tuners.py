"""PEFT's adapter types other than LoRA: round trips, merges, and invalid files."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings, strategies as st

import lorax
from lorax import (
    AdaloraSpec,
    BdloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LohaSpec,
    LokrSpec,
    LokrWeight,
    LoraSpec,
    MissSpec,
    OftSpec,
    Pair,
    TokensSpec,
    VeraSpec,
)
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    Conv,
    Embedding,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    load_peft,
    open_adapter,
    save_adapter,
    save_peft,
)
from lorax_io._formats.peft.tuners import TUNERS

NAMES = {
    "up": Linear("blocks.0.up"),
    "heads": Linear("blocks.0.heads", out_axes=(1, 2)),
    "stack": Linear("layers.{}.up", shared_axes=(0,)),
    "conv": Conv("conv", in_axes=(0, 1, 2), channel_axis=2),
    "kernel": Conv("kernel", in_axes=(0, 1, 2), channel_axis=2),
    "table": Embedding("table"),
    "tables": Embedding("layers.{}.table", shared_axes=(0,)),
    "inner": Linear("blocks.0.inner", in_axes=(0, 1)),
}
SHAPES = {
    **{"up": (24, 32), "heads": (24, 4, 5), "stack": (3, 16, 20), "conv": (3, 2, 4, 6)},
    "kernel": (3, 2, 4, 6),
    **{"table": (13, 8), "tables": (3, 11, 6), "inner": (3, 8, 20)},
}
CONV: dict[str, Any] = {"in_axes": (0, 1, 2), "out_axes": (3,)}
HEADS: dict[str, Any] = {"in_axes": (0,), "out_axes": (1, 2)}
STACK: dict[str, Any] = {"shared_axes": (0,)}
INNER: dict[str, Any] = {"in_axes": (0, 1), "out_axes": (2,)}

SPECS = {
    "loha": {"up": LohaSpec(3, 5), "stack": LohaSpec(2, 3, **STACK)},
    "loha, heads and convolution": {
        "heads": LohaSpec(3, 5, **HEADS),
        "conv": LohaSpec(2, 3, **CONV),
    },
    "loha with cores, convolution": {
        "up": LohaSpec(3, 5),
        "conv": LohaSpec(2, 3, tucker=True, **CONV),
    },
    "lokr with a core, convolution": {
        "up": LokrSpec(2, 5),
        "conv": LokrSpec(1, 5, tucker=True, split_axes=(2, 3), **CONV),
    },
    "lokr": {"up": LokrSpec(2, 5), "stack": LokrSpec(2, 5, **STACK)},
    "lokr, both decomposed": {"up": LokrSpec(1, 5, decompose_both=True)},
    "lokr in blocks of four": {
        "up": LokrSpec(2, 5, factor=4),
        "stack": LokrSpec(2, 5, factor=4, **STACK),
    },
    "lokr of a convolution": {"conv": LokrSpec(1, 5, split_axes=(2, 3), **CONV)},
    "adalora": {"up": AdaloraSpec(2, 5), "stack": AdaloraSpec(2, 5, **STACK)},
    "ia3": {"up": IA3Spec(), "stack": IA3Spec("in", **STACK)},
    "ia3, heads and convolution": {
        "heads": IA3Spec(**HEADS),
        "conv": IA3Spec("in", gain_axes=(2,), **CONV),
    },
    "vera": {"up": VeraSpec(5), "stack": VeraSpec(5, **STACK)},
    "vera, heads": {"heads": VeraSpec(5, **HEADS), "inner": VeraSpec(5, **INNER)},
    "oft": {"up": OftSpec(4), "stack": OftSpec(4, **STACK)},
    "oft within a bound": {"up": OftSpec(4, eps=0.3), "stack": OftSpec(4, eps=0.3, **STACK)},
    "oft, heads": {"heads": OftSpec(4, **HEADS), "inner": OftSpec(4, **INNER)},
    "oft, shared and exact": {
        "up": OftSpec(4, block_share=True, terms=None),
        "inner": OftSpec(4, block_share=True, terms=None, **INNER),
    },
    "oft of tables": {
        "table": OftSpec(2, "out", terms=3),
        "tables": OftSpec(2, "out", terms=3, **STACK),
    },
    "delora": {"up": DeloraSpec(3), "stack": DeloraSpec(2, **STACK)},
    "delora, heads": {"heads": DeloraSpec(3, **HEADS), "inner": DeloraSpec(3, **INNER)},
    "miss": {"up": MissSpec(5), "stack": MissSpec(5, **STACK)},
    "miss, heads": {"heads": MissSpec(4, **HEADS), "inner": MissSpec(4, **INNER)},
    "gralora": {"up": GraloraSpec(6, 5), "stack": GraloraSpec(6, 5, **STACK)},
    "gralora, heads": {
        "heads": GraloraSpec(6, 5, split_axes=(0, 1), **HEADS),
        "up": GraloraSpec(6, 5),
    },
    "bdlora": {
        "up": BdloraSpec(4, 5, side="in"),
        "stack": BdloraSpec(6, 5, side="out", **STACK),
    },
    "bdlora and lora": {
        "up": LoraSpec(3, 5),
        "heads": BdloraSpec(4, 5, side="out", split_axis=1, **HEADS),
    },
    "tokens": {"table": TokensSpec([5, 1, 9]), "tables": TokensSpec([5, 1, 9], **STACK)},
    "tokens and lora": {"table": TokensSpec([7, 0]), "up": LoraSpec(3, 5)},
    "tokens and dora": {"table": TokensSpec([2]), "up": DoraSpec(LoraSpec(3, 5))},
}


def make(spec):
    """Parameters, and a pair with random nonzero factors."""
    numbers = np.random.default_rng(3)
    draw = lambda shape: jnp.asarray(numbers.normal(0.5, 0.2, shape), jnp.float32)  # noqa: E731
    params = {path: draw(SHAPES[path]) for path in spec}
    if not {*map(type, spec.values())} & {VeraSpec, DeloraSpec, TokensSpec, DoraSpec}:
        # Without frozen factors. Only shapes are used, so nothing is compiled.
        shapes = jax.eval_shape(lambda: lorax.init_lora(params, spec, jax.random.key(0)).tunable)
        return params, lorax.Pair(params, jax.tree.map(lambda x: draw(x.shape), shapes))
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    return params, lorax.Pair(frozen, jax.tree.map(lambda x: draw(x.shape), tunable))


def names_of(spec):
    return {path: NAMES[path] for path in spec}


def assert_close(left, right):
    assert left.keys() == right.keys()
    for path, array in right.items():
        np.testing.assert_allclose(left[path], array, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", SPECS)
def test_folder_round_trips(files, case):
    params, pair = make(SPECS[case])
    names = names_of(params)
    save_peft("adapter", pair, names)
    loaded = load_peft("adapter", params, names)
    assert {p: x.kind for p, x in loaded.tunable.items()} == {
        p: x.kind for p, x in pair.tunable.items()
    }
    assert_close(lorax.merge_params(loaded), lorax.merge_params(pair))


@pytest.mark.parametrize("case", [case for case in SPECS if "heads" not in case])
def test_command_merges_each_tuner(shell, files, case):
    spec = {p: x for p, x in SPECS[case].items() if p in ("up", "conv", "table")}
    params, pair = make(spec)
    save_peft("adapter", pair, names_of(spec))
    order = {"conv": (3, 2, 0, 1), "up": (1, 0), "table": (0, 1)}
    base = {
        f"{NAMES[p].module}.weight": np.asarray(x).transpose(order[p]) for p, x in params.items()
    }
    files.base({name: np.ascontiguousarray(x) for name, x in base.items()})
    shell.succeed("verify adapter --base base")
    shell.succeed("merge adapter --base base --out merged")
    merged = files.read("merged/model.safetensors")
    for path, array in lorax.merge_params(pair).items():
        tensor = merged[f"{NAMES[path].module}.weight"]
        np.testing.assert_allclose(tensor, array.transpose(order[path]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in SPECS if "conv" not in case])
def test_command_reads_each_tuner_without_a_base(shell, files, case):
    params, pair = make(SPECS[case])
    save_peft("adapter", pair, names_of(params))
    report = json.loads(shell.succeed("inspect adapter --json"))
    kinds = {row.kind for row in pair.tunable.values()}
    assert {line["kind"] for line in report["parameters"]} == kinds
    if "vera" in kinds:
        assert "as large as the largest module" in report["needs its base"]
        shell.fail("convert adapter native.safetensors --to native")
        return
    shell.succeed("convert adapter native.safetensors --to native")
    if kinds <= {
        "loha",
        "lokr",
        "adalora",
        "delora",
    }:  # other files do not contain the sizes of both sides
        shell.succeed("convert native.safetensors converted --to peft")
        assert shell("diff adapter converted").code == 0


def test_fold_scale_of_loha(files):
    params, pair = make({"up": LohaSpec(3, 5)})
    save_peft("adapter", pair.tunable, names_of(params), fold_scale=True)
    loaded = load_peft("adapter", params, names_of(params))
    assert loaded.tunable["up"].scale == 1
    assert_close(lorax.merge_params(loaded), lorax.merge_params(pair))


REFUSED = {
    "lokr with other axes": {"conv": LokrSpec(1, 5, split_axes=(0, 3), **CONV)},
    "lokr with two factors": {"up": LokrSpec(2, factor=4), "stack": LokrSpec(2, factor=2, **STACK)},
    "adalora with two scales": {"up": AdaloraSpec(2, 5), "stack": AdaloraSpec(2, 3, **STACK)},
    "adalora of a convolution": {"conv": AdaloraSpec(2, 5, **CONV)},
    "some cores": {
        "conv": LohaSpec(2, tucker=True, **CONV),
        "kernel": LohaSpec(2, **CONV),
    },
    "a core with other channels": {
        "conv": LohaSpec(2, tucker=True, channel_axis=0, **CONV),
    },
    "oft with two bounds": {"up": OftSpec(4, eps=0.3), "stack": OftSpec(4, **STACK)},
    "gains along a window": {"conv": IA3Spec("in", **CONV)},
    "gains along some heads": {"heads": IA3Spec(gain_axes=(1,), **HEADS)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_kinds_that_peft_cannot_store_raise(files, tmp_path, case):
    params, pair = make(REFUSED[case])
    with pytest.raises(UnsupportedAdapterError, match="PEFT"):
        save_peft("adapter", pair.tunable, names_of(params))
    assert not (tmp_path / "adapter").exists()


def test_tokens_with_a_full_parameter_raise(tmp_path):
    params = {"table": jnp.ones((13, 8)), "norm": jnp.ones(8)}
    names = {"table": Embedding("table"), "norm": Tensor("norm", parameter="weight")}
    spec = {"table": TokensSpec([3, 1]), "norm": lorax.LORA_FULL}
    pair = lorax.init_lora(params, spec, jax.random.key(0))
    with pytest.raises(UnsupportedAdapterError, match="`norm` in full, and .* no `modules_to_s"):
        save_peft(tmp_path / "a", pair, names)
    assert not (tmp_path / "a").exists()


def test_scalar_token_rows_raise(files):
    delta = {"embed.trainable_tokens_delta": np.array(1, np.float32)}
    files.peft(delta)
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed"]}
    pathlib.Path("adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="has rows of shape"):
        load_peft("adapter", {"e": jnp.ones((7, 4))}, {"e": Embedding("embed")})


def test_frozen_bias_of_a_numbered_stack_raises(tmp_path):
    params = {"up": jnp.ones((2, 6, 5)), "bias": jnp.ones((2, 5))}
    stack: dict[str, Any] = {"shared_axes": (0,), "numbers": (1, 3)}
    names = {"up": Linear("blocks.{}.up", **stack), "bias": Tensor("blocks.{}.up", **stack)}
    axes: dict[str, Any] = {"in_axes": (1,), "out_axes": (2,), "shared_axes": (0,)}
    spec = {"up": lorax.IA3Spec(**axes), "bias": lorax.LORA_FREEZE}
    pair = lorax.init_lora(params, spec, jax.random.key(0))
    with pytest.raises(UnsupportedAdapterError, match="scales the bias `bias`"):
        save_peft(tmp_path / "a", pair, names)


@pytest.mark.parametrize("side", ["out", "in"])
def test_output_gains_also_scale_the_bias(shell, files, side):
    params, pair = make({"up": IA3Spec(side)})
    names = names_of(params) | {"bias": Tensor("blocks.0.up")}
    save_peft("adapter", pair.tunable, names_of(params))
    bias = files.draw(32)
    files.base({"blocks.0.up.weight": files.draw(32, 24), "blocks.0.up.bias": bias})
    params["bias"] = jnp.asarray(bias)
    loaded = load_peft("adapter", params, names)
    expected = bias * np.asarray(pair.tunable["up"].gain) if side == "out" else bias
    np.testing.assert_allclose(lorax.merge_params(loaded)["bias"], expected, rtol=1e-6)
    shell.succeed("merge adapter --base base --out merged")
    merged = files.read("merged/model.safetensors")["blocks.0.up.bias"]
    np.testing.assert_allclose(merged, expected, rtol=1e-6)
    save_peft("converted", loaded.tunable, names, params=params)
    assert shell("diff adapter converted").code == 0
    if side == "in":
        return
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(UnsupportedAdapterError, match="changes the bias `bias` by its value"):
        load_peft("adapter", shapes, names)
    with pytest.raises(UnsupportedAdapterError, match="and here it is frozen"):
        save_peft("converted", pair.tunable, names)
    other = loaded.tunable | {"bias": params["bias"] + 1}
    with pytest.raises(UnsupportedAdapterError, match="is not what PEFT makes of"):
        save_peft("converted", other, names, params=params)
    with pytest.raises(UnsupportedAdapterError, match="compared with the base"):
        save_peft("converted", loaded.tunable, names)


def write_changed(spec, changes=None, config=None):
    params, pair = make(spec)
    save_peft("adapter", pair.tunable, names_of(params))
    file = pathlib.Path("adapter/adapter_model.safetensors")
    tensors: dict[str, Any] = safetensors.numpy.load_file(file)
    for key, tensor in (changes or {}).items():
        [name] = [name for name in tensors if name.endswith(key)] or [f"base_model.model.x.{key}"]
        tensors[name] = tensor
    tensors = {name: x for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(tensors, file)
    path = pathlib.Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return params


ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
LOKR, IA3 = {"up": LokrSpec(2, 5)}, {"up": IA3Spec()}
CORES = {"conv": LohaSpec(2, 3, tucker=True, **CONV)}
SPOILED = [
    ("a factor missing", {"up": LohaSpec(3)}, {"hada_w2_b": None}, {}, AdapterFileError),
    ("another rank", {"up": LohaSpec(3)}, {}, {"r": 2}, AdapterMismatchError),
    ("alpha of text", {"up": LohaSpec(3)}, {}, {"alpha": "5"}, AdapterFileError),
    ("no first matrix", LOKR, {"lokr_w1": None}, {}, AdapterFileError),
    ("blocks that do not divide", LOKR, {"lokr_w1": ones(7, 4)}, {}, AdapterFileError),
    ("no blocks", LOKR, {"lokr_w1": ones(1)}, {}, AdapterFileError),
    ("a core of no module", LOKR, {"lokr_t2": ones(2, 2, 3, 3)}, {}, AdapterMismatchError),
    ("a core missing", CORES, {"hada_t2": None}, {}, AdapterFileError),
    ("a core of another rank", CORES, {"hada_t2": ones(3, 2, 3, 2)}, {}, AdapterMismatchError),
    ("a core of another window", CORES, {"hada_t1": ones(2, 2, 3, 3)}, {}, AdapterMismatchError),
    ("a flag of text", CORES, {}, {"use_effective_conv2d": "yes"}, AdapterFileError),
    ("no bound", {"up": OftSpec(4, eps=0.1)}, {}, {"eps": 0}, AdapterFileError),
    ("no weights of ranks", {"up": AdaloraSpec(2)}, {"lora_E": None}, {}, AdapterFileError),
    ("weights as a row", {"up": AdaloraSpec(2)}, {"lora_E": ones(1, 2)}, {}, AdapterMismatchError),
    ("the rank as text", {"up": AdaloraSpec(2)}, {}, {"init_r": "2"}, AdapterFileError),
    ("another side", IA3, {}, {"feedforward_modules": ["up"]}, AdapterMismatchError),
    ("gains of one axis", IA3, {"ia3_l": ones(32)}, {}, AdapterMismatchError),
    ("another kind", {"up": LohaSpec(3)}, {}, {"peft_type": "LOKR"}, UnsupportedAdapterError),
]


@pytest.mark.parametrize("spec", [LohaSpec(2), LokrSpec(2)], ids=["loha", "lokr"])
def test_core_without_a_window_raises(files, spec):
    params, pair = make({"up": spec})
    save_peft("adapter", pair.tunable, names_of(params))
    file = pathlib.Path("adapter/adapter_model.safetensors")
    key = "hada_t1" if isinstance(spec, LohaSpec) else "lokr_t2"
    core = {f"base_model.model.blocks.0.up.{key}": ones(2, 2, 3, 3)}
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | core, file)
    with pytest.raises(AdapterFileError, match="a core over a window, and `up` has none"):
        load_peft("adapter", params, names_of(params))


@pytest.mark.parametrize(
    ("spec", "changes", "config", "error"),
    [pytest.param(*row[1:], id=row[0]) for row in SPOILED],
)
def test_mismatched_tuner_folders_raise(files, spec, changes, config, error):
    params = write_changed(spec, changes, config)
    with pytest.raises(error) as raised:
        load_peft("adapter", params, names_of(params))
    assert type(raised.value) is error
    assert "adapter" in str(raised.value)


KEYS = {
    "LOHA": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1"],
    "LOKR": ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
    "ADALORA": ["lora_A", "lora_B", "lora_E", "lora_A.weight"],
    "IA3": ["ia3_l", "ia3_l.weight"],
    "LORA": ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_A"],
    "VERA": ["vera_lambda_b", "vera_lambda_d", "vera_A"],
    "OFT": ["oft_R.weight", "oft_embedding_R.weight", "oft_r"],
    "DELORA": ["delora_A", "delora_B", "delora_lambda", "delora_w_norm"],
    "MISS": ["miss_block"],
    "GRALORA": ["gralora_A", "gralora_B", "gralora_A_general.weight"],
    "TRAINABLE_TOKENS": ["trainable_tokens_delta", "token_adapter.trainable_tokens_delta"],
}
COMMON = {"VERA": ["vera_A", "vera_B"]}
SETTINGS = {
    "LORA": "r lora_alpha",
    "ADALORA": "init_r lora_alpha",
    "LOHA": "r alpha",
    "LOKR": "r alpha",
    "GRALORA": "r alpha gralora_k",
    "VERA": "r",
    "DELORA": "r",
    "MISS": "r",
}


def test_every_tuner_has_a_case():
    assert KEYS.keys() == TUNERS.keys()


@pytest.mark.parametrize("kind", KEYS)
@settings(max_examples=30)
@given(data=st.data())
def test_random_tensors_are_read_or_rejected(tmp_path_factory, kind, data):
    shapes = data.draw(
        st.dictionaries(
            st.sampled_from(KEYS[kind]), st.lists(st.integers(1, 4), max_size=5).map(tuple)
        )
    )
    config: dict[str, Any] = {"peft_type": kind, "target_modules": ["a"], "peft_version": "0.21.2"}
    config |= {key: data.draw(st.integers(1, 3)) for key in SETTINGS.get(kind, "").split()}
    if kind == "IA3":
        config["feedforward_modules"] = ["a"]
    if kind == "TRAINABLE_TOKENS":
        config["token_indices"] = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    if kind == "LORA" and data.draw(st.booleans()):
        config["use_bdlora"] = {
            "nblocks": data.draw(st.integers(1, 3)),
            "target_modules_bd_a": ["a"],
        }
    folder = tmp_path_factory.mktemp("random")
    tensors = {f"base_model.model.a.{key}": ones(*shape) for key, shape in shapes.items()}
    for key in COMMON.get(kind, ()):
        shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
        tensors[f"base_model.{key}"] = ones(*shape)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = folder / "base.safetensors"
    for read in (
        lambda: open_adapter(folder),
        lambda: load_peft(folder, {"a": jnp.ones((4, 6))}, {"a": Linear("a")}),
        lambda: load_peft(folder, {"a": jnp.ones((3, 2, 4, 6))}, {"a": Conv("a")}),
        lambda: load_peft(folder, {"a": jnp.ones((5, 4))}, {"a": Embedding("a")}),
    ):
        try:
            read()
        except AdapterError as error:
            assert str(error).startswith(str(folder))
    assert not base.exists()


def test_native_file_of_each_kind_converts(shell, files):
    params, pair = make({"up": LokrSpec(2, 5)})
    save_adapter("a.safetensors", pair.tunable)
    pathlib.Path("names.json").write_text(
        json.dumps({"up": {"type": "Linear", "module": "blocks.0.up"}})
    )
    shell.succeed("convert a.safetensors adapter --to peft --names names.json")
    loaded = load_peft("adapter", params, names_of(params))
    assert_close(lorax.merge_params(loaded), lorax.merge_params(pair))


@pytest.mark.parametrize(("size", "factor"), [(8, 4), (24, 8)])
def test_lokr_factor_that_divides_an_axis_is_the_number_of_blocks(tmp_path, size, factor):
    shapes = {"w1": (2, factor), "w2": (3, size // factor)}
    arrays = {name: jnp.ones(shape) for name, shape in shapes.items()}
    blank = LokrWeight(*[None] * 7, 9, 5, (2, factor), (False, False), False, (0, 1), (0,), (1,))
    pair = Pair(
        {"up": jax.ShapeDtypeStruct((6, size), jnp.float32)}, {"up": blank.with_factors(arrays)}
    )
    save_peft(tmp_path, pair, {"up": Linear("up")})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["decompose_factor"] == factor
