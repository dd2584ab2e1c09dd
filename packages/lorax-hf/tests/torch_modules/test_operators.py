"""Operators that torchax computes differently have PyTorch's values and gradients."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lorax_hf

X = np.sin(np.arange(24, dtype=np.float32)).reshape(4, 6)
IMAGE = np.sin(np.arange(4 * 7 * 8, dtype=np.float32)).reshape(1, 4, 7, 8)


class Applies(nn.Module):
    """Applies a function to the product with a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.cos(torch.arange(36.0)).reshape(6, 6))
        self.function = function

    def forward(self, x):
        return self.function(x @ self.weight)


def check_equals_torch(module, *arrays):
    """Checks values and gradients of a module."""
    fn, params = lorax_hf.from_torch(module.eval())
    expected = module(*map(torch.from_numpy, arrays))
    output = jax.jit(fn)(params, *arrays)
    assert output.dtype == jnp.dtype(str(expected.dtype).removeprefix("torch."))
    np.testing.assert_allclose(output, expected.detach().numpy(), atol=2e-5, rtol=2e-5)
    weigh = np.sin(np.arange(expected.numel(), dtype=np.float32)).reshape(expected.shape)
    gradient = jax.jit(jax.grad(lambda p: (fn(p, *arrays) * weigh).sum()))(params)
    (expected * torch.from_numpy(weigh)).sum().backward()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(gradient[name], parameter.grad, atol=2e-4, rtol=2e-4)


def fill_a_slice(y):
    y[:, 1:3].fill_(2.0)
    y[2:, 3:].masked_fill_(y[2:, 3:] > 0.5, 0.25)
    y[1, 4:].zero_()
    functional.relu(y[0, 2:], inplace=True)
    return y


def convert_another(y):
    return y.type_as(torch.ones(1, dtype=torch.bfloat16)).float() + y


FUNCTIONS = {
    "slice": fill_a_slice,
    "conversion": convert_another,
    "data": lambda y: y + (y.round() - y).data,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_equal_torch(name):
    check_equals_torch(Applies(FUNCTIONS[name]), X)


LAYERS = {
    "grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
    "depthwise": lambda: nn.ConvTranspose2d(4, 4, 2, groups=4, padding=1),
    "average": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "average without padding": lambda: nn.AvgPool2d((3, 2), (2, 3), 1, True, False),
    "average by divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_torch(name):
    torch.manual_seed(0)
    check_equals_torch(nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]()), IMAGE)


def test_embedding_gradients_scaled_by_frequency():
    ids = np.array([[1, 2, 2, 5], [7, 2, 1, 1]])
    torch.manual_seed(0)
    check_equals_torch(nn.Embedding(9, 6, padding_idx=7, scale_grad_by_freq=True), ids)


def test_indices_outside_a_table_give_nan():
    fn, params = lorax_hf.from_torch(nn.Embedding(9, 6))
    missing = np.isnan(np.asarray(fn(params, np.array([-1, 0, 8, 9, -100]))))
    np.testing.assert_array_equal(missing.all(1), [True, False, False, True, True])


def test_mask_with_is_causal_raises():
    attend = functional.scaled_dot_product_attention
    mask = torch.ones(4, 4, dtype=torch.bool)
    fn, params = lorax_hf.from_torch(Applies(lambda y: attend(y, y, y, mask, is_causal=True)))
    with pytest.raises(ValueError, match="takes `attn_mask` or `is_causal`"):
        fn(params, X)


DRAWN = {
    "rand": lambda y: y * torch.rand(6),
    "randint": lambda y: y + torch.randint(0, 9, (6,)),
    "randperm": lambda y: y[:, torch.randperm(6)],
    "exponential": functional.gumbel_softmax,
    "cauchy": lambda y: y + torch.empty_like(y).cauchy_(),
    "dropout": lambda y: functional.dropout(y, 0.5),
}


@pytest.mark.parametrize("name", DRAWN)
def test_random_numbers_come_from_the_key(name):
    fn, params = lorax_hf.from_torch(Applies(DRAWN[name]))
    with pytest.raises(TypeError, match="draws random numbers"):
        fn(params, X)
    draw = jax.jit(lambda key: fn(params, X, rng=key))
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-3


ON_THE_HOST = {
    "bernoulli": lambda y: y * torch.bernoulli(torch.full((6,), 0.5)),
    "normal": lambda y: y + 2 * torch.empty(6).normal_(),
    "single": lambda y: y * torch.rand([]),
}


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_random_numbers_from_the_host_raise(name):
    fn, params = lorax_hf.from_torch(Applies(ON_THE_HOST[name]))
    with pytest.raises(ValueError, match="random numbers that PyTorch has drawn.*device=x.device"):
        jax.jit(fn)(params, X, rng=jax.random.key(0))


def test_random_number_can_decide_a_branch():
    fn, params = lorax_hf.from_torch(Applies(lambda y: y if torch.rand([]) < 0.0 else 2 * y))
    np.testing.assert_allclose(fn(params, X), 2 * X @ np.asarray(params["weight"]), atol=1e-5)


@pytest.mark.parametrize("combine", [operator.add, operator.mul, operator.matmul])
def test_mismatched_shapes_raise(combine):
    fn, params = lorax_hf.from_torch(Applies(lambda y: combine(y, y[:, :5])))
    with pytest.raises(ValueError, match=r"incompatible shapes|\(6,\) and \(5,\)|contract"):
        fn(params, X)
