"""The programs that are compiled of a model: forward pass, training step, and merge."""

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
    """A model, plain and with hand-written LoRA, and the shapes for which it is compiled."""

    plain: Callable[..., Any]  # of (params, batch)
    hand_written: Callable[..., Any]  # of (factors, params, batch)
    loss: Callable[..., Any]  # of (output, batch)
    params: Any
    batch: Any
    rank: int
    where: str = "*"


class Program(NamedTuple):
    """A program, ours and hand-written, each as a function followed by its arguments."""

    name: str
    ours: tuple[Any, ...]
    hand_written: tuple[Any, ...]
    plain: tuple[Any, ...] | None  # without adapters, or None for programs that need them
    sizes: set[int]  # entries of an adapted weight, and of one device's shard of it


def programs(mesh: Any, model: Model) -> Iterator[Program]:
    """Yields the programs of a model."""
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
        (model.hand_written, factors, params, batch),
        (model.plain, params, batch),
        sizes,
    )
    yield Program(
        "training step",
        (step_of(ours, model.loss), tunable, states[0], frozen, batch),
        (step_of(model.hand_written, model.loss), factors, states[1], params, batch),
        None,
        sizes,
    )
    yield Program(
        "merge",
        (lambda tunable, frozen: lorax.merge_params(frozen, tunable), tunable, frozen),
        (hand_written_merge, factors, params),
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


def hand_written_merge(factors: Any, params: Any) -> Any:
    """Every weight plus its delta."""

    def add(weight, pair):
        if pair is None:
            return weight
        delta = pair["a"] @ pair["b"]
        return (weight.astype(delta.dtype) + delta).astype(weight.dtype)

    return jax.tree.map(add, params, factors)


def is_lora(node: Any) -> bool:
    return isinstance(node, lorax.LoraWeight)


def weight_sizes(tunable: Any, frozen: Any) -> set[int]:
    """Entries of an adapted weight: of all or one device's shard, of a stack or one layer."""
    sizes: set[int] = set()

    def collect(base, weight):
        if is_lora(weight):
            stack = math.prod(base.shape[axis] for axis in weight.shared_axes)
            for shape in (base.shape, base.sharding.shard_shape(base.shape)):
                sizes.update({math.prod(shape), math.prod(shape) // stack})

    jax.tree.map(collect, frozen, tunable)
    return sizes
