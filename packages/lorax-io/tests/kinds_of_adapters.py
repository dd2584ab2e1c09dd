"""A pair of each kind of adapter."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from lorax import (
    AdaloraSpec,
    BdloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    LoraFASpec,
    LoraSpec,
    MissSpec,
    OftSpec,
    Pair,
    TokensSpec,
    VeraSpec,
    init_lora,
)
from lorax_io import (
    Linear,
    Tensor,
)

KINDS = {
    "lora": LoraSpec(2, alpha=4),
    "rslora": LoraSpec(3, alpha=4, scaling="rslora"),
    "dora": DoraSpec(LoraSpec(2, alpha=4)),
    "dora-with-gradient": DoraSpec(LoraSpec(2, alpha=4), detached=False),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "lora-fa": LoraFASpec(2, alpha=4),
    "vera": VeraSpec(4),
    "adalora": AdaloraSpec(2, alpha=4),
    "delora": DeloraSpec(2),
    "tokens": TokensSpec([3, 1]),
    "loha": LohaSpec(2, alpha=4),
    "lokr": LokrSpec(2, alpha=4),
    "lokr-narrow": LokrSpec(1, alpha=3, decompose_both=True),
    "locon": LoconSpec(2, alpha=4),
    "miss": MissSpec(2),
    "gralora": GraloraSpec(2, alpha=4, blocks=2),
    "bdlora": BdloraSpec(2, alpha=4),
    "oft": OftSpec(2),
}


# Kinds whose frozen factors do not follow from the base: only a pair can be saved.
NEED_PAIR = ("lora-fa", "vera")


OTHERS = [name for name in KINDS if not isinstance(KINDS[name], LoraSpec)]


AXES = {"kernel": lorax.Axes((), (0,), (1,)), "stack": lorax.Axes((0,), (1,), (2, 3))}


NAMES = {
    "kernel": Linear("q"),
    "stack": Linear("layers.{}.v", in_axes=(1,), shared_axes=(0,)),
    "bias": Tensor("q"),
    "scale": Tensor("norm", parameter="weight"),
}


def make_params():
    numbers = np.random.default_rng(0)
    shapes = {"kernel": (8, 6), "stack": (2, 8, 3, 4), "bias": (6,), "scale": (8,)}
    return {path: jnp.asarray(numbers.normal(size=s), jnp.float32) for path, s in shapes.items()}


def make_pair(kind):
    """A pair in which every trained value differs from its initial value."""
    spec = {path: KINDS[kind].with_axes(axes) for path, axes in AXES.items()}
    params = make_params()
    frozen, tunable = init_lora(params, spec | {"bias": 0, "scale": -1}, jax.random.key(0))
    key = jax.random.key(1)
    return Pair(frozen, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), tunable))
