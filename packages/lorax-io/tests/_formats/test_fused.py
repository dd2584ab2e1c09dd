"""Flux adapters in diffusers' names are fused exactly for Flux's original names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
import lorax_io
from lorax import DoraSpec, LoraSpec
from lorax_io import (
    AdapterMismatchError,
    Linear,
    UnsupportedAdapterError,
    load_any,
    open_adapter,
    save_kohya,
    save_original,
)

IN, TEXT = 6, 5
DOUBLE, SINGLE = "transformer_blocks.2.", "single_transformer_blocks.1."
SIZES = {
    **{f"{DOUBLE}attn.to_{x}": IN for x in "qkv"},
    **{f"{DOUBLE}attn.add_{x}_proj": IN for x in "qkv"},
    **{f"{SINGLE}attn.to_{x}": IN for x in "qkv"},
    f"{SINGLE}proj_mlp": 4 * IN,
    f"{SINGLE}proj_out": 7,
    f"{DOUBLE}ff.net.0.proj": 9,
    "norm_out.linear": 2 * IN,
    "x_embedder": 8,
}
PARAMS = {name: jnp.zeros((IN, size)) for name, size in SIZES.items()}
NAMES = {name: Linear(name) for name in SIZES}
FUSED = {
    "double_blocks.2.img_attn.qkv": [f"{DOUBLE}attn.to_{x}" for x in "qkv"],
    "double_blocks.2.txt_attn.qkv": [f"{DOUBLE}attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.1.linear1": [*(f"{SINGLE}attn.to_{x}" for x in "qkv"), f"{SINGLE}proj_mlp"],
    "single_blocks.1.linear2": [f"{SINGLE}proj_out"],
    "double_blocks.2.img_mlp.0": [f"{DOUBLE}ff.net.0.proj"],
    "img_in": ["x_embedder"],
}
WRITERS = {"original": save_original, "kohya": save_kohya}


def make(spec, params=PARAMS):
    return lorax.init_lora(params, spec, jax.random.key(3), b_init="gaussian")


def deltas_of(pair):
    return {name: np.asarray(x) for name, x in lorax.merge_params(pair).items()}


def check(file, deltas):
    """Checks that a file has the fused delta of each module, and that splitting restores them."""
    opened = open_adapter(file)
    flat = "lora_unet_" if opened.format == "kohya" else ""
    rows = {torch_name.module: opened.rows[path] for path, torch_name in opened.names.items()}
    merged = {
        name: np.asarray(row.scale * np.asarray(row.a) @ np.asarray(row.b))
        for name, row in rows.items()
    }
    for name, parts in FUSED.items():
        key = flat + (name.replace(".", "_") if flat else name)
        widths = [4 * IN if part.endswith("proj_mlp") else SIZES[part] for part in parts]
        blocks = [deltas.get(p, np.zeros((IN, n))) for p, n in zip(parts, widths, strict=True)]
        if any(p in deltas for p in parts):
            np.testing.assert_allclose(merged[key], np.concatenate(blocks, 1), rtol=1e-5, atol=1e-6)
        else:
            assert key not in merged
    params = {**PARAMS, f"{SINGLE}attn.to_q": PARAMS[f"{SINGLE}attn.to_q"]}
    restored = deltas_of(load_any(file, params, NAMES))
    for name in SIZES:
        expected = deltas.get(name, np.zeros(PARAMS[name].shape))
        np.testing.assert_allclose(restored[name], expected, rtol=1e-5, atol=1e-6)
    return rows


@pytest.mark.parametrize("to", WRITERS)
def test_parts_with_different_ranks_and_scales_become_blocks(tmp_path, to):
    spec: Any = {name: LoraSpec(1 + k % 3, 2.0 + k % 2) for k, name in enumerate(SIZES)}
    spec[f"{SINGLE}attn.to_k"] = LoraSpec(4, 3.0, "rslora")
    spec = {
        name: x if name != f"{SINGLE}attn.to_k" else LoraSpec(4, 6.0) for name, x in spec.items()
    }
    pair = make(spec)
    WRITERS[to](tmp_path / "a.safetensors", pair.tunable, NAMES)
    rows = check(tmp_path / "a.safetensors", deltas_of(pair))
    [linear1] = [row for name, row in rows.items() if "linear1" in name]
    parts = [spec[name].rank for name in FUSED["single_blocks.1.linear1"]]
    assert linear1.rank == sum(parts)


@pytest.mark.parametrize("to", WRITERS)
def test_parts_with_a_shared_a_keep_their_rank(tmp_path, to):
    pair = make(dict.fromkeys(SIZES, LoraSpec(2, 3.0)))
    a = next(iter(pair.tunable.values())).a
    tunable = {name: row.with_factors({"a": a, "b": row.b}) for name, row in pair.tunable.items()}
    WRITERS[to](tmp_path / "a.safetensors", tunable, NAMES)
    rows = check(tmp_path / "a.safetensors", deltas_of(lorax.Pair(pair.frozen, tunable)))
    assert {row.rank for row in rows.values()} == {2}
    assert {row.scale for row in rows.values()} == {1.5}


@pytest.mark.parametrize("to", WRITERS)
def test_parts_without_an_adapter_become_zeros(tmp_path, to):
    spec = dict.fromkeys([f"{DOUBLE}attn.to_v", f"{SINGLE}attn.to_q", f"{SINGLE}attn.to_v"], 2)
    pair = make({name: spec.get(name, lorax.LORA_FREEZE) for name in SIZES})
    WRITERS[to](tmp_path / "a.safetensors", pair.tunable, NAMES)
    deltas = {name: x for name, x in deltas_of(pair).items() if name in spec}
    check(tmp_path / "a.safetensors", deltas)


@pytest.mark.parametrize("to", WRITERS)
def test_double_blocks_are_recognized_by_model_names(tmp_path, to):
    spec = {name: 2 if name.startswith(DOUBLE) else lorax.LORA_FREEZE for name in SIZES}
    pair = make(spec)
    WRITERS[to](tmp_path / "a.safetensors", pair.tunable, NAMES)
    adapted = {name: x for name, x in deltas_of(pair).items() if name.startswith(DOUBLE)}
    check(tmp_path / "a.safetensors", adapted)


@pytest.mark.parametrize("to", WRITERS)
def test_ambiguous_double_blocks_warn(tmp_path, to):
    names = {name: x for name, x in NAMES.items() if name.startswith(DOUBLE)}
    params = {name: PARAMS[name] for name in names}
    pair = make(dict.fromkeys(names, 2), params)
    with pytest.warns(lorax_io.AdapterWarning, match="If it is for Flux, give `names`"):
        WRITERS[to](tmp_path / "a.safetensors", pair.tunable, names)
    modules = {x.module for x in open_adapter(tmp_path / "a.safetensors").names.values()}
    flat = {f"lora_unet_{name.replace('.', '_')}" for name in names}
    assert modules == (flat if to == "kohya" else names.keys())


def test_halves_of_the_last_modulation_are_swapped(tmp_path):
    names = ["norm_out.linear", f"{SINGLE}proj_out"]
    pair = make({name: 2 if name in names else lorax.LORA_FREEZE for name in SIZES})
    save_original(tmp_path / "a.safetensors", pair.tunable, NAMES)
    row = open_adapter(tmp_path / "a.safetensors").rows["final_layer/adaLN_modulation/1/kernel"]
    b = np.asarray(pair.tunable["norm_out.linear"].b)
    np.testing.assert_array_equal(np.asarray(row.b), np.roll(b, IN, 1))


def test_fused_files_convert_in_both_directions(shell, files):
    pair = make({name: LoraSpec(1 + k % 3, 2.0 + k % 2) for k, name in enumerate(SIZES)})
    save_original("a.safetensors", pair.tunable, NAMES)
    shell.succeed("convert a.safetensors diffusers --to diffusers")
    for to in WRITERS:
        shell.succeed(f"convert diffusers {to}.safetensors --to {to}")
        check(f"{to}.safetensors", deltas_of(pair))
    shell.succeed("diff original.safetensors a.safetensors --rename x x")


def test_dora_magnitudes_are_fused(tmp_path):
    params = {name: jax.random.normal(jax.random.key(1), x.shape) for name, x in PARAMS.items()}
    pair = make(dict.fromkeys(SIZES, DoraSpec(LoraSpec(2))), params)
    save_kohya(tmp_path / "a.safetensors", pair.tunable, NAMES)
    restored = load_any(tmp_path / "a.safetensors", params, NAMES)
    for name, weight in lorax.merge_params(pair).items():
        np.testing.assert_allclose(lorax.merge_params(restored)[name], weight, rtol=1e-4, atol=1e-5)
    some = {k: v for k, v in pair.tunable.items() if not k.endswith("attn.to_k")}
    with pytest.raises(UnsupportedAdapterError, match="DoRA of some parts"):
        save_kohya(tmp_path / "b.safetensors", some, NAMES)
    assert not (tmp_path / "b.safetensors").exists()


REFUSED = {
    "another kind": (lorax.LohaSpec(2), {}, UnsupportedAdapterError, "only LoRA and DoRA can"),
    "unknown module": (
        2,
        {f"{SINGLE}attn.to_q": Linear("single_transformer_blocks.1.attn.norm_q")},
        UnsupportedAdapterError,
        "has no module",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_fused_raise(tmp_path, case):
    spec, names, error, message = REFUSED[case]
    pair = make(dict.fromkeys(SIZES, spec))
    with pytest.raises(error, match=message):
        save_kohya(tmp_path / "a.safetensors", pair.tunable, NAMES | names)
    assert not list(tmp_path.iterdir())


def test_wrong_output_size_raises(tmp_path):
    params = {"q": jnp.ones((IN, IN + 1))}
    _, tunable = lorax.init_lora(params, {"q": 2}, jax.random.key(0))
    with pytest.raises(AdapterMismatchError, match="Flux has 6 outputs there"):
        save_original(tmp_path / "a.safetensors", tunable, {"q": Linear(f"{SINGLE}attn.to_q")})
