"""`spec`: which modules each option selects, and errors."""

import re

import jax
import pytest
import tiny
import transformers

import lorax
import lorax_hf


def adapted(config, **kwargs):
    """The adapted modules of a spec, with their leaves."""
    spec = lorax_hf.spec(config, **kwargs)
    leaves = jax.tree_util.tree_leaves_with_path(spec, is_leaf=lambda x: not isinstance(x, dict))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if leaf != lorax.LORA_FREEZE
    }


def modules(config, **kwargs):
    """The last names of the adapted modules, in layer 1 or outside of layers."""
    return {path.rpartition("/")[0] for path in adapted(config, **kwargs)}


@pytest.fixture
def llama():
    return tiny.config_of("llama")


ENDS = {
    "default": {"q_proj", "v_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
    "all-linear": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "embeddings": {"embed_tokens"},
    "list": {"q_proj", "down_proj"},
    "regex": {"q_proj", "k_proj"},
    "part": {"gate_proj", "up_proj", "down_proj"},
    "function": {"o_proj"},
}
TARGETS = {
    "list": ["q_proj", "mlp.down_proj"],
    "regex": r".*\.[qk]_proj",
    "part": re.compile(r"mlp\."),
    "function": lambda module: module.endswith("o_proj"),
}


@pytest.mark.parametrize("targets", ENDS)
def test_targets(llama, targets):
    chosen = modules(llama, targets=TARGETS.get(targets, targets))
    assert {name.rpartition("/")[2] for name in chosen} == ENDS[targets]
    assert len(chosen) == (1 if targets == "embeddings" else 2 * len(ENDS[targets]))


def test_gpt2_modules_of_the_same_name_are_different_targets():
    config = tiny.config_of("gpt2")
    assert modules(config, targets="attention", layers=0) == {"h/0/attn/c_attn", "h/0/attn/c_proj"}
    assert modules(config, targets="mlp", layers=0) == {"h/0/mlp/c_fc", "h/0/mlp/c_proj"}
    kernel = adapted(config, targets=["mlp.c_proj"])["h/0/mlp/c_proj/kernel"]
    assert (kernel.in_axes, kernel.out_axes) == ((1,), (0,))


def test_dense_layer_of_gpt2_is_not_conv1d():
    config = tiny.config_of("gpt2")
    config.tie_word_embeddings = False
    config.architectures = ["GPT2LMHeadModel"]
    head = adapted(config, targets=["lm_head"])["lm_head/kernel"]
    assert (head.in_axes, head.out_axes) == ((0,), (1,))


def test_all_linear_excludes_the_task_head():
    config = tiny.config_of("bert")
    config.architectures = ["BertForSequenceClassification"]
    chosen = modules(config, targets="all-linear")
    assert "classifier" not in chosen and "bert/pooler/dense" in chosen
    assert "bert/embeddings/word_embeddings" not in chosen


def test_classifier_with_fewer_classes_than_the_rank_warns():
    config = transformers.BertConfig(num_hidden_layers=1, architectures=["BertForPreTraining"])
    message = r"`cls.seq_relationship` \(768 inputs × 2 outputs\)"
    with pytest.warns(lorax.UnadaptedWarning, match=message):
        spec = lorax_hf.spec(config, rank=8, targets="all-linear")
    assert spec["cls"]["seq_relationship"]["kernel"] == lorax.LORA_FREEZE
    named = lorax_hf.spec(config, rank=8, targets=["query", "seq_relationship"])
    assert named["cls"]["seq_relationship"]["kernel"].rank == 8


def test_exclude_layers_and_full(llama):
    llama.architectures = ["LlamaForCausalLM"]
    chosen = adapted(llama, targets="attention", exclude=["k_proj"], layers=[1], full=["lm_head"])
    assert chosen["lm_head/kernel"] == lorax.LORA_FULL
    assert {path.rpartition("/")[0] for path in chosen} == {
        "lm_head",
        *(f"model/layers/1/self_attn/{name}_proj" for name in "qvo"),
    }


def test_ranks_alphas_and_scaling(llama):
    chosen = adapted(
        llama,
        rank=5,
        alpha=7,
        rslora=True,
        rank_pattern={r"0\.self_attn\.q_proj": 3},
        alpha_pattern={"v_proj": 2.5},
    )
    settings = {path.split("/", 1)[1]: (x.rank, x.alpha, x.scaling) for path, x in chosen.items()}
    assert settings["0/self_attn/q_proj/kernel"] == (3, 7, "rslora")
    assert settings["1/self_attn/q_proj/kernel"] == (5, 7, "rslora")
    assert settings["0/self_attn/v_proj/kernel"] == (5, 2.5, "rslora")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": ["q_prj"]}, r"'q_prj'. Did you mean 'q_proj'"),
        ({"targets": "q_proj"}, r"targets='q_proj' matches no module.*'q_proj'"),
        ({"targets": ["q_proj", "query"]}, "no module is called 'query'.*end in: .*q_proj"),
        ({"targets": lambda module: False}, "matches no module"),
        ({"exclude": ["k_prj"]}, "exclude: no module is called 'k_prj'"),
        ({"full": ["classifier"]}, "full: no module is called 'classifier'"),
        ({"layers": 7}, r"the layers are \[0, 1\]"),
        ({"rank_pattern": {"w_proj": 2}}, "rank_pattern: no module ends in 'w_proj'"),
    ],
    ids=["end", "name", "two", "function", "exclude", "full", "layers", "pattern"],
)
def test_patterns_without_a_match_raise(llama, kwargs, message):
    with pytest.raises(lorax.SpecError, match=message):
        lorax_hf.spec(llama, **kwargs)


