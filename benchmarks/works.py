"""What is timed: the models, their sizes, and how each runs with LoRA in every way compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorax
import models
from adapted import Adapted
from models import Model
from steps import floor, start, train
from ways import ByHand, Flat, SideBySide

ADAPTERS = 8  # of one base
HEADS = 8
CAPACITY = 96  # rows of an expert


class Lora(NamedTuple):
    """A model with LoRA, in any way of having it."""

    apply: Callable[[Any, Any, Any], Any]  # (factors, frozen, batch) -> output
    factors: Any
    frozen: Any


class Program(NamedTuple):
    """A function with the arguments of each of its calls, one after the other."""

    fn: Callable[..., Any]
    calls: list[tuple[Any, ...]]
    loss: Callable[..., Any] | None = None  # what it differentiates by its first argument


class Work(NamedTuple):
    """A model, the rank of its adapters, and what is run of it."""

    model: Callable[[], Model]
    rank: int
    program: Callable[[Lora, Any], Program]  # the same of every way, on a batch
    beside: Callable[[Model, Adapted], dict[str, Program]]  # what they are compared with

    def programs(self, model: Model, adapted: Adapted) -> dict[str, Program]:
        """Every program that needs no other library."""
        found = {name: self.program(way, model.batch) for name, way in ways(model, adapted).items()}
        return found | {"hand-written again": found["hand-written"]} | self.beside(model, adapted)


def ways(model: Model, adapted: Adapted) -> dict[str, Lora]:
    """LoRA by `lora`, and hand-written in two forms."""
    return {
        "ours": Lora(adapted.ours, adapted.tunable, adapted.frozen),
        "hand-written": Lora(model.written(ByHand()), adapted.factors, model.params),
        "hand-written, flat": Lora(model.written(Flat()), adapted.factors, model.params),
    }


# What is run


def step(lora: Lora, batch: Any) -> Program:
    """A training step."""
    trained = train(lora.apply)
    return Program(trained.step, [(start(lora.factors), lora.frozen, batch)], trained.loss)


def forward(lora: Lora, batch: Any) -> Program:
    """The output."""
    return Program(lora.apply, [(lora.factors, lora.frozen, batch)])


def scaled(tree: Any, k: int) -> Any:
    """What the k-th of several adapters has, factors or examples."""
    return jax.tree.map(lambda leaf: (1 + k / ADAPTERS) * leaf, tree)


def in_turn(lora: Lora, batch: Any) -> Program:
    """A training step of each of several adapters, on its own examples."""
    trained = train(lora.apply)
    calls = [
        (start(scaled(lora.factors, k)), lora.frozen, scaled(batch, k)) for k in range(ADAPTERS)
    ]
    return Program(trained.step, calls, trained.loss)


def at_once(lora: Lora, batch: Any) -> Program:
    """The same in one call."""
    trained = train(lora.apply)
    states, _, batches = zip(*in_turn(lora, batch).calls, strict=True)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    over = {"in_axes": (0, None, 0)}
    return Program(
        jax.vmap(trained.step, **over),
        [(stack(states), lora.frozen, stack(batches))],
        lambda *args: jax.vmap(trained.loss, **over)(*args).sum(),
    )


# What it is compared with


def bounds(model: Model, adapted: Adapted) -> dict[str, Program]:
    """The floor trains nothing: the plain model's loss, its gradient, down to the input."""
    plain = Lora(lambda params, _, batch: model.apply(params, batch), model.params, None)
    return {"floor": Program(*floor(model)), "full fine-tuning": step(plain, model.batch)}


def bounds_of_blocks(model: Model, adapted: Adapted) -> dict[str, Program]:
    """What else could be done for weights that meet the same input."""
    side_by_side = Lora(model.written(SideBySide()), adapted.factors, model.params)
    return bounds(model, adapted) | {"hand-written, q|k|v": step(side_by_side, model.batch)}


def without_adapters(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Merged into the weights, and not there."""
    merged = lorax.merge_params(adapted.frozen, adapted.tunable)
    return {
        "merged": Program(model.apply, [(merged, model.batch)]),
        "base": Program(model.apply, [(model.params, model.batch)]),
    }


def one_after_another(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Several adapters, in a call of each."""
    made = ways(model, adapted)
    names = ("ours", "hand-written")
    return {f"{name}, in turn": in_turn(made[name], model.batch) for name in names}


# The works


def gpt(**options: Any) -> Model:
    return models.blocks(6, 512, 2048, heads=HEADS, **{"batch": 4, "time": 128} | options)


def linen_attention() -> Model:
    import library_models  # needs flax

    return library_models.linen_attention(heads=HEADS)


def flax_gpt2() -> Model:
    import library_models  # needs transformers

    return library_models.flax_gpt2()


def training(model: Callable[[], Model], rank: int, beside: Any = bounds) -> Work:
    return Work(model, rank, step, beside)


WORKS = {
    "GPT": training(gpt, 16, bounds_of_blocks),
    "GPT, scan + remat": training(lambda: gpt(scan=True, remat=True), 16, bounds_of_blocks),
    "MLP": training(lambda: models.mlp((1000,) * 31, batch=256), 64),
    "FlaxGPT2": training(flax_gpt2, 16),
    "Linen attention": training(linen_attention, 16),
    "convnet": training(lambda: models.convnet(32, 32, 64), 8),
    "tied embedding": training(lambda: models.tied(8000, 256, 1024, 4, 128), 16),
    "experts": training(lambda: models.experts(capacity=CAPACITY), 16),
    "one token": Work(lambda: models.decoding(heads=HEADS), 16, forward, without_adapters),
    "8 adapters": Work(lambda: gpt(batch=1, time=16), 16, at_once, one_after_another),
}
