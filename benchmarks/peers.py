"""The same training steps with other LoRA libraries, each used as its own documentation says.

Every peer gets the weights and the factors of ours, and so has to compute the same loss.
"""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import peft
import quax
import quax.examples.lora
import qwix
import torch
from flax import nnx

import in_torch
from works import Step, Work, plain, start, train

RNGS = nnx.Rngs(0)


class Net(nnx.Module):
    """A work whose adapted weights are modules."""

    def __init__(self, work: Work, modules: Any, params: Any):
        self.forward, self.modules, self.params = work.forward, modules, nnx.data(params)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output of the work."""
        return self.forward(lambda module, _, x: module(x), self.modules, self.params, x)


def flax_nnx(work: Work, factors: Any) -> tuple[Step, Any]:
    """`flax.nnx.LoRA` around every `nnx.Linear`."""

    def wrap(f, w):
        module = nnx.LoRA(w.shape[0], work.rank, w.shape[1], base_module=linear(w), rngs=RNGS)
        module.lora_a[...], module.lora_b[...] = f["a"], f["b"]
        return module

    return step_of(Net(work, modules(wrap, factors, work.params), others(work, factors)), work)


def qwix_provider(work: Work, factors: Any) -> tuple[Step, Any]:
    """`qwix.apply_lora_to_model` on a model of `nnx.Linear`."""
    made = []

    def keep(f, w):
        made.append((f, w))
        return linear(w)

    net = Net(work, modules(keep, factors, work.params), others(work, factors))
    provider = qwix.LoraProvider(module_path=".*", rank=work.rank, alpha=work.rank)
    net = qwix.apply_lora_to_model(net, provider, work.batch, rngs=RNGS)
    # It does not keep the modules that it is given: a weight tells which is which.
    for module in [m for _, m in nnx.iter_modules(net) if isinstance(m, nnx.Linear)]:
        (f,) = [f for f, w in made if np.array_equal(w, module.kernel[...])]
        module.kernel_lora_a[...], module.kernel_lora_b[...] = f["a"], f["b"]
    return step_of(net, work)


def quax_array(work: Work, factors: Any) -> tuple[Step, Any]:
    """`quax.quaxify` of the plain model, with a `LoraArray` for every adapted weight."""
    nothing = jax.tree.map(lambda _: None, work.params)

    def array(f, w):
        if f is None:
            return w
        return quax.examples.lora.LoraArray(w, rank=work.rank, key=jax.random.key(0))

    def filled(f, w):
        return w if f is None else eqx.tree_at(lambda w: (w.a, w.b), w, (f["a"], f["b"]))

    def apply(factors, arrays, x):
        params = jax.tree.map(filled, factors, arrays, is_leaf=is_pair)
        return quax.quaxify(lambda params, x: work.forward(plain, nothing, params, x))(params, x)

    arrays = jax.tree.map(array, factors, work.params, is_leaf=is_pair)
    return train(apply), (start(factors), arrays, work.batch)


def peft_torch(work: Work, factors: Any) -> Callable[[], float]:
    """PEFT on the same model in PyTorch, with as many threads; a call is a step."""
    torch.set_num_threads(os.cpu_count() or 1)
    net = in_torch.model(work)
    names = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    pairs = [f for f in jax.tree.leaves(factors, is_leaf=is_pair) if f is not None]
    config = peft.LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=names)
    net = peft.get_peft_model(net, config)
    for name, f in zip(names, pairs, strict=True):
        module = net.base_model.model.get_submodule(name)
        module.lora_A.default.weight.data = in_torch.tensor(f["a"].T)
        module.lora_B.default.weight.data = in_torch.tensor(f["b"].T)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    x = in_torch.tensor(work.batch)

    def step():
        optimizer.zero_grad()
        loss = (net(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def is_pair(node: Any) -> bool:
    """Whether it stands where an adapted weight, or one that is not adapted, stands."""
    return node is None or (isinstance(node, dict) and set(node) == {"a", "b"})


def linear(w: jax.Array) -> nnx.Linear:
    module = nnx.Linear(*w.shape, use_bias=False, rngs=RNGS)
    module.kernel[...] = w
    return module


def modules(make: Callable[..., nnx.Module], factors: Any, params: Any) -> Any:
    """A module for every adapted weight, in NNX's lists and dicts."""
    if is_pair(factors):
        return None if factors is None else make(factors, params)
    if isinstance(factors, dict):
        found = {k: modules(make, f, params[k]) for k, f in factors.items()}
        return nnx.Dict({k: module for k, module in found.items() if module is not None})
    return nnx.List([modules(make, f, p) for f, p in zip(factors, params, strict=True)])


def others(work: Work, factors: Any) -> Any:
    """The parameters that are not adapted."""
    return jax.tree.map(
        lambda f, w: w if f is None else None, factors, work.params, is_leaf=is_pair
    )


def step_of(net: nnx.Module, work: Work) -> tuple[Step, Any]:
    graph, lora, rest = nnx.split(net, nnx.LoRAParam, ...)
    apply = lambda lora, rest, x: nnx.merge(graph, lora, rest)(x)  # noqa: E731
    return train(apply), (start(lora), rest, work.batch)
