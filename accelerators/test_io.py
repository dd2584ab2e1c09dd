"""Programs on adapters that were read from a file, compiled without a device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import lorax
import lorax_io
from compiling import compiled, on_mesh
from lorax.testing import random_factors

WIDTH, HIDDEN, TOKENS = 320, 896, 64


def model(params, x):
    return jax.nn.gelu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def native(folder, tunable, params):
    lorax_io.save_adapter(folder / "adapter.safetensors", tunable)
    return lorax_io.load_adapter(folder / "adapter.safetensors", params=params)


def peft(folder, tunable, params):
    names = lorax_io.flax_names(params)
    lorax_io.save_peft(folder, tunable, names)
    return lorax_io.load_peft(folder, params, names)[1]


@pytest.mark.parametrize("roundtrip", [native, peft])
def test_loaded_adapter_gives_the_same_program(mesh, report, tmp_path, roundtrip):
    params = {
        "up": {"kernel": jnp.ones((WIDTH, HIDDEN))},
        "down": {"kernel": jnp.ones((HIDDEN, WIDTH))},
    }
    frozen, tunable = lorax.init_lora(
        params, {"up": {"kernel": 8}, "down": {"kernel": 4}}, jax.random.key(0)
    )
    loaded = roundtrip(tmp_path, random_factors(tunable, jax.random.key(1)), params)

    def adapted(tunable, frozen, x):
        return lorax.lora(model, on_materialize="error")((frozen, tunable), x)

    x = jax.ShapeDtypeStruct((mesh.size * TOKENS, WIDTH), jnp.float32)
    x = on_mesh(mesh, x, lambda _: P(("data", "model")))
    trees = [on_mesh(mesh, tree, lambda _: P()) for tree in (tunable, loaded, frozen, params)]
    before, after = (compiled(adapted, tree, trees[2], x) for tree in trees[:2])
    report(f"{roundtrip.__name__} file: forward", after, before)
    assert after == before
    base = compiled(model, trees[3], x)
    assert after.arrays[WIDTH * HIDDEN] <= base.arrays[WIDTH * HIDDEN]
