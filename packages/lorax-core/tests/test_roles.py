"""The roles that `infer_spec` gives to axes, for each way in which a model uses a weight."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from lorax import LORA_FREEZE, UnadaptedWarning, infer_spec

F32 = jnp.float32


@pytest.fixture(autouse=True)
def default_promotion():
    """Models of users promote ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def struct(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


@jax.custom_vjp
def custom_dense(x, w):
    return x @ w


custom_dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def custom_square(w):
    return w * w


custom_square.defjvp(lambda p, t: (p[0] ** 2, 2 * p[0] * t[0]))


def normalized(p, u, x):
    """Spectral normalization: one step of the power iteration comes before the product."""
    w = p["w"].reshape(-1, 13)
    v = u @ w.T
    sigma = (v @ w) @ u.T
    return conv(x, p["w"] / sigma.reshape(()))


def modulated(p, style, x):
    def one(s, x):
        w = p["w"] * s[:, None]
        return conv(x[None], w / jnp.sqrt((w**2).sum((0, 1, 2))))[0]

    return jax.vmap(one)(style, x)


def pooled_by_query(p, x):
    query = jnp.einsum("bqd,dhk->bqhk", jnp.tile(p["probe"], (x.shape[0], 1, 1)), p["w"])
    keys = jnp.einsum("btd,dhk->bthk", x, p["keys"]) + p["bias"]
    attention = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", query, keys))
    return jnp.einsum("bhqt,btd->bqd", attention, x)


def gathered_in_shards(p, x):
    spec = PartitionSpec("x")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    product = lambda w, x: x @ lax.all_gather(w, "x", tiled=True)  # noqa: E731
    return jax.shard_map(product, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(p["w"], x)


def per_token(p, ids):
    step = lambda carry, i: (carry, lax.dynamic_index_in_dim(p["w"], i, 0, False))  # noqa: E731
    return lax.scan(step, 0.0, ids)[1]


def picked_by_data(p, x, i):
    return x @ p["w"][i]


def masked(p, x):
    return x @ jnp.tril(p["w"])


def in_a_while(p, x):
    body = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ p["w"]))  # noqa: E731
    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def with_weight_carried(p, x):
    body = lambda i, carry: (carry[0], jnp.tanh(carry[1] @ carry[0]))  # noqa: E731
    return lax.fori_loop(0, 3, body, (p["w"], x))[1]


def in_branches(p, x):
    return lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ (2 * p["w"]))


def complex_state(p, u):
    return u @ (p["w"][..., 0] + 1j * p["w"][..., 1])


def attended(p, tokens):
    """Two attention blocks with residual connections."""
    for _ in range(2):
        query = jnp.einsum("...td,dk->...tk", tokens, p["w"])
        scores = jnp.einsum("...tk,...sk->...ts", query, query)
        tokens = tokens + jnp.einsum("...ts,...sd->...td", jax.nn.softmax(scores), tokens)
    return tokens


def with_sinks(p, x):
    """A learned score that every position may attend to, one for each layer of a scan."""

    def layer(x, sink):
        query = jnp.einsum("td,dk->tk", x, p["w"])
        scores = jnp.concatenate([query @ query.T, jnp.broadcast_to(sink[:, None], (3, 1))], 1)
        return jax.nn.softmax(scores)[:, :-1] @ x, None

    return lax.scan(layer, x, p["other"])[0]


def embedded(p, x):
    return jnp.tanh(x @ p["w"][:, :11])


X, IDS = struct(3, 11), struct(3, dtype=jnp.int32)
IMAGES = struct(2, 9, 8, 5)

