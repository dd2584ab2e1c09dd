"""Adapters of a dozen architectures, from ours to PEFT and from PEFT to ours: equal outputs."""

import pytest
from peft import LoraConfig

from lorax import LoraSpec

# What is adapted in each model: the ends of the modules' names.
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
# Rank and alpha, one after the other: many modules differ from the most frequent.
SETTINGS = [(3, 4.0), (2, 5.0), (3, 7), (3, 4.0), (5, 1.5)]

both_scalings = pytest.mark.parametrize("scaling", ["standard", "rslora"])


def ends_in(name, ends):
    return any(f".{name}".endswith(f".{end}") for end in ends)


def specs(twin, targets, scaling):
    """A spec for each target, with the settings in turn."""
    torch_names = twin.names
    paths = [
        path
        for path, torch_name in torch_names.items()
        if ends_in(torch_name.module, targets) and torch_name.parameter == "weight"
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
def test_peft_reads_ours(twin, to_peft, name, scaling):
    model = twin(name)
    to_peft(model, specs(model, TARGETS[name], scaling))


@both_scalings
@pytest.mark.parametrize("name", TARGETS)
def test_we_read_pefts(twin, from_peft, name, scaling):
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


# Those of which PEFT wraps one parameter or both, alone and beside modules.
EXPERTS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "inner": ["mlp.experts.gate_up_proj"],
    "outer": ["mlp.experts.down_proj"],
}
# PEFT says so of patterns for parameters, in error: it does use them.
patterns_in_use = pytest.mark.filterwarnings(
    r"ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)


@patterns_in_use
@both_scalings
@pytest.mark.parametrize("targets", EXPERTS)
def test_peft_reads_our_experts(twin, to_peft, targets, scaling):
    model = twin("gptoss")
    paths = [path for path in model.names if ends_in(path, [*EXPERTS[targets], "q_proj.weight"])]
    to_peft(model, spec_of(model, paths, scaling))


@patterns_in_use
def test_peft_reads_experts_alone(twin, to_peft):
    model = twin("gptoss")
    paths = [path for path in model.names if ends_in(path, EXPERTS["both"])]
    to_peft(model, spec_of(model, paths, "standard"))


@patterns_in_use
@both_scalings
@pytest.mark.parametrize("targets", EXPERTS)
def test_we_read_pefts_experts(twin, from_peft, targets, scaling):
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


# PEFT's own forward pass fails for this module of transformers 4, but its merge does not.
CONV = ["encoder.conv1", "encoder.conv2", "q_proj"]


def test_peft_reads_our_whisper_convolutions(twin, to_peft):
    model = twin("whisper")
    to_peft(model, specs(model, CONV, "standard"), merged=True)


def test_we_read_pefts_whisper_convolutions(twin, from_peft):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=CONV, rank_pattern={"conv1": 5})
    from_peft(twin("whisper"), config, merged=True)
