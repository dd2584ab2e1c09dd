"""Programs of the transform, compiled without a device, compared with hand-written LoRA."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import llama
import models
from compiling import compiled, on_mesh
from layer_ops import LoraOps
from programs import Model, programs


class Case(NamedTuple):
    """A model of the benchmarks, and the batch size of one device."""

    make: Callable[[], models.Model]
    batch: tuple[int, ...]
    peak: float = 1.0  # see `check_programs`


# No activation has as many entries as a weight. The number of tokens is a power of two: for other
# numbers, XLA cannot always compile the gradient of a narrow product for a GPU (JAX 0.10.2).
CASES = {
    "blocks": Case(lambda: models.blocks(3), (2, 32, 128)),
    "blocks, scanned": Case(lambda: models.blocks(scan=True, remat=True), (2, 32, 128)),
    "MLP": Case(models.mlp, (64, 128)),
    # Its grouped convolutions have another form than the hand-written ones. On a TPU v5e they need
    # 1.026 times the bytes.
    "convnet": Case(models.convnet, (1, 14, 14, 16), peak=1.03),
    "tied embedding": Case(models.tied, (2, 32)),
}
EVERYWHERE = P(("data", "model"))


@pytest.mark.parametrize("name", CASES)
def test_models_cost_no_more_than_hand_written(mesh, report, name):
    """Each device has all weights and a part of the batch."""
    case = CASES[name]
    made = case.make()
    first, *rest = case.batch
    batch = jax.ShapeDtypeStruct((mesh.size * first, *rest), made.batch.dtype)
    model = Model(
        plain=made.apply,
        hand_written=made.with_ops(LoraOps()),
        loss=lambda out, _: jnp.mean(out**2),
        params=on_mesh(mesh, made.params, lambda _: P()),
        batch=on_mesh(mesh, batch, lambda _: EVERYWHERE),
        rank=8,
    )
    check_programs(mesh, name, model, report, case.peak)


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_llama_costs_no_more_than_hand_written(mesh, report, layout):
    check_programs(mesh, f"Llama, {layout}", small_llama(mesh, layout), report)


@pytest.mark.every_target
def test_fully_sharded_llama_costs_no_more_than_hand_written(mesh, report):
    check_programs(mesh, "Llama, fully sharded", small_llama(mesh, "fully sharded"), report)


def small_llama(mesh, layout: str) -> Model:
    return llama.on(mesh, llama.SMALL, layout, batch=(2 * mesh.size, 32), rank=8)


def check_programs(mesh, name: str, model: Model, report, peak: float = 1.0) -> None:
    """Ours costs at most as much as hand-written LoRA, and creates no weight-sized array.

    `peak` is the largest allowed ratio of peak bytes.
    """
    for program in programs(mesh, model):
        ours, written = compiled(*program.ours), compiled(*program.hand_written)
        report(f"{name}: {program.name}", ours, written)
        plain = written if program.plain is None else compiled(*program.plain)
        for size in program.sizes:
            assert ours.arrays[size] <= plain.arrays[size], f"{program.name}: {size} entries"
        assert ours.collectives <= written.collectives, program.name
        assert ours.arguments <= written.arguments, program.name
        assert ours.peak <= peak * written.peak, program.name
        assert (ours.flops or 0) <= (written.flops or 0), program.name
