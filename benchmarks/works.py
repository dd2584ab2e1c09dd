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
from ways import ByHand, Flat

ADAPTERS = 8  # of one batch


class Program(NamedTuple):
    """A function with the arguments of each of its calls, one after the other."""

    fn: Callable[..., Any]
    calls: list[tuple[Any, ...]]
    loss: Callable[..., Any] | None = None  # what it differentiates by its first argument


class Work(NamedTuple):
    """A model, the rank of its adapters, and which programs are made of it."""

    model: Callable[[], Model]
    rank: int
    programs: Callable[[Model, Adapted], dict[str, Program]]
    peers: bool = True


def training(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Steps. The floor trains nothing: the plain model's loss, its gradient, down to the input."""

    def step(apply, factors, params):
        trained = train(apply)
        return Program(trained.step, [(start(factors), params, model.batch)], trained.loss)

    plain = lambda params, _, x: model.apply(params, x)  # noqa: E731
    by_hand = step(model.written(ByHand()), adapted.factors, model.params)
    return {
        "ours": step(adapted.ours, adapted.tunable, adapted.frozen),
        "by hand": by_hand,
        "by hand again": by_hand,
        "by hand, flat": step(model.written(Flat()), adapted.factors, model.params),
        "floor": Program(*floor(model)),
        "full fine-tuning": step(plain, model.params, None),
    }


def inference(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Forward passes: with adapters, merged into the weights, and without."""
    batch, params = model.batch, model.params
    merged = lorax.merge_params(adapted.frozen, adapted.tunable)
    by_hand = Program(model.written(ByHand()), [(adapted.factors, params, batch)])
    flat = model.written(Flat())
    return {
        "ours": Program(adapted.ours, [(adapted.tunable, adapted.frozen, batch)]),
        "by hand": by_hand,
        "by hand again": by_hand,
        "by hand, flat": Program(flat, [(adapted.factors, params, batch)]),
        "merged": Program(model.apply, [(merged, batch)]),
        "base": Program(model.apply, [(params, batch)]),
    }


def many_adapters(model: Model, adapted: Adapted) -> dict[str, Program]:
    """A step of several adapters of one base, each on examples of its own: at once, or in turn."""

    def scaled(factors, k):
        return jax.tree.map(lambda leaf: (1 + k / ADAPTERS) * leaf, factors)

    def both(apply, factors, params):
        trained = train(apply)
        states = [start(scaled(factors, k)) for k in range(ADAPTERS)]
        batches = [(1 + k / ADAPTERS) * model.batch for k in range(ADAPTERS)]
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
        over = {"in_axes": (0, None, 0)}
        at_once = Program(
            jax.vmap(trained.step, **over),
            [(stack(states), params, stack(batches))],
            lambda *args: jax.vmap(trained.loss, **over)(*args).sum(),
        )
        in_turn = [(state, params, batch) for state, batch in zip(states, batches, strict=True)]
        return at_once, Program(trained.step, in_turn, trained.loss)

    ours, ours_in_turn = both(adapted.ours, adapted.tunable, adapted.frozen)
    by_hand, by_hand_in_turn = both(model.written(ByHand()), adapted.factors, model.params)
    flat, _ = both(model.written(Flat()), adapted.factors, model.params)
    return {
        "ours": ours,
        "by hand": by_hand,
        "by hand again": by_hand,
        "by hand, flat": flat,
        "ours, in turn": ours_in_turn,
        "by hand, in turn": by_hand_in_turn,
    }


def gpt(**options: Any) -> Model:
    return models.blocks(6, 512, 2048, heads=8, **{"batch": 4, "time": 128} | options)


def linen_attention() -> Model:
    import library_models  # needs flax

    return library_models.linen_attention()


def flax_gpt2() -> Model:
    import library_models  # needs transformers

    return library_models.flax_gpt2()


WORKS = {
    "GPT": Work(gpt, 16, training),
    "GPT, scan + remat": Work(lambda: gpt(scan=True, remat=True), 16, training),
    "MLP": Work(lambda: models.mlp((1000,) * 31, batch=256), 64, training),
    "FlaxGPT2": Work(flax_gpt2, 16, training),
    "Linen attention": Work(linen_attention, 16, training),
    "convnet": Work(lambda: models.convnet(32, 32, 64), 8, training),
    "tied embedding": Work(lambda: models.tied(8000, 256, 1024, 4, 128), 16, training),
    "experts": Work(models.experts, 16, training),
    "one token": Work(models.decoding, 16, inference, peers=False),
    "8 adapters": Work(lambda: gpt(batch=1, time=16), 16, many_adapters, peers=False),
}
