"""Kinds with frozen or computed factors equal PEFT's, factor by factor.

With PEFT's factors, outputs, merged weights and gradients are PEFT's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import lorax
from lorax import AdaloraSpec, DeloraSpec, LoraFASpec, OftSpec, TokensSpec, VeraSpec

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LAYERS = ("up", "down")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 5)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.table(tokens))))


def model_output(params, tokens):
    x = params["table"][tokens]
    x = jnp.tanh(x @ params["up"] + params["up bias"])
    return x @ params["down"] + params["down bias"]


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def params_of(net):
    params = {name: array(getattr(net, name).weight).T for name in LAYERS}
    params |= {f"{name} bias": array(getattr(net, name).bias) for name in LAYERS}
    return params | {"table": array(net.table.weight)}


# For each of our factors: the tensor of PEFT's layer, and how to reorder its axes.


def lora_factors(layer):
    return {"a": (layer.lora_A["default"].weight, "T"), "b": (layer.lora_B["default"].weight, "T")}


def vera_factors(layer):
    columns, rows = layer.in_features, layer.out_features
    return {
        "lambda_d": (layer.vera_lambda_d["default"], ""),
        "lambda_b": (layer.vera_lambda_b["default"], ""),
        "a": (layer.vera_A["default"][:, :columns], "T"),
        "b": (layer.vera_B["default"][:rows], "T"),
    }


def adalora_factors(layer):
    return {
        "a": (layer.lora_A["default"], "T"),
        "e": (layer.lora_E["default"], "flat"),
        "b": (layer.lora_B["default"], "T"),
    }


def delora_factors(layer):
    return {
        "a": (layer.delora_A["default"], "T"),
        "b": (layer.delora_B["default"], "T"),
        "length": (layer.delora_lambda["default"], "number"),
        "norm": (layer.delora_w_norm["default"], ""),
    }


def tokens_factors(layer):
    return {
        "values": (layer.trainable_tokens_delta["default"], ""),
        "replaced": (layer.trainable_tokens_original["default"], ""),
    }


def oft_factors(layer):
    blocks = layer.oft_embedding_R if "default" in layer.oft_embedding_R else layer.oft_R
    return {"q": (blocks["default"].weight, "")}


def shared_oft_factors(layer):
    return {"q": (layer.oft_R["default"].weight, "flat")}


ORDERS = {
    "": lambda x: x,
    "T": lambda x: x.T,
    "flat": lambda x: x.reshape(-1),
    "number": lambda x: x.reshape(()),
}


def freeze_a(model):
    create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-3)


@dataclasses.dataclass
class Case:
    config: Any
    spec: Any
    factors: Callable[[Any], dict[str, Any]]
    prepare: Callable[[Any], None] = lambda model: None
    names: tuple[str, ...] = LAYERS


KINDS = {
    "LoRA-FA": Case(
        LoraConfig(r=3, lora_alpha=5, target_modules=list(LAYERS)),
        LoraFASpec(3, 5),
        lora_factors,
        freeze_a,
    ),
    "VeRA": Case(VeraConfig(r=4, target_modules=list(LAYERS)), VeraSpec(4), vera_factors),
    "AdaLoRA": Case(
        AdaLoraConfig(init_r=3, lora_alpha=5, total_step=10, target_modules=list(LAYERS)),
        AdaloraSpec(3, 5),
        adalora_factors,
    ),
    "DeLoRA": Case(
        DeloraConfig(r=3, delora_lambda=4, target_modules=list(LAYERS)),
        DeloraSpec(3, length=4),
        delora_factors,
    ),
    "OFT": Case(OFTConfig(oft_block_size=4, target_modules=list(LAYERS)), OftSpec(4), oft_factors),
    "OFT within a bound": Case(
        OFTConfig(oft_block_size=4, coft=True, eps=0.3, target_modules=list(LAYERS)),
        OftSpec(4, eps=0.3),
        oft_factors,
    ),
    "OFT, exact and shared": Case(
        OFTConfig(
            oft_block_size=4,
            block_share=True,
            use_cayley_neumann=False,
            target_modules=list(LAYERS),
        ),
        OftSpec(4, block_share=True, terms=None),
        shared_oft_factors,
    ),
    "OFT of an embedding": Case(
        OFTConfig(oft_block_size=2, num_cayley_neumann_terms=3, target_modules=["table"]),
        OftSpec(2, "out", terms=3),
        oft_factors,
        names=("table",),
    ),
    "trainable tokens": Case(
        TrainableTokensConfig(target_modules=["table"], token_indices=[5, 1, 9]),
        TokensSpec([5, 1, 9]),
        tokens_factors,
        names=("table",),
    ),
}


def adapted(row, randomize=True):
    torch.manual_seed(0)
    net = Net()
    params = params_of(net)
    model = get_peft_model(net, row.config)
    row.prepare(model)
    if randomize:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn_like(parameter))
    spec = {name: row.spec if name in row.names else lorax.LORA_FREEZE for name in params}
    return model, params, lorax.init_lora(params, spec, jax.random.key(0))


def layer_of(model, name):
    return getattr(model.base_model.model, name)


def with_factors_of(model, row, pair):
    """The pair with PEFT's factors, which must have the shapes of ours."""
    frozen, tunable = dict(pair.frozen), dict(pair.tunable)
    for name in row.names:
        factors = {
            key: ORDERS[order](array(tensor))
            for key, (tensor, order) in row.factors(layer_of(model, name)).items()
        }
        frozen_factors = getattr(frozen[name], "factors", {})
        assert factors.keys() == tunable[name].factors().keys() | frozen_factors.keys()
        for key, factor in (tunable[name].factors() | frozen_factors).items():
            assert factor.shape == factors[key].shape, key
        tunable[name] = tunable[name].with_factors(factors)
        if frozen_factors:
            from_peft = {key: factors[key] for key in frozen_factors}
            frozen[name] = lorax.FrozenWeight(frozen[name].base, from_peft)
    return lorax.Pair(frozen, tunable)


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_merged_weights_equal_pefts(kind):
    row = KINDS[kind]
    model, params, pair = adapted(row)
    frozen, tunable = with_factors_of(model, row, pair)
    tokens, expected = jnp.asarray(TOKENS.numpy()), array(model.eval()(TOKENS))
    assert np.abs(model_output(params, tokens) - expected).max() > 1e-2 * np.abs(expected).max()
    assert_close(lorax.lora(model_output)((frozen, tunable), tokens), expected)
    merged = model.merge_and_unload()
    for name, weight in params_of(merged).items():
        assert_close(lorax.merge_params(frozen, tunable)[name], weight)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_pefts(kind):
    row = KINDS[kind]
    model, _, pair = adapted(row)
    frozen, tunable = with_factors_of(model, row, pair)
    torch.sin(model.eval()(TOKENS)).sum().backward()
    tokens = jnp.asarray(TOKENS.numpy())
    grads = jax.grad(lambda t: jnp.sin(lorax.lora(model_output)((frozen, t), tokens)).sum())(
        tunable
    )
    for name in row.names:
        trained = row.factors(layer_of(model, name))
        with_gradient = {key for key, (tensor, _) in trained.items() if tensor.grad is not None}
        assert with_gradient == grads[name].factors().keys()
        for key, factor in grads[name].factors().items():
            tensor, order = trained[key]
            assert_close(factor, ORDERS[order](array(tensor.grad)), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_factors_equal_pefts(kind):
    """Compares the range of random factors, and the values of all others."""
    row = KINDS[kind]
    model, _, pair = adapted(row, randomize=False)
    peft_pair = with_factors_of(model, row, pair)
    for name in row.names:
        frozen_factors = getattr(pair.frozen[name], "factors", {})
        for key, factor in (pair.tunable[name].factors() | frozen_factors).items():
            other = peft_pair.tunable[name].factors().get(key)
            other = peft_pair.frozen[name].factors[key] if other is None else other
            if (kind, key) in RANDOM:
                assert 0.5 < jnp.abs(factor).max() / jnp.abs(other).max() < 2
            else:
                assert_close(factor, other, 1e-6)


RANDOM = {("LoRA-FA", "a"), ("VeRA", "a"), ("VeRA", "b"), ("DeLoRA", "a")}
RANDOM |= {("AdaLoRA", "a"), ("AdaLoRA", "b")}


def test_steps_of_constrained_oft_equal_pefts():
    """PEFT projects in each forward pass, and never drops a block."""
    config = OFTConfig(
        oft_block_size=4, coft=True, eps=0.3, module_dropout=0.9, target_modules=list(LAYERS)
    )
    row = Case(config, OftSpec(4, eps=0.3), oft_factors)
    model, _, pair = adapted(row)
    frozen, tunable = with_factors_of(model, row, pair)
    tokens = jnp.asarray(TOKENS.numpy())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    loss = lambda tunable: jnp.sin(lorax.lora(model_output)((frozen, tunable), tokens)).sum()  # noqa: E731
    for _ in range(3):
        optimizer.zero_grad()
        torch.sin(model(TOKENS)).sum().backward()
        optimizer.step()
        tunable = lorax.project_oft(tunable)
        tunable = jax.tree.map(lambda x, g: x - 1e-2 * g, tunable, jax.grad(loss)(tunable))
    for name in row.names:
        for key, (tensor, order) in row.factors(layer_of(model, name)).items():
            assert_close(tunable[name].factors()[key], ORDERS[order](array(tensor)), 2e-5)


def test_adalora_penalty_equals_pefts():
    row = KINDS["AdaLoRA"]
    model, _, pair = adapted(row)
    _, tunable = with_factors_of(model, row, pair)
    expected = []
    for name in LAYERS:
        layer = layer_of(model, name)
        for gram in (
            layer.lora_A["default"] @ layer.lora_A["default"].T,
            layer.lora_B["default"].T @ layer.lora_B["default"],
        ):
            expected.append(torch.linalg.norm(gram - torch.eye(3)).item())
    assert_close(lorax.adalora_orthogonality(tunable), np.mean(expected))


def test_adalora_prunes_the_ranks_that_peft_prunes():
    schedule = {"tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 9}
    row = dataclasses.replace(
        KINDS["AdaLoRA"],
        config=AdaLoraConfig(
            init_r=3, target_r=1, lora_alpha=5, target_modules=list(LAYERS), **schedule
        ),
    )
    model, _, pair = adapted(row)
    pruner = lorax.adalora_pruner(1, 9, t_init=1, t_final=2, every=2)
    update = jax.jit(pruner.update)
    state = pruner.init(with_factors_of(model, row, pair).tunable)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    counts = []
    for step in range(9):
        optimizer.zero_grad()
        (torch.sin(model(TOKENS) * (step + 1)) ** 2).sum().backward()
        optimizer.step()
        tunable = with_factors_of(model, row, pair).tunable
        grads = tunable | {
            name: tunable[name].with_factors(
                {
                    key: ORDERS[order](array(tensor.grad))
                    for key, (tensor, order) in row.factors(layer_of(model, name)).items()
                }
            )
            for name in LAYERS
        }
        tunable, state = update(tunable, grads, state, step)
        model.base_model.update_and_allocate(step)
        expected = with_factors_of(model, row, pair).tunable
        for name in LAYERS:
            np.testing.assert_array_equal(tunable[name].e, expected[name].e)
        counts.append(sum(int((expected[name].e != 0).sum()) for name in LAYERS))
    assert counts[0] == 6 and counts[-1] == 2 and len(set(counts)) > 2


def oft_convolution(window):
    """A convolution with OFT in PEFT, its input, blocks and base output, and ours as a function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, window))
    x = torch.randn(2, 4, 5, 5)
    kernel = array(net[0].weight).transpose(2, 3, 1, 0)  # [height, width, in, out]
    bias, base = array(net[0].bias), array(net(x))
    model = get_peft_model(net, OFTConfig(oft_block_size=2, target_modules=["0"]))
    blocks = model.base_model.model[0].oft_R["default"].weight

    def conv(params, x):
        numbers = ("NCHW", "HWIO", "NCHW")
        y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=numbers)
        return y + bias[None, :, None, None]

    spec = {"w": OftSpec(2, channel_axis=2)}
    frozen, tunable = lorax.init_lora({"w": kernel}, spec, jax.random.key(0))
    return (
        model,
        x,
        blocks,
        base,
        lambda q: lorax.lora(conv)((frozen, {"w": tunable["w"].with_factors({"q": q})}), array(x)),
    )


def test_oft_of_a_pointwise_convolution_equals_pefts():
    model, x, blocks, base, apply_ours = oft_convolution(1)
    with torch.no_grad():
        blocks.copy_(0.5 * torch.randn_like(blocks))
    expected = array(model(x))
    assert np.abs(base - expected).max() > 1e-2
    assert_close(apply_ours(array(blocks)), expected)
    assert_close(array(model.merge_and_unload()(x)), expected)


def test_initial_oft_of_a_window_is_the_base_unlike_in_peft():
    """PEFT sums overlapping windows, so its initial output is wrong and cannot be compared."""
    model, x, blocks, base, apply_ours = oft_convolution(3)
    assert not blocks.any()
    assert_close(apply_ours(jnp.zeros((2, 1))), base, 1e-6)
    assert np.abs(array(model(x)) - base).max() > np.abs(base).max()
    assert_close(array(model.merge_and_unload()(x)), base)
