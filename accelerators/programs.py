"""What is compiled of a model: its forward pass, a training step, and the merge."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import lorax
from adapted import as_factors
from compiling import shapes_of

OPTIMIZER = optax.adam(1e-3)


class Model(NamedTuple):
    """A plain model and its hand-written twin, with the shapes that they are compiled for."""

    plain: Callable[..., Any]  # of (params, batch)
    by_hand: Callable[..., Any]  # of (factors, params, batch)
    loss: Callable[..., Any]  # of (output, batch)
    params: Any
    batch: Any
    rank: int
    where: str = "*"


class Program(NamedTuple):
    """A function and its arguments, in each of its forms."""

    name: str
    ours: tuple[Any, ...]
    by_hand: tuple[Any, ...]
    plain: tuple[Any, ...] | None  # without adapters, where that means something
    sizes: set[int]  # how many entries an adapted weight has, and one device's part of it


def programs(mesh: Any, model: Model) -> Iterator[Program]:
    """The programs of a model, one after the other."""
    params, batch = model.params, model.batch
    spec = lorax.infer_spec(
        model.plain, params, batch, rank=model.rank, where=model.where, skip_small=False
    )
    frozen, tunable = shapes_of(
        mesh, lambda params: lorax.init_lora(params, spec, jax.random.key(0)), params
    )
    factors = as_factors(tunable)
    adapted = lorax.lora(model.plain, on_materialize="error", on_unused="error")

    def ours(tunable, frozen, batch):
        return adapted((frozen, tunable), batch)

    sizes = weight_sizes(tunable, frozen)
    states = [shapes_of(mesh, OPTIMIZER.init, tree) for tree in (tunable, factors)]
    yield Program(
        "forward",
        (ours, tunable, frozen, batch),
        (model.by_hand, factors, params, batch),
        (model.plain, params, batch),
        sizes,
    )
    yield Program(
        "training step",
        (step_of(ours, model.loss), tunable, states[0], frozen, batch),
        (step_of(model.by_hand, model.loss), factors, states[1], params, batch),
        None,
        sizes,
    )
    yield Program(
        "merge",
        (lambda tunable, frozen: lorax.merge_params(frozen, tunable), tunable, frozen),
        (merge_by_hand, factors, params),
        None,
        sizes,
    )


def step_of(forward: Callable[..., Any], loss: Callable[..., Any]) -> Callable[..., Any]:
    """A step of Adam on the first argument of `forward`."""

    def step(tunable, state, frozen, batch):
        objective = lambda tunable: loss(forward(tunable, frozen, batch), batch)  # noqa: E731
        value, gradient = jax.value_and_grad(objective)(tunable)
        updates, state = OPTIMIZER.update(gradient, state)
        return optax.apply_updates(tunable, updates), state, value

    return step


def merge_by_hand(factors: Any, params: Any) -> Any:
    """Every weight plus its delta, as one would write it."""

    def add(weight, pair):
        if pair is None:
            return weight
        delta = pair["a"] @ pair["b"]
        return (weight.astype(delta.dtype) + delta).astype(weight.dtype)

    return jax.tree.map(add, params, factors)


def is_lora(node: Any) -> bool:
    return isinstance(node, lorax.LoraWeight)


def weight_sizes(tunable: Any, frozen: Any) -> set[int]:
    """How many entries an adapted weight has: all of it or one device's part, stacked or not."""
    sizes: set[int] = set()

    def collect(base, weight):
        if is_lora(weight):
            stack = math.prod(base.shape[axis] for axis in weight.shared_axes)
            for shape in (base.shape, base.sharding.shard_shape(base.shape)):
                sizes.update({math.prod(shape), math.prod(shape) // stack})

    jax.tree.map(collect, frozen, tunable)
    return sizes
