"""PEFT's other adapter types give the same merged weights in PEFT and here, in both directions.

Factors are random, as after training.
"""

import copy
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    GraloraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import lorax
from lorax_io import (
    AdapterWarning,
    Conv,
    Embedding,
    Linear,
    Tensor,
    load_peft,
    open_adapter,
    save_peft,
)
from lorax_io._command import main


class Net(nn.Module):
    """Layers of different kinds, none of them square, with or without biases."""

    def __init__(self, bias):
        super().__init__()
        self.table = nn.Embedding(11, 24)
        self.up = nn.Linear(24, 32, bias=bias)
        self.down = nn.Linear(32, 20, bias=bias)
        self.conv = nn.Conv2d(4, 6, (3, 2), bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def seeded_vera(**settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A")
        return VeraConfig(save_projection=False, **settings)


LINEAR = ["up", "down"]
ALL = ["up", "down", "conv"]

CONFIGS = {
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
    "LoHa of a convolution": LoHaConfig(r=3, alpha=5, target_modules=ALL),
    "LoHa with cores": LoHaConfig(r=3, alpha=5, target_modules=ALL, use_effective_conv2d=True),
    "LoHa with patterns": LoHaConfig(
        r=3, alpha=5, target_modules=LINEAR, rank_pattern={"up": 2}, alpha_pattern={"down": 7}
    ),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=LINEAR),
    "full LoKr": LoKrConfig(r=64, alpha=5, target_modules=LINEAR),
    "LoKr, both decomposed": LoKrConfig(r=1, alpha=5, target_modules=LINEAR, decompose_both=True),
    "LoKr in blocks of four": LoKrConfig(r=2, alpha=5, target_modules=LINEAR, decompose_factor=4),
    "LoKr in blocks of eight": LoKrConfig(r=2, alpha=5, target_modules=LINEAR, decompose_factor=8),
    "LoKr of a convolution": LoKrConfig(r=1, alpha=5, target_modules=ALL),
    "LoKr with a core": LoKrConfig(r=1, alpha=5, target_modules=ALL, use_effective_conv2d=True),
    "full LoKr of a convolution": LoKrConfig(r=64, alpha=5, target_modules=ALL),
    "AdaLoRA": AdaLoraConfig(init_r=4, lora_alpha=5, target_modules=LINEAR, total_step=9),
    "IA3": IA3Config(target_modules=LINEAR, feedforward_modules=["down"]),
    "IA3 of a convolution": IA3Config(target_modules=ALL, feedforward_modules=["conv"]),
    "IA3 of channels out": IA3Config(target_modules=ALL, feedforward_modules=[]),
    "rsLoRA": LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_rslora=True),
    "VeRA": VeraConfig(r=5, target_modules=LINEAR, projection_prng_key=3),
    "VeRA of a seed": seeded_vera(r=5, target_modules=LINEAR, projection_prng_key=2**33 + 7),
    "OFT": OFTConfig(oft_block_size=8, target_modules=LINEAR),
    "OFT, exact and shared": OFTConfig(
        oft_block_size=4, target_modules=LINEAR, block_share=True, use_cayley_neumann=False
    ),
    "OFT of a table": OFTConfig(
        oft_block_size=4, target_modules=["up", "table"], num_cayley_neumann_terms=3
    ),
    "OFT with a number of blocks": OFTConfig(r=4, oft_block_size=0, target_modules=["down"]),
    "OFT within a bound": OFTConfig(
        oft_block_size=4, target_modules=LINEAR, coft=True, eps=0.3, module_dropout=0.5
    ),
    "DeLoRA": DeloraConfig(r=3, target_modules=LINEAR, rank_pattern={"up": 2}),
    "MiSS": MissConfig(r=8, target_modules=LINEAR),
    "MiSS with a remainder": MissConfig(r=5, target_modules=LINEAR),
    "GraLoRA": GraloraConfig(r=6, alpha=5, gralora_k=2, target_modules=LINEAR),
    "BD-LoRA": LoraConfig(
        r=6,
        lora_alpha=5,
        target_modules=LINEAR,
        use_rslora=True,
        use_bdlora=BdLoraConfig(["up"], ["down"], nblocks=2),
    ),
    "BD-LoRA and LoRA": LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=LINEAR,
        use_bdlora=BdLoraConfig(None, ["down"], nblocks=4, match_strict=False),
    ),
    "trainable tokens": TrainableTokensConfig(target_modules=["table"], token_indices=[5, 1, 9]),
    "tokens and LoRA": LoraConfig(
        r=3, lora_alpha=5, target_modules=LINEAR, trainable_token_indices={"table": [7, 0]}
    ),
    "tokens and DoRA": LoraConfig(
        r=3, target_modules=LINEAR, use_dora=True, trainable_token_indices={"table": [2]}
    ),
    "LoRA of a table": LoraConfig(r=3, lora_alpha=5, target_modules=["up", "table"]),
}  # fmt: skip
# With biases that are trained, or scaled together with the weight.
BIASED = {
    "LoRA and its biases": LoraConfig(r=3, target_modules=LINEAR, bias="lora_only"),
    "LoRA and all biases": LoraConfig(r=3, target_modules=["up"], bias="all"),
    "LoRA with biased factors": LoraConfig(
        r=3, lora_alpha=5, target_modules=LINEAR, lora_bias=True
    ),
    "LoRA with biased factors and biases": LoraConfig(
        r=4, target_modules=["up"], lora_bias=True, use_rslora=True, bias="all"
    ),
    "IA3 of outputs": IA3Config(target_modules=LINEAR, feedforward_modules=["down"]),
    "VeRA and its biases": VeraConfig(r=5, target_modules=LINEAR, bias="vera_only"),
    "OFT and all biases": OFTConfig(oft_block_size=4, target_modules=["up"], bias="all"),
    "DeLoRA and its biases": DeloraConfig(r=3, target_modules=LINEAR, bias="delora_only"),
    "MiSS and its biases": MissConfig(r=4, target_modules=LINEAR, bias="MiSS_only"),
    "GraLoRA and its biases": GraloraConfig(r=4, target_modules=LINEAR, bias="gralora_only"),
}
CASES = CONFIGS | BIASED
NAMES = {
    "table": Embedding("table"),
    "up": Linear("up"),
    "down": Linear("down"),
    "conv": Conv("conv", in_axes=(0, 1, 2), channel_axis=2),
}


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return {bias: Net(bias) for bias in (False, True)}


