"""`lorax inspect` of every format."""

import importlib.metadata
import json

import numpy as np
import pytest
from formats_of_files import ATTN, IN, OUT, PEFT, QKV, RANK, save

import lorax
from lorax_io import (
    Linear,
    open_adapter,
    save_adapter,
    save_diffusers,
    save_keras,
    save_kohya,
    save_mlx,
    save_original,
    save_peft,
)


def make(files):
    a, b = files.draw(IN, RANK), files.draw(RANK, OUT)
    return {"q/kernel": lorax.LoraWeight(a, b, RANK, 3.0)}


NAMES = {"q/kernel": Linear(f"{ATTN}.to_q")}
NUMBERS = {"q/kernel": Linear("11")}
WRITERS = {
    "native": (lambda file, tree: save_adapter(file, tree), "q"),
    "peft": (lambda file, tree: save_peft(file, tree, NAMES), f"{ATTN}.to_q"),
    "diffusers": (lambda file, tree: save_diffusers(file, tree, NAMES), f"{ATTN}.to_q"),
    "kohya": (lambda file, tree: save_kohya(file, tree, NAMES), "attn1_to_q"),
    "original": (lambda file, tree: save_original(file, tree, NAMES), "to_q"),
    "mlx": (lambda file, tree: save_mlx(file, tree, NAMES), "to_q"),
    "keras": (lambda file, tree: save_keras(file, tree, NUMBERS), "11"),
}


@pytest.mark.parametrize("format", WRITERS)
def test_writer_and_targets_of_every_format_are_shown(shell, files, format):
    if format == "keras":
        pytest.importorskip("h5py")
    write, target = WRITERS[format]
    write("a", make(files))
    about = json.loads(shell.succeed("inspect a --json"))
    assert about["format"] == format
    assert about["written by"] == f"lorax-io {importlib.metadata.version('lorax-io')}"
    assert about["targets"] == [target]


def test_targets_are_names_not_numbers(shell, files):
    modules = ("a.0.attn.to_out.0", "a.1.attn.to_out.0", "a.0.ff")
    save({f"{m}{end}": files.draw(RANK, RANK) for m in modules for end in PEFT})
    about = json.loads(shell.succeed("inspect a.safetensors --json"))
    assert about["targets"] == ["ff", "to_out.0"]
    assert "written by" not in about


def test_rename_is_applied(shell, files):
    save({f"old.to_q{end}": files.draw(RANK, RANK) for end in PEFT})
    about = json.loads(shell.succeed("inspect a.safetensors --json --rename old new"))
    assert [line["path"] for line in about["parameters"]] == ["new/to_q/kernel"]


def flux(files, name, rank):
    tensors = {PEFT[0]: files.draw(rank, IN), PEFT[1]: files.draw(3 * IN, rank)}
    save({f"diffusion_model.{QKV}{end}": x for end, x in tensors.items()}, name)
    return tensors[PEFT[1]] @ tensors[PEFT[0]]


def written(folder):
    """The concatenated deltas of q, k and v in a diffusers file."""
    rows = open_adapter(folder).rows
    paths = [f"transformer_blocks/0/attn/to_{x}/kernel" for x in "qkv"]
    assert rows.keys() == {*paths}
    selected = [rows[path] for path in paths]
    deltas = [row.scale * np.asarray(row.a) @ np.asarray(row.b) for row in selected]
    return np.concatenate(deltas, 1).T


def test_combined_or_resized_flux_adapter_can_be_split(shell, files):
    one, two = flux(files, "a.safetensors", 2), flux(files, "b.safetensors", 3)
    shell.succeed("combine a.safetensors b.safetensors --out sum --to diffusers")
    np.testing.assert_allclose(written("sum"), one + two, rtol=1e-4, atol=1e-5)
    shell.succeed("resize a.safetensors low --rank 1 --to diffusers")
    left, sizes, right = np.linalg.svd(one)
    best = sizes[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(written("low"), best, rtol=1e-3, atol=1e-4)


def test_flux_of_a_peft_folder_keeps_its_rslora_scale(shell, files):
    a, b = files.draw(4, IN), files.draw(3 * IN, 4)
    tensors = dict(zip((f"{QKV}{end}" for end in PEFT), (a, b), strict=True))
    files.peft(tensors, r=4, lora_alpha=6, use_rslora=True, target_modules=[QKV])
    shell.succeed("convert adapter out --to diffusers")
    np.testing.assert_allclose(written("out"), 3 * b @ a, rtol=1e-4, atol=1e-5)
