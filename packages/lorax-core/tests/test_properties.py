"""Random models: einsums, convolutions, and chains of structural primitives."""

import collections

import jax
import jax.numpy as jnp
from hypothesis import assume, given, settings, strategies as st
from jax import lax

from lorax import LoraSpec, testing

settings.register_profile("lorax", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("lorax")

# The weight's axes have other sizes, so no activation has the shape of a weight.
OPERAND_SIZES = dict(zip("ABC", (2, 3, 5), strict=True))
WEIGHT_SIZES = dict(zip("abcd", (7, 11, 4, 13), strict=True))
SIZES = OPERAND_SIZES | WEIGHT_SIZES


def array(key, shape):
    return jax.random.normal(jax.random.key(key), shape) / 4


@st.composite
def roles(draw, ndim):
    """A spec for a weight of `ndim` axes: every axis is an input, an output, or shared."""
    order = draw(st.permutations(range(ndim)))
    n_in = draw(st.integers(1, ndim - 1))
    n_out = draw(st.integers(1, ndim - n_in))
    inputs, outputs = order[:n_in], order[n_in : n_in + n_out]
    return LoraSpec(
        draw(st.integers(1, 3)),
        alpha=draw(st.sampled_from([None, 5.0])),
        in_axes=inputs,
        out_axes=outputs,
        shared_axes=order[n_in + n_out :],
    )


@st.composite
def einsums(draw):
    weight = draw(st.permutations("abcd"))[: draw(st.integers(2, 4))]
    common = draw(st.lists(st.sampled_from(weight), min_size=1, max_size=len(weight), unique=True))
    if len(common) == len(weight):
        common = common[1:]  # test_contraction has weights whose axes are all contracted.
    operand_only = draw(st.lists(st.sampled_from("ABC"), min_size=1, max_size=2, unique=True))
    operand = draw(st.permutations([*common, *operand_only]))
    # A common axis is contracted, or is a batch axis where the result keeps it.
    kept = [label for label in common if draw(st.booleans())]
    if len(kept) == len(common):
        kept = kept[1:]  # A product that contracts nothing is as big as the weight itself.
    free = [label for label in weight if label not in common]
    out = draw(st.permutations([*operand_only, *kept, *free]))
    left, right = "".join(operand), "".join(weight)
    return left, right, "".join(out), draw(st.booleans()), draw(roles(len(weight)))


@given(einsums())
def test_einsum(case):
    left, right, out, weight_first, spec = case

    def fn(p, x):
        if weight_first:
            return jnp.einsum(f"{right},{left}->{out}", p["w"], x)
        return jnp.einsum(f"{left},{right}->{out}", x, p["w"])

    w = array(0, [SIZES[label] for label in right])
    x = array(1, [SIZES[label] for label in left])
    testing.check(fn, {"w": w}, {"w": spec}, x, transforms=False)


@st.composite
def convolutions(draw):
    ndim = draw(st.integers(1, 2))
    spatial = "HW"[:ndim]
    layouts = tuple(
        "".join(draw(st.permutations([*axes, *spatial]))) for axes in ("NC", "OI", "NC")
    )
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in spatial)  # noqa: E731
    kind = draw(st.sampled_from(["plain", "groups", "depthwise", "batch"]))
    groups = {"plain": 1, "groups": 2, "depthwise": 5, "batch": 1}[kind]
    batch_groups = 2 if kind == "batch" else 1
    features_in = 1 if kind == "depthwise" else 5
    sizes = {"O": 10, "I": features_in, "H": 3, "W": 2}
    image = {"N": 2, "C": features_in * groups, "H": 7, "W": 8}
    parameters = {
        "window_strides": each(1, 3),
        "padding": tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in spatial),
        "lhs_dilation": each(1, 2),
        "rhs_dilation": each(1, 2),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
        "dimension_numbers": layouts,
    }
    kernel = layouts[1]
    window = [d for d, name in enumerate(kernel) if name in spatial]
    # A depthwise kernel has one input: without the window, `b` would be as large as the kernel.
    fewest = 1 if kind == "depthwise" else 0
    with_inputs = draw(st.lists(st.sampled_from(window), min_size=fewest, unique=True))
    in_axes = (kernel.index("I"), *with_inputs)
    # `a` has one kernel for each group: at rank 2 it would be as large as the kernel.
    spec = LoraSpec(1 if kind == "depthwise" else 2, in_axes=in_axes)
    return (
        [sizes[name] for name in kernel],
        [image[name] for name in layouts[0]],
        parameters,
        spec,
    )


