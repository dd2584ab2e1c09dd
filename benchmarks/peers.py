"""The same training steps with other LoRA libraries, each used as its own documentation says.

Every peer gets the weights and the factors of ours, and so has to compute the same loss and, in
JAX, the same gradient. What it says of a model that it cannot do is left as it is.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import quax
import quax.examples.lora
import qwix
import torch
from flax import nnx

import in_torch
from adapted import Adapted
from models import Leaf, Model
from steps import NotCompared, start, train
from ways import Plain
from works import Program


def program(apply: Callable[..., Any], factors: Any, frozen: Any, batch: Any) -> Program:
    trained = train(apply)
    return Program(trained.step, [(start(factors), frozen, batch)], trained.loss)


def is_pair(node: Any) -> bool:
    """Whether it stands where an adapted weight, or one that is not adapted, stands."""
    return node is None or (isinstance(node, dict) and set(node) == {"a", "b"})


# flax.nnx.LoRA


class Nnx(Plain):
    """`flax.nnx.LoRA` around the module of each weight.

    A module is split once into its structure and its variables, and put together where it is used:
    in this form it goes through `jax.lax.scan` and `jax.checkpoint` as well.
    """

    def dense(self, f, w, x):
        return self.call(nnx.Linear, w.shape, {"use_bias": False}, "kernel", f, w, x)

    def to_heads(self, f, w, x):
        sizes = w.shape[0], w.shape[1:]
        return self.call(nnx.LinearGeneral, sizes, {"use_bias": False}, "kernel", f, w, x)

    def conv(self, f, w, x, stride=1, groups=1):
        *window, _, out = w.shape
        options = {"strides": stride, "feature_group_count": groups, "use_bias": False}
        sizes, options = (x.shape[-1], out), options | {"kernel_size": tuple(window)}
        return self.call(nnx.Conv, sizes, options, "kernel", f, w, x)

    def embed(self, f, w, tokens):
        return self.call(nnx.Embed, w.shape, {}, "embedding", f, w, tokens)

    def experts(self, f, w, x):
        raise NotCompared("it wraps a module, and no module of flax.nnx has stacked experts")

    def call(self, kind, sizes, options, name, f, w, x):
        rank = f["a"].shape[-1]
        structure, variables = _abstract(kind, sizes, tuple(options.items()), rank)
        paths = {("base_module", name): w, ("lora_a",): f["a"], ("lora_b",): f["b"]}
        for path, value in paths.items():
            wanted = variables[path].shape
            if wanted != value.shape:
                # It adapts something else: let it say so itself.
                value = jnp.zeros(wanted, value.dtype)
            variables = variables | {path: value}
        return nnx.merge(structure, nnx.State.from_flat_path(variables))(x)


@functools.cache
def _abstract(kind: Any, sizes: Any, options: Any, rank: int) -> Any:
    """The structure of a module, and its variables by path, without their values."""

    def make():
        rngs = nnx.Rngs(0)
        base = kind(*sizes, **dict(options), rngs=rngs)
        out = int(np.prod(sizes[1]))
        return nnx.LoRA(sizes[0], rank, out, base_module=base, rngs=rngs)

    structure, state = nnx.split(nnx.eval_shape(make))
    flat = {path: variable.get_value() for path, variable in state.flat_state()}
    return structure, flat


def flax_nnx(model: Model, adapted: Adapted, rank: int) -> Program:
    """`flax.nnx.LoRA` around every module."""
    if model.library is not None:
        raise NotCompared("it wraps modules of flax.nnx, and these are Linen's")
    return program(model.written(Nnx()), adapted.factors, model.params, model.batch)


# qwix


class Net(nnx.Module):
    """A model whose adapted weights are modules of flax.nnx, in which qwix looks for them."""

    def __init__(self, model: Model, modules: Any, params: Any):
        self.forward, self.modules, self.params = model.forward, modules, nnx.data(params)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output of the model."""
        return self.forward(AsModules(), self.modules, self.params, x)


class AsModules(Plain):
    """Every weight is a module that has it."""

    def dense(self, module, _, x):
        return module(x)

    def conv(self, module, _, x, stride=1, groups=1):
        return module(x)

    def embed(self, module, _, tokens):
        return module(tokens)

    def logits(self, module, _, x):
        return module.attend(x)

    def experts(self, module, _, x):
        return jnp.einsum("end,edf->enf", x, module.kernel[...])


class Experts(nnx.Module):
    def __init__(self, w):
        self.kernel = nnx.Param(w)


def qwix_provider(model: Model, adapted: Adapted, rank: int) -> Program:
    """`qwix.apply_lora_to_model`."""
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=rank)
    if model.library is not None:
        return qwix_linen(model, adapted, provider)
    if "norm1" in model.params:
        raise NotCompared("a scan would have to be flax.linen.scan over its modules")
    frozen = jax.tree.map(
        lambda f, w: w if f is None else None, adapted.factors, model.params, is_leaf=is_pair
    )
    net = Net(model, modules(adapted.factors, model.params), frozen)
    net = qwix.apply_lora_to_model(net, provider, model.batch, rngs=nnx.Rngs(0))
    leaves = zip(
        jax.tree.leaves(adapted.factors, is_leaf=is_pair),
        jax.tree.leaves(model.params),
        strict=True,
    )
    pairs = [(f, w) for f, w in leaves if f is not None]
    found = 0
    # It does not keep the modules that it is given: a weight tells which is which.
    for _, module in nnx.iter_modules(net):
        name = "embedding" if hasattr(module, "embedding") else "kernel"
        if not hasattr(module, f"{name}_lora_a"):
            continue
        value = getattr(module, name)[...]
        (f,) = [f for f, w in pairs if np.array_equal(w, value)]
        for factor in "ab":
            fill(getattr(module, f"{name}_lora_{factor}"), f[factor])
        found += 1
    if found < len(pairs):
        raise NotCompared(f"it adapts {found} of {len(pairs)} weights, and says nothing")
    graph, lora, rest = nnx.split(net, nnx.LoRAParam, ...)
    apply = lambda lora, rest, x: nnx.merge(graph, lora, rest)(x)  # noqa: E731
    return program(apply, lora, rest, model.batch)