@pytest.fixture
def net(nets, request):
    """The net of a case; by default without biases."""
    callspec = getattr(request.node, "callspec", None)
    return nets[callspec is not None and callspec.params.get("case") in BIASED]


def names_of(net):
    biases = {
        name: Tensor(name.removesuffix(".bias")) for name in make_params(net) if "bias" in name
    }
    return NAMES | biases


def make_params(net):
    """The weights in the layout of JAX libraries."""
    weights = {name: tensor.detach().numpy() for name, tensor in net.named_parameters()}
    order = {"conv.weight": (2, 3, 1, 0), "table.weight": (0, 1)}
    axes = lambda name, ndim: order.get(name, (1, 0) if ndim > 1 else (0,))  # noqa: E731
    return {
        name.removesuffix(".weight"): jnp.asarray(array.transpose(axes(name, array.ndim)))
        for name, array in weights.items()
    }


def trained(net, config):
    """A PEFT model with random factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(net), copy.deepcopy(config))
    numbers = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=numbers) / 2
    return model


def merged_by_peft(model):
    """The weights merged by PEFT, in the layout of JAX libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_params(copy.deepcopy(model).merge_and_unload())


def assert_close(actual, expected, bound=3e-6):
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(actual[path] / scale, array / scale, rtol=0, atol=bound)


