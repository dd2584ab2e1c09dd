"""`load_base`: trees, shapes, shardings, memory, and invalid files.

`integration-tests/peft/test_bases.py` tests with each library that its codes are decoded bit for
bit. GGUF, whose library does not need PyTorch, is also tested in `_bases/test_gguf.py`.
"""

import json
import re
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax import QuantizedWeight, dequantize, init_lora, lora
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterWarning,
    Embedding,
    Experts,
    Linear,
    Tensor,
    load_base,
    load_frozen,
    save_frozen,
)

OUT, IN = 128, 64
draw = lambda *shape: np.random.default_rng(sum(shape)).normal(size=shape)  # noqa: E731


def fp8(out=OUT, inputs=IN, seed=0):
    codes = (draw(out, inputs) + seed).astype(jnp.float8_e4m3fn)
    scales = np.abs(draw(out, 1)).astype(np.float32) + 0.1
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales


def save(path, **modules):
    tensors = {f"{m}.{n}": x for m, parameters in modules.items() for n, x in parameters.items()}
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture
def file(tmp_path):
    norm = {"weight": draw(7).astype(np.float32)}
    path = save(tmp_path / "model.safetensors", up=fp8()[0], norm=norm, e=fp8(seed=1)[0])
    return path


NAMES: dict[str, Any] = {
    "mlp/up/kernel": Linear("up"),
    "mlp/norm/scale": Tensor("norm", parameter="weight"),
    "embed": Embedding("e"),
}


def test_load_base_returns_a_tree_by_path(file):
    loaded = load_base(file, NAMES)
    assert isinstance(loaded["mlp"]["up"]["kernel"], QuantizedWeight)
    assert loaded["mlp"]["norm"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(loaded)["mlp"]["up"]["kernel"].T, fp8()[1])
    np.testing.assert_array_equal(dequantize(loaded)["embed"], fp8(seed=1)[1])


