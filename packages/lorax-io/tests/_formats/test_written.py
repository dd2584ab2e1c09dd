"""Every writable format: round trips, and errors for unsupported features."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from formats_of_files import (
    ATTN,
    IN,
    OUT,
    Q,
    delta_of,
    make_tunable,
)

import lorax
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    Conv,
    Embedding,
    Linear,
    UnsupportedAdapterError,
    load_any,
    open_adapter,
    save_adapter,
    save_kohya,
    save_mlx,
    save_original,
    save_peft,
)

NAMES = {
    "q": Linear(f"{ATTN}.to_q"),
    "conv": Conv("conv_in", in_axes=(0, 1, 2), channel_axis=2),
    "stack": Linear("layers.{}.k", shared_axes=(0,)),
}


PARAMS = {
    "q": jnp.zeros((IN, OUT)),
    "conv": jnp.zeros((3, 2, 4, 7)),
    "stack": jnp.zeros((3, IN, OUT)),
}


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_kohya_round_trips(files, scaling):
    tunable = make_tunable(files, scaling)
    save_kohya("k.safetensors", tunable, NAMES)
    assert open_adapter("k.safetensors").format == "kohya"
    loaded = load_any("k.safetensors", PARAMS, NAMES)
    for path, row in tunable.items():
        expected, actual = (
            np.asarray(lorax.materialize(PARAMS[path], x)) for x in (row, loaded.tunable[path])
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    alphas = {k: x for k, x in files.read("k.safetensors").items() if k.endswith(".alpha")}
    assert len(alphas) == 5 and all(x.shape == () for x in alphas.values())


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_mlx_round_trips(files, scaling):
    tunable = {"q": make_tunable(files, scaling)["q"]}
    names = {"q": Linear(Q), "embed": Embedding("model.embed_tokens")}
    save_mlx("mlx", tunable, names, model="me/base")
    config = json.loads(pathlib.Path("mlx/adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    assert config["model"] == "me/base"
    loaded = load_any("mlx", {"q": PARAMS["q"], "embed": jnp.zeros((11, IN))}, names)
    np.testing.assert_allclose(delta_of(loaded.tunable["q"]), delta_of(tunable["q"]), rtol=1e-6)


@pytest.mark.parametrize("save_as", [save_kohya, save_original, save_mlx])
def test_kinds_that_a_format_cannot_store_raise(files, tmp_path, save_as):
    full = {"q": jnp.ones((IN, OUT)), "stack": make_tunable(files)["stack"]}
    with pytest.raises((UnsupportedAdapterError, AdapterMismatchError)):
        save_as("out", full, NAMES)
    assert not (tmp_path / "out").exists()


def test_several_ranks_or_scales_raise_for_mlx(files, tmp_path):
    with pytest.raises(UnsupportedAdapterError, match="one rank and scale"):
        save_mlx("out", make_tunable(files), NAMES)
    assert not (tmp_path / "out").exists()


def test_modules_with_the_same_flat_name_raise(files):
    row = make_tunable(files)["q"]
    with pytest.raises(AdapterMismatchError, match="are both called `lora_unet_a_b`"):
        save_kohya("k", {"x": row, "y": row}, {"x": Linear("a.b"), "y": Linear("a_b")})


@pytest.mark.parametrize("form", ["kohya", "original", "mlx", "diffusers", "peft"])
def test_convert_writes_every_format(shell, files, form):
    row = make_tunable(files)["q"]
    save_adapter("a.safetensors", {"blocks/0/to_q/kernel": row})
    shell.succeed(f"convert a.safetensors out --to {form}")
    adapter = open_adapter("out")
    assert adapter.format == form
    [written] = adapter.rows.values()
    np.testing.assert_allclose(delta_of(written), delta_of(row), rtol=1e-6)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**400, "3"])
def test_nonfinite_alpha_raises(tmp_path, alpha):
    weight = lorax.LoraWeight(jnp.ones((IN, 2)), jnp.ones((2, OUT)), 2, alpha)
    for tree in ({"q": weight}, {"q": lorax.DoraWeight(weight, jnp.ones(OUT))}):
        writers = (
            lambda tree=tree: save_adapter(tmp_path / "a", tree),
            lambda tree=tree: save_peft(tmp_path / "b", tree, {"q": Linear(Q)}),
            lambda tree=tree: save_mlx(tmp_path / "c", tree, {"q": Linear(Q)}),
            lambda tree=tree: save_kohya(tmp_path / "d", tree, {"q": Linear(Q)}),
        )
        for write in writers:
            with pytest.raises(AdapterError, match="`q` has alpha .*, which is not a finite numb"):
                write()
    assert not list(tmp_path.iterdir())
