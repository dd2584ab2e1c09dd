"""The algebra of terms: each method, compared with the same operation on the full array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax._factored import FactoredArray
from lorax._term_products import align, entrywise, operand, product, relabeled
from lorax._terms import Inexpressible, Label, Term


def term(*sizes, rank=2, inputs=(0,), shared=(), seed=0):
    """A LoRA term of a weight with axes of `sizes`."""
    axes = [Label(d, size) for d, size in enumerate(sizes)]
    r = Label(len(sizes), rank)
    both = [axes[d] for d in shared]
    ins = [axes[d] for d in inputs]
    outs = [label for d, label in enumerate(axes) if d not in (*inputs, *shared)]
    labels = ((*both, *ins, r), (*both, r, *outs))
    keys = jax.random.split(jax.random.key(seed))
    factors = tuple(
        jax.random.normal(key, [label.size for label in names])
        for key, names in zip(keys, labels, strict=True)
    )
    return Term(factors, labels, tuple((label,) for label in axes), ("w",))


def full(value):
    return np.asarray(value.array(jnp.float32, precision="highest"))


def assert_equals(value, expected):
    assert value.shape == expected.shape
    assert np.allclose(full(value), expected, rtol=1e-5, atol=1e-5)


def test_array_is_the_product_of_the_factors():
    t = term(5, 3)
    assert_equals(t, np.asarray(t.factors[0]) @ np.asarray(t.factors[1]))


def test_permute():
    t = term(5, 3, 7)
    assert_equals(t.permute((2, 0, 1)), full(t).transpose(2, 0, 1))


def test_drop_sums():
    t = term(5, 3, 7)
    assert_equals(t.drop([1]), full(t).sum(1))
    assert_equals(t.drop([0, 2]), full(t).sum((0, 2)))


def test_drop_an_axis_without_a_factor():
    t = term(5, 3).broadcast((7, 5, 3), (1, 2))
    assert_equals(t.drop([0]), full(t).sum(0))


def test_broadcast():
    t = term(5, 1)
    assert_equals(t.broadcast((7, 5, 3), (1, 2)), np.broadcast_to(full(t), (7, 5, 3)))


@pytest.mark.parametrize(
    "shape",
    [(6, 10), (2, 3, 10), (6, 2, 5), (2, 3, 5, 2), (60,), (12, 5), (1, 6, 1, 10, 1), (4, 3, 5)],
    ids=str,
)
def test_reshape(shape):
    t = term(6, 10)
    if shape == (4, 3, 5):
        # The axis of 4 would join a 2 from an axis of `a` and a 2 from one of `b`.
        with pytest.raises(Inexpressible):
            t.reshape(shape)
        return
    assert_equals(t.reshape(shape), full(t).reshape(shape))


def test_reshape_joins_labels_it_split():
    t = term(7, 12)
    assert_equals(t.reshape((7, 4, 3)).reshape((7, 6, 2)), full(t).reshape(7, 6, 2))
    assert_equals(t.reshape((7, 4, 3)).reshape((7, 2, 3, 2)), full(t).reshape(7, 2, 3, 2))


def test_reshape_keeps_a_unit_axis_with_its_factor():
    t = term(1, 6)
    label = t.out[0][0]
    for shape in ((2, 1, 3), (6, 1), (1, 2, 1, 3)):
        new = t.reshape(shape)
        assert new.out[shape.index(1)] == (label,)
        assert_equals(new, full(t).reshape(shape))


def test_reshape_moves_no_data_of_the_weight():
    t = term(6, 10).reshape((60,)).reshape((6, 10))
    assert [factor.shape for factor in t.factors] == [(6, 2), (2, 10)]


def test_fuse_follows_the_order_of_the_axis():
    # `a` stores its axes as (0, 1), and the merged axis has them as (1, 0).
    t = term(2, 3, 7, inputs=(0, 1)).permute((1, 0, 2)).reshape((6, 7))
    fused, label = t.fuse(0)
    assert label.size == 6 and fused.out[0] == (label,)
    assert_equals(fused, full(t))


def test_fuse_axes_of_different_factors_raises():
    t = term(5, 3).reshape((15,))
    with pytest.raises(Inexpressible):
        t.fuse(0)


def test_fuse_a_unit_axis():
    t = term(5, 3).reshape((5, 1, 3))
    fused, label = t.fuse(1)
    assert label.size == 1
    assert_equals(fused, full(t))


def test_fuse_a_copied_axis_of_size_one():
    # As `jnp.tile` of learned queries: copies that no factor has, and an axis of 1 that `a` has.
    t = term(1, 6)
    copies = t.fresh(4)
    tiled = dataclasses.replace(t, out=((copies, *t.out[0]), t.out[1]))
    fused, label = tiled.fuse(0)
    assert fused.out[0] == (label,) == (copies,)
    assert_equals(fused, np.repeat(full(t), 4, 0))


def test_leading_splits_off_the_first_label():
    t = term(5, 3).reshape((15,))
    _, label, unit = t.leading(0, (6, 12))
    assert (label.size, unit) == (5, 3)
    with pytest.raises(Inexpressible):
        t.leading(0, (7, 12))


def test_along_changes_every_factor_with_the_axis():
    t = term(5, 3, 7, inputs=(1,), shared=(0,))
    cut, _ = t.along(t.out[0][0], lambda factor, k: jax.lax.slice_in_dim(factor, 1, 4, axis=k), 3)
    assert_equals(cut, full(t)[1:4])


def test_split_a_label():
    t = term(6, 5)
    split, (high, low) = t.split(t.out[0][0], 2)
    assert (high.size, low.size) == (2, 3)
    assert_equals(split, full(t))


def test_own_gives_the_axis_to_a_factor():
    t = term(5, 3).broadcast((7, 5, 3), (1, 2))
    label = t.out[0][0]
    owned = t.own(label)
    assert owned.owners(label) and not t.owners(label)
    assert_equals(owned, full(t))
    assert owned.own(label) is owned


@pytest.mark.parametrize("scalar", [3, -0.5, jnp.float32(3), jnp.bfloat16(2)], ids=str)
def test_scale(scalar):
    t = term(5, 3)
    assert_equals(t.scale(scalar), full(t) * float(scalar))
    # The scale is multiplied into the smallest factor.
    changed = [a is not b for a, b in zip(t.scale(scalar).factors, t.factors, strict=True)]
    assert changed == [False, True]


def test_scale_by_a_wider_dtype_widens_the_factor():
    t = term(5, 3)
    narrow = dataclasses.replace(t, factors=tuple(f.astype(jnp.bfloat16) for f in t.factors))
    assert narrow.scale(jnp.float32(3)).factors[1].dtype == jnp.float32


def test_split_factors():
    t = term(5, 3)
    (i,), (o,) = t.out
    first, second, inner_labels = t.split_factors([i], [o])
    assert len(first) == len(second) == 1 and [label.size for label in inner_labels] == [2]
    with pytest.raises(Inexpressible):
        t.split_factors([i, o], [o])


@pytest.mark.parametrize(
    "shape, flat",
    [((5, 3), False), ((1, 3), True), ((5, 1), True)],
    ids=str,
)
def test_is_flat_where_one_factor_spans_the_rest(shape, flat):
    t = term(5, 3)
    for axis, size in enumerate(shape):
        if size == 1:
            t = t.drop([axis])
    assert t.is_flat == flat


def test_a_dense_term_is_not_flat_until_it_is_summed():
    t, base = term(5, 3), operand(jax.random.normal(jax.random.key(7), (5, 3)))
    product = entrywise(t, base)
    assert product.dense_factor == 2 and product.is_dense and not product.is_flat
    assert t.dense_factor is None
    summed = product.drop([0])
    assert summed.is_flat and not summed.is_dense
    assert_equals(summed, (full(t) * full(base)).sum(0))


def test_rows_are_flat_and_not_dense():
    """The label of an index array is not an axis of the weight, so one factor spans the rest."""
    t = term(5, 3)
    label = t.out[0][0]
    rows = t.rename({label: (label._replace(is_index=True),)})
    assert rows.is_flat and not rows.is_dense


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (60,)], ids=str)
def test_entrywise(shape):
    t, other = term(6, 10).reshape(shape), term(6, 10, seed=1, inputs=(1,)).reshape(shape)
    assert_equals(entrywise(t, other), full(t) * full(other))
    assert_equals(entrywise(t, t), full(t) ** 2)


def test_one_owner_moves_a_label_to_one_factor():
    t = term(5, 3)
    label = t.out[1][0]
    scaled = t.times(jnp.arange(3.0), (label,))
    alone = scaled.one_owner(label)
    assert len(scaled.owners(label)) == 2 and len(alone.owners(label)) == 1
    assert_equals(alone, full(scaled))
    shared = term(5, 3, 7, inputs=(1,), shared=(0,))
    with pytest.raises(Inexpressible):
        shared.one_owner(shared.out[0][0])


@pytest.mark.parametrize("sizes", [((6,), (6,)), ((2, 3), (6,)), ((6,), (2, 3)), ((2, 3), (2, 3))])
def test_align_and_product(sizes):
    """Contracts axes of size 6, which either side may have merged from axes of 2 and 3."""
    left_sizes, right_sizes = sizes
    left = term(*left_sizes, 5, inputs=range(len(left_sizes))).reshape((6, 5))
    right = term(7, *right_sizes, seed=1).reshape((7, 6))
    expected = np.einsum("io,vi->ov", full(left), full(right))
    l, r = align(left, relabeled(left, right), [(0, 1)])  # noqa: E741
    assert_equals(product(l, r, (l.out[1], r.out[0])), expected)


def test_align_sizes_that_do_not_divide_raises():
    left = term(4, 3, 5, inputs=(0, 1)).reshape((12, 5))
    right = term(7, 6, 2, inputs=(0,)).reshape((7, 12))
    with pytest.raises(Inexpressible):
        align(left, relabeled(left, right), [(0, 1)])


def test_product_sums_over_an_axis_without_a_factor():
    left = term(5, 3).broadcast((7, 5, 3), (1, 2))
    right = operand(jnp.ones((2, 4)))
    out = product(left, relabeled(left, right), (left.out[1],))
    # Sums over the axis of 7, and over all axes of `right`.
    assert_equals(out, full(left).sum((0, 2)) * 8)


def test_relabeled_labels_are_distinct():
    left, right = term(5, 3), term(5, 3, seed=1)
    used = {label for names in left.labels for label in names}
    moved = {label for names in relabeled(left, right).labels for label in names}
    assert used.isdisjoint(moved)
    assert_equals(relabeled(left, right), full(right))


def test_factored_array_sums_in_float32():
    base = jnp.full((5, 3), 256.0, jnp.bfloat16)
    t = term(5, 3)
    split_factors = dataclasses.replace(t, factors=tuple(jnp.full_like(f, 0.5) for f in t.factors))
    # Each term is 0.5, which bfloat16 cannot add to 256; four of them make a step of 2.
    value = FactoredArray(base, (split_factors,) * 4)
    assert value.array().dtype == jnp.bfloat16 and (value.array() == 258).all()


def test_terms_are_pytrees_whose_labels_are_static():
    t = term(5, 3)
    leaves, structure = jax.tree.flatten(t)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).labels == t.labels
    assert jax.tree.structure(term(5, 3, seed=1)) == structure
