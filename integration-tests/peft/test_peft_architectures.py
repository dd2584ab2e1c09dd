"""Adapters of a dozen architectures have equal outputs in PEFT and here, in both directions."""

import pytest
from peft import LoraConfig

from lorax import LoraSpec

# The suffixes of the names of the adapted modules in each model.
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
    "bert": ["query", "value", "word_embeddings"],
    "roberta": ["key", "attention.output.dense"],
    "t5": ["q", "v", "wi", "wo"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "whisper": ["q_proj", "out_proj", "fc2"],
    "vit": ["query", "value", "projection"],
    "clip": ["q_proj", "v_proj", "patch_embedding", "token_embedding", "text_projection"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "mixtral": ["q_proj", "gate", "w1", "w2", "w3"],
    "net": ["one", "two", "three", "head"],
}
# Rank and alpha in turn, so that many modules differ from the most frequent values.
SETTINGS = [(3, 4.0), (2, 5.0), (3, 7), (3, 4.0), (5, 1.5)]

both_scalings = pytest.mark.parametrize("scaling", ["standard", "rslora"])


def has_suffix(name, suffixes):
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)


def specs(twin, targets, scaling):
    """A spec for each target, with the settings in turn."""
    torch_names = twin.names
    paths = [
        path
        for path, torch_name in torch_names.items()
        if has_suffix(torch_name.module, targets) and torch_name.parameter == "weight"
    ]
    return spec_of(twin, paths, scaling)


def spec_of(twin, paths, scaling):
    specs = {}
    for index, path in enumerate(paths):
        roles = twin.names[path].at(path, twin.params[path].shape).axes
        rank, alpha = SETTINGS[index % len(SETTINGS)]
        specs[path] = LoraSpec(rank, alpha, scaling, roles.inputs, roles.outputs, roles.shared)
    return specs


@both_scalings
@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_our_adapters(twin, to_peft, name, scaling):
    model = twin(name)
    to_peft(model, specs(model, TARGETS[name], scaling))


@both_scalings
@pytest.mark.parametrize("name", TARGETS)
def test_peft_adapters_are_loaded(twin, from_peft, name, scaling):
    first, *_, last = TARGETS[name]
    config = LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=TARGETS[name],
        rank_pattern={last: 5, rf"^(.*\.1\..*)?{first}": 2},
        alpha_pattern={last: 7, rf"^(.*\.0\..*)?{first}": 1.5},
        use_rslora=scaling == "rslora",
        fan_in_fan_out=name == "gpt2",
    )
    from_peft(twin(name), config)


# Experts in which PEFT wraps one or both parameters.
EXPERTS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "inner": ["mlp.experts.gate_up_proj"],
    "outer": ["mlp.experts.down_proj"],
}
# PEFT warns about patterns for parameters by mistake: it does use them.
patterns_in_use = pytest.mark.filterwarnings(
    r"ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)


@patterns_in_use
@both_scalings
@pytest.mark.parametrize("targets", EXPERTS)
def test_peft_loads_our_experts(twin, to_peft, targets, scaling):
    model = twin("gptoss")
    paths = [path for path in model.names if has_suffix(path, [*EXPERTS[targets], "q_proj.weight"])]
    to_peft(model, spec_of(model, paths, scaling))


@patterns_in_use
def test_peft_loads_our_experts_without_modules(twin, to_peft):
    model = twin("gptoss")
    paths = [path for path in model.names if has_suffix(path, EXPERTS["both"])]
    to_peft(model, spec_of(model, paths, "standard"))


@patterns_in_use
@both_scalings
@pytest.mark.parametrize("targets", EXPERTS)
def test_peft_experts_are_loaded(twin, from_peft, targets, scaling):
    config = LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=EXPERTS[targets],
        rank_pattern={EXPERTS[targets][0]: 2, "1.self_attn.q_proj": 5},
        alpha_pattern={EXPERTS[targets][-1]: 7},
        use_rslora=scaling == "rslora",
    )
    from_peft(twin("gptoss"), config)


# PEFT's forward pass fails for this module of transformers 4, but its merge does not.
CONV = ["encoder.conv1", "encoder.conv2", "q_proj"]


def test_peft_loads_our_whisper_convolutions(twin, to_peft):
    model = twin("whisper")
    to_peft(model, specs(model, CONV, "standard"), merged=True)


def test_peft_whisper_convolutions_are_loaded(twin, from_peft):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=CONV, rank_pattern={"conv1": 5})
    from_peft(twin("whisper"), config, merged=True)
