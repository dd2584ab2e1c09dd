"""`spec`, `peft_names` and `lora` for PyTorch modules: targets, axes and names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
import transformers
from torch import nn

import lorax
import lorax_hf
from lorax import testing

LAYER = "model.layers.0."


def adapted(model, **options):
    """The adapted leaves of a spec, by name."""
    spec = lorax_hf.spec(model, **options)
    return {path: leaf for path, leaf in spec.items() if leaf != lorax.LORA_FREEZE}


def last_names(model, **options):
    """The last names of modules or expert parameters, in layer 0 or outside of layers."""
    modules = {path.removesuffix(".weight") for path in adapted(model, **options)}
    return {path.rpartition(".")[2] for path in modules if ".0." in path or ".1." not in path}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPERTS = {"gate_up_proj", "down_proj"}
CHOICES = {
    ("llama", "default"): {"q_proj", "v_proj"},
    ("llama", "attention"): ATTENTION,
    ("llama", "mlp"): MLP,
    ("llama", "all-linear"): ATTENTION | MLP,
    ("llama", "embeddings"): {"embed_tokens"},
    ("gpt2", "default"): {"c_attn"},
    ("gpt2", "attention"): {"c_attn", "c_proj"},
    ("gpt2", "mlp"): {"c_fc", "c_proj"},
    ("gpt2", "embeddings"): {"wte"},
    ("mixtral", "default"): {"q_proj", "v_proj"},
    ("mixtral", "all-linear"): ATTENTION,
    ("mixtral", "experts"): EXPERTS,
    ("mixtral", "mlp"): EXPERTS,
    ("gpt_oss", "experts"): EXPERTS,
}


@pytest.mark.parametrize(("kind", "targets"), CHOICES)
def test_named_targets(kind, targets):
    assert last_names(tiny_torch.causal(kind), targets=targets) == CHOICES[kind, targets]


SELECTIONS = {
    "ends": (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
    "full match": (r".*\.[qk]_proj", {"q_proj", "k_proj"}),
    "part": (re.compile(r"mlp\."), MLP),
    "function": (lambda name: name.endswith("o_proj"), {"o_proj"}),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_other_targets(case):
    targets, expected = SELECTIONS[case]
    assert last_names(tiny_torch.causal("llama"), targets=targets) == expected


def test_options_equal_those_of_flax_models():
    chosen = adapted(
        tiny_torch.causal("llama"),
        rank=5,
        alpha=7,
        rslora=True,
        targets="attention",
        exclude=["o_proj"],
        layers=[1],
        full=["lm_head"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 2},
    )
    assert chosen.pop("lm_head.weight") == lorax.LORA_FULL
    specs = {
        path.split(".")[-2]: (leaf.rank, leaf.alpha, leaf.scaling) for path, leaf in chosen.items()
    }
    assert specs == {
        "q_proj": (3, 7, "rslora"),
        "k_proj": (5, 7, "rslora"),
        "v_proj": (5, 2, "rslora"),
    }
    assert all(path.startswith("model.layers.1.") for path in chosen)
    kind = lorax.DoraSpec(lorax.LoraSpec(3))
    dora = adapted(tiny_torch.causal("llama"), adapter=kind, targets=["q_proj"])
    assert all(leaf.spec.in_axes == (1,) for leaf in dora.values())


class Mixed(nn.Module):
    """Weights of every module class with known axes, and of some with unknown axes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6, padding_idx=0)
        self.window = nn.Conv1d(6, 8, 3)
        self.groups = nn.Conv1d(8, 8, 2, groups=4)
        self.across = nn.ConvTranspose1d(8, 10, 3)
        self.turned = transformers.pytorch_utils.Conv1D(12, 10)
        self.scores = nn.Parameter(torch.ones(12, 7))
        self.head = nn.Linear(7, 5)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = self.turned(self.across(self.groups(self.window(x))).transpose(1, 2))
        return self.head(x @ self.scores)


IDS = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])


def test_axes_equal_those_of_a_trace():
    module = tiny_torch.randomized(Mixed())
    fn, params = lorax_hf.from_torch(module)
    traced = lorax.infer_spec(fn, params, jnp.asarray(IDS), rank=2, skip_small=False)
    inputs = (jax.ShapeDtypeStruct(IDS.shape, jnp.int32),)
    spec = lorax_hf.spec(module, rank=2, targets=lambda name: True, inputs=inputs)
    assert spec == traced
    assert spec["across.weight"].out_axes == (1,) and spec["turned.weight"].out_axes == (1,)
    testing.check(fn, params, spec, jnp.asarray(IDS), transforms=False)


def test_weights_with_unknown_axes_raise_or_warn():
    module = Mixed()
    with pytest.raises(lorax.SpecError, match="`across.weight` of ConvTranspose1d.*`inputs=`"):
        lorax_hf.spec(module, targets=["across"])
    with pytest.warns(lorax.UnadaptedWarning, match="`scores` of Mixed"):
        spec = lorax_hf.spec(module, rank=2, targets=lambda name: name != "embed")
    assert spec["across.weight"] == spec["scores"] == lorax.LORA_FREEZE
    assert spec["window.weight"].in_axes == (1, 2)
    with pytest.raises(TypeError, match="`inputs` must be a tuple or a dict"):
        lorax_hf.spec(module, targets=["across"], inputs=jnp.asarray(IDS))


