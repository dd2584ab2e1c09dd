"""Stacks, heads, biases, tied embeddings and other features of adapters agree with PEFT."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    FourierFTConfig,
    GraloraConfig,
    LoraConfig,
    MissConfig,
    RandLoraConfig,
    get_peft_model,
)

import lorax
from lorax import LORA_FULL, DoraSpec, FrozenWeight, LoraSpec
from lorax_io import (
    AdapterWarning,
    Experts,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    load_peft,
    save_peft,
)

# Stacks of several modules' parameters: the model, the name, the shape before the axes are
# transposed, and the order of axes.
ATTENTION = "model.layers.{}.self_attn"
MOE = "model.layers.{}.block_sparse_moe.experts.{}.w1"
FUSED = {"parameter": "down_proj", "order": 1, "swapped": True}
STACKS = {
    "layers": ("llama", Linear(f"{ATTENTION}.q_proj", shared_axes=(0,)), (2, 16, 16), None),
    "layers last": (
        "llama",
        Linear(f"{ATTENTION}.v_proj", shared_axes=(-1,)),
        (2, 16, 8),
        (1, 2, 0),
    ),
    "layers second": (
        "llama",
        Linear("model.layers.{}.mlp.down_proj", in_axes=(0,), shared_axes=(1,)),
        (2, 24, 16),
        (1, 0, 2),
    ),
    "as in torch": (
        "llama",
        Linear(f"{ATTENTION}.k_proj", in_axes=(2,), out_axes=(1,), shared_axes=(0,)),
        (2, 16, 8),
        (0, 2, 1),
    ),
    "output heads": (
        "llama",
        Linear(f"{ATTENTION}.v_proj", in_axes=(1,), out_axes=(2, 3), shared_axes=(0,)),
        (2, 16, 2, 4),
        None,
    ),
    "input heads": (
        "llama",
        Linear(f"{ATTENTION}.o_proj", in_axes=(1, 2), shared_axes=(0,)),
        (2, 4, 4, 16),
        None,
    ),
    "one layer's heads": (
        "llama",
        Linear("model.layers.1.self_attn.q_proj", in_axes=(0,)),
        (16, 4, 4),
        None,
    ),
    "layers and experts": ("mixtral", Linear(MOE, shared_axes=(0, 1)), (2, 3, 16, 24), None),
    "layers of fused experts": (
        "gptoss",
        Experts("model.layers.{}.mlp.experts", shared_axes=(0, 1), **FUSED),
        (2, 3, 24, 16),
        None,
    ),
}


def stacked(twin, case):
    name, *rest = STACKS[case]
    return twin(name).stacked(*rest)


@pytest.mark.parametrize("case", STACKS)
def test_peft_loads_our_stacks(twin, to_peft, case):
    model = stacked(twin, case)
    torch_name, shape = model.names["stack"], model.params["stack"].shape
    roles = torch_name.at("stack", shape).axes
    to_peft(model, {"stack": LoraSpec(3, 5, "standard", roles.inputs, roles.outputs, roles.shared)})


@pytest.mark.parametrize("case", STACKS)
def test_peft_stacks_are_loaded(twin, from_peft, case):
    model = stacked(twin, case)
    torch_name = model.names["stack"]
    end = torch_name.module.rpartition(".")[2]
    targets = {"target_modules": rf".*\.{end}"}
    if "{" not in torch_name.module:
        targets = {"target_modules": [torch_name.module]}
    if isinstance(torch_name, Experts):
        targets = {"target_modules": [], "target_parameters": [f"{end}.{torch_name.parameter}"]}
    from_peft(model, LoraConfig(r=3, lora_alpha=5, **targets))


def perturbed(tunable):
    """Random changes, also of fully trained parameters."""
    key = jax.random.key(7)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), tunable)


# Factors for a `BERT` model, in addition to fully trained parameters.
FACTORS = {f"bert.encoder.layer.{i}.attention.self.value.weight": 3 for i in (0, 1)}


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_peft_loads_our_heads(twin, to_peft, task_type):
    head = {"classifier.weight": LORA_FULL, "classifier.bias": LORA_FULL}
    to_peft(twin("bert"), FACTORS | head, change=perturbed, task_type=task_type)


def test_peft_loads_our_partly_frozen_heads(twin, to_peft):
    model = twin("bert")
    head = {"classifier.weight": LORA_FULL}
    to_peft(model, FACTORS | head, change=perturbed, params=model.params)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_peft_loads_our_heads_of_several_modules(twin, to_peft, task_type):
    spec = {"roberta.encoder.layer.0.attention.self.query.weight": 3}
    for module in ("dense", "out_proj"):
        spec |= {f"classifier.{module}.{name}": LORA_FULL for name in ("weight", "bias")}
    to_peft(twin("roberta"), spec, change=perturbed, task_type=task_type)


def test_peft_loads_our_factors_with_a_frozen_head(twin, to_peft):
    model = twin("bert")
    to_peft(model, FACTORS, task_type="SEQ_CLS", params=model.params)


def test_peft_loads_our_parent_modules(twin, to_peft, tmp_path):
    model = twin("vit")
    spec = {"vit.embeddings.cls_token": LORA_FULL, "vit.layernorm.weight": LORA_FULL}
    spec |= {f"vit.encoder.layer.{i}.attention.attention.value.weight": 3 for i in (0, 1)}
    to_peft(model, spec, change=perturbed, params=model.params)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["vit.embeddings", "vit.layernorm"]


def test_peft_loads_our_stacks_of_norms(twin, to_peft):
    norms = Tensor("model.layers.{}.input_layernorm", parameter="weight", shared_axes=(0,))
    model = twin("llama").stacked(norms, (2, 16))
    spec = {"stack": LORA_FULL, "model.norm.weight": LORA_FULL, "lm_head.weight": 3}
    to_peft(model, spec, change=perturbed)


def test_peft_loads_our_biases(twin, to_peft):
    biases = {path.replace("weight", "bias"): LORA_FULL for path in FACTORS}
    to_peft(twin("bert"), FACTORS | biases, change=perturbed)


def perturb_trained(*suffixes):
    """Randomly changes the copies of these parameters that PEFT trains."""

    def change(model):
        trained = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "lora_" not in name and name.endswith(suffixes)
        ]
        assert trained
        for parameter in trained:
            parameter.add_(0.3 * torch.randn_like(parameter))

    return change


SEQ_CLS = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
FULL = {
    "head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "head of the task": ("bert", SEQ_CLS),
    "head of several modules": ("roberta", SEQ_CLS),
    "biases of the adapted": ("bert", {"target_modules": ["key"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", FULL)
def test_peft_full_parameters_are_loaded(twin, from_peft, case):
    name, values = FULL[case]
    config = LoraConfig(r=3, lora_alpha=4, **values)
    _, tunable = from_peft(twin(name), config, change=perturb_trained("weight", "bias"))
    assert any(isinstance(leaf, jax.Array) for leaf in tunable.values())


@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_all_peft_biases_are_loaded(twin, from_peft, modules_to_save):
    config = LoraConfig(r=3, target_modules=["key"], bias="all", modules_to_save=modules_to_save)
    from_peft(twin("bert"), config, change=perturb_trained("bias"), resave=False)


# Ways to select modules, and other settings that do not change values.
SELECTIONS = {
    "pattern": {"target_modules": r".*layers\.1\..*\.[qv]_proj"},
    "all": {"target_modules": "all-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*|.*mlp.*"},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "one layer": {
        "target_modules": ["v_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "by the model": {"task_type": "CAUSAL_LM"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "high rank": {"target_modules": ["q_proj"], "r": 19},
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_peft_selections_are_loaded(twin, from_peft, case):
    from_peft(twin("llama"), LoraConfig(**{"r": 3, "lora_alpha": 4, **SELECTIONS[case]}))


@pytest.mark.parametrize("adapted", [["head"], ["aux.head"], ["head", "aux.head"]])
def test_peft_loads_our_modules_whose_names_are_suffixes(twin, to_peft, adapted):
    settings = {"head": LoraSpec(2, 3), "aux.head": LoraSpec(3, 4)}
    to_peft(twin("net"), {f"{name}.weight": settings[name] for name in adapted})


def test_peft_adapters_of_another_name_are_loaded(twin, from_peft):
    from_peft(twin("llama"), LoraConfig(r=3, target_modules=["q_proj"]), name="other")


# Scales that a config can contain: rank, alpha and scaling of two layers.
SCALES = {
    "of one": [(3, None, "standard"), (2, None, "standard")],
    "of one and another": [(3, None, "standard"), (2, 5, "rslora")],
    "of both kinds": [(3, 4, "standard"), (2, 5, "rslora")],
}


@pytest.mark.parametrize("fold_scale", [False, True])
@pytest.mark.parametrize("case", SCALES)
def test_peft_loads_our_scales(twin, to_peft, case, fold_scale):
    paths = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    spec = {path: LoraSpec(*scale) for path, scale in zip(paths, SCALES[case], strict=True)}
    to_peft(twin("llama"), spec, fold_scale=fold_scale, target_modules=["q_proj"])


# PEFT warns that it adapts only the lookup until the factors are merged into the table.
TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@TIED
def test_peft_loads_our_tied_embeddings_when_merged(twin, to_peft):
    with pytest.warns(AdapterWarning, match="the head shares the embedding"):
        to_peft(twin("gpt2"), {"transformer.wte.weight": 3}, merged=True)


@TIED
def test_merged_peft_tied_embeddings_are_loaded(twin, from_peft):
    config = LoraConfig(r=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    with pytest.warns(AdapterWarning, match="the head shares the embedding"):
        from_peft(twin("gpt2"), config, merged=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_round_trip_bit_for_bit(twin, from_peft, tmp_path, dtype):
    model = twin("llama")
    half = dataclasses.replace(model, model=copy.deepcopy(model.model).to(dtype))
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"])
    _, tunable = from_peft(half, config, tolerance=0.05, autocast_adapter_dtype=False)
    adapters = jax.tree.leaves(tunable)
    assert {str(x.dtype) for x in adapters} == {str(dtype).removeprefix("torch.")}


def test_axes_of_experts_are_inferred_from_shapes(twin, from_peft, tmp_path):
    model = twin("gptoss")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, target_modules=[], target_parameters=parameters)
    _, tunable = from_peft(model, config)
    torch_names = {
        path: dataclasses.replace(torch_name, swapped=None)
        if isinstance(torch_name, Experts)
        else torch_name
        for path, torch_name in model.names.items()
    }
    _, loaded = load_peft(tmp_path / "theirs", model.params, torch_names)
    jax.tree.map(np.testing.assert_array_equal, loaded, tunable)


def test_auto_classes_load_the_base(twin, tmp_path):
    model = twin("llama")
    model.model.save_pretrained(tmp_path / "base")
    spec = {path: 3 if path.endswith("q_proj.weight") else 0 for path in model.names}
    frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0), b_init="gaussian")
    named = {"base_model": str(tmp_path / "base"), "task_type": "CAUSAL_LM"}
    save_peft(tmp_path / "ours", tunable, model.names, **named)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.check_equal(lorax.merge_params(frozen, tunable), loaded)
    plain = copy.deepcopy(model.model)
    plain.load_adapter(str(tmp_path / "ours"))
    model.check_equal(lorax.merge_params(frozen, tunable), plain)


# DoRA: a model, and the suffixes of the adapted modules' names.
DORA = {
    "linear": ("llama", ["q_proj", "down_proj"]),
    "with a bias": ("bert", ["query", "intermediate.dense"]),
    "transposed": ("gpt2", ["c_attn"]),
    "embedding": ("llama", ["embed_tokens", "v_proj"]),
    "convolutions": ("net", ["one", "two", "three"]),
}


@pytest.mark.parametrize("fold_scale", [False, True])
@pytest.mark.parametrize("case", DORA)
def test_peft_loads_our_dora(twin, to_peft, case, fold_scale):
    name, suffixes = DORA[case]
    model = twin(name)
    spec = {}
    for path, torch_name in model.names.items():
        if torch_name.parameter == "weight" and torch_name.module.endswith(tuple(suffixes)):
            axes = torch_name.at(path, model.params[path].shape).axes
            spec[path] = DoraSpec(LoraSpec(3, 5)).with_axes(axes)
    assert len(spec) >= len(suffixes)
    to_peft(model, spec, change=perturbed, fold_scale=fold_scale)


@pytest.mark.parametrize("case", DORA)
def test_peft_dora_is_loaded(twin, from_peft, case):
    name, suffixes = DORA[case]
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=suffixes, use_dora=True, fan_in_fan_out=name == "gpt2"
    )
    frozen, tunable = from_peft(twin(name), config)
    assert {leaf.kind for leaf in tunable.values() if leaf is not None} == {"dora"}
    assert {type(frozen[path]) for path, leaf in tunable.items() if leaf} == {FrozenWeight}


DORA_STACKS = ["layers last", "output heads", "layers and experts"]


@pytest.mark.parametrize("case", DORA_STACKS)
def test_peft_loads_our_stacks_of_dora(twin, to_peft, case):
    model = stacked(twin, case)
    axes = model.names["stack"].at("stack", model.params["stack"].shape).axes
    to_peft(model, {"stack": DoraSpec(LoraSpec(3, 5)).with_axes(axes)}, change=perturbed)


@pytest.mark.parametrize("case", DORA_STACKS)
def test_peft_stacks_of_dora_are_loaded(twin, from_peft, case):
    targets = rf".*\.{STACKS[case][1].module.rpartition('.')[2]}"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True)
    from_peft(stacked(twin, case), config)


REFUSED = {
    "PiSSA": LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"),
    "OLoRA": LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="olora"),
    "replication": LoraConfig(r=3, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    "MiSS times the base": MissConfig(r=4, target_modules=["q_proj"], init_weights="bat"),
    "MiSS repeated": MissConfig(r=4, target_modules=["q_proj"], init_weights="mini", mini_r=4),
    "hybrid GraLoRA": GraloraConfig(r=4, hybrid_r=2, target_modules=["q_proj"]),
    "Fourier": FourierFTConfig(n_frequency=8, target_modules=["q_proj"]),
    "RandLoRA": RandLoraConfig(r=4, target_modules=["q_proj"]),
}


# PEFT warns by mistake that a bias was not gathered from several devices.
@pytest.mark.filterwarnings(r"ignore:Adapter 'default'.*lora_B\.bias")
def test_biases_of_factors_become_model_biases(twin, from_peft):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], lora_bias=True)
    _, tunable = from_peft(twin("llama", attention_bias=True), config, resave=False)
    full = {path for path, leaf in tunable.items() if leaf is not None and "bias" in path}
    assert {path.rpartition(".layers.")[2] for path in full} == {
        f"{k}.self_attn.q_proj.bias" for k in range(2)
    }


@pytest.mark.parametrize("tied", [False, True])
def test_trained_embedding_rows_are_loaded_with_lora(twin, from_peft, tied):
    config = LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[7, 2])

    def train(model):
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))

    model = twin("llama", tie_word_embeddings=tied)
    _, tunable = from_peft(model, config, change=train)
    [table] = [leaf for leaf in tunable.values() if leaf is not None and leaf.kind == "tokens"]
    assert table.indices == (7, 2)


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_peft_types_raise(twin, tmp_path, case):
    model = twin("llama", attention_bias=True)
    get_peft_model(copy.deepcopy(model.model), REFUSED[case]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapterError):
        load_peft(tmp_path, model.params, model.names)
