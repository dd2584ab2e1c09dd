"""VeRA: one frozen pair of random matrices for all weights, and two trained vectors for each.

delta[shared, in, out]  =  Σ_r A[in, r] · lambda_d[shared, r] · B[r, out] · lambda_b[shared, out]
"""

import dataclasses
import math
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, defkind, sizes, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._errors import SpecError
from .lora import check_rank


@defkind
class VeraWeight(Adapter):
    """The two vectors of one weight, beside its part of the frozen matrices.

        delta = a @ diag(lambda_d) @ b @ diag(lambda_b)      for a kernel [in, out]

    The frozen tree holds `a` of `[*in, rank]` and `b` of `[rank, *out]` beside the base: the same
    arrays for all weights of one size. Kopiczko et al. 2023, arXiv:2310.11454.

    Attributes:
        lambda_d: `[*shared, rank]`.
        lambda_b: `[*shared, *out]`.
        rank: the inner size.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that make the output.
        shared_axes: the weight's axes with their own vectors for each entry.
    """

    kind = "vera"

    lambda_d: Any
    lambda_b: Any
    rank: int = static()
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the factors run along a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        rank = axes.inner(0, self.rank)
        # Δ = a [in, rank] · diag(lambda_d) · b [rank, out] · diag(lambda_b), where a and b are
        # frozen
        factors = {"lambda_d": (*axes.shared, rank), "lambda_b": (*axes.shared, *axes.outputs)}
        return Layout(axes.out, factors, {"a": (*axes.inputs, rank), "b": (rank, *axes.outputs)})


class _Matrices:
    """One pair of matrices, as large as the largest weight needs, and its parts.

    Parts of one shape and dtype are one array.
    """

    def __init__(self, key: jax.Array, fan_in: int, rank: int, fan_out: int):
        of_a, of_b = jax.random.split(key)
        # Kaiming's bound for the fan-in of each.
        # a [fan_in, rank], b [rank, fan_out] of the largest weight; smaller ones take a corner of
        # each.
        self._whole = {
            "a": math.sqrt(6 / fan_in) * _uniform(of_a, (fan_in, rank)),
            "b": math.sqrt(6 / rank) * _uniform(of_b, (rank, fan_out)),
        }
        self._parts: dict[Any, jax.Array] = {}

    def part(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The first rows of `a`, or the first columns of `b`, as a factor of `shape`."""
        key = (name, shape, jnp.dtype(dtype))
        if key not in self._parts:
            whole = self._whole[name]
            rows, columns = whole.shape
            if name == "a":
                rows = math.prod(shape[:-1])
            else:
                columns = math.prod(shape[1:])
            self._parts[key] = whole[:rows, :columns].astype(dtype).reshape(shape)
        return self._parts[key]


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0)


@dataclasses.dataclass(frozen=True)
class VeraSpec(AdapterSpec):
    """VeRA of one weight: two trained vectors, between and behind frozen matrices.

        delta = a @ diag(lambda_d) @ b @ diag(lambda_b)

    All weights that one call of `init_lora` gives a `VeraSpec` of one rank share one pair of random
    matrices `a` and `b`, of which each takes as much as it is large.

    Args:
        rank: the inner size, which may be larger than the weight's.
        d_initial: the first value of `lambda_d`; `lambda_b` is zero at first.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import VeraSpec, init_lora
        >>> params = {"q": jnp.ones((5, 3)), "v": jnp.ones((5, 3))}
        >>> spec = {"q": VeraSpec(4), "v": VeraSpec(4)}
        >>> frozen, tunable = init_lora(params, spec, jax.random.key(0))
        >>> tunable["q"].lambda_d.shape, tunable["q"].lambda_b.shape
        ((4,), (3,))
        >>> frozen["q"].factors["a"] is frozen["v"].factors["a"]
        True
    """

    has_narrow_delta = True

    rank: int = 256
    d_initial: float = 0.1
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Refuses ranks and first values that are none."""
        check_rank(path, self, self.rank)
        first = self.d_initial
        if not isinstance(first, numbers.Real) or not math.isfinite(first) or first == 0:
            raise SpecError(
                f"`{path}` has d_initial {first!r}; it is a finite number, and not zero, which "
                "would leave all gradients zero. PEFT's default is 0.1."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> VeraWeight:
        """The adapter without arrays."""
        return VeraWeight(None, None, self.rank, axes.inputs, axes.outputs, axes.shared)

    @property
    def common_key(self) -> Hashable:
        """Weights of one rank share the matrices, whatever their axes are."""
        return VeraSpec, self.rank

    def common(
        self, weights: Sequence[tuple[tuple[int, ...], Axes]], key: jax.Array
    ) -> "_Matrices":
        """The matrices for the largest of the weights."""
        fans = [axes.sizes(shape) for shape, axes in weights]
        fan_in, fan_out = (max(sizes) for sizes in zip(*fans, strict=True))
        return _Matrices(key, fan_in, self.rank, fan_out)

    def start(self, start: Start) -> Started:
        """Vectors that make a delta of zero, and this weight's part of the matrices."""
        weight = self.blank(start.base.shape, start.axes)
        layout = weight.layout(start.base.shape)
        shapes = layout.shapes()
        factors = {
            "lambda_d": jnp.full(shapes["lambda_d"], self.d_initial, start.dtype),
            # Zero, so that Δ is zero at first. lambda_d must not be zero, or both gradients are.
            "lambda_b": jnp.zeros(shapes["lambda_b"], start.dtype),
        }
        held = {
            name: start.common.part(name, sizes(labels), start.dtype)
            for name, labels in layout.held.items()
        }
        return Started(weight.with_factors(factors), held)
