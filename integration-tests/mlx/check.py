"""Checks that mlx-lm and lorax-io read each other's folders, with equal outputs."""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

import lorax
from lorax_io import Linear, load_any, save_mlx

KEYS = ["self_attn.q_proj", "mlp.down_proj"]
LAYERS, RANK = 2, 4
numbers = np.random.default_rng(0)


def make_model():
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=LAYERS,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=64,
            tie_word_embeddings=False,
        )
    )
    mx.eval(model.parameters())
    return model


def outputs(model):
    return np.array(model(mx.array([[1, 5, 9, 2, 7]])))


def weights(model):
    """The parameters in JAX's order of axes, and their PyTorch names."""
    arrays = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    modules = [f"model.layers.{k}.{key}" for k in range(LAYERS) for key in KEYS]
    params = {module: jnp.asarray(arrays[f"{module}.weight"].T) for module in modules}
    return params, {module: Linear(module) for module in modules}


def merged_outputs(pair):
    """The outputs of mlx's model with weights merged by the core."""
    model = make_model()
    merged = lorax.merge_params(pair)
    model.load_weights(
        [(f"{name}.weight", mx.array(np.asarray(x).T)) for name, x in merged.items()],
        strict=False,
    )
    return outputs(model)


def check_close(actual, expected, base, label):
    error = np.abs(actual - expected).max() / np.abs(expected - base).max()
    assert error < 1e-4, f"{label}: differs by {error}"
    print(f"{label}: error {error:.1e}, relative to the change by the adapter")


def check_ours(home, scaling):
    params, names = weights(make_model())
    spec = {name: lorax.LoraSpec(RANK, 6.0, scaling) for name in params}

    random = jax.nn.initializers.normal(0.1)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1), b_init=random)
    save_mlx(home, tunable, names)
    model = load_adapters(make_model(), str(home))
    actual, base = outputs(model), outputs(make_model())
    check_close(actual, merged_outputs(lorax.Pair(frozen, tunable)), base, f"ours, {scaling}")


def check_theirs(home, dora):
    params, names = weights(make_model())
    model = make_model()
    settings = {"rank": RANK, "scale": 2.5, "dropout": 0.0, "keys": KEYS}
    model.freeze()
    linear_to_lora_layers(model, LAYERS, settings, use_dora=dora)
    random = [
        (name, mx.array(numbers.normal(0.5, 0.1, array.shape).astype(np.float32)))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(random, strict=False)
    home.mkdir()
    mx.save_safetensors(str(home / "adapters.safetensors"), dict(random))
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": LAYERS, "lora_parameters": settings}
    (home / "adapter_config.json").write_text(json.dumps(config))
    pair = load_any(home, params, names)
    base = outputs(make_model())
    check_close(merged_outputs(pair), outputs(model), base, f"theirs, {kind}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for scaling in ("standard", "rslora"):
            check_ours(home / scaling, scaling)
        for dora in (False, True):
            check_theirs(home / f"theirs {dora}", dora)
    return 0


if __name__ == "__main__":
    sys.exit(main())
