"""`torch.autograd.Function`: its backward pass is the gradient in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import lorax
import lorax_hf

X = np.sin(np.arange(24, dtype=np.float32)).reshape(4, 6)


class Rounds(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Scales(Function):
    """Saves tensors, a number and an attribute; returns two tensors and a number."""

    @staticmethod
    def forward(ctx, x, scale, others, count):
        ctx.save_for_backward(x, others[0])
        ctx.scale, ctx.count, ctx.half_x = scale, count, x / 2
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        return x * scale + others[0], signs, 3

    @staticmethod
    def backward(ctx, gradient, signs_gradient, number_gradient):
        assert number_gradient is None and ctx.needs_input_grad == (True, False, False, True)
        x, other = ctx.saved_tensors
        x_gradient = gradient * ctx.scale * x.cos() + other + ctx.half_x + signs_gradient
        return x_gradient, None, None, gradient.sum() * ctx.count


class New(Function):
    """The form with `setup_context`, on complex tensors."""

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return 2 * gradient * y.conj(), gradient * x.conj()


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.number = nn.Parameter(torch.tensor(0.7))
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x), self.number)


def scale(y, number):
    scaled, signs, three = Scales.apply(y, 0.3, [y * 2], number)
    return scaled * three + signs * y


def multiply(y, number):
    turned = torch.polar(torch.ones(6), torch.arange(6.0))
    return torch.view_as_real(New.apply(torch.complex(y, number * y), turned))


def without_gradient(y, number):
    with torch.no_grad():
        factor = Rounds.apply(y)
    return factor * y * number


FUNCTIONS = {
    "round": lambda y, number: Rounds.apply(y) * number,
    "scale": scale,
    "complex": multiply,
    "no_grad": without_gradient,
    "checkpoint": lambda y, number: checkpoint(lambda z: z.sin() * number, y, use_reentrant=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_backward(name):
    torch.manual_seed(0)
    module = Applies(FUNCTIONS[name])
    fn, params = lorax_hf.from_torch(module)
    expected = module(torch.from_numpy(X))
    np.testing.assert_allclose(fn(params, X), expected.detach().numpy(), atol=1e-5)
    weigh = np.cos(np.arange(expected.numel(), dtype=np.float32)).reshape(expected.shape)
    loss = jax.checkpoint(lambda p: (fn(p, X) * weigh).sum())
    gradient = jax.jit(jax.grad(loss))(params)
    (expected * torch.from_numpy(weigh)).sum().backward()
    for key, parameter in module.named_parameters():
        np.testing.assert_allclose(gradient[key], parameter.grad, atol=1e-4, rtol=1e-4)


def test_adapters_have_the_gradient_of_backward():
    # The backward pass of rounding is the identity.
    modules = [Applies(each) for each in (FUNCTIONS["round"], lambda y, number: y * number)]
    modules[1].load_state_dict(modules[0].state_dict())
    gradients = []
    for module in modules:
        fn, params = lorax_hf.from_torch(module)
        spec = lorax_hf.spec(module, rank=2, targets="all-linear")
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
        run = lorax.lora(fn, on_materialize="error")
        slope = jax.grad(lambda t, x, run=run, w=frozen: run((w, t), x).sum())
        gradients.append(jax.jit(jax.vmap(slope, (None, 0)))(tunable, X))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-3


class Wrong(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient.sum(0)


class Dirty(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.add_(1)


def test_invalid_functions_raise():
    fn, params = lorax_hf.from_torch(Applies(lambda y, number: Wrong.apply(y)))
    with pytest.raises(ValueError, match=r"Wrong.backward returns .*\(6,\).*\(4, 6\)"):
        jax.grad(lambda p: fn(p, X).sum())(params)
    fn, params = lorax_hf.from_torch(Applies(lambda y, number: Dirty.apply(y)))
    with pytest.raises(NotImplementedError, match="changes its inputs in place"):
        fn(params, X)


def test_functions_in_pytorch_are_unchanged():
    lorax_hf.from_torch(nn.Linear(6, 6))
    x = torch.ones(3, requires_grad=True)
    Rounds.apply(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))
