"""Every file format is detected by content, loaded, merged and inspected."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from formats_of_files import (
    ALPHA,
    ATTN,
    CLIP,
    FLAT,
    IN,
    KOHYA,
    OUT,
    PEFT,
    QKV,
    RANK,
    TEXT,
    TO_Q,
    UNET,
    delta_of,
    save,
)

from lorax_io import (
    Linear,
    load_any,
    open_adapter,
)


class Case:
    """A file with one module, whose delta is scale · up · down."""

    def __init__(self, form, module, name, down, up, alpha=None, part=None):
        self.form, self.module, self.part = form, module, part
        self.scale = 1.0 if alpha is None else alpha.item() / RANK
        self.down, self.up = name + down, name + up
        self.more = {} if alpha is None else {f"{name}.alpha": alpha}

    def write(self, files):
        down, up = files.draw(RANK, IN), files.draw(OUT, RANK)
        save({self.down: down, self.up: up} | self.more)
        return self.scale * (up @ down)


OWN = (".lora.down.weight", ".lora.up.weight")


OLD = ("_lora.down.weight", "_lora.up.weight")


LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")


FLUX, KOHYA_Q = f"diffusion_model.{QKV}", f"{FLAT}_to_q"


CASES = {
    "diffusers, PEFT keys": Case("diffusers", TO_Q, UNET, *PEFT, part="unet"),
    "diffusers, its own keys": Case("diffusers", TO_Q, UNET, *OWN, part="unet"),
    "diffusers, with alpha": Case("diffusers", TO_Q, UNET, *PEFT, ALPHA, part="unet"),
    "diffusers, without a part": Case("diffusers", TO_Q, TO_Q, *OWN, part=""),
    "processors": Case("diffusers", TO_Q, f"{ATTN}.processor.to_q", *OLD, part=""),
    "a processor's output": Case(
        "diffusers", f"{ATTN}.to_out.0", f"{ATTN}.processor.to_out", *OLD, part=""
    ),
    "text encoder": Case(
        "diffusers", f"{CLIP}.q_proj", f"{TEXT}.q_proj", *LINEAR, part="text_encoder"
    ),
    "old text encoder": Case(
        "diffusers", f"{CLIP}.q_proj", f"{TEXT}.to_q", *OLD, part="text_encoder"
    ),
    "old text encoder's output": Case(
        "diffusers", f"{CLIP}.out_proj", f"{TEXT}.to_out", *OLD, part="text_encoder"
    ),
    "kohya": Case("kohya", KOHYA_Q, KOHYA_Q, *KOHYA, ALPHA),
    "kohya, without alpha": Case("kohya", KOHYA_Q, KOHYA_Q, *KOHYA),
    "kohya, alpha in one entry": Case("kohya", KOHYA_Q, KOHYA_Q, *KOHYA, ALPHA.reshape(1)),
    "ai-toolkit": Case("original", QKV, FLUX, *PEFT),
    "ComfyUI": Case("original", QKV, FLUX, *KOHYA, ALPHA),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_file_format_is_detected_by_content(files, case):
    delta = case.write(files)
    adapter = open_adapter("a.safetensors")
    assert (adapter.format, adapter.part) == (case.form, case.part)
    [row] = adapter.rows.values()
    [torch_name] = adapter.names.values()
    assert torch_name.module == case.module
    assert row.scale == case.scale
    np.testing.assert_allclose(delta_of(row), delta, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_file_is_loaded_onto_parameters(files, case):
    delta = case.write(files)
    module = f"{ATTN}.to_q" if case.form == "kohya" else case.module
    pair = load_any("a.safetensors", {"w": jnp.zeros((IN, OUT))}, {"w": Linear(module)})
    np.testing.assert_allclose(delta_of(pair.tunable["w"]), delta, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_file_is_merged(shell, files, case, prefix):
    delta = case.write(files)
    module = prefix + (f"{ATTN}.to_q" if case.form == "kohya" else case.module)
    base = {f"{module}.weight": files.draw(OUT, IN), f"{prefix}other.weight": files.draw(OUT, IN)}
    save(base, "base.safetensors")
    shell.succeed("merge a.safetensors --base base.safetensors --out merged")
    merged = files.read("merged/base.safetensors")
    expected = base[f"{module}.weight"] + delta
    np.testing.assert_allclose(merged[f"{module}.weight"], expected, rtol=1e-5)
    np.testing.assert_array_equal(merged[f"{prefix}other.weight"], base[f"{prefix}other.weight"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inspect_reports_the_format(shell, files, case):
    case.write(files)
    report = json.loads(shell.succeed("inspect a.safetensors --json"))
    assert report["format"] == case.form
    assert (report["rank"], report["scale"]) == ([RANK], [case.scale])
    assert "load_any" in report["to load it"]
