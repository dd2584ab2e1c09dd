"""VeRA: one frozen pair of random matrices for all weights, and two trained vectors per weight.

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
    """The two trained vectors of one weight.

        delta = a @ diag(lambda_d) @ b @ diag(lambda_b)      for a kernel [in, out]

    Besides the base, the frozen tree holds `a`, `[*in, rank]`, and `b`, `[rank, *out]`: the same
    arrays for all weights of one size. Kopiczko et al. 2023, arXiv:2310.11454.

    Attributes:
        lambda_d: `[*shared, rank]`.
        lambda_b: `[*shared, *out]`.
        rank: the inner size.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
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
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        rank = axes.inner(0, self.rank)
        # Δ = a [in, rank] · diag(lambda_d) · b [rank, out] · diag(lambda_b), where a and b are
        # frozen
        factors = {"lambda_d": (*axes.shared, rank), "lambda_b": (*axes.shared, *axes.outputs)}
        return Layout(axes.out, factors, {"a": (*axes.inputs, rank), "b": (rank, *axes.outputs)})


class _Matrices:
    """A pair of matrices that is large enough for every weight, and cached parts of it.

    Parts with the same shape and dtype are the same array.
    """

    def __init__(self, key: jax.Array, fan_in: int, rank: int, fan_out: int):
        of_a, of_b = jax.random.split(key)
        # Uniform within Kaiming's bound for the fan-in of each. These are a [fan_in, rank] and
        # b [rank, fan_out] for the largest fans; a weight takes the leading part of each.
        self._whole = {
            "a": math.sqrt(6 / fan_in) * _uniform(of_a, (fan_in, rank)),
            "b": math.sqrt(6 / rank) * _uniform(of_b, (rank, fan_out)),
        }
        self._parts: dict[Any, jax.Array] = {}

    def part(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns the first rows of `a`, or the first columns of `b`, as a factor of `shape`."""
        key = (name, shape, jnp.dtype(dtype))
        if key not in self._parts:
            whole = self._whole[name]
            rows, columns = whole.shape
            if name == "a":
                # a [*in, rank]: the first fan_in rows.
                rows = math.prod(shape[:-1])
            else:
                # b [rank, *out]: the first fan_out columns.
                columns = math.prod(shape[1:])
            self._parts[key] = whole[:rows, :columns].astype(dtype).reshape(shape)
        return self._parts[key]


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0)


@dataclasses.dataclass(frozen=True)
class VeraSpec(AdapterSpec):
    """The spec of VeRA for one weight: two trained vectors, between and after frozen matrices.

        delta = a @ diag(lambda_d) @ b @ diag(lambda_b)

    All weights with a `VeraSpec` of the same rank in one call of `init_lora` share one pair of
    random matrices `a` and `b`, of which each weight uses the leading part.

    Args:
        rank: the inner size, which may exceed the rank of the weight.
        d_initial: the initial value of `lambda_d`; `lambda_b` is initially zero.
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
        """Raises `SpecError` for an invalid rank or initial value."""
        check_rank(path, self, self.rank)
        first = self.d_initial
        if not isinstance(first, numbers.Real) or not math.isfinite(first) or first == 0:
            raise SpecError(
                f"`{path}` has d_initial {first!r}; it must be a finite number other than zero, "
                "which would leave all gradients zero. PEFT's default is 0.1."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> VeraWeight:
        """Returns the adapter without arrays."""
        return VeraWeight(None, None, self.rank, axes.inputs, axes.outputs, axes.shared)

    @property
    def common_key(self) -> Hashable:
        """Weights of one rank share the matrices, whatever their axes are."""
        return VeraSpec, self.rank

    def common(
        self, weights: Sequence[tuple[tuple[int, ...], Axes]], key: jax.Array
    ) -> "_Matrices":
        """Returns the matrices, which are large enough for all of the weights."""
        fans = [axes.sizes(shape) for shape, axes in weights]
        fan_in, fan_out = (max(sizes) for sizes in zip(*fans, strict=True))
        return _Matrices(key, fan_in, self.rank, fan_out)

    def start(self, start: Start) -> Started:
        """Returns vectors with a delta of zero, and this weight's part of the matrices."""
        weight = self.blank(start.base.shape, start.axes)
        layout = weight.layout(start.base.shape)
        shapes = layout.shapes()
        factors = {
            "lambda_d": jnp.full(shapes["lambda_d"], self.d_initial, start.dtype),
            # Zero, so that Δ is initially zero. If lambda_d were zero too, so would both gradients.
            "lambda_b": jnp.zeros(shapes["lambda_b"], start.dtype),
        }
        frozen = {
            name: start.common.part(name, sizes(labels), start.dtype)
            for name, labels in layout.frozen.items()
        }
        return Started(weight.with_factors(factors), frozen)
