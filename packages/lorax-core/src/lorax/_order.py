"""The order of pairwise products with the fewest multiplications that never forms a weight."""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export

# Up to this many operands, all orders are searched: about 3ⁿ / 2 splits.
MOST_ORDERED = 8


# The value that replaces a symbolic size of `jax.export` when costs are compared.
NOMINAL_SIZE = 1024


def nominal(size) -> int:
    """Returns a size as a number, for comparing costs."""
    return NOMINAL_SIZE if jax.export.is_symbolic_dim(size) else size


def pairwise_order(labels: tuple[tuple[Any, ...], ...], out: tuple[Any, ...], meets: int | None):
    """Returns the order of pairwise products with the fewest multiplications.

    Each step names the positions of two operands, whose product is appended to the list. If an
    operand meets the weight (`meets`), factors are never multiplied with each other into an array
    that spans both inputs and outputs of the weight, or all of its axes: that would be the delta
    itself.

    Args:
        labels: the labels of each operand.
        out: the labels of the result.
        meets: the position of the operand that meets the weight, or None.

    Returns:
        Pairs of positions, `len(labels) − 1` of them.
    """
    # A set of labels is an integer, whose bit k is label k: set operations are `&` and `|`.
    numbers = {label: k for k, label in enumerate(dict.fromkeys(itertools.chain(*labels)))}
    sets = tuple(sum(1 << numbers[label] for label in set(owned)) for owned in labels)
    shown = sum(1 << numbers[label] for label in set(out))
    return _ordered(sets, tuple(nominal(label.size) for label in numbers), shown, meets)


@functools.lru_cache(maxsize=4096)
def _ordered(
    labels: tuple[int, ...], sizes: tuple[int, ...], out: int, meets: int | None
) -> list[tuple[int, int]]:
    """`pairwise_order` with bit masks for sets of labels, which equal terms share."""
    search = _Search(labels, sizes, out, meets)
    groups = [1 << k for k in range(len(labels))]
    steps: list[tuple[int, int]] = []

    def take(left: int, right: int) -> None:
        """Multiplies two of the groups of operands that are left."""
        positions = sorted((groups.index(left), groups.index(right)))
        steps.append((positions[0], positions[1]))
        # Positions refer to the list before the step; the later one is deleted first.
        for k in reversed(positions):
            del groups[k]
        groups.append(left | right)

    # Too many operands for a full search: take the cheapest product until few are left.
    while len(groups) > MOST_ORDERED:
        take(*search.cheapest_pair(groups))
    for left, right in search.best_tree(tuple(groups)):
        take(left, right)
    return steps


