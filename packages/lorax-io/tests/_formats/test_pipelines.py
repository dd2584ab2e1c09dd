"""Files with adapters of several parts of a pipeline."""

import json
import pathlib

import numpy as np
import pytest
import safetensors
from formats_of_files import (
    ATTN,
    CLIP,
    FLAT,
    IN,
    OUT,
    RANK,
    TEXT,
    UNET,
    save,
)

from lorax_io import (
    open_adapter,
)


def pipeline(files):
    """A diffusers folder with a U-Net and a text encoder."""
    modules = {"unet": f"{ATTN}.to_q", "text_encoder": f"{CLIP}.q_proj"}
    base = {}
    for part, module in modules.items():
        folder = pathlib.Path("pipeline", part)
        folder.mkdir(parents=True)
        stem = "diffusion_pytorch_model" if part == "unet" else "model"
        base[part] = {f"{module}.weight": files.draw(OUT, IN)}
        save(base[part], folder / f"{stem}.safetensors")
        (folder / "config.json").write_text("{}")
    pathlib.Path("pipeline/tokenizer").mkdir()
    pathlib.Path("pipeline/tokenizer/merges.txt").write_text("a b")
    pathlib.Path("pipeline/model_index.json").write_text("{}")
    return base


PARTS = {
    "diffusers": (f"{UNET}.lora_{{}}.weight", f"{TEXT}.q_proj.lora_{{}}.weight"),
    "kohya": (
        f"{FLAT}_to_q.lora_{{}}.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", PARTS)
def test_pipeline_is_merged_part_by_part(shell, files, form):
    base = pipeline(files)
    first, second = ("down", "up") if form == "kohya" else ("A", "B")
    tensors, deltas = {}, {}
    for part, key in zip(("unet", "text_encoder"), PARTS[form], strict=True):
        down, up = files.draw(RANK, IN), files.draw(OUT, RANK)
        tensors |= {key.format(first): down, key.format(second): up}
        deltas[part] = up @ down
    save(tensors)
    shell.succeed("merge a.safetensors --base pipeline --out merged")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        merged = files.read(f"merged/{part}/{stem}.safetensors")
        for name, weight in base[part].items():
            np.testing.assert_allclose(merged[name], weight + deltas[part], rtol=1e-5)
    for name in ("model_index.json", "unet/config.json", "tokenizer/merges.txt"):
        assert (
            pathlib.Path("merged", name).read_text() == pathlib.Path("pipeline", name).read_text()
        )


def test_several_parts_keep_their_configs(shell, files):
    tensors = files.pair(f"unet.{ATTN}.to_q", OUT, IN) | files.pair(
        f"text_encoder.{CLIP}.q_proj", OUT, IN, rank=3
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["to_q"]}
    other = config | {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    header = {f"unet.{k}": v for k, v in config.items()}
    header |= {f"text_encoder.{k}": v for k, v in other.items()}
    save(tensors, "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    scales = {p: row.scale for p, row in open_adapter("a.safetensors").rows.items()}
    assert sorted(scales.values()) == [0.5, 2]
    shell.succeed("convert a.safetensors out --to diffusers")
    file = "out/pytorch_lora_weights.safetensors"
    for name, tensor in files.read(file).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    with safetensors.safe_open(file, "numpy") as opened:
        configs = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (configs["unet.r"], configs["unet.lora_alpha"]) == (2, 1)
    assert (configs["text_encoder.r"], configs["text_encoder.lora_alpha"]) == (3, 6)
    shell.succeed("diff a.safetensors out")
    shell.succeed("convert a.safetensors peft --to peft --part unet")
    assert files.read("peft/adapter_model.safetensors").keys() == {
        f"base_model.model.{ATTN}.to_q.lora_{x}.weight" for x in "AB"
    }
    assert "nothing for the part" in shell.fail("convert a.safetensors x --to peft --part vae")
