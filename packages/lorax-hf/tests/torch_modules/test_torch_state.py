"""State of modules: it is restored after a call, and lost changes cause warnings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import lorax_hf

X = np.sin(np.arange(24, dtype=np.float32)).reshape(4, 6)


class With(nn.Module):
    """A linear layer, followed by a function of the module and the output."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, self.linear(x))


class Counter:
    count = 0


def append(module, y):
    module.kept.append(y)
    return sum(module.kept)


def remember(module, y):
    module.kept.setdefault("scale", y.mean())
    return y * module.kept["scale"]


def count(module, y):
    module.kept.count += 1
    return y * module.kept.count


KEPT = {"list": (append, list), "dict": (remember, dict), "object": (count, Counter)}


@pytest.mark.parametrize("name", KEPT)
def test_objects_in_attributes_are_restored(name):
    function, kind = KEPT[name]
    module = With(function, kept=kind())
    fn, params = lorax_hf.from_torch(module)
    expected = module(torch.from_numpy(X)).detach().numpy()
    for _ in range(2):
        np.testing.assert_allclose(jax.jit(fn)(params, X), expected, atol=1e-5)
        np.testing.assert_allclose(fn(params, X), expected, atol=1e-5)


def in_a_list():
    module = With(lambda self, y: y @ self.parameters_in_list[0])
    module.parameters_in_list = [module.linear.weight]
    return module


def in_a_closure():
    module = With(lambda self, y: y)
    module.linear.register_forward_hook(lambda _, args, y: y * module.linear.weight.sum())
    return module


def in_a_replaced_forward():
    module = nn.Linear(6, 6)
    forward = module.forward
    module.forward = functools.partial(lambda scale, x: scale * forward(x), 3)
    return module


@pytest.mark.parametrize("make", [in_a_list, in_a_closure, in_a_replaced_forward])
def test_parameters_have_gradients_under_every_reference(make):
    module = make()
    fn, params = lorax_hf.from_torch(module)
    gradient = jax.jit(jax.grad(lambda p: (fn(p, X) * X).sum()))(params)
    (module(torch.from_numpy(X)) * torch.from_numpy(X)).sum().backward()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(gradient[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_parameters_of_other_modules_warn():
    other = nn.Linear(6, 6, bias=False)
    fn, params = lorax_hf.from_torch(With(lambda self, y: self.hidden[0](y), hidden=[other]))
    with pytest.warns(lorax_hf.ModuleWarning, match=r"\(6, 6\) that requires a gradient"):
        fn(params, X)
    module = With(lambda self, y: y @ self.turned)
    module.turned = module.linear.weight.t()
    fn, params = lorax_hf.from_torch(module)
    with pytest.warns(lorax_hf.ModuleWarning, match="`turned` of With was computed from param"):
        fn(params, X)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_parameters_computed_by_a_hook_are_not_constants():
    module = torch.nn.utils.weight_norm(nn.Linear(6, 5))
    fn, params = lorax_hf.from_torch(module)
    np.testing.assert_allclose(
        fn(params, X), module(torch.from_numpy(X)).detach().numpy(), atol=1e-5
    )


class Average(nn.Module):
    """A module that updates a buffer, in place or by assignment, and normalizes with it."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.in_place:
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        else:
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return x - self.mean


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_buffers_warn(in_place):
    module = Average(in_place)
    fn, params = lorax_hf.from_torch(module)
    with pytest.warns(lorax_hf.ModuleWarning, match="Average changes `mean` when it is called"):
        output = fn(params, X)
    np.testing.assert_array_equal(fn.buffers["mean"], np.zeros(6))
    np.testing.assert_allclose(output, module(torch.from_numpy(X)), atol=1e-6)


def test_mismatched_array_shapes_raise():
    fn, params = lorax_hf.from_torch(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"`bias` of Linear has the shape \(5,\).*\(1,\)"):
        fn({**params, "bias": jnp.ones(1)}, X)


def test_attributes_keep_their_dtype():
    module = nn.Linear(6, 5)
    module.register_buffer("saved", torch.ones(3))
    module.plain = torch.ones(3)
    fn, _ = lorax_hf.from_torch(module, dtype=jnp.bfloat16)
    dtypes = {name: str(array.dtype) for name, array in fn.buffers.items()}
    assert dtypes == {"saved": "bfloat16", "plain": "float32"}


def data_parallel(module):
    wrapper = nn.DataParallel.__new__(nn.DataParallel)  # its `__init__` looks for devices
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


WRAPPERS = {"compile": torch.compile, "data parallel": data_parallel}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_of_wrapped_modules(name):
    module = nn.Sequential(nn.Linear(6, 6))
    wrapper = WRAPPERS[name](module)
    fn, params = lorax_hf.from_torch(wrapper)
    np.testing.assert_allclose(fn(params, X), module(torch.from_numpy(X)).detach(), atol=1e-6)
    assert params.keys() == lorax_hf.peft_names(wrapper).keys() == {"0.weight", "0.bias"}
    assert lorax_hf.spec(wrapper, rank=2, targets="all-linear").keys() == params.keys()


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_compiled_graphs_raise():
    script = torch.jit.trace(nn.Linear(6, 6), torch.from_numpy(X))
    with pytest.raises(TypeError, match="`0` is a TopLevelTracedModule.*not in Python"):
        lorax_hf.from_torch(nn.Sequential(script))


def of_a_module(module):
    module.register_full_backward_hook(lambda module, given, returned: None)


def of_a_parameter(module):
    module.weight.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize(("hook", "name"), [(of_a_module, "0"), (of_a_parameter, "0.weight")])
def test_backward_hooks_warn(hook, name):
    module = nn.Sequential(nn.Linear(6, 6))
    hook(module[0])
    with pytest.warns(
        lorax_hf.ModuleWarning, match=f"`{name}` of Sequential has hooks of the back"
    ):
        lorax_hf.from_torch(module)


def test_64_bit_integers_are_not_truncated():
    module = nn.Linear(6, 6)
    module.register_buffer("primes", torch.tensor([2**40 + 15]))
    with pytest.raises(ValueError, match="int64 .* has integers that int32 does not hold.*1099511"):
        lorax_hf.from_torch(module)
    fn, params = lorax_hf.from_torch(nn.Linear(6, 6))
    with pytest.raises(ValueError, match="does not hold"):
        fn(params, np.array([[2**33] * 6]))
