"""Checks that tunix and lorax-io read each other's checkpoints, with equal outputs."""

import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
import safetensors.numpy
from flax import nnx
from tunix.models import safetensors_saver
from tunix.models.gemma import model as gemma
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.checkpoint_manager import CheckpointManager

import lorax
from lorax_io import load_any, open_adapter, save_tunix
from lorax_io._command import main

RANK, ALPHA, LENGTH = 3, 7.0, 5
LLAMA = llama.ModelConfig(
    num_layers=2,
    vocab_size=32,
    embed_dim=20,
    hidden_dim=24,
    num_heads=4,
    head_dim=6,
    num_kv_heads=2,
    rope_theta=10000,
    norm_eps=1e-5,
)
GEMMA = gemma.ModelConfig(
    num_layers=2,
    num_embed=32,
    embed_dim=20,
    hidden_dim=24,
    num_heads=4,
    head_dim=6,
    num_kv_heads=2,
    final_logit_softcap=None,
    attention_types=(gemma.AttentionType.GLOBAL,) * 2,
    use_post_attn_norm=False,
    use_post_ffw_norm=False,
)
TARGETS = {
    "llama": r".*(q_proj|k_proj|o_proj|gate_proj|down_proj)",
    "gemma": r".*(q_einsum|kv_einsum|attn_vec_einsum|gate_proj|down_proj)",
}
numbers = np.random.default_rng(0)


def inputs(model):
    tokens = jnp.asarray(np.arange(LENGTH)[None] * 5 % 31)
    positions = jnp.arange(LENGTH)[None]
    mask = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    return tokens, positions, None, mask


def outputs(model):
    return np.asarray(model(*inputs(model))[0])


def adapted(model, target):
    tokens, positions, cache, mask = inputs(model)
    provider = qwix.LoraProvider(module_path=target, rank=RANK, alpha=ALPHA)
    options = {"positions": positions, "cache": cache, "attention_mask": mask}
    return qwix.apply_lora_to_model(model, provider, tokens, rngs=nnx.Rngs(1), **options)


def randomize(model):
    state = nnx.state(model, nnx.LoRAParam)
    draw = lambda x: jnp.asarray(numbers.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, state))


def save(folder, model):
    manager = CheckpointManager(folder, ocp.CheckpointManagerOptions())
    assert manager.save(7, model, save_only_lora_params=True, force=True)
    manager.close()


def restore(folder, model):
    manager = CheckpointManager(folder, ocp.CheckpointManagerOptions())
    step, _ = manager.maybe_restore(model, restore_only_lora_params=True)
    manager.close()
    return step


def check_close(actual, expected, base, label):
    error = np.abs(actual - expected).max() / np.abs(expected - base).max()
    assert error < 1e-4, f"{label}: differs by {error}"
    print(f"{label}: error {error:.1e}, relative to the change by the adapter")


def check_model(name, make, home):
    base, tunix_model = make(), adapted(make(), TARGETS[name])
    randomize(tunix_model)
    save(home / name, tunix_model)
    expected, without = outputs(tunix_model), outputs(base)

    params = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    pair = load_any(home / name, params, alpha=ALPHA)
    merged = make()
    state = nnx.state(merged, nnx.Param)
    nnx.replace_by_pure_dict(state, lorax.merge_params(pair))
    nnx.update(merged, state)
    check_close(outputs(merged), expected, without, f"{name}, theirs read by us")

    save_tunix(home / f"{name} again", pair.tunable, step=3)
    reloaded = adapted(make(), TARGETS[name])
    assert restore(home / f"{name} again", reloaded) == 3
    check_close(outputs(reloaded), expected, without, f"{name}, ours read by them")
    assert {row.scale for row in open_adapter(home / f"{name} again").rows.values()} == {
        ALPHA / RANK
    }
    return tunix_model


def check_merge(tunix_model, weights, home):
    """Checks that `lorax convert` and `lorax merge` write the same files as tunix's merge."""
    # tunix passes JAX arrays to safetensors, which version 0.8 does not accept.
    safetensors_saver.safe_np = types.SimpleNamespace(
        load_file=safetensors.numpy.load_file,
        save_file=lambda tensors, path: safetensors.numpy.save_file(
            {name: np.ascontiguousarray(x) for name, x in tensors.items()}, path
        ),
    )
    safetensors_saver.save_lora_merged_model_as_safetensors(
        local_model_path=str(weights),
        output_dir=str(home / "theirs merged"),
        lora_model=tunix_model,
        rank=RANK,
        alpha=ALPHA,
        state_key_transform_fn=lambda path: f"model.{path.replace('.attn.', '.self_attn.')}.weight",
        transpose_rules={"_proj": (1, 0)},
    )
    adapter = str(home / "llama")
    rename = ["--rename", r"^layers\.(\d+)\.attn", r"model.layers.\1.self_attn"]
    rename += ["--rename", r"^layers\.", "model.layers."]
    base = ["--base", str(weights)]
    for line in (
        ["merge", adapter, *base, "--out", str(home / "merged"), "--alpha", "7", *rename],
        ["convert", adapter, str(home / "peft"), "--to", "peft", "--alpha", "7", *rename],
        ["merge", str(home / "peft"), *base, "--out", str(home / "merged from peft")],
    ):
        assert main(line) == 0, line
    read = lambda name: safetensors.numpy.load_file(home / name / "model.safetensors")  # noqa: E731
    expected, before = (
        read("theirs merged"),
        safetensors.numpy.load_file(weights / "model.safetensors"),
    )
    for name in ("merged", "merged from peft"):
        merged = read(name)
        assert merged.keys() == expected.keys()
        changed = [key for key in expected if (expected[key] != before[key]).any()]
        assert len(changed) == 10
        for key, tensor in expected.items():
            np.testing.assert_allclose(merged[key], tensor, rtol=0, atol=1e-5)
    print(f"{len(changed)} of {len(expected)} tensors merged, equal to tunix's")


def write_weights(folder):
    """Writes Llama weights with transformers' names, which tunix reads."""
    folder.mkdir()
    model = llama.Llama3(LLAMA, rngs=nnx.Rngs(0))
    tensors = {}
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path[:-1])).replace(".attn.", ".self_attn.")
        array = numbers.normal(0, 0.3, x.shape).astype(np.float32)
        if name == "embedder":
            tensors["model.embed_tokens.weight"] = array
        elif name in ("lm_head", "final_norm"):
            key = {"lm_head": "lm_head", "final_norm": "model.norm"}[name]
            tensors[f"{key}.weight"] = np.ascontiguousarray(array.T)
        else:
            rows = array.shape[0] * array.shape[1] if name.endswith("o_proj") else array.shape[0]
            flat = array if array.ndim == 1 else array.reshape(rows, -1).T
            tensors[f"model.{name}.weight"] = np.ascontiguousarray(flat)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')


with tempfile.TemporaryDirectory() as temporary:
    home = Path(temporary)
    write_weights(home / "weights")
    make_llama = lambda: create_model_from_safe_tensors(str(home / "weights"), LLAMA)  # noqa: E731
    tunix_model = check_model("llama", make_llama, home)
    check_model("gemma", lambda: gemma.Gemma(GEMMA, rngs=nnx.Rngs(0)), home)
    check_merge(tunix_model, home / "weights", home)  # last, since the command enables 64-bit types