# (id, function of {"w": ...} and others, shapes of the parameters, arguments, inputs, outputs)
ROWS = [
    ("masked", masked, {"w": (11, 11)}, [X], (0,), (1,)),
    (
        "mask-of-data",
        lambda p, m, x: x @ (p["w"] * m),
        {"w": (11, 13)},
        [struct(11, 13), X],
        (0,),
        (1,),
    ),
    ("softplus", lambda p, x: x @ jax.nn.softplus(p["w"]), {"w": (11, 13)}, [X], (0,), (1,)),
    ("rounded", lambda p, x: x @ jnp.round(p["w"] * 9) / 9, {"w": (11, 13)}, [X], (0,), (1,)),
    ("custom-vjp", lambda p, x: custom_dense(x, p["w"]), {"w": (11, 13)}, [X], (0,), (1,)),
    ("custom-jvp", lambda p, x: x @ custom_square(p["w"]), {"w": (11, 13)}, [X], (0,), (1,)),
    ("padding-row", lambda p, ids: p["w"].at[0].set(0.0)[ids], {"w": (17, 13)}, [IDS], (0,), (1,)),
    (
        "complex",
        lambda p, x: x.astype(complex) @ lax.complex(p["w"], 0 * p["w"]),
        {"w": (11, 13)},
        [X],
        (0,),
        (1,),
    ),
    ("complex-pair", complex_state, {"w": (11, 13, 2)}, [X], (0,), (1,)),
    (
        "fft",
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["w"]), n=11),
        {"w": (3, 11)},
        [X],
        (1,),
        (0,),
    ),
    (
        "normalized",
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
        {"w": (11, 13)},
        [X],
        (0,),
        (1,),
    ),
    ("spectral", normalized, {"w": (3, 3, 5, 13)}, [struct(1, 13), IMAGES], (0, 1, 2), (3,)),
    (
        "resized",
        lambda p, x: conv(x, jax.image.resize(p["w"], (4, 4, 5, 13), "bilinear")),
        {"w": (8, 8, 5, 13)},
        [IMAGES],
        (0, 1, 2),
        (3,),
    ),
    ("modulated", modulated, {"w": (3, 3, 5, 13)}, [struct(2, 5), IMAGES], (0, 1, 2), (3,)),
    (
        "modulated-dense",
        lambda p, s, x: jax.vmap(lambda s, x: x @ (p["w"] * s[:, None]))(s, x),
        {"w": (11, 13)},
        [X, X],
        (0,),
        (1,),
    ),
    (
        "product-first",
        lambda p, x: jnp.einsum("bi,io,op->bp", x, p["w"], p["v"]),
        {"w": (11, 5), "v": (5, 7)},
        [struct(99, 11)],
        (0,),
        (1,),
    ),
    (
        "second-of-a-product",
        lambda p, x: x @ (p["v"] @ p["w"]),
        {"v": (11, 5), "w": (5, 7)},
        [X],
        (0,),
        (1,),
    ),
    (
        "middle-of-a-product",
        lambda p, x: x @ (p["u"] @ p["w"] @ p["v"]),
        {"u": (11, 5), "w": (5, 7), "v": (7, 13)},
        [X],
        (0,),
        (1,),
    ),
    (
        "power",
        lambda p, x: x @ jnp.linalg.matrix_power(p["w"], 4),
        {"w": (11, 11)},
        [X],
        (0,),
        (1,),
    ),
    ("gram", lambda p, x: x @ (p["w"].T @ p["w"]), {"w": (13, 11)}, [X], (1,), (0,)),
    (
        "concatenated-with-an-argument",
        lambda p, k, x: x @ jnp.concatenate([p["w"], k], 1),
        {"w": (11, 13)},
        [struct(11, 4), X],
        (0,),
        (1,),
    ),
    (
        "masked-and-fused",
        lambda p, m, x: x @ jnp.concatenate([p["w"] * m, p["v"] * m], 1),
        {"w": (11, 13), "v": (11, 13)},
        [struct(11, 13), X],
        (0,),
        (1,),
    ),
    (
        "learned-query",
        pooled_by_query,
        {"probe": (1, 5, 8), "w": (8, 2, 16), "keys": (8, 2, 16), "bias": (2, 16)},
        [struct(3, 7, 8)],
        (0,),
        (1, 2),
    ),
    (
        "sum-of-entries",
        lambda p, x: (p["w"] * x).sum((1, 2)),
        {"w": (13, 11, 5)},
        [struct(11, 5)],
        (1, 2),
        (0,),
    ),
    (
        "distances",
        lambda p, x: ((x[:, None] - p["w"]) ** 2).sum(-1),
        {"w": (13, 11)},
        [X],
        (1,),
        (0,),
    ),
    (
        "vmapped-lookup",
        lambda p, ids: jax.vmap(lambda i: p["w"][i])(ids),
        {"w": (17, 13)},
        [IDS],
        (0,),
        (1,),
    ),
    ("lookup-in-a-scan", per_token, {"w": (17, 13)}, [IDS], (0,), (1,)),
    ("lookup-of-columns", lambda p, ids: p["w"][:, ids], {"w": (13, 17)}, [IDS], (1,), (0,)),
    (
        "lookup-of-one",
        lambda p, i: p["w"][i],
        {"w": (17, 13)},
        [struct(dtype=jnp.int32)],
        (0,),
        (1,),
    ),
    (
        "dynamic-slice",
        lambda p, i: lax.dynamic_slice(p["w"], (i, 0), (1, 13)),
        {"w": (17, 13)},
        [struct(dtype=jnp.int32)],
        (0,),
        (1,),
    ),
    (
        "one-hot",
        lambda p, ids: jax.nn.one_hot(ids, 17) @ p["w"],
        {"w": (17, 13)},
        [IDS],
        (0,),
        (1,),
    ),
    (
        "expert-of-data",
        picked_by_data,
        {"w": (3, 11, 13)},
        [X, struct(dtype=jnp.int32)],
        (1,),
        (2,),
    ),
    (
        "experts-of-tokens",
        lambda p, x, i: jnp.einsum("ti,tio->to", x, p["w"][i]),
        {"w": (5, 11, 13)},
        [X, IDS],
        (1,),
        (2,),
    ),
    ("sharded", gathered_in_shards, {"w": (12, 13)}, [struct(4, 12)], (0,), (1,)),
    ("while", in_a_while, {"w": (11, 11)}, [X], (0,), (1,)),
    ("carried", with_weight_carried, {"w": (11, 11)}, [X], (0,), (1,)),
    ("cond", in_branches, {"w": (11, 13)}, [X], (0,), (1,)),
    (
        "reshaped-across",
        lambda p, x: x @ p["w"].reshape(6, 4),
        {"w": (4, 6)},
        [struct(3, 6)],
        (0,),
        (1,),
    ),
    (
        "kernel-and-gain",
        lambda p, x: conv(x, p["w"] * p["gain"]),
        {"w": (3, 3, 5, 13), "gain": (1, 13)},
        [IMAGES],
        (0, 1, 2),
        (3,),
    ),
    (
        "learned-constant",
        lambda p, z: conv(p["const"] * z[:, None, None], p["w"]),
        {"const": (4, 4, 5), "w": (3, 3, 5, 13)},
        [struct(2, 5)],
        (0, 1, 2),
        (3,),
    ),
    ("table-of-heads", lambda p, ids: p["w"][ids], {"w": (17, 3, 13)}, [IDS], (0,), (1, 2)),
    (
        "fast-weights",
        lambda p, k, v, q: q @ (p["w"] + k.T @ (v - k @ p["w"])),
        {"w": (11, 13)},
        [X, struct(3, 13), X],
        (0,),
        (1,),
    ),
    (
        "attention-bias-after",
        lambda p, x: jnp.einsum(
            "qhk,thk->hqt", q := jnp.einsum("td,dhk->thk", x, p["w"]) + p["bias"], q
        ),
        {"w": (11, 2, 13), "bias": (2, 13)},
        [X],
        (0,),
        (1, 2),
    ),
]


