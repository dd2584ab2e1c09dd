"""The models in PyTorch, with the same weights and names as in JAX."""

from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model

from models import Model
from workloads import CAPACITY, HEADS


def model(model: Model) -> nn.Module:
    """The PyTorch module of a model."""
    params = model.params
    if model.stack:
        return Rematerialized(map(Block, layers(params, model.stack)))
    if isinstance(params, list):
        return Decoder(map(Block, params)) if "q" in params[0] else Perceptron(params)
    if "wte" in params:
        return gpt2(params)
    kinds = {"norm_0": Attentions, "embedding": Tied, "stem": ConvNet, "router": Mixture}
    (kind,) = (kind for name, kind in kinds.items() if name in params)
    return kind(params)


def layers(stack: Any, count: int) -> list[Any]:
    """The layers of a stack."""
    return [jax.tree.map(lambda leaf, k=k: leaf[k], stack) for k in range(count)]


def batch(tree: Any) -> Any:
    """The batch as tensors. A cache has PyTorch's layout, [batch, head, time, width]."""
    if isinstance(tree, dict):
        cache = [tuple(tensor(part).transpose(1, 2) for part in pair) for pair in tree["cache"]]
        return tensor(tree["x"]), cache
    return tensor(tree)


def tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array)).contiguous()


def linear(w: Any, bias: Any = None) -> nn.Linear:
    module = nn.Linear(*w.shape, bias=bias is not None)
    module.weight.data = tensor(w.T)
    if bias is not None:
        module.bias.data = tensor(bias)
    return module


class Norm(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(tensor(scale))

    def forward(self, x):
        return functional.rms_norm(x, self.scale.shape, self.scale, 1e-6)


def gelu(x):
    return functional.gelu(x, approximate="tanh")


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q, k, v, **options):
    mixed = functional.scaled_dot_product_attention(q, k, v, **options)
    return mixed.transpose(1, 2).flatten(2)


# Transformer blocks


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm1, self.norm2 = Norm(p["norm1"]), Norm(p["norm2"])
        self.q, self.k, self.v, self.o = (linear(p[name]) for name in "qkvo")
        self.up, self.down = linear(p["up"]), linear(p["down"])

    def forward(self, x, cache=None):
        h = self.norm1(x)
        q, k, v = (heads(module(h)) for module in (self.q, self.k, self.v))
        if cache is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
        x = x + self.o(attend(q, k, v, is_causal=cache is None))
        return x + self.down(gelu(self.up(self.norm2(x)))), (k, v)


class Decoder(nn.ModuleList):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            for block in self:
                x, _ = block(x)
            return x
        (x, cached), keys_and_values = x, []
        for block, cache in zip(self, cached, strict=True):
            x, (k, v) = block(x, cache)
            keys_and_values.append((k[:, :, -1], v[:, :, -1]))
        return x, keys_and_values


class Rematerialized(nn.ModuleList):
    def forward(self, x):
        for block in self:
            x, _ = checkpoint(block, x, use_reentrant=False)
        return x


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        for name, part in p.items():
            bias = part["bias"].reshape(-1)
            self.add_module(name, linear(part["kernel"].reshape(-1, len(bias)), bias))

    def forward(self, x):
        return self.out(attend(*(heads(part(x)) for part in (self.query, self.key, self.value))))


class Attentions(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.layers = len(params) // 2
        for k in range(self.layers):
            scale, bias = (params[f"norm_{k}"][name] for name in ("scale", "bias"))
            norm = nn.LayerNorm(len(scale), 1e-6)
            norm.weight.data, norm.bias.data = tensor(scale), tensor(bias)
            self.add_module(f"norm_{k}", norm)
            self.add_module(f"attention_{k}", Attention(params[f"attention_{k}"]))

    def forward(self, x):
        for k in range(self.layers):
            x = x + self.get_submodule(f"attention_{k}")(self.get_submodule(f"norm_{k}")(x))
        return x


def gpt2(params: Any) -> nn.Module:
    net = GPT2Model(GPT2Config()).eval()
    state = net.state_dict()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        module, kind = name.rsplit(".", 1)
        # A Conv1D kernel is [out, in] in Flax, and [in, out] in PyTorch.
        value = tensor(leaf.T if kind == "kernel" else leaf)
        bias = f"{module}.bias"
        state[bias if kind == "bias" else f"{module}.weight"].copy_(value)
    return net


# Others


class Perceptron(nn.ModuleList):
    def __init__(self, params):
        super().__init__(linear(p["kernel"], p["bias"]) for p in params)

    def forward(self, x):
        *layers, last = self
        for layer in layers:
            x = functional.relu(layer(x))
        return last(x)


class Tied(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(tensor(p["embedding"]))
        self.norm, self.up, self.down = Norm(p["norm"]), linear(p["up"]), linear(p["down"])

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(gelu(self.up(self.norm(x))))
        return functional.linear(x, self.embedding.weight)


def convolution(w: Any, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    *window, fan_in, out = w.shape
    module = nn.Conv2d(groups * fan_in, out, window, stride, groups=groups, bias=False)
    module.weight.data = tensor(w.transpose(3, 2, 0, 1))
    return module


class ConvNet(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.stem = convolution(p["stem"], stride=2)
        self.depthwise = convolution(p["depthwise"], groups=p["depthwise"].shape[-1])
        self.pointwise = convolution(p["pointwise"])
        self.grouped = convolution(p["grouped"], groups=2)
        self.head = linear(p["head"])

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        x = functional.relu(self.stem(pad_same(x, window=5, stride=2)))
        x = functional.relu(self.depthwise(pad_same(x, window=3)))
        x = functional.relu(self.pointwise(x))
        x = functional.relu(self.grouped(pad_same(x, window=3)))
        return self.head(x.mean((2, 3)))


def pad_same(x, window, stride=1):
    """Pads like XLA's SAME: the odd row and column come last."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        missing = max((-(-size // stride) - 1) * stride + window - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return functional.pad(x, pads)


class Experts(nn.Module):
    is_transposed = True  # PEFT reads this: inputs come before outputs

    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(tensor(w))

    def forward(self, x):
        return torch.bmm(x, self.weight)


class Mixture(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm, self.router = Norm(p["norm"]), linear(p["router"])
        self.up, self.down = Experts(p["up"]), Experts(p["down"])

    def forward(self, x):
        gates = functional.softmax(self.router(self.norm(x)), -1)
        chosen = functional.one_hot(gates.argmax(-1), gates.shape[-1])
        position = torch.where(chosen > 0, chosen.cumsum(0) - 1, CAPACITY).clamp(max=CAPACITY)
        slot = functional.one_hot(position, CAPACITY + 1)[..., :CAPACITY]
        sent = (chosen[..., None] * slot).to(x.dtype)
        h = torch.einsum("nec,nd->ecd", sent, x)
        h = self.down(gelu(self.up(h)))
        return x + torch.einsum("nec,ne,ecd->nd", sent, gates, h)