class _Search:
    """The costs of products of operands. Groups of operands and sets of labels are bit masks.

    Of two orders with equally many multiplications, the one with smaller intermediates wins.
    """

    def __init__(self, labels: tuple[int, ...], sizes: tuple[int, ...], out: int, meets):
        self.labels, self.sizes, self.out = labels, sizes, out
        self.met = 0 if meets is None else 1 << meets
        # Label sets of the weight that an operand meets. x [n, i] · a [i, r] · b [r, o] -> [n, o]
        # has the inputs {i}, the outputs {o}, the shown labels {i, o} and the inner labels {r}.
        self.inputs = self.outputs = self.shown = self.inner = 0
        if meets is not None:
            seen = labels[meets]
            owned = functools.reduce(
                operator.or_,
                (own for k, own in enumerate(labels) if k != meets),
                0,
            )
            self.inputs, self.outputs, self.shown = seen & ~out, out & ~seen, owned & (seen | out)
            self.inner = owned & ~(seen | out)
        self.size = functools.cache(self._size)
        self.labels_of = functools.cache(self._labels_of)

    def _size(self, labels: int) -> int:
        return math.prod(size for k, size in enumerate(self.sizes) if labels >> k & 1)

    def _labels_of(self, group: int) -> int:
        """Returns the labels of an operand, or those of a group's product that are still needed."""
        inside, elsewhere = 0, self.out
        for k, labels in enumerate(self.labels):
            if group == 1 << k:
                return labels
            if group >> k & 1:
                inside |= labels
            else:
                elsewhere |= labels
        # A label that occurs nowhere outside the group has been summed over inside it.
        return inside & elsewhere

    def cost(self, left: int, right: int) -> tuple[int, int] | None:
        """Returns the multiplications and entries of a product, None if it is forbidden."""
        # A group with the operand is a narrow activation; only groups of factors can form a delta.
        product_labels = self.labels_of(left | right)
        if not (left | right) & self.met and (
            self._is_built(left, right, product_labels) or self._scales_inner_labels(left, right)
        ):
            return None
        # x [n, i] · a [i, r] -> [n, r] takes n · i · r multiplications, and has n · r entries.
        return self.size(self.labels_of(left) | self.labels_of(right)), self.size(product_labels)

    def _is_built(self, left: int, right: int, product_labels: int) -> bool:
        """Whether the product of two groups of factors is the delta, or a part of its size."""
        # a [i, r] · b [r, o] -> [i, o] is the delta.
        if self.inputs & product_labels and self.outputs & product_labels:
            # Not if one group merely scales the other: the result is no larger than that one was.
            return all(product_labels & ~self.labels_of(factor) for factor in (left, right))
        # Or neither group spans all of the weight's axes, and the product does.
        missing = (
            self.shown & ~labels
            for labels in (product_labels, self.labels_of(left), self.labels_of(right))
        )
        return [bool(labels) for labels in missing] == [False, True, True]

    def _scales_inner_labels(self, left: int, right: int) -> bool:
        """Whether one group only scales the other along inner labels, such as the rank.

        The operand is just as narrow after it has met a factor, so scaling it there costs next to
        nothing. The gradient of the scale then keeps that narrow product instead of the whole
        operand.
        """
        few, many = sorted(map(self.labels_of, (left, right)), key=int.bit_count)
        return not few & ~(self.inner & many) and few not in (0, many)

    def cheapest_pair(self, groups: Sequence[int]) -> tuple[int, int]:
        """Returns the pair of groups with the cheapest product that may be formed."""
        # A pair with the operand is always allowed, so the minimum exists.
        costs = {pair: self.cost(*pair) for pair in itertools.combinations(groups, 2)}
        return min((cost, pair) for pair, cost in costs.items() if cost is not None)[1]

    def best_tree(self, groups: tuple[int, ...]) -> list[tuple[int, int]]:
        """Returns the products of the cheapest order, inner ones first: a search over subsets."""
        # Dynamic programming: the best tree of a set consists of the best trees of two parts of
        # it, so sets are processed from small to large.
        costs: dict[int, tuple[int, int]] = {group: (0, 0) for group in groups}
        splits: dict[int, tuple[int, int]] = {}
        for count in range(2, len(groups) + 1):
            for chosen in itertools.combinations(groups, count):
                whole = sum(chosen)
                for left in _divisions(chosen):
                    right = whole ^ left
                    cost = self.cost(left, right) if left in costs and right in costs else None
                    if cost is None:
                        continue
                    # Each cost is (multiplications, entries); tuples compare multiplications first.
                    three = (cost, costs[left], costs[right])
                    total = (sum(c for c, _ in three), sum(made for _, made in three))
                    if whole not in costs or total < costs[whole]:
                        costs[whole], splits[whole] = total, (left, right)

        def steps(group: int) -> list[tuple[int, int]]:
            if group not in splits:
                return []
            left, right = splits[group]
            return [*steps(left), *steps(right), (left, right)]

        return steps(sum(groups))


def _divisions(groups: tuple[int, ...]) -> Iterator[int]:
    """Yields one part of each way to divide the groups in two, larger parts first."""
    # Every part has the first group, because (A, B) and (B, A) are the same division.
    first, *rest = groups
    for count in reversed(range(len(rest))):
        for others in itertools.combinations(rest, count):
            yield first + sum(others)
