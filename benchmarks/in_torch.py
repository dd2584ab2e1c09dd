"""The works in PyTorch, with the weights of those in JAX."""

import numpy as np
import torch
from torch import nn

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
        self.kernel, self.bias = linear(p["kernel"]), nn.Parameter(tensor(p["bias"]))

    def forward(self, x):
        return torch.relu(self.kernel(x) + self.bias)


def model(work):
    """The model of a work whose parameters are a list of layers."""
    if not isinstance(work.params, list):
        raise TypeError("written for layers in a list")
    return nn.Sequential(*(Block(p) if "q" in p else Layer(p) for p in work.params))