def save(model, folder):
    with warnings.catch_warnings():
        # PEFT mistakes the biases of factors for truncated factors.
        warnings.filterwarnings("ignore", ".*invalid shape.*lora_B.bias")
        model.save_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_peft_folder_gives_pefts_merged_weights(net, tmp_path, case):
    model = trained(net, CASES[case])
    save(model, tmp_path)
    pair = load_peft(tmp_path, make_params(net), names_of(net))
    expected = merged_by_peft(model)
    assert any((expected[p] != x).any() for p, x in make_params(net).items())
    assert_close(lorax.merge_params(pair), expected)


@pytest.mark.parametrize("case", CASES)
def test_our_folder_gives_the_same_weights_in_peft(net, tmp_path, case):
    model = trained(net, CASES[case])
    save(model, tmp_path / "theirs")
    params = make_params(net)
    pair = load_peft(tmp_path / "theirs", params, names_of(net))
    save_peft(tmp_path / "ours", pair, names_of(net), params=params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT's own code causes warnings on this Python.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours")
    assert_close(merged_by_peft(reloaded), merged_by_peft(model))


@pytest.mark.parametrize("case", CASES)
def test_command_merges_like_peft(net, tmp_path, case):
    model = trained(net, CASES[case])
    save(model, tmp_path / "adapter")
    base, out = tmp_path / "base.safetensors", tmp_path / "merged"
    save_file(dict(net.state_dict()), base)
    adapter = str(tmp_path / "adapter")
    assert main(["merge", adapter, "--base", str(base), "--out", str(out)]) == 0
    assert main(["inspect", adapter]) == 0
    tensors = load_file(out / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            tensors[name], tensor, rtol=0, atol=3e-6 * tensor.abs().max().item()
        )


def test_pruned_adalora_is_loaded(net, tmp_path):
    model = trained(net, CONFIGS["AdaLoRA"])
    config = model.peft_config["default"]
    config.rank_pattern = {
        f"{name}.lora_E.default": keep
        for name, keep in {
            "up": [True, False, True, True],
            "down": [False, True, False, True],
        }.items()
    }
    for name, keep in config.rank_pattern.items():
        module = model.base_model.model.get_submodule(name.removesuffix(".lora_E.default"))
        module.lora_E["default"].data *= torch.tensor(keep)[:, None]
    expected = merged_by_peft(model)
    model.save_pretrained(tmp_path)
    pair = load_peft(tmp_path, make_params(net), NAMES)
    assert (pair.tunable["up"].rank, pair.tunable["down"].rank) == (3, 2)
    assert_close(lorax.merge_params(pair), expected)


# Empty values: if PEFT loads a config, so do we, with the same scale.

KEYS = (
    "use_rslora use_dora fan_in_fan_out init_lora_weights modules_to_save layers_to_transform"
    " layers_pattern exclude_modules target_parameters rank_pattern alpha_pattern revision"
    " base_model_name_or_path megatron_config layer_replication eva_config runtime_config"
    " trainable_token_indices alora_invocation_tokens bias lora_dropout r lora_alpha task_type"
).split()


@pytest.mark.parametrize("value", [None, "", []], ids=repr)
@pytest.mark.parametrize("key", KEYS)
def test_empty_config_values_are_read_as_in_peft(net, tmp_path, key, value):
    model = trained(net, LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = merged_by_peft(PeftModel.from_pretrained(copy.deepcopy(net), tmp_path))
        except Exception:
            return  # if PEFT rejects a config, we may reject it or not
    pair = load_peft(tmp_path, make_params(net), NAMES)
    assert_close(lorax.merge_params(pair), expected)


def test_resized_vocabulary_is_loaded(twin, tmp_path):
    net = copy.deepcopy(twin("llama").model)
    net.resize_token_embeddings(net.config.vocab_size + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(AdapterWarning, match="the vocabulary was resized"):
        adapter = open_adapter(tmp_path)
    assert any(path.endswith("embed_tokens/weight") for path in adapter.rows)