def fill(variable: Any, value: jax.Array) -> None:
    if variable[...].size != value.size:
        raise NotCompared(f"its factor is {variable[...].shape}, and not {value.shape}")
    variable[...] = value.reshape(variable[...].shape)


def modules(factors: Any, params: Any, name: str = "") -> Any:
    """A module for every adapted weight, in NNX's lists and dicts."""
    if is_pair(factors):
        return None if factors is None else module_of(name, params)
    if isinstance(factors, dict):
        found = {k: modules(f, params[k], k) for k, f in factors.items()}
        return nnx.Dict({k: module for k, module in found.items() if module is not None})
    return nnx.List([modules(f, p) for f, p in zip(factors, params, strict=True)])


def module_of(name: str, w: jax.Array) -> nnx.Module:
    rngs = nnx.Rngs(0)
    if name == "embedding":
        module = nnx.Embed(*w.shape, rngs=rngs)
        module.embedding[...] = w
        return module
    if w.ndim == 3:
        return Experts(w)
    if w.ndim == 4:
        *window, _, out = w.shape
        groups = {"depthwise": out, "grouped": 2}.get(name, 1)
        module = nnx.Conv(
            groups * w.shape[2],
            out,
            tuple(window),
            strides=2 if name == "stem" else 1,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
    else:
        module = nnx.Linear(*w.shape, use_bias=False, rngs=rngs)
    module.kernel[...] = w
    return module


def qwix_linen(model: Model, adapted: Adapted, provider: Any) -> Program:
    """On a Linen module; its new parameters lie beside the kernels."""
    assert model.library is not None
    call = model.library.call
    net = qwix.apply_lora_to_model(model.library.module, provider)
    shapes = jax.eval_shape(lambda: call(net.init, jax.random.key(0), model.batch))["params"]
    factors: dict[Any, jax.Array] = {}
    flat = dict(jax.tree_util.tree_leaves_with_path(adapted.factors, is_leaf=is_pair))
    wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): f for path, f in flat.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "_lora_" in name:
            weight, factor = name.rsplit("_lora_", 1)
            value = wanted[weight][factor]
            factors[name] = value.reshape(leaf.shape)
    count = sum(f is not None for f in wanted.values())
    if len(factors) < 2 * count:
        raise NotCompared(f"it adapts {len(factors) // 2} of {count} weights, and says nothing")

    def apply(factors, params, x):
        for name, value in factors.items():
            params = Leaf(tuple(name.split("/"))).replace(params, value)
        return model.library.output(call(net.apply, {"params": params}, x))

    return program(apply, factors, model.params, model.batch)


# quax


def quax_array(model: Model, adapted: Adapted, rank: int) -> Program:
    """`quax.quaxify` of the plain model, with a `LoraArray` for every adapted weight."""

    def array(f, w):
        if f is None:
            return w
        return quax.examples.lora.LoraArray(w, rank=f["a"].shape[-1], key=jax.random.key(0))

    def filled(f, w):
        if f is None:
            return w
        if (f["a"].shape, f["b"].shape) != (w.a.shape, w.b.shape):
            return w  # it adapts something else: let it say so itself
        return eqx.tree_at(lambda w: (w.a, w.b), w, (f["a"], f["b"]))

    def apply(factors, arrays, x):
        params = jax.tree.map(filled, factors, arrays, is_leaf=is_pair)
        return quax.quaxify(model.apply)(params, x)

    arrays = jax.tree.map(array, adapted.factors, model.params, is_leaf=is_pair)
    return program(apply, adapted.factors, arrays, model.batch)


# PEFT


def peft_torch(model: Model, adapted: Adapted, rank: int) -> Callable[[], float]:
    """PEFT on the same model in PyTorch, with as many threads; a call is a step."""
    torch.set_num_threads(os.cpu_count() or 1)
    net, names = in_torch.model(model)
    factors = adapted.factors
    if "norm1" in model.params:
        factors = in_torch.layers(factors, len(model.params["norm1"]))
    pairs = [f for f in jax.tree.leaves(factors, is_leaf=is_pair) if f is not None]
    transposed = "wte" in model.params
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=names, fan_in_fan_out=transposed
    )
    net = peft.get_peft_model(net, config)
    for name, f in zip(names, pairs, strict=True):
        module = net.base_model.model.get_submodule(name)
        if "default" in module.lora_embedding_A:
            first, second = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
        for variable, value in (
            (first, f["a"].reshape(-1, rank)), (second, f["b"].reshape(rank, -1))
        ):  # fmt: skip
            variable.data = in_torch.tensor(value.T).reshape(variable.shape)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    x = in_torch.tensor(model.batch)

    def step():
        optimizer.zero_grad()
        out = net(x)
        out = getattr(out, "last_hidden_state", out)
        loss = ((out * out) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


PEERS = {
    "flax.nnx.LoRA": flax_nnx,
    "qwix": qwix_provider,
    "quax": quax_array,
    "PEFT on torch": peft_torch,
}
