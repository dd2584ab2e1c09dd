"""Random files and interrupted saves of every format give an adapter or one error type."""

import json

import numpy as np
import pytest
import safetensors.numpy
from formats_of_files import (
    Q,
    make_tunable,
    save,
)
from hypothesis import given, settings, strategies as st

from lorax_io import (
    AdapterError,
    Linear,
    open_adapter,
    save_diffusers,
    save_kohya,
    save_mlx,
    save_original,
    save_peft,
)
from lorax_io._formats.opening import in_diffusers

TENSORS = {
    "kohya": {
        "lora_unet_a.lora_down.weight": (2, 5),
        "lora_unet_a.lora_up.weight": (6, 2),
        "lora_unet_a.alpha": (),
    },
    "lycoris": {
        "lora_unet_a.lokr_w1": (2, 3),
        "lora_unet_a.lokr_w2_a": (3, 2),
        "lora_unet_a.lokr_w2_b": (2, 4),
        "lora_unet_a.alpha": (),
    },
    "original": {
        "diffusion_model.a.lora_A.weight": (2, 5),
        "diffusion_model.a.lora_B.weight": (6, 2),
    },
    "diffusers": {
        "unet.a.lora.down.weight": (2, 5),
        "unet.a.lora.up.weight": (6, 2),
        "text_encoder.b.lora_A.weight": (2, 5),
        "text_encoder.b.lora_B.weight": (6, 2),
    },
    "fused": {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (2, 5),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (15, 2),
        "diffusion_model.double_blocks.0.img_attn.qkv.alpha": (),
    },
    "torchtune": {
        "a.lora_a.weight": (2, 5),
        "a.lora_b.weight": (6, 2),
        "a.magnitude": (6,),
    },
    "mlx": {"a.lora_a": (5, 2), "a.lora_b": (2, 6), "a.m": (6,)},
}


SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@pytest.mark.parametrize("form", TENSORS)
@settings(max_examples=25)
@given(data=st.data())
def test_random_files_are_read_or_rejected(tmp_path_factory, form, data):
    known = TENSORS[form]
    kept = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True))
    shapes = {name: known[name] for name in kept}
    for name in data.draw(st.lists(st.sampled_from(sorted(known)), max_size=2)):
        shapes[name] = data.draw(SHAPES)
    ends = st.sampled_from([".alpha", ".lora_A.weight", ".lora_mid.weight", ".hada_w1_a", "", ".m"])
    for end in data.draw(st.lists(ends, max_size=2)):
        stem = min(known).rpartition(".")[0]
        shapes[stem + end or "x"] = data.draw(SHAPES)
    kind = data.draw(st.sampled_from([np.float32, np.float16, np.int8, np.float64]))
    value = data.draw(st.sampled_from([0, 1, np.nan, np.inf])) if kind != np.int8 else 1
    folder = tmp_path_factory.mktemp("random")
    path = folder / ("adapters.safetensors" if form == "mlx" else "a.safetensors")
    save({name: np.full(shape, value, kind) for name, shape in shapes.items()}, path)
    if form == "mlx":
        settings_of = data.draw(st.sampled_from([{"scale": 2}, {"scale": None}, {}, None, [1]]))
        config = {"fine_tune_type": data.draw(st.sampled_from(["lora", "dora", "full", 1])),
                  "lora_parameters": settings_of}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        adapter = open_adapter(path, alpha=2.0 if form == "torchtune" else None)
        if form == "fused":
            in_diffusers(adapter)
    except AdapterError as error:
        assert str(error).startswith(str(folder))
    else:
        assert adapter.rows


@pytest.mark.parametrize(
    "save_as", [save_kohya, save_original, save_mlx, save_diffusers, save_peft]
)
def test_interrupted_save_leaves_the_old_file(files, tmp_path, monkeypatch, save_as):
    first, second = ({"q": make_tunable(files)["q"]} for _ in range(2))
    save_as("out", first, {"q": Linear(Q)})
    files_of = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}  # noqa: E731
    before = files_of()

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(AdapterError, match="No space left"):
        save_as("out", second, {"q": Linear(Q)})
    assert files_of() == before
