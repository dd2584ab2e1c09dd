"""Initial factors from inputs and gradients equal PEFT's."""

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


def model_output(params, x):
    hidden = jnp.tanh(x @ params["up"] + params["up bias"])
    return hidden @ params["down"] + params["down bias"]


def loss(params, x):
    return jnp.mean(model_output(params, x) ** 3)


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name in LAYERS:
            # PEFT approximates the largest singular value with a few random vectors.
            weight = getattr(net, name).weight
            weight.add_(torch.outer(torch.sin(torch.arange(len(weight)) + 1.0), weight[0]))
    return net


def batches(count, decay=0.6):
    """Inputs with a decaying spectrum and a mean, since PEFT's decomposition is approximate."""
    torch.manual_seed(1)
    spectrum = 3.0 * decay ** torch.arange(10.0)
    return [torch.randn(40, 10) * spectrum + 0.5 for _ in range(count)]


def params_of(net):
    kernels = {name: array(getattr(net, name).weight).T for name in LAYERS}
    return kernels | {f"{name} bias": array(getattr(net, name).bias) for name in LAYERS}


def collected(net, init, data, function=model_output, rank=RANK):
    params = params_of(net)
    spec = {
        name: LoraSpec(rank, ALPHA, init=init) if name in LAYERS else lorax.LORA_FREEZE
        for name in params
    }
    starts = lorax.collect_starts(function, params, spec, [array(x) for x in data])
    return params, spec, starts


def init_pair(net, init, data, function=model_output):
    params, spec, starts = collected(net, init, data, function)
    return lorax.init_lora(params, spec, jax.random.key(0), collected=starts)


def assert_close(actual, expected, tolerance=1e-4):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_close_up_to_signs(actual, expected, axis):
    """The signs of singular vectors are arbitrary."""
    signs = np.sign(np.sum(np.asarray(actual) * np.asarray(expected), axis, keepdims=True))
    assert_close(actual * signs, expected)


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
def test_eva_equals_pefts(net, count):
    # PEFT stops when two batches agree, so all batches are equal.
    data = batches(1) * count
    model = eva(net, data, rho=1.0)
    frozen, tunable = init_pair(net, "eva", data)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        assert_close(tunable[name].a, a)
        assert not b.any() and not tunable[name].b.any()
        assert_close(frozen[name], array(layer_of(model, name).weight).T, 1e-6)


def test_whitened_eva_equals_pefts(net):
    """PEFT processes its only batch twice before it stops, so its values are for twice the rows."""
    data = batches(1)
    model = eva(net, data, rho=1.0, whiten=True)
    _, tunable = init_pair(net, EvaStart(whiten=True), data)
    for name in LAYERS:
        assert_close(tunable[name].a, a_and_b(model, name)[0] * 2**0.25)


def test_eva_ranks_equal_pefts(net):
    data = batches(1, decay=1.0)
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
        assert_close(tunable[name].a, a_and_b(model, name)[0], 1e-3)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("count", [1, 3])
def test_corda_equals_pefts(net, method, count):
    data = batches(count)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    peft_net = copy.deepcopy(net)
    corda.preprocess_corda(peft_net, config, run_model=lambda: [peft_net(x) for x in data])
    model = get_peft_model(peft_net, config)
    frozen, tunable = init_pair(net, CordaStart(method), data)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        assert_close_up_to_signs(tunable[name].a, a, 0)
        assert_close_up_to_signs(tunable[name].b, b, 1)
        base = array(layer_of(model, name).weight).T
        assert np.abs(base - params_of(net)[name]).max() > 1e-3
        assert_close(frozen[name], base)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_equals_pefts(net, direction, scale):
    data = batches(2)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
    )  # fmt: skip
    peft_net = copy.deepcopy(net)

    def train():
        for x in data:
            (peft_net(x.requires_grad_()) ** 3).mean().backward()

    loraga.preprocess_loraga(peft_net, config, train)
    model = get_peft_model(peft_net, config)
    frozen, tunable = init_pair(net, LoraGAStart(direction, scale), data, loss)
    for name in LAYERS:
        a, b = a_and_b(model, name)
        assert_close_up_to_signs(tunable[name].a, a, 0)
        assert_close_up_to_signs(tunable[name].b, b, 1)
        assert_close(lorax.merge_params(frozen, tunable)[name], params_of(net)[name])