def roles_of(fn, shapes, args, **options):
    params = {name: struct(*shape) for name, shape in shapes.items()}
    return infer_spec(fn, params, *args, rank=1, skip_small=False, **options)


@pytest.mark.parametrize(
    ("fn", "shapes", "args", "inputs", "outputs"),
    [row[1:] for row in ROWS],
    ids=[row[0] for row in ROWS],
)
@pytest.mark.filterwarnings("ignore::lorax.UnadaptedWarning")
def test_roles_of_axes(fn, shapes, args, inputs, outputs):
    roles = roles_of(fn, shapes, args)["w"]
    assert (roles.in_axes, roles.out_axes) == (inputs, outputs)


# Parameters that LoRA conventionally does not adapt: frozen without a warning.
SILENT = [
    ("bias", lambda p, x: (x @ p["w"])[:, None] + p["other"], (4, 13)),
    ("gain", lambda p, x: (x[:, None] * p["other"]).sum(1) @ p["w"], (1, 11)),
    ("positions", lambda p, x: jnp.tanh(x + p["other"]) @ p["w"], (3, 11)),
    ("sliced-positions", lambda p, x: (x + p["other"][:3]) @ p["w"], (5, 11)),
    (
        "initial-state",
        lambda p, x: lax.fori_loop(0, 3, lambda _, h: h @ p["w"][:, :11] + x, p["other"]),
        (3, 11),
    ),
    ("unused", lambda p, x: x @ p["w"], (4, 13)),
    (
        "class-token",
        lambda p, x: attended(p, jnp.concatenate([p["other"], embedded(p, x)])),
        (1, 11),
    ),
    (
        "registers-of-a-batch",
        lambda p, x: attended(
            p,
            jnp.concatenate(
                [jnp.tile(p["other"][None], (2, 1, 1)), jnp.tile(embedded(p, x), (2, 1, 1))], 1
            ),
        ),
        (4, 11),
    ),
    ("registers-and-input", lambda p, x: attended(p, jnp.concatenate([p["other"], x])), (4, 11)),
    ("stacked", lambda p, x: attended(p, jnp.stack([embedded(p, x), p["other"]])), (3, 11)),
    (
        "written-into",
        lambda p, x: attended(p, lax.dynamic_update_slice(embedded(p, x), p["other"], (1, 0))),
        (2, 11),
    ),
    ("set-in-data", lambda p, x: attended(p, embedded(p, x).at[1:].set(p["other"])), (2, 11)),
    ("added-to-rows", lambda p, x: attended(p, x.at[1:].add(p["other"])), (2, 11)),
    (
        "mask-token",
        lambda p, x: attended(p, jnp.where(x[:, :1] > 0, p["other"], embedded(p, x))),
        (3, 11),
    ),
    (
        "one-branch",
        lambda p, x: attended(p, lax.cond(x.sum() > 0, lambda: p["other"], lambda: embedded(p, x))),
        (3, 11),
    ),
    (
        "prefix-of-keys",
        lambda p, x: jax.nn.softmax(x @ jnp.concatenate([p["other"], embedded(p, x)]).T),
        (2, 11),
    ),
    ("sinks", with_sinks, (2, 3)),
    ("penalty", lambda p, x: (x @ p["w"]).sum() + (p["other"] ** 2).sum(), (4, 13)),
]


