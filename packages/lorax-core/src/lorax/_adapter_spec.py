"""Adapter specs: leaves of the spec tree that check a weight and make the initial factors."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ._adapter import Adapter
from ._arrays import Encoded, own
from ._axes import Axes, resolve_axes
from ._contract import holds_factors
from ._errors import SpecError, a_kind
from ._statics import make_plain

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


class Start(NamedTuple):
    """The inputs from which a kind makes its initial factors.

    Attributes:
        path: the path of the parameter.
        base: the parameter.
        axes: the roles of its axes.
        key: a PRNG key for this weight alone.
        dtype: the dtype of the factors.
        common: the result of `AdapterSpec.common` for all weights.
        initializers: those of fan-in factors and of fan-out factors.
        collected: the entry of `collect_starts` for this weight, if there is one.
    """

    path: str
    base: Any
    axes: Axes
    key: jax.Array
    dtype: Any
    common: Any
    initializers: tuple[Initializer, Initializer]
    collected: Mapping[str, jax.Array] | None = None

    def array(self, spec: Any, needed: str) -> Any:
        """Returns the parameter as an array; raises `SpecError` if only its shape is known."""
        if isinstance(self.base, Encoded):
            return self.base.array()
        if not isinstance(self.base, jax.Array | np.ndarray):
            raise SpecError(
                f"`{self.path}` has {a_kind(spec)}, which needs {needed}, but it is "
                f"{type(self.base).__name__}. Call init_lora on arrays, or under jax.eval_shape."
            )
        return self.base

    def draw(
        self, key: jax.Array, init: Initializer, matrix: tuple[int, int], shape: tuple[int, ...]
    ) -> jax.Array:
        """Draws a factor of `shape`: one `matrix` per entry of the shared axes."""
        shared = [self.base.shape[d] for d in self.axes.shared]
        if not shared:
            # A copy, because an initializer may return an array that the caller still uses.
            return own(self._drawn(init, key, matrix)).reshape(shape)
        # entries × [fan_in, rank] -> [*shared, *in, rank]
        keys = jax.random.split(key, math.prod(shared))
        return jax.vmap(lambda key: self._drawn(init, key, matrix))(keys).reshape(shape)

    def _drawn(self, init: Initializer, key: jax.Array, matrix: tuple[int, int]) -> Any:
        """Returns the matrix that an initializer draws, in the dtype of the factors."""
        drawn = init(key, matrix, self.dtype)
        shape, dtype = tuple(getattr(drawn, "shape", ())), getattr(drawn, "dtype", type(drawn))
        if shape != matrix or not holds_factors(dtype):
            raise SpecError(
                f"`{self.path}`: the initializer returned {dtype}{list(shape)} instead of "
                f"{jnp.dtype(self.dtype)}{list(matrix)}."
            )
        return drawn if dtype == self.dtype else drawn.astype(self.dtype)


class Started(NamedTuple):
    """The initial state of an adapter, with frozen factors, and a new base if it has changed."""

    adapter: Adapter
    frozen: Mapping[str, Any] = {}
    base: Any = None


class AdapterSpec:
    """How one weight is adapted: a leaf of the spec tree.

    A kind of spec is a frozen dataclass with the fields `in_axes`, `out_axes` and `shared_axes`
    besides its own settings.
    """

    # Whether the delta is a product of narrow factors, so that its norm needs no weight-sized
    # array.
    has_narrow_delta: ClassVar[bool] = False

    # Whether its rank is at most that of the matrix, so that `infer_spec` lowers a higher one.
    has_matrix_rank: ClassVar[bool] = False

    @property
    def collects(self) -> Any:
        """The start that computes the initial factors from collected statistics, or None."""
        return None

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("in_axes", "out_axes", "shared_axes"):
            axes = getattr(self, name)
            if not isinstance(axes, tuple | None) or (name == "shared_axes" and axes is None):
                raise SpecError(
                    f"{type(self).__name__} has {name}={axes!r}; axes are a sequence of ints."
                )

    def axes(self, path: str, ndim: int) -> Axes:
        """Returns the roles of the axes of a weight with `ndim` axes."""
        given: Any = self
        return resolve_axes(path, ndim, given.in_axes, given.out_axes, given.shared_axes)

    def with_axes(self, axes: Axes) -> Self:
        """Returns the same spec for a weight whose axes have these roles."""
        return dataclasses.replace(
            self,  # pyright: ignore[reportArgumentType]
            in_axes=axes.inputs,
            out_axes=axes.outputs,
            shared_axes=axes.shared,
        )

    @property
    def size(self) -> int | None:
        """The rank, for kinds whose rank is at most that of the matrix."""
        return getattr(self, "rank") if self.has_matrix_rank else None  # noqa: B009

    def with_size(self, rank: int) -> Self:
        """Returns the same spec with another rank."""
        return dataclasses.replace(self, rank=rank)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` if the kind cannot adapt such a weight."""

    def blank(self, shape: tuple[int, ...], axes: Axes) -> Adapter:
        """Returns the adapter without arrays."""
        raise NotImplementedError

    def count(self, shape: tuple[int, ...], axes: Axes) -> int:
        """Returns how many numbers are trained for such a weight."""
        return sum(map(math.prod, self.blank(shape, axes).layout(shape).shapes().values()))

    @property
    def common_key(self) -> Hashable:
        """Specs with equal keys share the result of `common`."""
        return self

    def common(self, weights: Sequence[tuple[tuple[int, ...], Axes]], key: jax.Array) -> Any:
        """Returns a value that all weights of one key share, made from their shapes and axes."""

    def start(self, start: Start) -> Started:
        """Returns the initial state of the adapter."""
        raise NotImplementedError
