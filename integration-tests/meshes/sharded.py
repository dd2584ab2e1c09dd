"""A small transformer, plain and with LoRA written into it, and the layouts it is tried in."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lorax
from lorax import LoraWeight
from lorax_io import Linear, Tensor

# Layers, batch, time, width, heads, size of a head, hidden: no two are equal, and no product that
# is a weight's size is one of activations, so that a collective tells what it moves by its size.
SIZES = {"l": 2, "b": 16, "t": 6, "d": 40, "h": 8, "k": 4, "f": 56, "e": 40}
RANK = 3
EQUATIONS = {
    "q": "btd,dhk->bthk",
    "k": "btd,dhk->bthk",
    "v": "btd,dhk->bthk",
    "o": "bthk,hkd->btd",
    "up": "btd,df->btf",
    "down": "btf,fd->btd",
}
NORMS = {"norm1": "e", "norm2": "e"}  # as wide as the model, and cut in no layout


def split(equation: str) -> tuple[str, str, str]:
    """The labels of the operand, of the weight and of the result."""
    operands, out = equation.split("->")
    operand, weight = operands.split(",")
    return operand, weight, out


LABELS = {name: split(equation)[1] for name, equation in EQUATIONS.items()} | NORMS


# Layouts.


class Layout(NamedTuple):
    """A mesh, and for each labelled axis the axis of the mesh that it is cut along."""

    mesh: dict[str, int]
    weights: dict[str, str]
    activations: dict[str, str]


# Queries, keys, values and `up` by columns; `o` and `down` by rows.
COLUMNS_AND_ROWS = {"h": "model", "f": "model"}
LAYOUTS = {
    "one device": Layout({"data": 1}, {}, {}),
    "data": Layout({"data": 8}, {}, {"b": "data"}),
    "fully sharded": Layout({"data": 8}, {"d": "data"}, {"b": "data"}),
    "tensor": Layout({"model": 8}, COLUMNS_AND_ROWS, COLUMNS_AND_ROWS),
    "data and tensor": Layout(
        {"data": 2, "model": 4}, COLUMNS_AND_ROWS, {"b": "data", **COLUMNS_AND_ROWS}
    ),
    "fully sharded and tensor": Layout(
        {"data": 2, "model": 4},
        {"d": "data", **COLUMNS_AND_ROWS},
        {"b": "data", **COLUMNS_AND_ROWS},
    ),
}


class Setting(NamedTuple):
    """A layout on a mesh whose axes are of one type, for layers in a list or in a stack."""

    layout: Layout
    mesh: Mesh
    explicit: bool
    stacked: bool

    def context(self) -> Any:
        return jax.set_mesh(self.mesh) if self.explicit else contextlib.nullcontext()

    def weight(self, labels: str) -> NamedSharding:
        return self._sharding(self.layout.weights, labels)

    def activation(self, labels: str) -> NamedSharding:
        return self._sharding(self.layout.activations, labels)

    def _sharding(self, cuts: dict[str, str], labels: str) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*(cuts.get(label) for label in labels)))

    def stored(self, name: str) -> str:
        """The labels of a parameter as it is stored."""
        return ("l" if self.stacked else "") + LABELS[name]

    def einsum(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """With explicit axes, the model gathers what is sharded, and shards results."""
        if not self.explicit:
            return jnp.einsum(equation, x, w)
        _, labels, out = split(equation)
        w = jax.sharding.reshard(w, self.activation(labels))
        return jnp.einsum(equation, x, w, out_sharding=self.activation(out))

    def constrained(self, x: jax.Array, labels: str) -> jax.Array:
        """With automatic axes, the model says where its activations are to be."""
        return x if self.explicit else jax.lax.with_sharding_constraint(x, self.activation(labels))


def setting(layout: str, *, explicit: bool, stacked: bool) -> Setting:
    chosen = LAYOUTS[layout]
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(chosen.mesh)
    sizes = tuple(chosen.mesh.values())
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, tuple(chosen.mesh), axis_types=kinds, devices=devices)
    return Setting(chosen, mesh, explicit, stacked)


SETTINGS = {
    f"{layout}, {axes} axes, {layers}": {"layout": layout, "explicit": explicit, "stacked": stacked}
    for layout in LAYOUTS
    if layout != "one device"
    for axes, explicit in {"automatic": False, "explicit": True}.items()
    for layers, stacked in {"a list of layers": False, "a stack of layers": True}.items()
}


# The model.


def norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def block(dense, p, x):
    h = norm(p["norm1"], x)
    q, k, v = (dense(name, p[name], h) for name in "qkv")
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(np.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    x = x + dense("o", p["o"], jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), v))
    h = norm(p["norm2"], x)
    return x + dense("down", p["down"], jax.nn.gelu(dense("up", p["up"], h)))


def blocks(dense, stacked, params, x):
    if stacked:
        return jax.lax.scan(lambda x, p: (block(dense, p, x), None), x, params)[0]
    for p in params:
        x = block(dense, p, x)
    return x


def plain(where: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    """The model: nothing in it knows about LoRA."""

    def dense(name, w, x):
        equation = EQUATIONS[name]
        return where.constrained(where.einsum(equation, x, w), split(equation)[2])

    return functools.partial(blocks, dense, where.stacked)


def by_hand(where: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    """The model of the pair, as a careful user would write it."""

    def dense(name, weight, x):
        base, a, b = weight
        x_labels, w_labels, out = split(EQUATIONS[name])
        inputs = "".join(label for label in w_labels if label in x_labels)
        outputs = "".join(label for label in w_labels if label not in x_labels)
        middle = "".join(label for label in x_labels if label not in inputs) + "r"
        low = where.einsum(f"{x_labels},{inputs}r->{middle}", x, a)
        delta = where.einsum(f"{middle},r{outputs}->{out}", low, b)
        return where.constrained(where.einsum(EQUATIONS[name], x, base) + delta, out)

    def both(base, new):
        if isinstance(new, LoraWeight):
            return base, new.a, new.b
        return base if new is None else new

    def apply(pair, x):
        is_absent = lambda leaf: leaf is None  # noqa: E731
        return blocks(dense, where.stacked, jax.tree.map(both, *pair, is_leaf=is_absent), x)

    return apply


# Its numbers, from NumPy: the same in every layout and in every process.


def make_params(stacked: bool) -> Any:
    random = np.random.default_rng(0)

    def draw(labels: str) -> np.ndarray[Any, Any]:
        numbers = random.normal(size=[SIZES[label] for label in labels])
        return (numbers / 6 if len(labels) > 1 else numbers).astype(np.float32)

    layers = [{name: draw(labels) for name, labels in LABELS.items()} for _ in range(SIZES["l"])]
    return jax.tree.map(lambda *rows: np.stack(rows), *layers) if stacked else layers


def make_batch() -> Any:
    random = np.random.default_rng(1)
    return random.normal(size=(2, *(SIZES[label] for label in "btd"))).astype(np.float32)


def put(array: np.ndarray[Any, Any], sharding: NamedSharding) -> jax.Array:
    """A global array, of which each process puts its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Adapted(NamedTuple):
    """The model's numbers where a setting says, with an adapter in which no delta is zero."""

    params: Any
    frozen: Any
    tunable: Any
    batch: tuple[jax.Array, jax.Array]


