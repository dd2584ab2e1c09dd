"""OFT: a block-diagonal orthogonal matrix on one side of the weight, and nothing is added.

W'[(n i), out]  =  Σ_j R[n, i, j] · W[(n j), out],    R of each block near an orthogonal matrix
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
    """The blocks of one weight.

        x @ W'  =  (x R) @ W,      or  (x @ W) R  where `side` is "out"

    R is block-diagonal. Each block is the Cayley transform of a skew-symmetric `Q`, of which `q`
    holds what is above the diagonal, row by row. Its Neumann series of five terms is

        R  =  I + 2 Q + 2 Q² + 2 Q³ + Q⁴

    Under a bound `eps` on all of the weight, as in constrained OFT, the `Q` of each of `k` blocks
    is shortened to `‖Q‖ ≤ eps / √k` where it is used, and its gradient passes as it is.

    Qiu et al. 2023, arXiv:2306.07280; with the series, Qiu et al. 2025, arXiv:2506.19847. The
    numbers are those of `peft.OFTConfig`.

    Attributes:
        q: `[*shared, *others, blocks, block_size · (block_size − 1) / 2]`; see `OftSpec`.
        block_size: how many entries of the axis a block has.
        side: "in" or "out".
        channel_axis: the axis that is cut into blocks.
        alone: whether the other axes of that side share the blocks.
        block_share: whether all blocks are one.
        terms: of the Neumann series, or None for the exact inverse.
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
        """Refuses blocks and series that are none."""
        check_blocks(path, self.block_size, self.terms)
        check_bound(path, self.eps)

    def summary(self) -> str:
        """The kind and the size of its blocks."""
        return f"oft {self.block_size}"

    def _labels(self, shape: tuple[int, ...]) -> tuple[Label, Label, Labels]:
        """The label of the blocks, that of the entries within one, and what blocks vary along."""
        axes = Labeled.of(self.axes, shape)
        size = shape[self.channel_axis]
        if size != 1 and size % self.block_size != 0:
            raise SpecError(f"blocks of {self.block_size} do not divide its axis of size {size}")
        # A base of ones has no block, but it has labels.
        blocks = Label(self.channel_axis, size // self.block_size)
        entry = axes.inner(0, self.block_size)
        side = axes.inputs if self.side == "in" else axes.outputs
        # Blocks vary along the other axes of the side, unless the user chose one axis alone.
        others = () if self.alone else tuple(x for x in side if x.id != self.channel_axis)
        varying = () if self.block_share else (*others, blocks)
        return blocks, entry, (*axes.shared, *varying)

    def neutral(self) -> dict[str, Neutral]:
        """Zeros: no block turns."""
        return {"q": 0.0}

    def within_bound(self) -> jax.Array:
        """`q` as it is used: shortened to the bound, where there is one."""
        if self.eps is None:
            return self.q
        blocks = math.prod(self.q.shape[len(self.shared_axes) : -1])
        return shortened(self.q, self.eps / math.sqrt(blocks))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the blocks run along a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        blocks, entry, varying = self._labels(shape)
        # q [*varying, n (n − 1) / 2]: the entries above the diagonal of a skew-symmetric Q [n, n].
        above = axes.inner(1, self.block_size * (self.block_size - 1) // 2)
        out = axes.out_with({self.channel_axis: (blocks, entry)})
        return Layout(out, {"q": (*varying, above)}, gains=frozenset({"q"}))

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """The base under a matrix on one axis."""
        axes = Labeled.of(self.axes, base.shape)
        _, entry, varying = self._labels(base.shape)
        row, column = axes.inner(1, self.block_size), axes.inner(2, self.block_size)
        # Inputs are rows of R, outputs are columns; the transpose of R is that of −Q.
        q = self.within_bound()
        q = q if self.side == "in" else -q
        # The powers of Q together are as large as a few ranks of LoRA: they are made again.
        matrix = jax.checkpoint(rotation, static_argnums=(1, 2))(q, self.block_size, self.terms)
        layout = self.layout(base.shape)
        term = make_term({"m": matrix}, {"m": (*varying, row, column)}, layout.out, source)
        return FactoredArray(base, (), turn=Turn(term, entry))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def shortened(q: jax.Array, bound: float) -> jax.Array:
    """`q` whose skew-symmetric matrices have at most this norm; the gradient passes as it is."""
    wide = q.astype(wide_dtype(q.dtype))
    norm = jnp.sqrt(2 * jnp.sum(wide**2, -1, keepdims=True))  # both halves of the matrix
    scale = jnp.where(norm <= bound, 1, bound / jnp.maximum(norm, bound))
    return (wide * scale).astype(q.dtype)


@shortened.defjvp
def _shortened_jvp(bound: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return shortened(primals[0], bound), tangents[0]


def project_oft(tunable: Any) -> Any:
    """The same adapters with constrained OFT moved within its bounds.

    The adapted model is the same. PEFT moves the numbers themselves in each forward pass, so call
    this after each update of the optimizer to take its steps; else what is beyond a bound goes on
    from there.

    Args:
        tunable: the tunable tree of a pair.

    Returns:
        The tree, where each `OftWeight` with `eps` has the `q` that it is used with.

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
    """`R − I` of each block, `[*varying, size, size]`, from what is above the diagonal of `Q`."""
    q = q.astype(wide_dtype(q.dtype))
    rows, columns = np.triu_indices(size, 1)
    # places[i, j] is the position in q of the entry (i, j), and of (j, i) with the other sign.
    places = np.zeros((size, size), np.int32)
    places[rows, columns] = places[columns, rows] = np.arange(rows.size)
    sign = np.triu(np.ones((size, size)), 1) - np.tril(np.ones((size, size)), -1)
    around = tuple(range(q.ndim - 1))
    skew = q[..., places] * jnp.expand_dims(sign, around).astype(q.dtype)  # [*varying, size, size]
    if terms is None:  # (I − Q)(I + Q)⁻¹ − I, which turns the other way, as PEFT's does.
        across = jnp.swapaxes(jnp.expand_dims(jnp.eye(size, dtype=q.dtype), around) + skew, -1, -2)
        return jnp.swapaxes(jnp.linalg.solve(across, 2 * skew), -1, -2)
    # R = (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + 2Q³ + …, cut off
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
    """OFT of one weight: its inputs, or its outputs, are turned block by block.

    Args:
        block_size: how many entries a block has; it divides the axis. More of them are more
            numbers: `(block_size − 1) / 2` for each entry of the axis.
        side: "in", or "out" as PEFT has it for an embedding, whose rows are turned.
        channel_axis: the axis of that side that is cut into blocks, which the other axes of the
            side share. Give the channels of a convolution: blocks that differ along its window take
            the whole kernel. By default it is the last axis of the side, and every entry of the
            others has its own blocks.
        block_share: whether all blocks are one.
        terms: of the Neumann series for the inverse in the Cayley transform, at least 2; None
            solves for it.
        eps: of constrained OFT: how far all blocks together may turn from the identity, as under
            `coft` in PEFT, whose default is 6e-5. None sets no bound. See `project_oft`.
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
        """Refuses blocks that do not fit."""
        if self.side not in ("in", "out"):
            raise SpecError(f"`{path}` has an OftSpec of side {self.side!r}; it is 'in' or 'out'.")
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
        """The adapter without arrays."""
        axis = self._channel_axis("", len(shape), axes)
        return OftWeight(
            None, self.block_size, self.side, axis, self.channel_axis is not None,
            self.block_share, self.terms, self.eps, axes.inputs, axes.outputs, axes.shared,
        )  # fmt: skip

    def start(self, start: Start) -> Started:
        """Zeros: no block turns. A complex weight has real ones."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        zeros = jnp.zeros(weight.layout(shape).shapes()["q"], jnp.finfo(start.dtype).dtype)
        return Started(weight.with_factors({"q": zeros}))


def check_blocks(path: str, size: Any, terms: Any) -> None:
    """Refuses blocks that hold no number, and a series that has none."""
    if type(size) is not int or size < 2:
        raise SpecError(
            f"`{path}` has block_size {size!r}; it is an int of at least 2: a block of one entry "
            "cannot turn."
        )
    if terms is not None and (type(terms) is not int or terms < 2):
        raise SpecError(
            f"`{path}` has {terms!r} terms of the Neumann series; it is an int of at least 2, or "
            "None for the exact inverse."
        )


def check_bound(path: str, eps: Any) -> None:
    """Refuses a bound that leaves nothing."""
    if eps is None:
        return
    if type(eps) is bool or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise SpecError(f"`{path}` has eps {eps!r}; it is a positive number, or None.")
