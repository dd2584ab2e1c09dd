"""`ragged_dot`: groups of rows, each multiplied by its own weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import LoraSpec, MaterializeError, init_lora, lora, merge_params, testing

BF16 = jnp.bfloat16
struct = jax.ShapeDtypeStruct
# The default of `check` is wider for 16-bit results than these need.
TIGHTER = {"tolerance": 0.05}


def ragged(numbers=None, **keywords):
    def fn(p, x, sizes):
        if numbers is None:
            return lax.ragged_dot(x, p["w"], sizes, **keywords)
        return lax.ragged_dot_general(x, p["w"], sizes, numbers, **keywords)

    return fn


def rows_by_group(summed, ragged_axis, group):
    return lax.RaggedDotDimensionNumbers((summed, ((), ())), [ragged_axis], [group])


# Each group sums over its own piece of the contracted axis.
RAGGED_CONTRACTION = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], [])
SIZES = np.array([2, 0, 4], np.int32)  # of 6 rows
SHORT = np.array([1, 3, 1], np.int32)  # the last of 6 rows belongs to no group
# JAX has no batching rule for every way of mapping `ragged_dot`.
UNMAPPED = {"transforms": False}

ROWS = [
    ("shared", ragged(), {"w": (3, 11, 7)}, {"w": LoraSpec(2, shared_axes=[0])},
     [(6, 11), SIZES], UNMAPPED),
    ("owned-by-a", ragged(), {"w": (3, 11, 7)}, {"w": 2}, [(6, 11), SIZES], UNMAPPED),
    ("owned-by-b", ragged(), {"w": (3, 11, 7)}, {"w": LoraSpec(2, in_axes=[1])},
     [(6, 11), SIZES], UNMAPPED),
    ("rows-beyond-the-groups", ragged(), {"w": (3, 11, 7)},
     {"w": LoraSpec(2, shared_axes=[0])}, [(6, 11), SHORT], UNMAPPED),
    ("rows-beyond-owned-by-a", ragged(), {"w": (3, 11, 7)}, {"w": 2},
     [(6, 11), SHORT], UNMAPPED),
    ("rows-beyond-owned-by-b", ragged(), {"w": (3, 11, 7)},
     {"w": LoraSpec(2, in_axes=[1])}, [(6, 11), SHORT], UNMAPPED),
    ("precision", ragged(precision="highest", preferred_element_type=jnp.float32),
     {"w": (3, 11, 7)}, {"w": LoraSpec(2, shared_axes=[0])}, [(6, 11), SIZES], UNMAPPED),
    ("bfloat16", ragged(preferred_element_type=jnp.float32),
     {"w": struct((3, 11, 7), BF16)}, {"w": LoraSpec(2, shared_axes=[0])},
     [struct((6, 11), BF16), SIZES], UNMAPPED | TIGHTER),
    ("general-layout", ragged(rows_by_group(((0,), (2,)), 1, 1)), {"w": (7, 3, 11)},
     {"w": LoraSpec(2, in_axes=[2], shared_axes=[1])}, [(11, 6), SIZES], UNMAPPED),
    ("general-output-contracted", ragged(rows_by_group(((1,), (2,)), 0, 0)),
     {"w": (3, 11, 7)}, {"w": LoraSpec(2, shared_axes=[0])}, [(6, 7), SIZES], UNMAPPED),
    ("two-experts-layers",
     lambda p, x, s: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["w"], s)), p["v"], s),
     {"w": (3, 11, 7), "v": (3, 7, 13)},
     {"w": LoraSpec(2, shared_axes=[0]), "v": LoraSpec(2, shared_axes=[0])},
     [(6, 11), SIZES], UNMAPPED),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_ragged_dot(check_row, row):
    check_row(*row)


def test_ragged_contraction_materializes_the_weight():
    # JAX has no gradient of this form in the weight, so the table cannot hold it.
    params = {"w": jnp.arange(77, dtype=jnp.float32).reshape(11, 7) / 77}
    x, sizes = jnp.ones((3, 11)), jnp.array([5, 6], jnp.int32)
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    fn = ragged(RAGGED_CONTRACTION)
    with pytest.raises(MaterializeError, match="`w`.*ragged_dot_general"):
        lora(fn, on_materialize="error")((frozen, tunable), x, sizes)
    got = lora(fn, on_materialize="allow")((frozen, tunable), x, sizes)
    assert jnp.allclose(got, fn(merge_params(frozen, tunable), x, sizes), rtol=1e-5)