def test_load_base_has_the_structure_of_params(file):
    params = {"mlp": [jnp.ones((IN, 4, OUT // 4))], "rest": None}
    with pytest.warns(
        AdapterWarning, match=r"that `names` does not contain: e.weight, e.weight_scale, norm"
    ):
        loaded = load_base(file, {"mlp/0": Linear("up", in_axes=[0])}, params=params)
    assert jax.tree.structure(loaded["rest"]) == jax.tree.structure(None)
    kernel = dequantize(loaded)["mlp"][0].reshape(IN, OUT)
    np.testing.assert_array_equal(kernel.T, fp8()[1])


def test_floats_are_unchanged(tmp_path):
    weight = draw(6, 5).astype(jnp.bfloat16)
    path = save(tmp_path / "f", up={"weight": weight})
    loaded = load_base(path, {"up": Linear("up")})["up"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.T, weight)


def test_layers_in_several_dtypes(tmp_path):
    dtypes = (np.float16, jnp.bfloat16)
    weights = [draw(6, 5).astype(dtype) for dtype in dtypes]
    layers: dict[str, Any] = {
        f"layers.{k}.up": {"weight": weight} for k, weight in enumerate(weights)
    }
    names = {"up": Linear("layers.{}.up", shared_axes=[0])}
    path = save(tmp_path / "f", **layers)
    with pytest.warns(AdapterWarning, match=r"`up` \(bfloat16 and float16, as float32\)"):
        loaded = load_base(path, names)["up"]
    for k, weight in enumerate(weights):
        np.testing.assert_array_equal(loaded[k].T, weight.astype(np.float32))
    layers["layers.0.up"] = {"bias": np.arange(5)}
    layers["layers.1.up"] = {"bias": np.ones(5, np.float32)}
    names = {"b": Tensor("layers.{}.up", shared_axes=[0], parameter="bias")}
    with pytest.raises(AdapterError, match="modules of `b` in float32 and int64, which have no"):
        load_base(save(tmp_path / "f", **layers), names)


def test_layers_are_stacked(tmp_path):
    layers = {f"layers.{k}.up": fp8(seed=k)[0] for k in range(3)}
    path = save(tmp_path / "f", **layers)
    loaded = load_base(path, {"up": Linear("layers.{}.up", shared_axes=[0])})["up"]
    assert loaded.shape == (3, IN, OUT) and loaded.arrays["scales"].shape == (3, OUT)
    for k in range(3):
        np.testing.assert_array_equal(dequantize(loaded)[k].T, fp8(seed=k)[1])


def test_numbers_in_a_name_select_layers(tmp_path):
    numbers = np.random.default_rng(0)
    layers = {f"layers.{k}.up": {"weight": numbers.normal(size=(7, 5))} for k in (1, 2, 3)}
    layers = {name: {"weight": x["weight"].astype(np.float32)} for name, x in layers.items()}
    file = save(tmp_path / "a.safetensors", **layers)
    names = {"up": Linear("layers.{}.up", shared_axes=(0,), numbers=(1, 3))}
    with pytest.warns(AdapterWarning, match=r"that `names` does not contain: layers.2.up.weight"):
        loaded = load_base(file, names)["up"]
    expected = np.stack([layers[f"layers.{k}.up"]["weight"].T for k in (1, 3)])
    np.testing.assert_array_equal(loaded, expected)


def test_experts_in_one_tensor_are_a_stack(tmp_path):
    codes = draw(3, OUT, IN).astype(jnp.float8_e4m3fn)
    scales = np.abs(draw(3, 1, 1)).astype(np.float32)
    path = save(tmp_path / "f", mlp={"up": codes, "up_scale_inv": scales})
    torch_name = Experts("mlp", parameter="up", shared_axes=[0], out_first=True)
    loaded = load_base(path, {"up": torch_name})["up"]
    expected = (codes.astype(np.float32) * scales).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(loaded).swapaxes(1, 2), expected)


def test_dtype_of_decoded_weights(file):
    loaded = load_base(file, NAMES, dtype=jnp.float16)["embed"]
    assert loaded.dtype == jnp.float16
    np.testing.assert_array_equal(dequantize(loaded), fp8(seed=1)[1].astype(np.float16))


def test_prefix_of_the_names_is_matched(tmp_path):
    path = save(tmp_path / "f", **{"language_model.up": fp8()[0]})
    np.testing.assert_array_equal(
        dequantize(load_base(path, {"up": Linear("up")}))["up"].T, fp8()[1]
    )


def floats(path, **values):
    return save(path, **{n: {"weight": np.full((4, 3), x, np.float32)} for n, x in values.items()})


PREFIXES: dict[str, tuple[dict[str, int], str]] = {
    "has no tensor for `vision.norm.weight`": ({"norm": 1, "vision.up": 2}, "vision.norm"),
    "whose prefixes differ in two ways": ({"vision.norm": 1, "text.up": 2}, "norm up"),
    "has one weight `a.norm.weight` for": ({"a.norm": 1}, "a.norm norm"),
}


@pytest.mark.parametrize("message", PREFIXES)
def test_modules_with_other_prefixes_are_not_mixed(tmp_path, message):
    values, names = PREFIXES[message]
    path = floats(tmp_path / "f", **values)
    with pytest.raises(AdapterMismatchError, match=message):
        load_base(path, {name: Linear(name) for name in names.split()})
    path = floats(tmp_path / "f", **{"model.norm": 1, "model.up": 2, "head": 3})
    loaded = load_base(path, {name: Linear(name) for name in ("norm", "up", "head")})
    assert [int(loaded[name][0, 0]) for name in ("norm", "up", "head")] == [1, 2, 3]
    path = floats(tmp_path / "f", norm=1, up=2)
    loaded = load_base(path, {name: Linear(f"model.{name}") for name in ("norm", "up")})
    assert [int(loaded[name][0, 0]) for name in ("norm", "up")] == [1, 2]


def test_files_of_a_folder_are_those_of_transformers(tmp_path):
    """A folder may have files of several saves."""

    def loaded():
        return int(load_base(tmp_path, {"up": Linear("up")})["up"][0, 0])

    for k, name in enumerate(["model", "shard", "other"]):
        floats(tmp_path / f"{name}.safetensors", up=k)
    index = {"weight_map": {"up.weight": "shard.safetensors"}}
    for stem in ("model", "diffusion_pytorch_model"):
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert loaded() == 0
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert loaded() == 2
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert loaded() == 1
    (tmp_path / "model.safetensors.index.json").unlink()
    floats(tmp_path / "diffusion_pytorch_model.safetensors", up=3)
    assert loaded() == 1


def test_weights_that_decode_to_infinity_raise(tmp_path):
    """Its codes and scales are finite."""
    codes = np.full((4, 64), 100, np.int8)
    up: dict[str, Any] = {"weight": codes, "weight_scale": np.full((4, 1), 700, np.float16)}
    path = save(tmp_path / "f", up=up)
    with pytest.raises(AdapterError, match="`up` that decode to infinity in float16"):
        load_base(path, {"up": Linear("up")})
    held = load_base(path, {"up": Linear("up")}, dtype=jnp.bfloat16)
    assert jnp.isfinite(dequantize(held)["up"]).all()
    up["weight_scale"][:] = 600
    held = load_base(save(path, up=up), {"up": Linear("up")})
    assert (dequantize(held)["up"] == 60000).all()
    experts: dict[str, Any] = {"up_blocks": np.full((2, 4, 1, 16), 0x77, np.uint8)}
    experts["up_scales"] = np.full((2, 4, 1), 127 + 14, np.uint8)
    path = save(tmp_path / "f", e=experts)
    names = {"up": Experts("e", parameter="up", shared_axes=[0])}
    params = {"up": jnp.ones((2, 32, 4))}
    with pytest.raises(AdapterError, match="`up` that decode to infinity in float16"):
        load_base(path, names, params=params, dtype=jnp.float16)
    assert jnp.isfinite(dequantize(load_base(path, names, params=params))["up"]).all()


# JAX 0.8 frees host memory that it has borrowed some time after the array is gone.
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="JAX 0.8 holds two weights at times")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_memory_is_limited_by_the_largest_tensor(tmp_path, dtype):
    side = 4096
    tensors: dict[str, Any] = {"weight": np.ones((side, side), dtype)}
    if dtype != jnp.bfloat16:
        tensors["weight_scale"] = np.ones((side, 1), np.float32)
    path = save(tmp_path / "f", a=tensors, b=tensors)
    names = {name: Linear(name) for name in "ab"}
    load_base(path, names)  # what is imported and traced stays
    tracemalloc.start()
    load_base(path, names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.1 * tensors["weight"].nbytes, peak / tensors["weight"].nbytes


def test_loaded_base_is_adapted_and_saved(file, tmp_path):
    frozen = load_base(file, NAMES)
    kernel = {"kernel": frozen["mlp"]["up"]["kernel"]}
    pair = init_lora(kernel, {"kernel": 2}, jax.random.key(0))
    x = jnp.ones((3, IN))
    out = lora(lambda p, x: x @ p["kernel"])(pair, x)
    np.testing.assert_allclose(out, x @ fp8()[1].T, rtol=1e-5)
    save_frozen(tmp_path / "frozen", frozen)
    reloaded = load_frozen(tmp_path / "frozen", like=frozen)
    assert jax.tree.structure(reloaded) == jax.tree.structure(frozen)


# Errors


def damaged(**changes):
    return {name: x for name, x in (fp8()[0] | changes).items() if x is not None}


NAN = np.full((OUT, 1), np.nan, np.float32)
BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "NaN": (damaged(weight_scale=NAN), {}, "`up/scales` holds NaN, inf"),
    "rows": (damaged(weight_scale=NAN[:3]), {}, r"`up.weight_scale` of shape \(3, 1\)"),
    "axes": (damaged(weight_scale=NAN[:, 0]), {}, r"`up.weight_scale` of shape \(128,\)"),
    "integers": (damaged(weight_scale=np.ones((OUT, 1), np.int8)), {}, "in int8, not floats"),
    "shape": ({"weight": np.ones((3, 4))}, {"params": {"up": jnp.ones((5, 3))}}, "takes"),
    "no weight": ({"weight_scale_inv": NAN}, {}, "lacks `up.weight`"),
    "cut blocks": (
        {"weight": fp8()[0]["weight"], "weight_scale_inv": NAN}, {},
        r"`up.weight_scale_inv` of shape \(128, 1\); \(1, 1\) would fit",
    ),
    "words": (
        {"qweight": np.ones((8, 64), np.int32), "scales": np.ones((1, 64), np.float16),
         "qzeros": np.ones((2, 8), np.int32)}, {}, "`up.scales`",
    ),
    "an uneven group": (
        {"qweight": np.ones((8, 64), np.int32), "scales": np.ones((2, 64), np.float16),
         "qzeros": np.ones((2, 8), np.int32), "g_idx": np.arange(64, dtype=np.int32)},
        {}, "a group without a scale in `up.g_idx`",
    ),
    "state": (
        {"weight": np.ones((8, 1), np.uint8), "weight.absmax": np.ones(1, np.float32),
         "weight.quant_map": np.ones(16, np.float32),
         "weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [4]}', np.uint8)},
        {}, "is not the state of a weight",
    ),
    "GPU's order": (
        {"weight": np.ones((4, 8), np.int8), "SCB": np.ones(4, np.float32),
         "weight_format": np.array(2, np.uint8)}, {}, "in the order of a GPU",
    ),
    "packed": (
        {"weight_packed": np.ones((4, 2), np.int32), "weight_scale": np.ones((4, 1), np.float32),
         "weight_shape": np.array([4, 99])}, {}, r"`up.weight_packed` \(4, 2\) for a weight of",
    ),
    "no groups": (
        {"weight_packed": np.ones((4, 0), np.uint8), "weight_scale": np.ones((4, 1), np.uint8)},
        {}, r"`up.weight_scale` of shape \(4, 1\) for a weight of \(4, 0\)",
    ),
    "one number that is zero": (
        {"weight_packed": np.ones((4, 8), np.uint8), "weight_scale": fp8(4, 1)[0]["weight"],
         "weight_global_scale": np.zeros(1, np.float32)}, {}, "`up/outer` holds .* zero that is",
    ),
    "scales of GPTQ in integers": (
        {"qweight": np.ones((8, 64), np.int32), "scales": np.ones((1, 64), np.uint8),
         "qzeros": np.ones((1, 8), np.int32)}, {}, "`up.scales` in uint8, not floats of 16 or 32",
    ),
    "scales of LLM.int8 in booleans": (
        {"weight": np.ones((4, 8), np.int8), "SCB": np.ones(4, bool)}, {}, "`up.SCB` in bool",
    ),
    "a state that is not JSON": (
        {"weight": np.ones((8, 1), np.uint8),
         "weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, {},
        "`up.weight.quant_state.bitsandbytes__nf4` is not the state of a weight",
    ),
    "EXL2": ({"q_weight": np.ones((4, 8), np.int32)}, {}, "as EXL2 .*, which is not supported"),
    "MLX": (
        {"weight": np.ones((4, 8), np.uint32), "scales": np.ones((4, 1), np.float32)}, {},
        "`up.weight` as MLX",
    ),
    "ComfyUI": (
        {"weight": fp8()[0]["weight"], "scale_weight": np.ones(1, np.float32)}, {}, "ComfyUI",
    ),
    "ModelOpt": (
        {"weight": np.ones((4, 8), np.uint8), "weight_scale": np.ones((4, 1), np.float32),
         "weight_scale_2": np.ones(1, np.float32)}, {}, "`up.weight` as FP8, or",
    ),
    "bare integers": ({"weight": np.ones((4, 8), np.int8)}, {}, "an unknown format, in int8"),
    "another": ({"W_q": np.ones((4, 8), np.uint8)}, {}, "as HQQ .*, which is not supported"),
    "format": (fp8()[0], {"requantize": None, "params": {"up": jnp.ones(3)}}, "fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_checkpoints_raise(tmp_path, case):
    tensors, options, message = BAD[case]
    path = save(tmp_path / "model.safetensors", up=tensors)
    with pytest.raises(AdapterError, match=message):
        load_base(path, {"up": Linear("up")}, **options)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_quantization_config_determines_the_zero_points(tmp_path, name, of):
    tensors = {
        "qweight": np.full((1, 8), 0x33333333, np.int32),
        "qzeros": np.full((1, 1), 0x11111111, np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    path = save(tmp_path / "model.safetensors", up=tensors)
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    content = {"quantization_config": settings} if name == "config.json" else settings
    (tmp_path / name).write_text(json.dumps(content))
    frozen = load_base(tmp_path if of == "folder" else path, {"up": Linear("up")})
    assert (dequantize(frozen)["up"] == 2).all()  # 3 − 1; the first version would give 3 − 2


def test_unknown_names_and_paths_raise(file):
    with pytest.raises(AdapterMismatchError, match="has no tensor for `pu.weight`.*mean `up.weig"):
        load_base(file, {"up": Linear("pu")})
    with pytest.raises(
        AdapterMismatchError, match="`names` has `up`, which is not in the parameters"
    ):
        load_base(file, {"up": Linear("up")}, params={})
    with pytest.raises(AdapterMismatchError, match="`names` has no entry for `b`"):
        load_base(file, {"a": Linear("up")}, params={"a": jnp.ones((IN, OUT)), "b": jnp.ones(2)})
    with pytest.raises(AdapterMismatchError, match="Pass `params`"):
        load_base(file, {"up": Linear("up", in_axes=[0], out_axes=[1, 2])})
    with pytest.raises(AdapterMismatchError, match="and a parameter above it"):
        load_base(file, {"up": Linear("up"), "up/e": Embedding("e")})
    with pytest.raises(AdapterNotFoundError, match=re.escape(str(file.parent / "none"))):
        load_base(file.parent / "none", NAMES)


def test_a_tied_head_and_files_of_other_names(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    save(folder / "gptq_model.safetensors", e={"weight": np.ones((4, 3), np.float32)})
    with pytest.raises(AdapterNotFoundError, match="path of a file itself, such as gptq_model"):
        load_base(folder, {"e": Embedding("e")})
    save(folder / "b.safetensors", up={"weight": np.ones((4, 3), np.float32)})
    index = {"weight_map": {"e.weight": "gptq_model.safetensors", "up.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(AdapterMismatchError, match=re.escape(f"{folder}: has no tensor for `z")):
        load_base(folder, {"e": Embedding("e"), "z": Linear("z")})
    with pytest.raises(AdapterMismatchError, match="`lm_head.weight`: its config ties the head"):
        load_base(folder, {"e": Embedding("e"), "head": Linear("lm_head")})
