"""The grouped matmul of a mixture of experts, which torchax 0.0.13 lacks, as `ragged_dot`."""

from typing import Any

import jax
import jax.numpy as jnp
import torch

from .._errors import OperatorError


def _grouped_mm(
    rows: jax.Array,
    kernels: jax.Array,
    offs: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    if offs is None:
        out = jnp.matmul(rows, kernels)  # [groups, rows, out]
    elif rows.ndim == 2 and kernels.ndim == 3:
        # `offs` are the ends of the groups of rows.  [rows, in] x [groups, in, out]
        sizes = jnp.diff(offs, prepend=jnp.zeros((1,), offs.dtype)).astype(jnp.int32)
        out = jax.lax.ragged_dot(rows, kernels, sizes)  # [rows, out]
    else:
        raise OperatorError(
            f"_grouped_mm of operands of {rows.ndim} and {kernels.ndim} axes with offsets is not "
            "implemented; add an implementation with `lorax_hf.register_op`."
        )
    if bias is not None:
        out = out + bias
    if out_dtype is None:
        return out
    from torchax.ops.mappings import t2j_dtype

    return out.astype(t2j_dtype(out_dtype))


OPERATORS = {torch.ops.aten._grouped_mm: _grouped_mm}
