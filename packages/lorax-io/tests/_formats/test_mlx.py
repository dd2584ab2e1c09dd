"""mlx-lm folders."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from formats_of_files import (
    IN,
    OUT,
    RANK,
    Q,
    delta_of,
    save,
)

from lorax import LoraWeight
from lorax_io import (
    AdapterError,
    AdapterFileError,
    Linear,
    UnsupportedAdapterError,
    open_adapter,
    save_mlx,
    save_peft,
)


def write_mlx(tensors, **config):
    folder = pathlib.Path("mlx")
    folder.mkdir(exist_ok=True)
    save(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    settings = {"rank": RANK, "scale": 20.0, "dropout": 0.0}
    settings_of_file = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": settings,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings_of_file))


def test_mlx_is_read(shell, files):
    a, b = files.draw(IN, RANK), files.draw(RANK, OUT)
    write_mlx({f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    adapter = open_adapter("mlx")
    assert adapter.format == "mlx"
    [row] = adapter.rows.values()
    np.testing.assert_allclose(delta_of(row), 20 * (a @ b).T, rtol=1e-5)
    files.base({f"{Q}.weight": files.draw(OUT, IN)})
    shell.succeed("merge mlx --base base --out merged")
    expected = files.read("base/model.safetensors")[f"{Q}.weight"] + 20 * (a @ b).T
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5)


def test_embeddings_and_dora_of_mlx_are_read(files):
    table = "model.embed_tokens"
    a, b = files.draw(11, RANK), files.draw(RANK, IN)
    write_mlx({f"{table}.lora_a": a, f"{table}.lora_b": b})
    [row] = open_adapter("mlx").rows.values()
    np.testing.assert_allclose(delta_of(row, (11, IN)), 20 * (a @ b).T, rtol=1e-5)
    q = {f"{Q}.lora_a": files.draw(IN, RANK), f"{Q}.lora_b": files.draw(RANK, OUT)}
    write_mlx(q | {f"{Q}.m": files.draw(OUT)}, fine_tune_type="dora")
    [row] = open_adapter("mlx").rows.values()
    assert row.kind == "dora" and row.magnitude.shape == (OUT,)


def test_full_fine_tuning_of_mlx_is_read(shell, files):
    weight = files.draw(OUT, IN)
    write_mlx({f"{Q}.weight": weight}, fine_tune_type="full")
    files.base({f"{Q}.weight": files.draw(OUT, IN)})
    shell.succeed("merge mlx --base base --out merged")
    np.testing.assert_array_equal(files.read("merged/model.safetensors")[f"{Q}.weight"], weight)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"fine_tune_type": "prefix"}, UnsupportedAdapterError),
        ({"lora_parameters": {}}, AdapterError),
        ({"lora_parameters": {"scale": "20"}}, AdapterError),
        ({"lora_parameters": None}, AdapterError),
        ({"fine_tune_type": "dora"}, AdapterFileError),
        ({"lora_parameters": {"rank": RANK + 1, "scale": 2.0}}, AdapterFileError),
    ],
)
def test_unsupported_mlx_configs_raise(files, config, error):
    write_mlx({f"{Q}.lora_a": files.draw(IN, RANK), f"{Q}.lora_b": files.draw(RANK, OUT)}, **config)
    with pytest.raises(error):
        open_adapter("mlx")


def test_float64_raises(files):
    tunable = {"q": LoraWeight(np.ones((IN, 1)), np.ones((1, OUT)), 1)}
    with pytest.raises(UnsupportedAdapterError, match="is float64; MLX"):
        save_mlx("mlx", tunable, {"q": Linear(Q)})
    assert not pathlib.Path("mlx").exists()


@pytest.mark.parametrize(("first", "second"), [(save_mlx, save_peft), (save_peft, save_mlx)])
def test_config_of_another_format_raises(tmp_path, first, second):
    """The configs of PEFT and mlx-lm have the same file name."""
    tunable = {"q": LoraWeight(jnp.ones((IN, 1)), jnp.ones((1, OUT)), 1)}
    first(tmp_path / "a", tunable, {"q": Linear(Q)})
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(AdapterError, match="an adapter in another format"):
        second(tmp_path / "a", tunable, {"q": Linear(Q)})
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    first(tmp_path / "a", tunable, {"q": Linear(Q)})


def test_magnitude_without_dora_in_the_config_raises(files):
    a, b, m = files.draw(IN, RANK), files.draw(RANK, OUT), files.draw(OUT)
    write_mlx({f"{Q}.lora_a": a, f"{Q}.lora_b": b, f"{Q}.m": m})
    with pytest.raises(AdapterFileError, match="has `.*q_proj.m`, and its config says lora"):
        open_adapter("mlx")