@settings(max_examples=12)
@given(convolutions())
def test_convolution(case):
    kernel, image, parameters, spec = case

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], **parameters)

    w, x = array(0, kernel), array(1, image)
    testing.check(fn, {"w": w}, {"w": spec}, x, transforms=False)


def divisors(n):
    return [d for d in range(2, n) if n % d == 0]


@st.composite
def chains(draw):
    """Steps that keep a weight a weight; each is (name, arguments) for the shape at that point."""
    shape = tuple(draw(st.permutations([12, 7, 10]))[: draw(st.integers(2, 3))])
    spec = draw(roles(len(shape)))
    start, steps = shape, []
    for _ in range(draw(st.integers(1, 4))):
        axis = draw(st.integers(0, len(shape) - 1))
        size = shape[axis]
        kind = draw(st.sampled_from(["transpose", "split", "slice", "pad", "rev", "expand"]))
        if kind == "transpose":
            argument = tuple(draw(st.permutations(range(len(shape)))))
            shape = tuple(shape[d] for d in argument)
        elif kind == "split" and divisors(size) and len(shape) < 5:
            high = draw(st.sampled_from(divisors(size)))
            argument = shape = (*shape[:axis], high, size // high, *shape[axis + 1 :])
            kind = "reshape"
        elif kind == "slice" and size > 3:
            low, high = sorted((draw(st.integers(0, size - 2)), draw(st.integers(2, size))))
            stride = draw(st.integers(1, 2))
            high = max(high, low + 2)
            argument = (axis, low, high, stride)
            shape = (*shape[:axis], -(-(high - low) // stride), *shape[axis + 1 :])
        elif kind == "pad":
            config = (draw(st.integers(-1, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 1)))
            grown = size + config[0] + config[1] + config[2] * (size - 1)
            if grown < 2:
                continue
            argument = (axis, config)
            shape = (*shape[:axis], grown, *shape[axis + 1 :])
        elif kind == "rev":
            argument = axis
        elif kind == "expand" and len(shape) < 5:
            argument = axis
            shape = (*shape[:axis], 1, *shape[axis:])
        else:
            continue
        steps.append((kind, argument))
    return start, spec, steps, shape


def apply(w, kind, argument):
    if kind == "transpose":
        return w.transpose(argument)
    if kind == "reshape":
        return w.reshape(argument)
    if kind == "slice":
        axis, low, high, stride = argument
        return lax.slice_in_dim(w, low, high, stride, axis)
    if kind == "pad":
        axis, config = argument
        return lax.pad(
            w, jnp.float32(0), [config if d == axis else (0, 0, 0) for d in range(w.ndim)]
        )
    if kind == "rev":
        return jnp.flip(w, argument)
    return jnp.expand_dims(w, argument)


@given(chains(), st.data())
def test_chains(case, data):
    start, spec, steps, shape = case
    contracted = data.draw(st.sampled_from([d for d, size in enumerate(shape) if size != 1]))
    # A result with all axes of the weight counts as the weight.
    rest = shape[:contracted] + shape[contracted + 1 :]
    assume(not collections.Counter(start) <= collections.Counter(rest))

    def fn(p, x):
        w = p["w"]
        for step in steps:
            w = apply(w, *step)
        assert w.shape == shape
        return jnp.tensordot(x, w, [[1], [contracted]])

    w, x = array(0, start), array(1, (11, shape[contracted]))
    testing.check(fn, {"w": w}, {"w": spec}, x, transforms=False)


@settings(max_examples=12)
@given(st.data())
def test_merging_axes(data):
    """Adjacent axes of the same factors merge, in whatever order the factors store them."""
    order = data.draw(st.permutations(range(4)))
    merged = data.draw(st.integers(0, 2))
    spec = data.draw(roles(4))
    start = (7, 4, 5, 6)

    def fn(p, x):
        w = p["w"].transpose(order)
        shape = (*w.shape[:merged], w.shape[merged] * w.shape[merged + 1], *w.shape[merged + 2 :])
        return jnp.tensordot(x, w.reshape(shape), [[1], [merged]])

    sizes = [start[d] for d in order]
    w, x = array(0, start), array(1, (11, sizes[merged] * sizes[merged + 1]))
    testing.check(fn, {"w": w}, {"w": spec}, x, transforms=False)