def name_of(path: Any) -> str:
    return next(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def made(where: Setting) -> tuple[Any, Any, Any]:
    """The parameters, the spec of their adapter, and a batch with what should become of it."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, array: put(array, where.weight(where.stored(name_of(path)))),
        make_params(where.stacked),
    )
    x, y = (put(array, where.activation("btd")) for array in make_batch())
    spec = lorax.infer_spec(plain(where), params, x, rank=RANK)
    spec = jax.tree_util.tree_map_with_path(
        lambda path, leaf: lorax.LORA_FULL if name_of(path) == "norm2" else leaf, spec
    )
    return params, spec, (x, y)


def adapt(where: Setting) -> Adapted:
    params, spec, batch = made(where)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0), b_init="gaussian")
    return Adapted(params, frozen, tunable, batch)


def names_for_peft(stacked: bool) -> dict[str, Any]:
    """The layouts of the parameters: attention's heads are flattened in PyTorch's weights."""
    inputs = {"o": (0, 1)}
    names: dict[str, Any] = {}
    for layer in [None] if stacked else range(SIZES["l"]):
        path, module, shared = (
            ("", "layers.{}.", [0]) if layer is None else (f"{layer}/", f"layers.{layer}.", [])
        )
        for name in EQUATIONS:
            axes = [d + len(shared) for d in inputs.get(name, (0,))]
            names[path + name] = Linear(module + name, in_axes=axes, shared_axes=shared)
        names[path + "norm2"] = Tensor(module + "norm2", parameter="weight", shared_axes=shared)
    return names


def loss_of(model: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """As a function of the tunable tree, the frozen one, a batch and what it should become."""
    return lambda tunable, frozen, x, y: jnp.mean((model((frozen, tunable), x) - y) ** 2)


def train(where: Setting, actual: Adapted, steps: int = 3) -> tuple[Any, list[float]]:
    """The tunable tree after some steps, and the losses on the way."""
    optimizer = optax.adam(1e-2)
    loss = loss_of(lorax.lora(plain(where), on_materialize="error", on_unused="error"))

    @jax.jit
    def step(tunable, state, frozen, x, y):
        value, grads = jax.value_and_grad(loss)(tunable, frozen, x, y)
        updates, state = optimizer.update(grads, state, tunable)
        return optax.apply_updates(tunable, updates), state, value

    tunable, state, losses = actual.tunable, optimizer.init(actual.tunable), []
    for _ in range(steps):
        tunable, state, value = step(tunable, state, actual.frozen, *actual.batch)
        losses.append(float(value))
    return tunable, losses
