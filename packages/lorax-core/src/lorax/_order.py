"""The order of pairwise products with the fewest multiplications, without forming a weight."""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export

# Up to so many operands every order is looked at: about 3ⁿ / 2 splits, a hundredth of a second.
MOST_ORDERED = 8


# The value of a symbolic size of `jax.export` where costs are compared.
NOMINAL_SIZE = 1024


def nominal(size) -> int:
    """A size as a number, for comparing costs."""
    return NOMINAL_SIZE if jax.export.is_symbolic_dim(size) else size


def pairwise_order(labels: tuple[tuple[Any, ...], ...], out: tuple[Any, ...], meets: int | None):
    """The order of pairwise products with the fewest multiplications.

    Each step names two positions; its result goes to the end of the list. Where an operand meets
    the weight (`meets`), factors are not multiplied with each other into something that spans the
    weight's inputs and its outputs, or all of its axes: that would be the delta itself.
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
    """`pairwise_order` with bit masks for sets of labels, so that equal terms share one search."""
    search = _Search(labels, sizes, out, meets)
    groups = [1 << k for k in range(len(labels))]
    steps: list[tuple[int, int]] = []

    def take(left: int, right: int) -> None:
        """Multiplies two of the groups of operands that are left."""
        positions = sorted((groups.index(left), groups.index(right)))
        steps.append((positions[0], positions[1]))
        for k in reversed(positions):
            del groups[k]
        groups.append(left | right)

    # Too many for a search over all orders: the cheapest product first, until few are left.
    while len(groups) > MOST_ORDERED:
        take(*search.cheapest_pair(groups))
    for left, right in search.best_tree(tuple(groups)):
        take(left, right)
    return steps


class _Search:
    """The costs of products of operands. A group of operands is a bit mask, as a set of labels is.

    Of two orders with as many multiplications, the one with smaller intermediate results wins.
    """

    def __init__(self, labels: tuple[int, ...], sizes: tuple[int, ...], out: int, meets):
        self.labels, self.sizes, self.out = labels, sizes, out
        self.met = 0 if meets is None else 1 << meets
        # Of the weight whose factors are multiplied, where something meets it.
        # x [n, i] · a [i, r] · b [r, o] -> [n, o] has the inputs {i}, the outputs {o}, shows {i,
        # o}, and has the inner labels {r}.
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
        """The labels of a group: its operand's, or those of its product that are needed later."""
        inside, elsewhere = 0, self.out
        for k, labels in enumerate(self.labels):
            if group == 1 << k:
                return labels
            if group >> k & 1:
                inside |= labels
            else:
                elsewhere |= labels
        # A label that nothing outside of the group has is summed within it.
        return inside & elsewhere

    def cost(self, left: int, right: int) -> tuple[int, int] | None:
        """Multiplications and entries of one product, or None where it is not to be made."""
        product_labels = self.labels_of(left | right)
        if not (left | right) & self.met and (
            self._is_built(left, right, product_labels) or self._scales_inner_labels(left, right)
        ):
            return None
        # x [n, i] · a [i, r] -> [n, r] takes n · i · r multiplications, and has n · r entries.
        return self.size(self.labels_of(left) | self.labels_of(right)), self.size(product_labels)

    def _is_built(self, left: int, right: int, product_labels: int) -> bool:
        """Whether the product of two factors would be the weight's delta, or a part as large."""
        # a [i, r] · b [r, o] -> [i, o] is the delta.
        if self.inputs & product_labels and self.outputs & product_labels:
            # A scale of one of them leaves the other as large as it is.
            return all(product_labels & ~self.labels_of(factor) for factor in (left, right))
        # Or two factors of which neither has all of the weight's axes, and their product has.
        missing = (
            self.shown & ~labels
            for labels in (product_labels, self.labels_of(left), self.labels_of(right))
        )
        return [bool(labels) for labels in missing] == [False, True, True]

    def _scales_inner_labels(self, left: int, right: int) -> bool:
        """Whether one factor scales the other along labels that join factors, such as the rank.

        What meets the weight is as narrow there, so the scale costs next to nothing. For its own
        gradient then that narrow product is kept, and not all that meets the weight.
        """
        few, many = sorted(map(self.labels_of, (left, right)), key=int.bit_count)
        return not few & ~(self.inner & many) and few not in (0, many)

    def cheapest_pair(self, groups: Sequence[int]) -> tuple[int, int]:
        """The two of many groups whose product costs least; what meets the weight meets any."""
        costs = {pair: self.cost(*pair) for pair in itertools.combinations(groups, 2)}
        return min((cost, pair) for pair, cost in costs.items() if cost is not None)[1]

    def best_tree(self, groups: tuple[int, ...]) -> list[tuple[int, int]]:
        """The products of the cheapest order, inner ones first, by a search over subsets."""
        # The best tree of a set of operands has the best trees of two parts of it as branches, so
        # sets are done from small to large.
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
    """One part of each way to divide groups in two, the larger parts first."""
    # The first group is in every part, for (A, B) and (B, A) are one division.
    first, *rest = groups
    for count in reversed(range(len(rest))):
        for others in itertools.combinations(rest, count):
            yield first + sum(others)