def test_targets_without_a_match_raise():
    with pytest.raises(lorax.SpecError, match="targets='mlp': this architecture has none"):
        lorax_hf.spec(tiny.config_of("resnet"), targets="mlp")


def test_model_type_without_a_preset_raises():
    with pytest.raises(lorax.SpecError, match="no Flax model of the type 'esm'"):
        lorax_hf.spec(transformers.EsmConfig())
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")}}
    with pytest.raises(lorax.SpecError, match="no preset for the model type 'esm'"):
        lorax_hf.spec(transformers.EsmConfig(), params)


def test_non_model_raises_type_error():
    with pytest.raises(TypeError, match="not dict"):
        lorax_hf.spec({})


def test_spec_has_the_structure_of_the_parameters():
    model = tiny.make("FlaxResNetModel")
    spec = lorax_hf.spec(model)
    assert jax.tree.structure(spec, is_leaf=lambda x: isinstance(x, lorax.LoraSpec)) == (
        jax.tree.structure(model.params)
    )
    lorax.init_lora(model.params, spec, jax.random.key(0))


def test_composite_model_has_both_presets():
    chosen = modules(tiny.make("FlaxEncoderDecoderModel"), layers=0)
    assert chosen == {
        *(f"encoder/encoder/layer/0/attention/self/{name}" for name in ("query", "value")),
        *(f"decoder/transformer/h/0/{name}/c_attn" for name in ("attn", "crossattention")),
    }


def test_spec_accepts_any_kind_of_adapter(llama):
    kind = lorax.DoraSpec(lorax.LoraSpec(3, alpha=6))
    specs = adapted(llama, adapter=kind, rank_pattern={"v_proj": 2})
    assert {spec.spec.rank for spec in specs.values()} == {2, 3}
    assert all(isinstance(spec, lorax.DoraSpec) and spec.spec.in_axes for spec in specs.values())
    gains = adapted(llama, adapter=lorax.IA3Spec(), targets=["k_proj", "v_proj"])
    assert len(gains) == 4 and all(spec.out_axes for spec in gains.values())
    plain = adapted(llama, adapter=lorax.LoraSpec(3, 6), alpha_pattern={"v_proj": 4})
    assert plain == adapted(llama, rank=3, alpha=6, alpha_pattern={"v_proj": 4})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2}, "leave rank out"),
        ({"alpha": 2}, "leave alpha out"),
        ({"rslora": True}, "leave rslora out"),
        ({"rank_pattern": {"q_proj": 2}}, "needs a kind of adapter with a rank, not IA3Spec"),
        ({"alpha_pattern": {"q_proj": 2}}, "is for LoraSpec, not for IA3Spec"),
    ],
)
def test_settings_with_an_adapter_raise(llama, options, message):
    with pytest.raises(TypeError, match=message):
        lorax_hf.spec(llama, adapter=lorax.IA3Spec(), **options)
