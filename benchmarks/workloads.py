"""The timed workloads: models, their sizes, and the LoRA implementations that are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorax
import models
from adapted import Adapted
from layer_ops import FlatLoraOps, FusedLoraOps, LoraOps
from models import Model
from steps import floor, start, train

ADAPTERS = 8  # of one base
HEADS = 8
CAPACITY = 96  # rows of an expert


class Lora(NamedTuple):
    """A model with LoRA, by any implementation."""

    apply: Callable[[Any, Any, Any], Any]  # (factors, frozen, batch) -> output
    factors: Any
    frozen: Any


class Program(NamedTuple):
    """A function, and the arguments of each of its consecutive calls."""

    fn: Callable[..., Any]
    calls: list[tuple[Any, ...]]
    loss: Callable[..., Any] | None = None  # differentiated with respect to its first argument


class Workload(NamedTuple):
    """A model, the rank of its adapters, and the programs that run it."""

    model: Callable[[], Model]
    rank: int
    program: Callable[[Lora, Any], Program]  # the same for every implementation, on a batch
    baselines: Callable[[Model, Adapted], dict[str, Program]]

    def programs(self, model: Model, adapted: Adapted) -> dict[str, Program]:
        """Every program that does not need another library."""
        made = {
            name: self.program(lora, model.batch)
            for name, lora in implementations(model, adapted).items()
        }
        again = {"hand-written again": made["hand-written"]}
        return made | again | self.baselines(model, adapted)


def implementations(model: Model, adapted: Adapted) -> dict[str, Lora]:
    """LoRA by `lora`, and hand-written in two forms."""
    return {
        "ours": Lora(adapted.apply, adapted.tunable, adapted.frozen),
        "hand-written": Lora(model.with_ops(LoraOps()), adapted.factors, model.params),
        "hand-written, flat": Lora(model.with_ops(FlatLoraOps()), adapted.factors, model.params),
    }


# Programs


def step(lora: Lora, batch: Any) -> Program:
    """One training step."""
    trained = train(lora.apply)
    return Program(trained.step, [(start(lora.factors), lora.frozen, batch)], trained.loss)


def forward(lora: Lora, batch: Any) -> Program:
    """The forward pass."""
    return Program(lora.apply, [(lora.factors, lora.frozen, batch)])


def scaled(tree: Any, k: int) -> Any:
    """The factors or examples of the k-th of several adapters."""
    return jax.tree.map(lambda leaf: (1 + k / ADAPTERS) * leaf, tree)


def in_turn(lora: Lora, batch: Any) -> Program:
    """One training step for each of several adapters, each on its own examples."""
    trained = train(lora.apply)
    calls = [
        (start(scaled(lora.factors, k)), lora.frozen, scaled(batch, k)) for k in range(ADAPTERS)
    ]
    return Program(trained.step, calls, trained.loss)


def at_once(lora: Lora, batch: Any) -> Program:
    """The same steps in one call."""
    trained = train(lora.apply)
    states, _, batches = zip(*in_turn(lora, batch).calls, strict=True)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    axes = {"in_axes": (0, None, 0)}
    return Program(
        jax.vmap(trained.step, **axes),
        [(stack(states), lora.frozen, stack(batches))],
        lambda *args: jax.vmap(trained.loss, **axes)(*args).sum(),
    )


# Baselines


def bounds(model: Model, adapted: Adapted) -> dict[str, Program]:
    """The lower bound, and full fine-tuning."""
    plain = Lora(lambda params, _, batch: model.apply(params, batch), model.params, None)
    return {"floor": Program(*floor(model)), "full fine-tuning": step(plain, model.batch)}


def bounds_of_blocks(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Also hand-written LoRA with the `a` of q, k and v concatenated."""
    fused = Lora(model.with_ops(FusedLoraOps()), adapted.factors, model.params)
    return bounds(model, adapted) | {"hand-written, q|k|v": step(fused, model.batch)}


def without_adapters(model: Model, adapted: Adapted) -> dict[str, Program]:
    """The merged model, and the base without adapters."""
    merged = lorax.merge_params(adapted.frozen, adapted.tunable)
    return {
        "merged": Program(model.apply, [(merged, model.batch)]),
        "base": Program(model.apply, [(model.params, model.batch)]),
    }


def one_after_another(model: Model, adapted: Adapted) -> dict[str, Program]:
    """Several adapters, one call for each."""
    loras = implementations(model, adapted)
    names = ("ours", "hand-written")
    return {f"{name}, in turn": in_turn(loras[name], model.batch) for name in names}


# Workloads


def gpt(**options: Any) -> Model:
    return models.blocks(6, 512, 2048, heads=HEADS, **{"batch": 4, "time": 128} | options)


def linen_attention() -> Model:
    import library_models  # needs flax

    return library_models.linen_attention(heads=HEADS)


def flax_gpt2() -> Model:
    import library_models  # needs transformers

    return library_models.flax_gpt2()


def training(model: Callable[[], Model], rank: int, baselines: Any = bounds) -> Workload:
    return Workload(model, rank, step, baselines)


WORKLOADS = {
    "GPT": training(gpt, 16, bounds_of_blocks),
    "GPT, scan + remat": training(lambda: gpt(scan=True, remat=True), 16, bounds_of_blocks),
    "MLP": training(lambda: models.mlp((1000,) * 31, batch=256), 64),
    "FlaxGPT2": training(flax_gpt2, 16),
    "Linen attention": training(linen_attention, 16),
    "convnet": training(lambda: models.convnet(32, 32, 64), 8),
    "tied embedding": training(lambda: models.tied(8000, 256, 1024, 4, 128), 16),
    "experts": training(lambda: models.experts(capacity=CAPACITY), 16),
    "one token": Workload(lambda: models.decoding(heads=HEADS), 16, forward, without_adapters),
    "8 adapters": Workload(lambda: gpt(batch=1, time=16), 16, at_once, one_after_another),
}