@pytest.mark.parametrize(("fn", "shape"), [r[1:] for r in SILENT], ids=[r[0] for r in SILENT])
def test_conventionally_frozen_without_a_warning(fn, shape):
    spec = roles_of(fn, {"w": (11, 13), "other": shape}, [X])
    assert spec["other"] == LORA_FREEZE and spec["w"] != LORA_FREEZE


def test_positions_of_a_batch_are_not_queries():
    """A parameter added to data with more axes is a bias, even if the sum is multiplied by data."""

    def attention(p, x):
        return jnp.einsum("btd,bsd->bts", x + p["other"][None], x) @ p["w"]

    spec = roles_of(attention, {"w": (3, 7), "other": (3, 11)}, [struct(5, 3, 11)])
    assert spec["other"] == LORA_FREEZE and spec["w"] != LORA_FREEZE


WARNED = [
    (
        "weights",
        lambda p, x: (p["other"] @ p["v"]).sum() + x @ p["w"],
        (4, 5),
        "is combined only with other weights, in `dot_general` at .*test_roles.*Give it a LoraSpec",
    ),
    (
        "inverted",
        lambda p, x: jnp.linalg.inv(p["other"]).sum() + x @ p["w"],
        (7, 7),
        "enters `.*`.*which is not followed.*Give it a LoraSpec",
    ),
    (
        "no-output",
        lambda p, x: jnp.tensordot(x, p["other"]) + (x @ p["w"]).sum(),
        (3, 11),
        "uses none of its axes as outputs.*Give it a LoraSpec",
    ),
    (
        "dead",
        lambda p, x: (x @ p["w"], jnp.tanh(x @ p["other"]))[0],
        (11, 4),
        "nothing that the function returns depends on `dot_general` at .*test_roles",
    ),
    (
        "dead-in-a-call",
        lambda p, x: jax.jit(lambda p, x: (x @ p["w"], jnp.tanh(x @ p["other"]))[0])(p, x),
        (11, 4),
        "nothing that the function returns depends on `dot_general` at .*test_roles",
    ),
    (
        "gain-of-a-weight",
        lambda p, x: x @ (p["w"] * p["other"]),
        (1, 13),
        "uses none of its axes as inputs.*give it LORA_FULL",
    ),
]


@pytest.mark.parametrize(
    ("fn", "shape", "reason"), [row[1:] for row in WARNED], ids=[row[0] for row in WARNED]
)
def test_unadapted_weight_warns_with_the_reason(fn, shape, reason):
    with pytest.warns(UnadaptedWarning, match=rf"`other`: .*{reason}"):
        spec = roles_of(fn, {"w": (11, 13), "v": (5, 7), "other": shape}, [X])
    assert spec["other"] == LORA_FREEZE and spec["w"] != LORA_FREEZE


def test_data_that_the_function_closes_over():
    x = jnp.ones((3, 11))
    spec = roles_of(lambda p: jnp.tanh(x @ p["w"]) @ p["v"].T, {"w": (11, 13), "v": (7, 13)}, [])
    assert (spec["w"].in_axes, spec["v"].in_axes) == ((0,), (1,))


def test_warning_names_the_line_that_calls_a_library_function():
    def model(p, x):
        return jnp.linalg.inv(p["other"]) @ p["v"] + (x @ p["w"]).sum()

    with pytest.warns(UnadaptedWarning, match=r"test_roles\.py:\d+"):
        roles_of(model, {"w": (11, 13), "v": (7, 5), "other": (7, 7)}, [X])
