"""OFT: multiplies one side of the weight by a block-diagonal orthogonal matrix.

W'[(n i), out]  =  Σ_j R[n, i, j] · W[(n j), out],    each block of R near an orthogonal matrix
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, make_term, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes, normalize
from .._contract import wide_dtype
from .._errors import SpecError
from .._factored import FactoredArray
from .._pair import is_tunable_leaf
from .._terms import Label, Labels
from .._turn import Turn

Side = Literal["in", "out"]


@defkind
class OftWeight(Adapter):
    """The trained blocks of one weight.

        x @ W'  =  (x R) @ W,      or  (x @ W) R  where `side` is "out"

    R is block-diagonal. Each block is the Cayley transform of a skew-symmetric `Q`, whose entries
    above the diagonal are in `q`, row by row. With a Neumann series of five terms, it is

        R  =  I + 2 Q + 2 Q² + 2 Q³ + Q⁴

    With a bound `eps`, as in constrained OFT, the `Q` of each of the weight's `k` blocks is scaled
    down to `‖Q‖ ≤ eps / √k` in the forward pass, and its gradient passes through unchanged.

    Qiu et al. 2023, arXiv:2306.07280; with the series, Qiu et al. 2025, arXiv:2506.19847. The
    numbers are those of `peft.OFTConfig`.

    Attributes:
        q: `[*shared, *others, blocks, block_size · (block_size − 1) / 2]`; see `OftSpec`.
        block_size: the number of entries per block.
        side: "in" or "out".
        channel_axis: the axis that is split into blocks.
        alone: whether the other axes of that side share the blocks.
        block_share: whether all blocks of the axis are the same.
        terms: the number of terms of the Neumann series, or None for the exact inverse.
        eps: the bound of constrained OFT, or None.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that make the output.
        shared_axes: the weight's axes with their own blocks for each entry.
    """

    kind = "oft"

    q: Any
    block_size: int = static()
    side: Side = static("in")
    channel_axis: int = static(0)
    alone: bool = static(False)
    block_share: bool = static(False)
    terms: int | None = static(5)
    eps: float | None = static(None)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def check_settings(self, path: str) -> None:
        """Raises `SpecError` for invalid blocks, series or bounds."""
        check_blocks(path, self.block_size, self.terms)
        check_bound(path, self.eps)

    def summary(self) -> str:
        """Returns the kind and the block size."""
        return f"oft {self.block_size}"

    def _labels(self, shape: tuple[int, ...]) -> tuple[Label, Label, Labels]:
        """Returns the labels of blocks and of entries within one, and those blocks vary along."""
        axes = Labeled.of(self.axes, shape)
        size = shape[self.channel_axis]
        if size != 1 and size % self.block_size != 0:
            raise SpecError(f"blocks of {self.block_size} do not divide its axis of size {size}")
        # An axis of size one has no block but still needs labels.
        blocks = Label(self.channel_axis, size // self.block_size)
        entry = axes.inner(0, self.block_size)
        side = axes.inputs if self.side == "in" else axes.outputs
        # Blocks vary along the other axes of the side, unless the user chose one axis alone.
        others = () if self.alone else tuple(x for x in side if x.id != self.channel_axis)
        varying = () if self.block_share else (*others, blocks)
        return blocks, entry, (*axes.shared, *varying)

    def neutral(self) -> dict[str, Neutral]:
        """Returns zeros, with which R is the identity."""
        return {"q": 0.0}

    def within_bound(self) -> jax.Array:
        """Returns `q` as it is used: scaled down to the bound, if there is one."""
        if self.eps is None:
            return self.q
        # All blocks of one shared entry share the bound.
        blocks = math.prod(self.q.shape[len(self.shared_axes) : -1])
        return shortened(self.q, self.eps / math.sqrt(blocks))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of `q` for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        blocks, entry, varying = self._labels(shape)
        # q [*varying, n (n − 1) / 2]: the entries above the diagonal of a skew-symmetric Q [n, n].
        above = axes.inner(1, self.block_size * (self.block_size - 1) // 2)
        out = axes.out_with({self.channel_axis: (blocks, entry)})
        return Layout(out, {"q": (*varying, above)}, gains=frozenset({"q"}))

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """Returns the base with a turn along one axis; arguments as in `Adapter.applied`."""
        axes = Labeled.of(self.axes, base.shape)
        _, entry, varying = self._labels(base.shape)
        row, column = axes.inner(1, self.block_size), axes.inner(2, self.block_size)
        # `Turn` computes R · W, and the output side needs W · R, that is Rᵀ along the outputs. The
        # transpose of R belongs to Qᵀ = −Q.
        q = self.within_bound()
        q = q if self.side == "in" else -q
        # The powers of Q take as much memory as LoRA of a few ranks, so the backward pass
        # recomputes them.
        matrix = jax.checkpoint(rotation, static_argnums=(1, 2))(q, self.block_size, self.terms)
        layout = self.layout(base.shape)
        term = make_term({"m": matrix}, {"m": (*varying, row, column)}, layout.out, source)
        return FactoredArray(base, (), turn=Turn(term, entry))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def shortened(q: jax.Array, bound: float) -> jax.Array:
    """Scales `q` down to a norm of at most `bound` for each matrix; the gradient is unchanged."""
    wide = q.astype(wide_dtype(q.dtype))
    norm = jnp.sqrt(2 * jnp.sum(wide**2, -1, keepdims=True))  # both halves of the matrix
    # The maximum keeps the branch that is not taken free of division by zero.
    scale = jnp.where(norm <= bound, 1, bound / jnp.maximum(norm, bound))
    return (wide * scale).astype(q.dtype)


@shortened.defjvp
def _shortened_jvp(bound: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return shortened(primals[0], bound), tangents[0]


def project_oft(tunable: Any) -> Any:
    """Returns the same adapters with the factors of constrained OFT moved within their bounds.

    The adapted model stays the same. PEFT changes the parameters themselves in each forward pass,
    so call this after each optimizer update to take the same steps as PEFT. Otherwise, the
    optimizer continues from the values beyond the bound.

    Args:
        tunable: the tunable tree of a pair.

    Returns:
        The tree, in which each `OftWeight` with `eps` has `q` within its bound.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import OftSpec, init_lora, project_oft
        >>> spec = {"w": OftSpec(2, eps=0.1)}
        >>> frozen, tunable = init_lora({"w": jnp.ones((4, 3))}, spec, jax.random.key(0))
        >>> far = jax.tree.map(lambda q: q + 1, tunable)
        >>> [round(float(x), 3) for x in project_oft(far)["w"].q[:, 0]]  # ‖Q‖ = 0.1 / √2 blocks
        [0.05, 0.05]
    """

    def projected(node: Any) -> Any:
        if not isinstance(node, OftWeight):
            return node
        return node.with_factors({"q": node.within_bound()})

    return jax.tree.map(projected, tunable, is_leaf=is_tunable_leaf)


def rotation(q: jax.Array, size: int, terms: int | None) -> jax.Array:
    """Returns `R − I` of each block, `[*varying, size, size]`, from the entries of Q above the
    diagonal.
    """
    q = q.astype(wide_dtype(q.dtype))
    rows, columns = np.triu_indices(size, 1)
    # places[i, j] is the position in q of the entry (i, j), and of (j, i) with the other sign.
    places = np.zeros((size, size), np.int32)
    places[rows, columns] = places[columns, rows] = np.arange(rows.size)
    # +1 above the diagonal, −1 below it, 0 on it: Q is skew-symmetric.
    sign = np.triu(np.ones((size, size)), 1) - np.tril(np.ones((size, size)), -1)
    around = tuple(range(q.ndim - 1))
    skew = q[..., places] * jnp.expand_dims(sign, around).astype(q.dtype)  # [*varying, size, size]
    if terms is None:  # (I − Q)(I + Q)⁻¹ − I, which turns the other way, as PEFT's does.
        across = jnp.swapaxes(jnp.expand_dims(jnp.eye(size, dtype=q.dtype), around) + skew, -1, -2)
        return jnp.swapaxes(jnp.linalg.solve(across, 2 * skew), -1, -2)
    # R = (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + 2Q³ + …, truncated
    if terms == 2:
        return 2 * skew
    # PEFT adds the last power once, not twice; the series is the same otherwise.
    power, total, last = skew, 2 * skew, max(terms - 1, 3)
    for k in range(2, last + 1):
        power = jnp.matmul(power, skew, precision=jax.lax.Precision.HIGHEST)
        total = total + (power if k == last else 2 * power)
    return total


@dataclasses.dataclass(frozen=True)
class OftSpec(AdapterSpec):
    """The spec of OFT for one weight: rotates its inputs or its outputs block by block.

    Args:
        block_size: the number of entries per block, which must divide the axis. There are
            `(block_size − 1) / 2` parameters per entry of the axis.
        side: "in", or "out", which PEFT uses for an embedding, to rotate its rows.
        channel_axis: the axis of that side that is split into blocks; the other axes of the side
            share the blocks. For a convolution, give the channel axis: blocks that differ along
            the window would materialize the kernel. By default, it is the last axis of the side,
            and every entry of the other axes has its own blocks.
        block_share: whether all blocks of the axis are the same.
        terms: the number of terms of the Neumann series for the inverse in the Cayley transform,
            at least 2; None solves for the inverse.
        eps: the bound of constrained OFT on how far all blocks together may be from the identity,
            as with `coft` in PEFT, whose default is 6e-5. None sets no bound. See `project_oft`.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import OftSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((12, 5))}, {"w": OftSpec(4)},
        ...                             jax.random.key(0))
        >>> tunable["w"].q.shape  # three blocks
        (3, 6)
    """

    block_size: int = 32
    side: Side = "in"
    channel_axis: int | None = None
    block_share: bool = False
    terms: int | None = 5
    eps: float | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for blocks that do not fit the weight."""
        if self.side not in ("in", "out"):
            raise SpecError(
                f"`{path}` has an OftSpec of side {self.side!r}; it must be 'in' or 'out'."
            )
        check_blocks(path, self.block_size, self.terms)
        check_bound(path, self.eps)
        side = axes.inputs if self.side == "in" else axes.outputs
        axis = self._channel_axis(path, len(shape), axes)
        if axis not in side:
            raise SpecError(
                f"`{path}` has an OftSpec with channel_axis={self.channel_axis}, but the axes of "
                f"side {self.side!r} are {side}."
            )
        if (size := shape[axis]) % self.block_size != 0:
            fitting = [k for k in range(2, size + 1) if size % k == 0]
            nearest = min(fitting, key=lambda k: abs(k - self.block_size), default=None)
            remedy = f"Take {nearest}, or" if nearest else "Give it another spec, or"
            raise SpecError(
                f"`{path}` has an OftSpec of block_size {self.block_size}, which does not divide "
                f"its axis {axis} of size {size}. {remedy} another axis as channel_axis."
            )

    def _channel_axis(self, path: str, ndim: int, axes: Axes) -> int:
        if self.channel_axis is None:
            return (axes.inputs if self.side == "in" else axes.outputs)[-1]
        return normalize(path, ndim, "channel_axis", (self.channel_axis,))[0]

    def blank(self, shape: tuple[int, ...], axes: Axes) -> OftWeight:
        """Returns the adapter without arrays."""
        axis = self._channel_axis("", len(shape), axes)
        return OftWeight(
            None, self.block_size, self.side, axis, self.channel_axis is not None,
            self.block_share, self.terms, self.eps, axes.inputs, axes.outputs, axes.shared,
        )  # fmt: skip

    def start(self, start: Start) -> Started:
        """Returns zeros, with which R is the identity; they are real for a complex weight."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        zeros = jnp.zeros(weight.layout(shape).shapes()["q"], jnp.finfo(start.dtype).dtype)
        return Started(weight.with_factors({"q": zeros}))


def check_blocks(path: str, size: Any, terms: Any) -> None:
    """Raises `SpecError` for an invalid block size or number of terms."""
    if type(size) is not int or size < 2:
        raise SpecError(
            f"`{path}` has block_size {size!r}; it must be an int of at least 2: a block of one "
            "entry cannot rotate."
        )
    if terms is not None and (type(terms) is not int or terms < 2):
        raise SpecError(
            f"`{path}` has {terms!r} terms of the Neumann series; it must be an int of at least "
            "2, or None for the exact inverse."
        )


def check_bound(path: str, eps: Any) -> None:
    """Raises `SpecError` for an invalid bound."""
    if eps is None:
        return
    if type(eps) is bool or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise SpecError(f"`{path}` has eps {eps!r}; it must be a positive number, or None.")
