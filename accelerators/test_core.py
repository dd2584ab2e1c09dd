"""Programs of the transform, compiled for chips that are not here, beside hand-written LoRA."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import llama
import models
from compiling import compiled, on_mesh
from programs import Model, programs
from ways import ByHand


class Case(NamedTuple):
    """A model of the benchmarks, and the batch of one device."""

    make: Callable[[], models.Model]
    batch: tuple[int, ...]
    peak: float = 1.0  # see `prove`


# No activation has as many entries as a weight. The number of tokens is a power of two: of others,
# XLA cannot always compile the gradient of a narrow product for a GPU (JAX 0.10.2).
CASES = {
    "blocks": Case(lambda: models.blocks(3), (2, 32, 128)),
    "blocks, scanned": Case(lambda: models.blocks(scan=True, remat=True), (2, 32, 128)),
    "MLP": Case(models.mlp, (64, 128)),
    # Its grouped convolutions have another form than the hand-written ones: on a TPU v5e they take
    # 1.026 of the bytes.
    "convnet": Case(models.convnet, (1, 14, 14, 16), peak=1.03),
    "tied embedding": Case(models.tied, (2, 32)),
}
EVERYWHERE = P(("data", "model"))


@pytest.mark.parametrize("name", CASES)
def test_models(mesh, report, name):
    """Each device has all weights and a part of the batch."""
    case = CASES[name]
    made = case.make()
    first, *rest = case.batch
    batch = jax.ShapeDtypeStruct((mesh.size * first, *rest), made.batch.dtype)
    model = Model(
        plain=made.apply,
        by_hand=made.written(ByHand()),
        loss=lambda out, _: jnp.mean(out**2),
        params=on_mesh(mesh, made.params, lambda _: P()),
        batch=on_mesh(mesh, batch, lambda _: EVERYWHERE),
        rank=8,
    )
    prove(mesh, name, model, report, case.peak)


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_a_language_model(mesh, report, layout):
    prove(mesh, f"Llama, {layout}", small_llama(mesh, layout), report)


@pytest.mark.every_target
def test_a_language_model_that_is_fully_sharded(mesh, report):
    prove(mesh, "Llama, fully sharded", small_llama(mesh, "fully sharded"), report)


def small_llama(mesh, layout: str) -> Model:
    return llama.on(mesh, llama.SMALL, layout, batch=(2 * mesh.size, 32), rank=8)


def prove(mesh, name: str, model: Model, report, peak: float = 1.0) -> None:
    """Ours does not need more than hand-written LoRA, and builds no weight.

    `peak` is the most bytes that it may need at once, as a multiple of those of hand-written LoRA.
    """
    for program in programs(mesh, model):
        ours, theirs = compiled(*program.ours), compiled(*program.by_hand)
        report(f"{name}: {program.name}", ours, theirs)
        plain = theirs if program.plain is None else compiled(*program.plain)
        for size in program.sizes:
            assert ours.arrays[size] <= plain.arrays[size], f"{program.name}: {size} entries"
        assert ours.collectives <= theirs.collectives, program.name
        assert ours.arguments <= theirs.arguments, program.name
        assert ours.peak <= peak * theirs.peak, program.name
        assert (ours.flops or 0) <= (theirs.flops or 0), program.name
