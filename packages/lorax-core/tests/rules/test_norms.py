"""Elementwise products of weights: norms, variances, and models that use them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import GraloraSpec, LoraSpec

struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}
TWO = {"w": (11, 7), "v": (11, 7)}
HWIO = {"w": (3, 2, 5, 7)}
HEADS = {"w": (11, 3, 5)}
FROM_MODEL = LoraSpec(2, in_axes=[0])
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}


def norm(w, axis, keepdims=True):
    return jnp.sqrt((w * w).sum(axis, keepdims=keepdims) + 0.1)


def weight_norm(p, x):
    return x @ (p["w"] * (p["g"] / jnp.linalg.norm(p["w"], axis=0))[None])


def conv(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def standardized(p, x):
    mean = p["w"].mean((0, 1, 2), keepdims=True)
    variance = jnp.var(p["w"], (0, 1, 2), keepdims=True)
    return conv(x, (p["w"] - mean) / jnp.sqrt(variance + 0.1))


def cosine_head(p, x):
    x = x / norm(x, -1)
    return x @ (p["w"] / norm(p["w"], 0))


def codebook(p, x):
    """The distances of vector quantization to codes [code, feature]."""
    codes = p["w"]
    return (x**2).sum(1, keepdims=True) - 2 * x @ codes.T + (codes**2).sum(-1)[None]


def of_a_stack(p, x):
    def layer(x, w):
        return jnp.tanh(x @ (w / norm(w, 0))), None

    return lax.scan(layer, x, p["w"])[0]


ROWS = [
    ("square", lambda p, x: x * jnp.square(p["w"]).sum(0)[None], W, {"w": 2}, [(3, 7)]),
    ("times-itself", lambda p, x: x * (p["w"] * p["w"]).sum(1)[None], W, {"w": 2}, [(3, 11)]),
    ("integer-pow", lambda p, x: x * (p["w"] ** 2).sum(0)[None], W, {"w": 2}, [(3, 7)]),
    ("pow", lambda p, x: x * (p["w"] ** 2.0).sum(0)[None], W, {"w": 2}, [(3, 7)]),
    ("another-pow", lambda p, x: x * ((0.1 + p["w"] ** 2) ** 0.5).sum(0)[None], W, {"w": 2},
     [(3, 7)], MATERIALIZED),
    ("sum-of-all", lambda p, x: x * (p["w"] ** 2).sum(), W, {"w": 2}, [(3, 5)]),
    ("mean-of-squares", lambda p, x: x * (p["w"] ** 2).mean(1)[None], W, {"w": 2}, [(3, 11)]),
    ("higher-rank", lambda p, x: x * (p["w"] ** 2).sum(0)[None], W, {"w": LoraSpec(5, alpha=3.0)},
     [(3, 7)]),
    ("of-blocks", lambda p, x: x * (p["w"] ** 2).sum(), {"w": (9, 6)},
     {"w": GraloraSpec(3, blocks=3)}, [(3, 5)]),
    ("linalg-norm", lambda p, x: x * jnp.linalg.norm(p["w"], axis=0)[None], W, {"w": 2}, [(3, 7)]),
    ("frobenius", lambda p, x: x * jnp.linalg.norm(p["w"]), W, {"w": 2}, [(3, 5)]),
    ("einsum", lambda p, x: x * jnp.einsum("io,io->o", p["w"], p["w"])[None], W, {"w": 2},
     [(3, 7)]),
    ("two-weights", lambda p, x: x * (p["w"] * p["v"]).sum(0)[None], TWO, {"w": 2, "v": 3},
     [(3, 7)]),
    ("two-weights-with-swapped-axes", lambda p, x: x * (p["w"] * p["v"].T).sum(0)[None],
     {"w": (11, 7), "v": (7, 11)}, {"w": 2, "v": LoraSpec(3, in_axes=[1])}, [(3, 7)]),
    ("with-its-transpose", lambda p, x: x * (p["w"] * p["w"].T).sum(0)[None], {"w": (11, 11)},
     {"w": 2}, [(3, 11)]),
    ("several-terms", lambda p, x: x * ((p["w"] - p["v"]) ** 2).sum(0)[None], TWO,
     {"w": 2, "v": 3}, [(3, 7)]),
    ("scaled-before", lambda p, x, s: x * ((p["w"] * s[:, None]) ** 2).sum(0)[None], W, {"w": 2},
     [(3, 7), (11,)]),
    ("weighted-sum", lambda p, x, s: x * ((p["w"] ** 2) * s[:, None]).sum(0)[None], W, {"w": 2},
     [(3, 7), (11,)]),
    ("sum-axis-by-axis", lambda p, x: x * (p["w"] ** 2).sum(0).sum(0)[None], HEADS,
     {"w": FROM_MODEL}, [(2, 5)]),
    ("moved-in-between", lambda p, x: x * jnp.square(p["w"]).T.reshape(7, 11, 1).sum((1, 2))[None],
     W, {"w": 2}, [(3, 7)]),
    # The base is one of the factors, so a slice of it counts as weight-sized.
    ("sliced-in-between", lambda p, x: x * jnp.square(p["w"])[2:9].sum(0)[None], W, {"w": 2},
     [(3, 7)], {"sizes": False}),
    ("looked-up-in-between", lambda p, x: x * jnp.square(p["w"])[jnp.array([1, 5, 5])].sum(0)[None],
     W, {"w": 2}, [(3, 7)]),
    ("bfloat16", lambda p, x: x * (p["w"] ** 2).sum(0)[None], {"w": struct((11, 7), jnp.bfloat16)},
     {"w": 2}, [struct((3, 7), jnp.bfloat16)], {"tolerance": 0.05}),
    ("bfloat16-summed-in-float32",
     lambda p, x: x * (p["w"].astype(jnp.float32) ** 2).sum(0)[None],
     {"w": struct((11, 7), jnp.bfloat16)}, {"w": 2}, [(3, 7)], {"tolerance": 0.05}),
    ("of-a-window", lambda p, x: x * (p["w"] ** 2).sum((0, 1, 2))[None], HWIO, {"w": 2}, [(3, 7)]),
    ("of-a-stack", of_a_stack, {"w": (3, 7, 7)}, {"w": STACKED}, [(2, 7)]),
    ("under-vmap", lambda p, x: x * jax.vmap(lambda w: (w**2).sum(0))(p["w"]), {"w": (3, 11, 7)},
     {"w": STACKED}, [(3, 7)]),
    ("for-each-of-a-batch-of-gains",
     lambda p, x, s: x * ((p["w"][None] * s[:, :, None]) ** 2).sum((1, 2))[:, None], W, {"w": 2},
     [(3, 5), (3, 11)]),
    # As models use them.
    ("weight-norm", weight_norm, {"w": (11, 7), "g": (7,)}, {"w": 2, "g": -1}, [(3, 11)]),
    ("weight-norm-of-rows",
     lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True)), W, {"w": 2},
     [(3, 11)]),
    ("variance", lambda p, x: x * jnp.var(p["w"], axis=0)[None], W, {"w": 2}, [(3, 7)]),
    ("standard-deviation", lambda p, x: x * jnp.std(p["w"], axis=1, ddof=1)[None], W, {"w": 2},
     [(3, 11)]),
    ("weight-standardization", standardized, HWIO, {"w": 2}, [(2, 8, 9, 5)]),
    ("cosine-head", cosine_head, W, {"w": 2}, [(3, 11)]),
    ("codebook", codebook, {"w": (19, 5)}, {"w": 2}, [(3, 5)]),
    ("weight-decay", lambda p, x: x @ p["w"] + (p["w"] ** 2).sum(), W, {"w": 2}, [(3, 11)]),
    # Uses of the square itself.
    ("square-in-a-product", lambda p, x: x @ jnp.square(p["w"]), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("square-in-a-convolution", lambda p, x: conv(x, p["w"] ** 2), HWIO, {"w": 2},
     [(2, 8, 9, 5)], MATERIALIZED),
    ("square-as-a-table", lambda p, ids: jnp.square(p["w"])[ids], W, {"w": 2},
     [jnp.array([3, 0, 8])]),
    ("square-returned", lambda p, x: jnp.square(p["w"]) + x.sum(), W, {"w": 2}, [(3, 11)],
     MATERIALIZED),
    ("two-weights-in-a-product", lambda p, x: x @ (p["w"] * p["v"]), TWO, {"w": 2, "v": 3},
     [(3, 11)], MATERIALIZED),
    ("fourth-power", lambda p, x: x * jnp.square(jnp.square(p["w"])).sum(0)[None], W, {"w": 2},
     [(3, 7)], MATERIALIZED),
    ("cube", lambda p, x: x * (p["w"] ** 3).sum(0)[None], W, {"w": 2}, [(3, 7)], MATERIALIZED),
    ("root-of-the-square", lambda p, x: x * jnp.sqrt(0.1 + p["w"] ** 2).sum(0)[None], W, {"w": 2},
     [(3, 7)], MATERIALIZED),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_norms(check_row, row):
    check_row(*row)