def test_peft_names():
    names = lorax_hf.peft_names(Mixed())
    assert names["head.weight"] == {
        "type": "Linear",
        "module": "head",
        "in_axes": [1],
        "out_axes": [0],
    }
    assert names["turned.weight"]["type"] == "Conv1D"
    assert names["embed.weight"]["type"] == "Embedding"
    assert names["window.weight"]["channel_axis"] == 1 and "grouped" not in names["window.weight"]
    assert names["groups.weight"]["grouped"] is True
    for path in ("across.weight", "head.bias"):
        module, _, parameter = path.rpartition(".")
        assert names[path] == {"type": "Tensor", "module": module, "parameter": parameter}
    assert names["scores"] == {
        "type": "Parameter",
        "module": "",
        "parameter": "scores",
        "order": 0,
    }
    experts = lorax_hf.peft_names(tiny_torch.causal("mixtral"))
    assert experts[f"{LAYER}mlp.experts.down_proj"] == {
        "type": "Experts",
        "module": f"{LAYER}mlp.experts",
        "parameter": "down_proj",
        "order": 1,
        "in_axes": [2],
        "out_axes": [1],
        "shared_axes": [0],
        "out_first": True,
    }


REFUSED = {
    "near": ({"targets": ["q_prj"]}, "'q_prj'. Did you mean 'q_proj'"),
    "experts": ({"targets": "experts"}, "targets='experts': this architecture has none"),
    "layer": ({"layers": [0, 9]}, r"there is no layer 9; the layers are \[0, 1\]"),
    "empty": ({"layers": []}, r"leave nothing of targets='default'.*\[0, 1\]"),
    "string": (
        {"targets": "q_proj"},
        r"must match the whole name; to match its end, pass \['q_proj'\]",
    ),
    "pattern": ({"rank_pattern": {"query": 2}}, "rank_pattern: no module ends in 'query'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_options_raise(name):
    options, message = REFUSED[name]
    with pytest.raises(lorax.SpecError, match=message):
        lorax_hf.spec(tiny_torch.causal("llama"), **options)


def test_patterns_without_an_effect_warn():
    with pytest.warns(
        lorax.UnadaptedWarning, match="alpha_pattern has 'up_proj', which matches no"
    ):
        lorax_hf.spec(tiny_torch.causal("llama"), alpha_pattern={"up_proj": 2, "q_proj": 3})


def test_computed_weights_warn():
    normalized = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    module = nn.Sequential(normalized, nn.Linear(6, 6))
    original = "0.parametrizations.weight.original1"
    with pytest.warns(lorax.UnadaptedWarning, match=f"`{original}` of Param.*`inputs=`"):
        assert adapted(module, rank=2, targets="all-linear").keys() == {"1.weight"}
    traced = adapted(module, rank=2, targets="all-linear", inputs=(jnp.ones((2, 6)),))
    assert traced.keys() == {"1.weight", original}


def test_module_with_peft_adapters_raises():
    tuned = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    for use in (lorax_hf.spec, lorax_hf.peft_names):
        with pytest.raises(lorax.SpecError, match="`1` is a Linear of PEFT: .*merge_and_unload"):
            use(nn.Sequential(nn.Linear(6, 6), tuned(6, 6)))


def test_type_without_a_peft_default_raises():
    with pytest.raises(lorax.SpecError, match="PEFT has no default for this module"):
        lorax_hf.spec(nn.Sequential(nn.Linear(6, 5)))
    config = transformers.OlmoConfig(num_hidden_layers=1)
    with pytest.raises(lorax.SpecError, match="PEFT has no default for the type 'olmo'"):
        lorax_hf.spec(config)


def test_spec_accepts_a_config():
    model = tiny_torch.causal("qwen3")
    model.config.architectures = ["Qwen3ForCausalLM"]
    assert lorax_hf.spec(model.config, rank=2) == lorax_hf.spec(model, rank=2)
    assert lorax_hf.peft_names(model.config) == lorax_hf.peft_names(model)


def test_adapted_module_is_called_like_the_module():
    model = tiny_torch.causal("llama")
    _, params = lorax_hf.from_torch(model)
    spec = lorax_hf.spec(model, rank=2, targets="all-linear")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    adapted = lorax_hf.lora(model, on_materialize="error", on_unused="error")
    ids = jnp.asarray(tiny_torch.IDS)
    mask = jnp.ones_like(ids)
    logits = adapted(ids, attention_mask=mask, params=(frozen, tunable)).logits
    fn, _ = lorax_hf.from_torch(model)
    expected = fn(lorax.merge_params(frozen, tunable), ids, attention_mask=mask).logits
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert adapted.config is model.config
    with pytest.raises(TypeError, match="params"):
        adapted(ids)
    with pytest.raises(AttributeError, match="no_such_thing"):
        adapted.no_such_thing  # noqa: B018


def test_doctor_accepts_a_module():
    assert lorax_hf.doctor(tiny_torch.causal("llama")) == lorax_hf.doctor(nn.Linear(2, 2)) == []


def test_untraceable_model_warns():
    config = transformers.XLMConfig(emb_dim=16, n_layers=1, n_heads=4, n_words=31)
    model = transformers.XLMModel(config).eval()
    (finding,) = lorax_hf.doctor(model)
    assert finding in lorax_hf.doctor() and "cannot be traced" in finding.problem
    with pytest.warns(lorax_hf.DefectWarning, match="has Python control flow"):
        lorax_hf.spec(model, rank=2, targets="all-linear")
    fn, params = lorax_hf.from_torch(model)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(fn)(params, jnp.asarray(tiny_torch.IDS) % 31)
