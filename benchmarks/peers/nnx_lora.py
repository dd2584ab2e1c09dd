"""`flax.nnx.LoRA` around the module of each weight."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapted import Adapted
from layer_ops import PlainOps
from models import Model
from steps import NotCompared
from workloads import Lora, Workload


def with_nnx(workload: Workload, model: Model, adapted: Adapted) -> Lora:
    """Keeps weights and factors as they are, and makes modules of them at each use."""
    if model.library is not None:
        raise NotCompared("it wraps modules of flax.nnx, and these are Linen modules")
    return Lora(model.with_ops(Nnx()), adapted.factors, model.params)


class Nnx(PlainOps):
    """Splits each module once into its structure and variables, and merges them at each use.

    In this form it works in `jax.lax.scan` and `jax.checkpoint`, too.
    """

    def dense(self, f, w, x):
        return self.call(nnx.Linear, w.shape, {"use_bias": False}, "kernel", f, w, x)

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
        structure, variables = abstract(kind, sizes, tuple(options.items()), rank)
        paths = {("base_module", name): w, ("lora_a",): f["a"], ("lora_b",): f["b"]}
        for path, value in paths.items():
            shape = variables[path].shape
            if shape != value.shape:
                # It adapts something else. Let it raise its own error.
                value = jnp.zeros(shape, value.dtype)
            variables = variables | {path: value}
        return nnx.merge(structure, nnx.State.from_flat_path(variables))(x)


@functools.cache
def abstract(kind: Any, sizes: Any, options: Any, rank: int) -> Any:
    """The structure of a module, and the shapes of its variables by path."""

    def make():
        rngs = nnx.Rngs(0)
        base = kind(*sizes, **dict(options), rngs=rngs)
        out = int(np.prod(sizes[1]))
        return nnx.LoRA(sizes[0], rank, out, base_module=base, rngs=rngs)

    structure, state = nnx.split(nnx.eval_shape(make))
    flat = {path: variable.get_value() for path, variable in state.flat_state()}
    return structure, flat
