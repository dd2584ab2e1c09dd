"""Kinds of adapters and dropout on a mesh: factors are sharded like their base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import (
    Axes,
    DoraSpec,
    FrozenWeight,
    IA3Spec,
    LoraSpec,
    OftSpec,
    init_lora,
    lora,
    merge_params,
    testing,
    with_dropout,
)

STACK = Axes((0,), (1,), (2,))
KINDS = {
    "lora": LoraSpec(2, alpha=4),
    "dora": DoraSpec(LoraSpec(2, alpha=4)),
    "dora-with-gradient": DoraSpec(2, detached=False),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "oft": OftSpec(4),
    "oft-out": OftSpec(4, "out"),
}
SHAPES = {"up": (3, 16, 32), "down": (3, 32, 16)}
SHARDED = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}


def model(params, x, explicit=False):
    """Tensor-parallel layers whose weights are also sharded over the data axis."""

    def layer(x, weights):
        up, down = weights
        if explicit:
            hidden = jnp.einsum("bi,io->bo", x, up, out_sharding=P("data", "model"))
            return jnp.einsum("bo,oi->bi", jnp.tanh(hidden), down, out_sharding=P("data")), None
        return jnp.tanh(x @ up) @ down, None

    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_kind_equals_merged_model(kind, axis_type):
    explicit = axis_type is AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0)), strict=True))
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(
                jax.random.normal(keys[name], shape), NamedSharding(mesh, SHARDED[name])
            )
            for name, shape in SHAPES.items()
        }
        x = jax.device_put(
            jax.random.normal(jax.random.key(1), (8, 16)), NamedSharding(mesh, P("data"))
        )
        spec = dict.fromkeys(params, KINDS[kind].with_axes(STACK))
        frozen, tunable = init_lora(params, spec, jax.random.key(2))
        for name, weight in tunable.items():
            layout = weight.layout(SHAPES[name])
            leaf = frozen[name]
            frozen_factors = leaf.factors if isinstance(leaf, FrozenWeight) else {}
            for factor, array in {**weight.factors(), **frozen_factors}.items():
                axes = map(layout.axis_of, {**layout.factors, **layout.frozen}[factor])
                expected = P(*(None if d is None else SHARDED[name][d] for d in axes))
                assert array.sharding.is_equivalent_to(NamedSharding(mesh, expected), array.ndim)
        tunable = testing.random_factors(tunable, jax.random.key(3))
        adapted = lora(model, on_materialize="error")

        def split(tunable):
            return (adapted((frozen, tunable), x, explicit) ** 2).sum()

        def merged(tunable):
            return (model(merge_params(frozen, tunable), x, explicit) ** 2).sum()

        def dropped(tunable):
            tunable = with_dropout(tunable, jax.random.key(4), 0.5)
            return (adapted((frozen, tunable), x, explicit) ** 2).sum()

        actual, expected = (jax.jit(jax.value_and_grad(f))(tunable) for f in (split, merged))
        for leaf, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=2e-3, atol=2e-4 * np.abs(wanted).max())
        differs = abs(jax.jit(dropped)(tunable) - actual[0]) > 1e-3 * abs(actual[0])
        assert bool(differs) == (not kind.startswith(("ia3", "oft")))
