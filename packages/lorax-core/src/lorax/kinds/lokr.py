"""LoKr: the Kronecker product of a small matrix and a larger one, which may have low rank.

ΔW[shared, (m n), (l k)]  =  scale · w1[m, l] · w2[n, k]
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._errors import SpecError
from ._split import resolve_split
from ._tucker import draw_core, draw_outputs, has_window
from .lora import check_rank, check_scale, lora_scale

NAMES = ("w1", "a1", "b1", "w2", "a2", "core", "b2")


@defkind
class LokrWeight(Adapter):
    """The trained factors of one weight: `w1` or `a1 b1`, and `w2`, `a2 b2` or `a2 core b2`.

        ΔW[(m n), (l k)]  =  alpha / rank · w1[m, l] · w2[n, k]

    One input axis is split into m blocks of n, and one output axis into l blocks of k. The other
    axes of both sides, such as the window of a convolution, belong to the second matrix. Yeh et al.
    2024 (LyCORIS), arXiv:2309.14859.

    Attributes:
        w1: `[*shared, m, l]`, or None.
        a1: `[*shared, m, rank]`, or None.
        b1: `[*shared, rank, l]`, or None.
        w2: `[*shared, *in, *out]`, where the split axes have sizes n and k, or None.
        a2: `[*shared, *in, rank]` with n, `[*shared, n, rank]` with a core, or None.
        core: `[*shared, *window, rank, rank]` in Tucker form, or None.
        b2: `[*shared, rank, *out]` with k, or None.
        rank: the inner size of low-rank matrices, and the divisor of the scale.
        alpha: the numerator of the scale, or None for a scale of 1.
        blocks: m and l.
        narrow: whether the first and the second matrix have low rank.
        tucker: whether the second matrix has a core over the input axes that are not split.
        split_axes: the input axis and the output axis that are split.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "lokr"

    w1: Any
    a1: Any
    b1: Any
    w2: Any
    a2: Any
    core: Any
    b2: Any
    rank: int = static()
    alpha: float | None = static(None)
    blocks: tuple[int, int] = static((1, 1))
    narrow: tuple[bool, bool] = static((False, False))
    tucker: bool = static(False)
    split_axes: tuple[int, int] = static((0, 1))
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies the delta."""
        return lora_scale(self.rank, self.alpha, "standard")

    def factors(self) -> dict[str, Any]:
        """Returns the factors that the settings require."""
        first = ("a1", "b1") if self.narrow[0] else ("w1",)
        second = ("a2", "b2") if self.narrow[1] else ("w2",)
        second = ("a2", "core", "b2") if self.tucker else second
        return {name: getattr(self, name) for name in (*first, *second)}

    def with_factors(self, factors: Mapping[str, Any]) -> Self:
        """Returns the same adapter with other arrays."""
        return super().with_factors({**dict.fromkeys(NAMES), **factors})

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        # The input axis is [m, n] and the output axis [l, k]: W1 [m, l] ⊗ W2 [n, k].
        (i, o), (m, n) = self.split_axes, axes.split(self.split_axes[0], self.blocks[0], 0)
        l, k = axes.split(o, self.blocks[1], 1)  # noqa: E741
        inputs = tuple(n if label.id == i else label for label in axes.inputs)
        outputs = tuple(k if label.id == o else label for label in axes.outputs)
        factors = {}
        for number, (first, last) in enumerate((((m,), (l,)), (inputs, outputs)), 1):
            if self.narrow[number - 1]:
                left = right = axes.inner(1 + number, self.rank)
                if number == 2 and self.tucker:
                    right = axes.inner(4, self.rank)
                    # In Tucker form, the inputs that are not split are the window.
                    window = tuple(label for label in first if label != n)
                    first = (n,)
                    factors["core"] = (*axes.shared, *window, left, right)
                # w [*first, *last] = a [*first, left] · (core [*window, left, right]) · b [right,
                # *last]
                factors[f"a{number}"] = (*axes.shared, *first, left)
                factors[f"b{number}"] = (*axes.shared, right, *last)
            else:
                factors[f"w{number}"] = (*axes.shared, *first, *last)
        ordered = {name: factors[name] for name in NAMES if name in factors}
        return Layout(axes.out_with({i: (m, n), o: (l, k)}), ordered)


@dataclasses.dataclass(frozen=True)
class LokrSpec(AdapterSpec):
    """The spec of LoKr for one weight: a delta of high rank from few numbers.

    As in PEFT, `w1` (or `b1`) is initially zero: it is drawn by `b_init` of `init_lora`, the others
    by `a_init`. The second matrix has low rank if `rank` is less than half of its longer side.

    Args:
        rank: the rank of low-rank matrices; with a high rank, the second matrix is a full one.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        factor: the number of blocks of both axes; −1 means the largest divisor of each up to its
            square root.
        decompose_both: whether the first matrix has low rank as well, if it is large enough.
        tucker: whether the window of a convolution is in a core of `rank × rank` where the second
            matrix has low rank, as under `use_effective_conv2d` in PEFT and `use_tucker` in
            LyCORIS. A weight without a window has no core.
        split_axes: the input axis and the output axis that are split; None means the last of each
            side. For a convolution give the axes of its channels.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LokrSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((32, 24))}, {"w": LokrSpec(2, factor=4)},
        ...                             jax.random.key(0))
        >>> {name: x.shape for name, x in tunable["w"].factors().items()}
        {'w1': (4, 4), 'a2': (8, 2), 'b2': (2, 6)}
    """

    rank: int
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    split_axes: Sequence[int] | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings, or a factor that does not divide both axes."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)
        if type(self.tucker) is not bool:
            raise SpecError(f"`{path}` has tucker={self.tucker!r}; it must be True or False.")
        if type(self.factor) is not int or not (self.factor == -1 or self.factor > 0):
            raise SpecError(
                f"`{path}` has factor {self.factor!r}; it must be a positive int, or -1."
            )
        for d in resolve_split(path, self, len(shape), axes, self.split_axes):
            if self.factor > 0 and shape[d] % self.factor:
                divisors = [k for k in range(1, shape[d] + 1) if shape[d] % k == 0]
                nearest = min(divisors, key=lambda k: abs(k - self.factor))
                raise SpecError(
                    f"`{path}` has a LokrSpec with factor={self.factor}, which does not divide "
                    f"axis {d} of its shape {tuple(shape)}. Choose a factor that divides both "
                    f"axes that are split (for this one, {nearest} is nearest), or -1."
                )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LokrWeight:
        """Returns the adapter without arrays."""
        split = resolve_split("", self, len(shape), axes, self.split_axes)
        sizes = [shape[d] for d in split]
        blocks = [_blocks(size, self.factor) for size in sizes]
        rest = [size // count for size, count in zip(sizes, blocks, strict=True)]
        # PEFT's rule: low rank if the rank is below half of the longer side.
        narrow = (self.decompose_both and self.rank < max(blocks) / 2, self.rank < max(rest) / 2)
        none = [None] * len(NAMES)
        tucker = self.tucker and narrow[1] and has_window(shape, axes, split[0])
        cut = (tuple(blocks), narrow, tucker, split)
        roles = (axes.inputs, axes.outputs, axes.shared)
        return LokrWeight(*none, self.rank, self.alpha, *cut, *roles)

    def start(self, start: Start) -> Started:
        """Draws the factors: by default, the first matrix is zero and the second is random."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        random, zero = start.initializers
        shapes = weight.layout(shape).shapes()
        shared = len(start.axes.shared)
        ins = {"1": 1, "2": 1 if weight.tucker else len(start.axes.inputs)}
        factors = {}
        for name, key in zip(shapes, jax.random.split(start.key, len(shapes)), strict=True):
            if weight.tucker and name in ("core", "b2"):
                draw = draw_core if name == "core" else draw_outputs
                factors[name] = draw(start, key, random, shapes[name])
                continue
            sizes = shapes[name][shared:]
            # As a matrix [rows, columns]: the rows are inputs, or the rank in b1 and b2.
            rows = 1 if name[0] == "b" else ins[name[1]]
            matrix = math.prod(sizes[:rows]), math.prod(sizes[rows:])
            init = zero if name in ("w1", "b1") else random
            factors[name] = start.draw(key, init, matrix, shapes[name])
        return Started(weight.with_factors(factors))


def _blocks(size: int, factor: int) -> int:
    """Returns the factor, or the largest divisor of `size` up to its square root."""
    if factor > 0:
        return factor
    # 1 divides every size, so a divisor is always found.
    return next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)
