"""First factors from inputs and gradients against those of a real PEFT model, vector by vector."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import corda, loraga
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import nn

import lorax
from lorax import CordaStart, EvaStart, LoraGAStart, LoraSpec

LAYERS = ("up", "down")
RANK, ALPHA = 2, 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 7)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def ours(params, x):
    hidden = jnp.tanh(x @ params["up"] + params["up bias"])
    return hidden @ params["down"] + params["down bias"]


def loss(params, x):
    return jnp.mean(ours(params, x) ** 3)


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name in LAYERS:
            # PEFT finds the largest singular value of a weight by a few random vectors.
            weight = getattr(net, name).weight
            weight.add_(torch.outer(torch.sin(torch.arange(len(weight)) + 1.0), weight[0]))
    return net


def batches(count, fall=0.6):
    """Inputs of a falling spectrum, beside a mean: PEFT's decomposition is an approximate one."""
    torch.manual_seed(1)
    spectrum = 3.0 * fall ** torch.arange(10.0)
    return [torch.randn(40, 10) * spectrum + 0.5 for _ in range(count)]


def params_of(net):
    kernels = {name: array(getattr(net, name).weight).T for name in LAYERS}
    return kernels | {f"{name} bias": array(getattr(net, name).bias) for name in LAYERS}


def collected(net, init, data, function=ours, rank=RANK):
    params = params_of(net)
    spec = {
        name: LoraSpec(rank, ALPHA, init=init) if name in LAYERS else lorax.LORA_FREEZE
        for name in params
    }
    starts = lorax.collect_starts(function, params, spec, [array(x) for x in data])
    return params, spec, starts


def started(net, init, data, function=ours):
    params, spec, starts = collected(net, init, data, function)
    return lorax.init_lora(params, spec, jax.random.key(0), collected=starts)


def close(got, expected, tolerance=1e-4):
    got, expected = np.asarray(got), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def up_to_signs(got, expected, axis):
    """Singular vectors have a sign by chance."""
    signs = np.sign(np.sum(np.asarray(got) * np.asarray(expected), axis, keepdims=True))
    close(got * signs, expected)


def layer_of(model, name):
    return getattr(model.base_model.model, name)


def a_and_b(model, name):
    layer = layer_of(model, name)
    return array(layer.lora_A["default"].weight).T, array(layer.lora_B["default"].weight).T


def eva(net, data, rank=RANK, **settings):
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights="eva",
        eva_config=EvaConfig(**settings),
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(net), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model, [{"x": x} for x in data], forward_fn=lambda model, batch: model(**batch),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("count", [1, 3])
def test_eva(net, count):
    # PEFT stops as soon as two batches agree, whatever comes after them.
    data = batches(1) * count
    model = eva(net, data, rho=1.0)
    frozen, tunable = started(net, "eva", data)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        close(tunable[name].a, a)
        assert not b.any() and not tunable[name].b.any()
        close(frozen[name], array(layer_of(model, name).weight).T, 1e-6)


def test_whitened_eva(net):
    """PEFT goes over its one batch twice before it stops, so its values are of twice the rows."""
    data = batches(1)
    model = eva(net, data, rho=1.0, whiten=True)
    _, tunable = started(net, EvaStart(whiten=True), data)
    for name in LAYERS:
        close(tunable[name].a, a_and_b(model, name)[0] * 2**0.25)


def test_ranks_of_eva(net):
    data = batches(1, fall=1.0)
    model = eva(net, data, rank=4, rho=2.0)
    params, spec, starts = collected(net, EvaStart(rho=2.0), data, rank=4)
    spec = lorax.eva_ranks(spec, starts)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0), collected=starts)
    ranks = {name: tunable[name].rank for name in LAYERS}
    assert sum(ranks.values()) == 8 and len(set(ranks.values())) == 2
    for name in LAYERS:
        layer = layer_of(model, name)
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(tunable[name].scale)
        close(tunable[name].a, a_and_b(model, name)[0], 1e-3)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("count", [1, 3])
def test_corda(net, method, count):
    data = batches(count)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    theirs = copy.deepcopy(net)
    corda.preprocess_corda(theirs, config, run_model=lambda: [theirs(x) for x in data])
    model = get_peft_model(theirs, config)
    frozen, tunable = started(net, CordaStart(method), data)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        up_to_signs(tunable[name].a, a, 0)
        up_to_signs(tunable[name].b, b, 1)
        base = array(layer_of(model, name).weight).T
        assert np.abs(base - params_of(net)[name]).max() > 1e-3
        close(frozen[name], base)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga(net, direction, scale):
    data = batches(2)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
    )  # fmt: skip
    theirs = copy.deepcopy(net)

    def train():
        for x in data:
            (theirs(x.requires_grad_()) ** 3).mean().backward()

    loraga.preprocess_loraga(theirs, config, train)
    model = get_peft_model(theirs, config)
    frozen, tunable = started(net, LoraGAStart(direction, scale), data, loss)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        up_to_signs(tunable[name].a, a, 0)
        up_to_signs(tunable[name].b, b, 1)
        close(lorax.merge_params(frozen, tunable)[name], params_of(net)[name])
