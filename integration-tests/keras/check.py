"""Checks that KerasHub and lorax-io read each other's files, with equal outputs."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from keras_hub.models import LlamaBackbone

import lorax
from lorax_io import Linear, load_any, open_adapter, save_keras

AXES = {"in_axes": (0, 1), "out_axes": (2,)}
RANK = 3
TOKENS = {
    "token_ids": np.arange(10).reshape(2, 5),
    "padding_mask": np.ones((2, 5), np.int32),
}


def make_backbone():
    return LlamaBackbone(
        vocabulary_size=31,
        num_layers=2,
        num_query_heads=4,
        hidden_dim=16,
        intermediate_dim=24,
        num_key_value_heads=2,
    )


def layers_of(backbone):
    """The layers with weights, in the order of their numbers in a file."""
    return [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]


def outputs(backbone):
    return np.asarray(backbone(TOKENS))


def copy_of(backbone):
    other = make_backbone()
    other.set_weights(backbone.get_weights())
    return other


def assert_close(actual, expected):
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


base = make_backbone()
adapted = copy_of(base)
adapted.enable_lora(RANK)
numbers = np.random.default_rng(0)
for weight in adapted.trainable_weights:
    weight.assign(numbers.normal(0, 0.2, weight.shape))
home = Path(tempfile.mkdtemp())
adapted.save_lora_weights(home / "theirs.lora.h5")
expected = outputs(adapted)
assert np.abs(expected - outputs(base)).max() > 1e-2 * np.abs(expected).max()

adapter = open_adapter(home / "theirs.lora.h5")
indices = sorted(int(name.module) for name in adapter.names.values())
assert indices == sorted(adapted._lora_enabled_layers)
kernels = {str(k): layers_of(base)[k].kernel for k in indices}
params = {name: jnp.asarray(kernel) for name, kernel in kernels.items()}
names = {name: Linear(name, **AXES) for name in params}
pair = load_any(home / "theirs.lora.h5", params, names)
assert {(row.rank, row.scale) for row in pair.tunable.values()} == {(RANK, 1)}

merged = copy_of(base)
for name, weight in lorax.merge_params(pair).items():
    layers_of(merged)[int(name)].kernel.assign(weight)
assert_close(outputs(merged), expected)

# A layer as a function of its kernel, without materializing the merged kernel.
name = str(indices[0])
x = jnp.asarray(numbers.normal(size=(2, 5, 16)), jnp.float32)
equation = layers_of(base)[indices[0]].equation


def layer(kernel, x):
    return jnp.einsum(equation, x, kernel)


output = lorax.lora(layer)((pair.frozen[name], pair.tunable[name]), x)
assert_close(output, layer(lorax.merge_params(pair)[name], x))

save_keras(home / "ours.lora.h5", pair.tunable, names)
reloaded = copy_of(base)
reloaded.load_lora_weights(home / "ours.lora.h5")
assert_close(outputs(reloaded), expected)
print("KerasHub reads what lorax-io writes, and lorax-io what KerasHub writes")
