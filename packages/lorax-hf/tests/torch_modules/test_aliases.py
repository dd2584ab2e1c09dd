"""Changes in place of tensors that share their memory: values and gradients of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import lorax_hf

X = np.sin(np.arange(24, dtype=np.float32)).reshape(2, 3, 4)


class Applies(nn.Module):
    """A function of a product with a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.cos(torch.arange(24.0)).reshape(2, 3, 4))
        self.function = function

    def forward(self, x):
        return self.function(x * self.weight)


def changed(x, change):
    change(x)
    return x


def view_of_a_changed_tensor(x):
    rows = x.view(6, 4)
    x.mul_(3)
    return rows


def views_of_views(x):
    columns = x.view(-1).view(4, 6).t()
    columns[2].mul_(-1)
    x.view(24)[0] = 9
    return x + columns.t().reshape(2, 3, 4)


def copies(x):
    """Of these, PyTorch copies each."""
    x.transpose(0, 1).contiguous().add_(1)
    x.transpose(0, 2).reshape(-1).add_(1)
    x.clone().view(-1).zero_()
    return x


FUNCTIONS = {
    "view": lambda x: changed(x, lambda x: x.view(-1).mul_(2)),
    "transpose": lambda x: changed(x, lambda x: x.transpose(0, 2)[0].fill_(5)),
    "permute and reshape": lambda x: changed(x, lambda x: x.permute(1, 0, 2)[1].sub_(1)),
    "T": lambda x: changed(x, lambda x: x.mT[0, 1].fill_(3)),
    "flatten": lambda x: changed(x, lambda x: x.flatten(1)[:, 2].zero_()),
    "a view of a slice": lambda x: changed(x, lambda x: x[0].view(-1)[3:5].zero_()),
    "diagonal": lambda x: changed(x, lambda x: x.diagonal(dim1=1, dim2=2).zero_()),
    "select and narrow": lambda x: changed(
        x, lambda x: x.select(1, 2).copy_(x.narrow(1, 0, 1).squeeze(1))
    ),
    "detach": lambda x: changed(x, lambda x: x.detach().view(-1)[4:].mul_(2)),
    "data": lambda x: changed(x, lambda x: x.data.clamp_(-0.2, 0.2)) * 1,
    "a view of a changed tensor": view_of_a_changed_tensor,
    "views of views": views_of_views,
    "copies": copies,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_change_is_visible_in_all_tensors_of_the_memory(name):
    module = Applies(FUNCTIONS[name])
    fn, params = lorax_hf.from_torch(module)
    weigh = np.cos(np.arange(24, dtype=np.float32))

    def total(params):
        output = fn(params, X)
        return (output.reshape(-1) * weigh).sum(), output

    (_, output), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    expected = module(torch.from_numpy(X))
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-6)
    (expected.reshape(-1) * torch.from_numpy(weigh)).sum().backward()
    np.testing.assert_allclose(gradient["weight"], module.weight.grad, atol=1e-6)


def test_parts_of_a_tensor_without_gradients():
    """PyTorch refuses these changes where there are gradients."""

    @torch.no_grad()
    def change(x):
        first, second = x.chunk(2, -1)
        first.add_(second)
        for k, row in enumerate(x.unbind(1)):
            row.mul_(k)
        return x

    module = Applies(change)
    fn, params = lorax_hf.from_torch(module)
    np.testing.assert_allclose(fn(params, X), module(torch.from_numpy(X)).detach(), rtol=1e-6)


def expanded(x):
    x[:1].expand(2, 3, 4).add_(1)


def reshaped(x):
    rows = x.view(6, 4)
    x.unsqueeze_(0)
    rows.add_(1)


@pytest.mark.parametrize(
    "change, message", [(expanded, "Call `clone"), (reshaped, "another shape in place")]
)
def test_changes_that_cannot_be_followed_are_errors(change, message):
    fn, params = lorax_hf.from_torch(Applies(lambda x: changed(x, change)))
    with pytest.raises(lorax_hf.OperatorError, match=message):
        fn(params, jnp.asarray(X))
