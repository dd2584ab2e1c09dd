"""LoHa, LoKr, MiSS, GraLoRA and BD-LoRA equal PEFT's with the same factors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import BdLoraConfig
from torch import nn

import lorax
from lorax import BdloraSpec, GraloraSpec, LohaSpec, LokrSpec, MissSpec


class Dense(nn.Module):
    """Two dense layers with different sizes."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Image(nn.Module):
    """Two convolutions, the second one with two groups."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv2d(4, 12, (3, 2), stride=(2, 1), padding=1)
        self.down = nn.Conv2d(12, 8, 3, groups=2)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def dense(params, x):
    return jnp.tanh(x @ params["up"] + params["up_bias"]) @ params["down"] + params["down_bias"]


def image(params, x):
    """Kernels are [in, height, width, out], so that the inputs have PEFT's order."""
    numbers = ("NCHW", "IHWO", "NCHW")
    conv = jax.lax.conv_general_dilated
    x = conv(x, params["up"], (2, 1), [(1, 1), (1, 1)], dimension_numbers=numbers)
    x = jnp.tanh(x + params["up_bias"][:, None, None])
    x = conv(x, params["down"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2)
    return x + params["down_bias"][:, None, None]


MODELS = {
    "dense": (Dense, dense, (3, 12), (1, 0)),
    "image": (Image, image, (2, 4, 7, 8), (1, 2, 3, 0)),
}


def loha(layer):
    return {
        "a1": layer.hada_w1_b["default"].T,
        "b1": layer.hada_w1_a["default"].T,
        "a2": layer.hada_w2_b["default"].T,
        "b2": layer.hada_w2_a["default"].T,
    }


def lokr(layer):
    factors = {}
    for n in (1, 2):
        full = getattr(layer, f"lokr_w{n}")
        if "default" in full:  # [out, in, *window]
            factors[f"w{n}"] = torch.movedim(full["default"], 0, -1)
        else:
            factors[f"a{n}"] = getattr(layer, f"lokr_w{n}_b")["default"].T
            factors[f"b{n}"] = getattr(layer, f"lokr_w{n}_a")["default"].T
    return factors


def loha_with_cores(layer):
    """A core in PEFT is [output rank, input rank, height, width]."""
    factors = {}
    for k in (1, 2):
        factors[f"a{k}"] = getattr(layer, f"hada_w{k}_b")["default"].T
        factors[f"b{k}"] = getattr(layer, f"hada_w{k}_a")["default"]
        factors[f"core{k}"] = getattr(layer, f"hada_t{k}")["default"].permute(2, 3, 1, 0)
    return factors


def lokr_with_a_core(layer):
    return {
        "w1": torch.movedim(layer.lokr_w1["default"], 0, -1),
        "a2": layer.lokr_w2_b["default"].T,
        "core": layer.lokr_t2["default"].permute(2, 3, 1, 0),
        "b2": layer.lokr_w2_a["default"],
    }


def miss(layer):
    return {"d": layer.miss_block["default"]}


def gralora(layer):
    return {"a": layer.gralora_A["default"], "b": layer.gralora_B["default"]}


def bdlora(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if isinstance(layer.lora_A["default"], nn.Linear):  # the outputs have two blocks
        return {"a": a.T, "b": b.view(2, -1, b.shape[-1]).permute(0, 2, 1)}
    return {"a": a.view(2, -1, a.shape[-1]).permute(0, 2, 1), "b": b.T}


SPLIT = {"split_axes": (0, -1)}
TARGETS = {"target_modules": ["up", "down"]}
# The model, PEFT's config, our spec, and a function from a PEFT layer to factors by our names.
CASES = {
    "loha": ("dense", peft.LoHaConfig(r=3, alpha=5, **TARGETS), LohaSpec(3, alpha=5), loha),
    "loha-convolution": (
        "image", peft.LoHaConfig(r=3, alpha=5, **TARGETS), LohaSpec(3, alpha=5), loha,
    ),
    "loha-with-cores": (
        "image",
        peft.LoHaConfig(r=2, alpha=5, use_effective_conv2d=True, **TARGETS),
        LohaSpec(2, alpha=5, tucker=True, channel_axis=0),
        loha_with_cores,
    ),
    "lokr-with-a-core": (
        "image",
        peft.LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, **TARGETS),
        LokrSpec(1, alpha=5, tucker=True, **SPLIT),
        lokr_with_a_core,
    ),
    "lokr": ("dense", peft.LoKrConfig(r=4, alpha=5, **TARGETS), LokrSpec(4, alpha=5), lokr),
    "lokr-narrow": (
        "dense",
        peft.LoKrConfig(r=1, alpha=5, decompose_both=True, **TARGETS),
        LokrSpec(1, alpha=5, decompose_both=True),
        lokr,
    ),
    "lokr-factor": (
        "dense",
        peft.LoKrConfig(r=2, alpha=5, decompose_factor=2, **TARGETS),
        LokrSpec(2, alpha=5, factor=2),
        lokr,
    ),
    "lokr-convolution": (
        "image", peft.LoKrConfig(r=4, alpha=5, **TARGETS), LokrSpec(4, alpha=5, **SPLIT), lokr,
    ),
    "lokr-narrow-convolution": (
        "image", peft.LoKrConfig(r=1, alpha=5, **TARGETS), LokrSpec(1, alpha=5, **SPLIT), lokr,
    ),
    "miss": ("dense", peft.MissConfig(r=4, **TARGETS), MissSpec(4), miss),
    "miss-remainder": ("dense", peft.MissConfig(r=7, **TARGETS), MissSpec(7), miss),
    "gralora": (
        "dense",
        peft.GraloraConfig(r=6, alpha=5, gralora_k=2, **TARGETS),
        GraloraSpec(6, alpha=5, blocks=2),
        gralora,
    ),
    "bdlora": (
        "dense",
        peft.LoraConfig(
            r=6, lora_alpha=5, **TARGETS,
            use_bdlora=BdLoraConfig(["down"], ["up"], nblocks=2),
        ),
        {
            "up": BdloraSpec(6, alpha=5, blocks=2, side="out"),
            "down": BdloraSpec(6, alpha=5, blocks=2),
        },
        bdlora,
    ),
}  # fmt: skip


def as_array(tensor):
    return jnp.asarray(tensor.detach().numpy())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_merged_weights_equal_pefts(case):
    kind, config, spec, factors_of = CASES[case]
    cls, function, shape, order = MODELS[kind]
    torch.manual_seed(0)
    model = cls().eval()
    x = torch.sin(torch.arange(float(np.prod(shape)))).reshape(shape)
    params = {
        name + suffix: as_array(tensor.permute(order) if tensor.ndim > 1 else tensor)
        for name in ("up", "down")
        for suffix, tensor in (
            ("", getattr(model, name).weight), ("_bias", getattr(model, name).bias),
        )
    }  # fmt: skip
    # A grouped kernel has the input channels of one group.
    inputs = tuple(range(len(order) - 1))
    specs = {name: lorax.LORA_FREEZE for name in params}
    for name in ("up", "down"):
        axes = lorax.Axes((), inputs, (len(inputs),))
        specs[name] = (spec[name] if isinstance(spec, dict) else spec).with_axes(axes)
    frozen, tunable = lorax.init_lora(params, specs, jax.random.key(0))

    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    layers = {name: getattr(adapted.base_model.model, name) for name in ("up", "down")}
    base = as_array(model(x))
    # Neither PEFT's initial factors nor ours change the model.
    np.testing.assert_allclose(as_array(adapted(x)), base, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        lorax.lora(function)((frozen, tunable), as_array(x)), base, rtol=0, atol=1e-5
    )
    zero = {
        name: {key for key, factor in factors_of(layer).items() if not factor.any()}
        for name, layer in layers.items()
    }
    with torch.no_grad():
        for layer in layers.values():
            for factor in factors_of(layer).values():
                factor.copy_(0.4 * torch.randn_like(factor))
    for name, layer in layers.items():
        factors = factors_of(layer)
        initial = tunable[name].factors()
        assert {key for key, factor in initial.items() if not factor.any()} == zero[name]
        # PEFT flattens windows and blocks that are axes in our factors.
        tunable[name] = tunable[name].with_factors(
            {key: as_array(factors[key]).reshape(initial[key].shape) for key in initial}
        )
    expected = as_array(adapted(x))
    size = np.abs(expected).max()
    assert np.abs(expected - base).max() > 1e-2 * size
    actual = lorax.lora(function)((frozen, tunable), as_array(x))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * size)
    merged = lorax.merge_params(frozen, tunable)
    peft_merged = adapted.merge_and_unload()
    for name in ("up", "down"):
        weight = as_array(getattr(peft_merged, name).weight.permute(order))
        np.testing.assert_allclose(merged[name], weight, rtol=0, atol=1e-5 * np.abs(weight).max())
