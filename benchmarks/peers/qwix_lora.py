"""`qwix.apply_lora_to_model` on flax.nnx or Linen modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from adapted import Adapted, is_pair
from layer_ops import PlainOps
from models import Leaf, Library, Model, attend, norm, split_heads
from steps import NotCompared
from workloads import HEADS, Lora, Workload


def with_qwix(workload: Workload, model: Model, adapted: Adapted) -> Lora:
    """Adapts the model's own modules, or modules made of its weights."""
    provider = qwix.LoraProvider(module_path=".*", rank=workload.rank, alpha=workload.rank)
    if model.library is not None:
        return on_linen(model.library, provider, adapted.factors, model.params, model.batch)
    if model.stack:
        names = [name for name, f in adapted.factors.items() if f is not None]
        factors, params = (in_linen(tree, names) for tree in (adapted.factors, model.params))
        return on_linen(scanned(model), provider, factors, params, model.batch)
    return on_nnx(model, provider, adapted.factors)


def check_adapted(adapted: int, expected: int) -> None:
    if adapted < expected:
        raise NotCompared(f"it adapts only {adapted} of {expected} weights, without a warning")


# flax.nnx


class Net(nnx.Module):
    """A model whose adapted weights are modules, as qwix requires."""

    def __init__(self, model: Model, modules: Any, params: Any):
        self.forward, self.modules, self.params = model.forward, modules, nnx.data(params)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The model's output."""
        return self.forward(AsModules(), self.modules, self.params, x)


class AsModules(PlainOps):
    """Every weight is a module that contains it."""

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


def on_nnx(model: Model, provider: Any, factors: Any) -> Lora:
    frozen = jax.tree.map(
        lambda f, w: w if f is None else None, factors, model.params, is_leaf=is_pair
    )
    net = Net(model, modules(factors, model.params), frozen)
    net = qwix.apply_lora_to_model(net, provider, model.batch, rngs=nnx.Rngs(0))
    leaves = zip(
        jax.tree.leaves(factors, is_leaf=is_pair), jax.tree.leaves(model.params), strict=True
    )
    pairs = [(f, w) for f, w in leaves if f is not None]
    adapted = 0
    # qwix does not keep the modules that it gets, so they are identified by weight.
    for _, module in nnx.iter_modules(net):
        name = "embedding" if hasattr(module, "embedding") else "kernel"
        if not hasattr(module, f"{name}_lora_a"):
            continue
        value = getattr(module, name)[...]
        (f,) = [f for f, w in pairs if np.array_equal(w, value)]
        for factor in "ab":
            fill(getattr(module, f"{name}_lora_{factor}"), f[factor])
        adapted += 1
    check_adapted(adapted, len(pairs))
    graph, lora, rest = nnx.split(net, nnx.LoRAParam, ...)
    return Lora(lambda lora, rest, x: nnx.merge(graph, lora, rest)(x), lora, rest)


def fill(variable: Any, value: jax.Array) -> None:
    if variable[...].size != value.size:
        raise NotCompared(f"its factor has shape {variable[...].shape}, not {value.shape}")
    variable[...] = value.reshape(variable[...].shape)


def modules(factors: Any, params: Any, name: str = "") -> Any:
    """A module for each adapted weight, in NNX lists and dicts."""
    if is_pair(factors):
        return None if factors is None else module_of(name, params)
    if isinstance(factors, dict):
        children = {k: modules(f, params[k], k) for k, f in factors.items()}
        return nnx.Dict({k: module for k, module in children.items() if module is not None})
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


# Linen


class Block(nn.Module):
    """A block of a GPT, as the body of a scan."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        dense = lambda name, out: nn.Dense(out, use_bias=False, name=name)  # noqa: E731
        scale = lambda name: self.param(name, nn.initializers.ones, (self.width,))  # noqa: E731
        h = norm(scale("norm1"), x)
        mixed = attend(*(split_heads(dense(name, self.width)(h), HEADS) for name in "qkv"))
        x = x + dense("o", self.width)(mixed.reshape(x.shape))
        h = jax.nn.gelu(dense("up", self.hidden)(norm(scale("norm2"), x)))
        return x + dense("down", self.width)(h), None


class Blocks(nn.Module):
    """Blocks in one scan, each rematerialized."""

    layers: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        lifted = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return lifted(self.width, self.hidden, name="blocks")(x, None)[0]


def scanned(model: Model) -> Library:
    """The same model made of modules, since qwix does not adapt functions."""
    net = Blocks(model.stack, *model.params["up"].shape[1:])
    return Library(lambda params, x: net.apply({"params": params}, x), net)


def in_linen(tree: Any, kernels: list[str]) -> Any:
    """The parameters of the scan, in the tree that Linen uses."""
    block = {name: {"kernel": leaf} if name in kernels else leaf for name, leaf in tree.items()}
    return {"blocks": block}


def on_linen(library: Library, provider: Any, factors: Any, params: Any, batch: Any) -> Lora:
    """Adapts a Linen module. qwix adds the factors as siblings of the kernels."""
    call = library.call
    net = qwix.apply_lora_to_model(library.module, provider)
    shapes = jax.eval_shape(lambda: call(net.init, jax.random.key(0), batch))["params"]
    factors_by_path = {
        path_string(path): f for path, f in leaves_with_path(factors) if f is not None
    }
    filled: dict[str, jax.Array] = {}
    for path, leaf in leaves_with_path(shapes):
        weight, *factor = path_string(path).rsplit("_lora_", 1)
        if factor:
            filled[path_string(path)] = factors_by_path[weight][factor[0]].reshape(leaf.shape)
    check_adapted(len(filled) // 2, len(factors_by_path))

    def apply(filled, params, x):
        for name, value in filled.items():
            params = Leaf(tuple(name.split("/"))).replace(params, value)
        return library.output(call(net.apply, {"params": params}, x))

    return Lora(apply, filled, params)


def leaves_with_path(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_pair)


def path_string(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
