"""A small transformer, plain and with hand-written LoRA, and the layouts in which it is tested."""

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

# Layers, batch, time, width, heads, head size, hidden size. All differ, and no activation has as
# many entries as a weight, so that the size of a collective identifies the array that it moves.
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
NORMS = {"norm1": "e", "norm2": "e"}  # as wide as the model, and never sharded


def split(equation: str) -> tuple[str, str, str]:
    """The labels of the operand, of the weight and of the result."""
    operands, out = equation.split("->")
    operand, weight = operands.split(",")
    return operand, weight, out


LABELS = {name: split(equation)[1] for name, equation in EQUATIONS.items()} | NORMS


# Layouts.


class Layout(NamedTuple):
    """A mesh, and the mesh axis along which each labeled axis is sharded."""

    mesh: dict[str, int]
    weights: dict[str, str]
    activations: dict[str, str]


# Queries, keys, values and `up` are sharded by columns; `o` and `down` by rows.
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
    """A layout on a mesh with axes of one type, for a list or a stack of layers."""

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

    def _sharding(self, mesh_axes: dict[str, str], labels: str) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*(mesh_axes.get(label) for label in labels)))

    def stored(self, name: str) -> str:
        """The labels of a stored parameter."""
        return ("l" if self.stacked else "") + LABELS[name]

    def einsum(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """An einsum. With explicit axes, gathers sharded weights, and shards the result."""
        if not self.explicit:
            return jnp.einsum(equation, x, w)
        _, labels, out = split(equation)
        w = jax.sharding.reshard(w, self.activation(labels))
        return jnp.einsum(equation, x, w, out_sharding=self.activation(out))

    def constrained(self, x: jax.Array, labels: str) -> jax.Array:
        """Activations. With automatic axes, constrains their sharding."""
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
    """The plain model."""

    def dense(name, w, x):
        equation = EQUATIONS[name]
        return where.constrained(where.einsum(equation, x, w), split(equation)[2])

    return functools.partial(blocks, dense, where.stacked)


def hand_written(where: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    """The model with hand-written LoRA."""

    def dense(name, weight, x):
        base, a, b = weight
        x_labels, w_labels, out = split(EQUATIONS[name])
        inputs = "".join(label for label in w_labels if label in x_labels)
        outputs = "".join(label for label in w_labels if label not in x_labels)
        middle = "".join(label for label in x_labels if label not in inputs) + "r"
        low = where.einsum(f"{x_labels},{inputs}r->{middle}", x, a)
        delta = where.einsum(f"{middle},r{outputs}->{out}", low, b)
        return where.constrained(where.einsum(EQUATIONS[name], x, base) + delta, out)

    def combine(base, leaf):
        if isinstance(leaf, LoraWeight):
            return base, leaf.a, leaf.b
        return base if leaf is None else leaf

    def apply(pair, x):
        is_absent = lambda leaf: leaf is None  # noqa: E731
        return blocks(dense, where.stacked, jax.tree.map(combine, *pair, is_leaf=is_absent), x)

    return apply


# Parameters and batches come from NumPy, so they are the same in every layout and process.


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
    """A global array, to which each process contributes its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Adapted(NamedTuple):
    """Parameters and batch, sharded by a setting, and an adapter with nonzero deltas."""

    params: Any
    frozen: Any
    tunable: Any
    batch: tuple[jax.Array, jax.Array]


def name_of(path: Any) -> str:
    return next(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def make_inputs(where: Setting) -> tuple[Any, Any, Any]:
    """The parameters, the spec of their adapter, and a batch of inputs and targets."""
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
    params, spec, batch = make_inputs(where)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0), b_init="gaussian")
    return Adapted(params, frozen, tunable, batch)


def names_for_peft(stacked: bool) -> dict[str, Any]:
    """The PyTorch names of the parameters. In PyTorch's weights, heads are flattened."""
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
    """The loss as a function of the tunable tree, the frozen tree, inputs and targets."""
    return lambda tunable, frozen, x, y: jnp.mean((model((frozen, tunable), x) - y) ** 2)


def train(where: Setting, adapted: Adapted, steps: int = 3) -> tuple[Any, list[float]]:
    """The tunable tree after some steps, and the loss of each step."""
    optimizer = optax.adam(1e-2)
    loss = loss_of(lorax.lora(plain(where), on_materialize="error", on_unused="error"))

    @jax.jit
    def step(tunable, state, frozen, x, y):
        value, grads = jax.value_and_grad(loss)(tunable, frozen, x, y)
        updates, state = optimizer.update(grads, state, tunable)
        return optax.apply_updates(tunable, updates), state, value

    tunable, state, losses = adapted.tunable, optimizer.init(adapted.tunable), []
    for _ in range(steps):
        tunable, state, value = step(tunable, state, adapted.frozen, *adapted.batch)
        losses.append(float(value))
    return tunable, losses
