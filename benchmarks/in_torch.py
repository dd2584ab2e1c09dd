"""The models in PyTorch, with the weights of those in JAX."""

import jax
import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model

from steps import NotCompared

HEADS = 8


def tensor(array):
    return torch.tensor(np.asarray(array)).contiguous()


def linear(w):
    module = nn.Linear(*w.shape, bias=False)
    module.weight.data = tensor(w.T)
    return module


class Norm(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(tensor(scale))

    def forward(self, x):
        return nn.functional.rms_norm(x, self.scale.shape, self.scale, 1e-6)


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm1, self.norm2 = Norm(p["norm1"]), Norm(p["norm2"])
        for name in ("down", "k", "o", "q", "up", "v"):  # in the order of JAX's leaves
            self.add_module(name, linear(p[name]))

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            getattr(self, name)(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv"
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.gelu(self.up(h), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.kernel = linear(p["kernel"])
        self.kernel.bias = nn.Parameter(tensor(p["bias"]))

    def forward(self, x):
        return self.kernel(x)


class Attention(nn.Module):
    def __init__(self, norm, p):
        super().__init__()
        width = len(norm["scale"])
        self.heads = p["query"]["bias"].shape[0]
        self.norm = nn.LayerNorm(width, 1e-6)
        self.norm.weight.data, self.norm.bias.data = tensor(norm["scale"]), tensor(norm["bias"])
        for name in ("key", "out", "query", "value"):  # in the order of JAX's leaves
            module = linear(p[name]["kernel"].reshape(width, width))
            module.bias = nn.Parameter(tensor(p[name]["bias"].reshape(width)))
            self.add_module(name, module)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (
            getattr(self, name)(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.down = linear(p["down"])
        self.embedding = nn.Embedding.from_pretrained(tensor(p["embedding"]))
        self.norm = Norm(p["norm"])
        self.up = linear(p["up"])

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))
        return nn.functional.linear(x, self.embedding.weight)


class Rematerialized(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = checkpoint(module, x, use_reentrant=False)
        return x


def gpt2(model):
    net = GPT2Model(GPT2Config()).eval()
    state = net.state_dict()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        module, kind = name.rsplit(".", 1)
        # Flax keeps a Conv1D's kernel with its outputs first, PyTorch with its inputs.
        value = tensor(leaf.T if kind == "kernel" else leaf)
        bias = f"{module}.bias"
        state[bias if kind == "bias" else f"{module}.weight"].copy_(value)
    return net


def layers(stack, count):
    """The layers of a stack."""
    return [jax.tree.map(lambda leaf, k=k: leaf[k], stack) for k in range(count)]


def model(model):
    """The module, and the names of what is adapted in it, in the order of JAX's leaves."""
    params = model.params
    if isinstance(params, list):
        made = [Block(p) if "q" in p else Layer(p) for p in params]
        if isinstance(made[0], Layer):
            made = [part for layer in made for part in (layer, nn.ReLU())][:-1]
        net = nn.Sequential(*made)
    elif "norm1" in params:
        net = Rematerialized(*map(Block, layers(params, len(params["norm1"]))))
    elif "norm_0" in params:
        count = len(params) // 2
        net = nn.Sequential(
            *(Attention(params[f"norm_{k}"], params[f"attention_{k}"]) for k in range(count))
        )
    elif "wte" in params:
        blocks = sorted(params["h"])
        parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        return gpt2(model), [f"h.{k}.{part}" for k in blocks for part in parts]
    elif "embedding" in params:
        return Tied(params), ["down", "embedding", "up"]
    else:
        raise NotCompared("the model is not written in PyTorch here")
    modules = net.named_modules()
    return net, [name for name, module in modules if isinstance(module, nn.Linear)]
