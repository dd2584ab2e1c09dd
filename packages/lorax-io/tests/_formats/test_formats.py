"""Formats of other programs: told by their content, read, written, converted, and merged."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings, strategies as st

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
    save_diffusers,
    save_kohya,
    save_mlx,
    save_peft,
)

ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
CLIP = "text_model.encoder.layers.0.self_attn"
Q = "model.layers.0.self_attn.q_proj"
RANK, OUT, IN = 2, 6, 5


def save(tensors, name: Any = "a.safetensors", metadata=None):
    safetensors.numpy.save_file(dict(tensors), name, metadata or {"format": "pt"})
    return name


class Case:
    """A file of one module, and what it means: delta = scale · up · down."""

    def __init__(self, form, module, name, down, up, alpha=None, part=None):
        self.form, self.module, self.part = form, module, part
        self.scale = 1.0 if alpha is None else alpha.item() / RANK
        self.down, self.up = name + down, name + up
        self.more = {} if alpha is None else {f"{name}.alpha": alpha}

    def write(self, files):
        down, up = files.draw(RANK, IN), files.draw(OUT, RANK)
        save({self.down: down, self.up: up} | self.more)
        return self.scale * (up @ down)


ALPHA = np.asarray(1, np.float32)
PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
OWN = (".lora.down.weight", ".lora.up.weight")
OLD = ("_lora.down.weight", "_lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
UNET, TEXT, TO_Q = f"unet.{ATTN}.to_q", f"text_encoder.{CLIP}", f"{ATTN}.to_q"
QKV = "double_blocks.0.img_attn.qkv"
FLUX, KOHYA_Q = f"diffusion_model.{QKV}", f"{FLAT}_to_q"
CASES = {
    "diffusers, keys of PEFT": Case("diffusers", TO_Q, UNET, *PEFT, part="unet"),
    "diffusers, keys of its own": Case("diffusers", TO_Q, UNET, *OWN, part="unet"),
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


def delta_of(row, shape=(IN, OUT)):
    """The delta as PyTorch has it."""
    return np.asarray(lorax.materialize(jnp.zeros(shape), row)).T


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_file_format_is_detected_by_content(files, case):
    delta = case.write(files)
    adapter = open_adapter("a.safetensors")
    assert (adapter.format, adapter.part) == (case.form, case.part)
    [row] = adapter.rows.values()
    [layout] = adapter.names.values()
    assert layout.module == case.module
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
    assert report["form"] == case.form
    assert (report["rank"], report["scale"]) == ([RANK], [case.scale])
    assert "load_any" in report["to load it"]


# Several parts of a pipeline


def pipeline(files):
    """A folder of diffusers with a U-Net and a text encoder."""
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


def test_several_parts_are_written_again_with_a_config_each(shell, files):
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


# kohya's names


def test_underscores_are_resolved_by_the_base(shell, files):
    tensors = {f"{FLAT}_to_q.lora_down.weight": files.draw(RANK, IN)}
    tensors |= {f"{FLAT}_to_q.lora_up.weight": files.draw(OUT, RANK)}
    save(tensors)
    save({f"{ATTN}.to_q.weight": files.draw(OUT, IN)}, "base.safetensors")
    shell.succeed("convert a.safetensors peft --to peft --base base.safetensors")
    assert list(open_adapter("peft").names) == [f"{ATTN}.to_q".replace(".", "/") + "/kernel"]


@pytest.mark.parametrize("names", [["a.b_c", "a_b.c"], ["x.a.b.c", "y.a.b.c"], ["a.b"]])
def test_underscores_that_may_be_several_raise(shell, files, names):
    save({"lora_unet_a_b_c.lora_down.weight": files.draw(RANK, IN),
          "lora_unet_a_b_c.lora_up.weight": files.draw(OUT, RANK)})  # fmt: skip
    save({f"{name}.weight": files.draw(OUT, IN) for name in names}, "base.safetensors")
    message = shell.fail("merge a.safetensors --base base.safetensors --out merged")
    assert "with `_` for each `.`" in message


@pytest.mark.parametrize("key", ["lora_mid.weight", "oft_blocks", "diff", "diff_b", "w_norm"])
def test_more_than_lora_of_kohya_raises(files, key):
    save({"lora_unet_a.lora_down.weight": files.draw(RANK, IN),
          "lora_unet_a.lora_up.weight": files.draw(OUT, RANK),
          f"lora_unet_a.{key}": files.draw(OUT, 1)})  # fmt: skip
    with pytest.raises(UnsupportedAdapterError, match=f"lora_unet_a.{key}"):
        open_adapter("a.safetensors")


def flux_file(files, prefix, ends):
    """Adapters of a fused product of q, k and v, and of one with the rest behind it."""
    tensors, deltas = {}, {}
    dot = "_" if prefix.endswith("_") else "."
    for module, outputs in {QKV: 3 * IN, "single_blocks.1.linear1": 3 * IN + OUT}.items():
        a, b = files.draw(RANK, IN), files.draw(outputs, RANK)
        name = prefix + module.replace(".", dot)
        tensors |= {name + ends[0]: a, name + ends[1]: b, f"{name}.alpha": ALPHA}
        deltas[module] = float(ALPHA) / RANK * b @ a
    save(tensors)
    return deltas


@pytest.mark.parametrize(
    ("prefix", "ends"), [("diffusion_model.", PEFT), ("lora_unet_", KOHYA)], ids=["dots", "kohya"]
)
def test_fused_products_are_split_for_a_base_that_has_them_apart(shell, files, prefix, ends):
    deltas = flux_file(files, prefix, ends)
    one, two = "transformer_blocks.0.attn.", "single_transformer_blocks.1."
    parts = {f"{one}to_{x}": IN for x in "qkv"} | {f"{two}attn.to_{x}": IN for x in "qkv"}
    parts[f"{two}proj_mlp"] = OUT
    base = {f"{name}.weight": files.draw(size, IN) for name, size in parts.items()}
    save(base, "base.safetensors")
    shell.succeed("merge a.safetensors --base base.safetensors --out merged")
    merged = files.read("merged/base.safetensors")
    changes = {name: merged[f"{name}.weight"] - base[f"{name}.weight"] for name in parts}
    for module, begin in {QKV: one, "single_blocks.1.linear1": two}.items():
        whole = np.concatenate([x for name, x in changes.items() if name.startswith(begin)])
        np.testing.assert_allclose(whole, deltas[module], rtol=1e-4, atol=1e-5)
    names = {name: Linear(name, in_axes=(1,), out_axes=(0,)) for name in parts}
    params = {name: jnp.asarray(base[f"{name}.weight"]) for name in parts}
    pair = load_any("a.safetensors", params, names)
    for name, weight in lorax.merge_params(pair).items():
        np.testing.assert_allclose(weight, merged[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    shell.succeed("convert a.safetensors out --to diffusers")
    assert {x.module for x in open_adapter("out").names.values()} == parts.keys()


@pytest.mark.parametrize(
    ("prefix", "ends"), [("diffusion_model.", PEFT), ("lora_unet_", KOHYA)], ids=["dots", "kohya"]
)
def test_fused_products_stay_for_a_base_that_has_them(shell, files, prefix, ends):
    deltas = flux_file(files, prefix, ends)
    base = {f"{name}.weight": files.draw(*delta.shape) for name, delta in deltas.items()}
    save(base, "base.safetensors")
    shell.succeed("merge a.safetensors --base base.safetensors --out merged")
    merged = files.read("merged/base.safetensors")
    for name, delta in deltas.items():
        expected = base[f"{name}.weight"] + delta
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("case", ["no thirds", "no rest", "lokr", "no module of diffusers"])
def test_unsplittable_flux_modules_raise(shell, files, case):
    flux_file(files, "diffusion_model.", PEFT)
    tensors = files.read("a.safetensors")
    name = f"diffusion_model.{QKV}"
    if case == "no thirds":
        tensors[f"{name}.lora_B.weight"] = files.draw(3 * IN + 1, RANK)
    elif case == "no rest":
        tensors["diffusion_model.single_blocks.1.linear1.lora_B.weight"] = files.draw(IN, RANK)
    elif case == "lokr":
        tensors = {f"{name}.lokr_w1": files.draw(3, 2), f"{name}.lokr_w2": files.draw(IN, IN // 2)}
    else:
        tensors |= {f"diffusion_model.x.lora_{x}.weight": files.draw(RANK, RANK) for x in "AB"}
    save(tensors)
    message = shell.fail("convert a.safetensors out --to diffusers")
    assert "outputs for a product" in message or "is not cut" in message or "no module" in message


def test_lycoris_is_read(files):
    loha = {f"lora_unet_a.hada_w{k}_{x}": files.draw(*((OUT, RANK) if x == "a" else (RANK, IN)))
            for k in (1, 2) for x in "ab"}  # fmt: skip
    save(loha | {"lora_unet_a.alpha": ALPHA})
    [row] = open_adapter("a.safetensors").rows.values()
    products = [loha[f"lora_unet_a.hada_w{k}_a"] @ loha[f"lora_unet_a.hada_w{k}_b"] for k in (1, 2)]
    np.testing.assert_allclose(delta_of(row), products[0] * products[1] / 2, rtol=1e-5)


# mlx-lm


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
    ],
)
def test_other_configs_of_mlx_raise(files, config, error):
    write_mlx({f"{Q}.lora_a": files.draw(IN, RANK), f"{Q}.lora_b": files.draw(RANK, OUT)}, **config)
    with pytest.raises(error):
        open_adapter("mlx")


# Writing


NAMES = {
    "q": Linear(f"{ATTN}.to_q"),
    "conv": Conv("conv_in", in_axes=(0, 1, 2), channel_axis=2),
    "stack": Linear("layers.{}.k", shared_axes=(0,)),
}


def make_tunable(files, scaling="standard"):
    weight = lambda a, b, alpha, **axes: lorax.LoraWeight(  # noqa: E731
        jnp.asarray(a), jnp.asarray(b), a.shape[-1], alpha, scaling, **axes
    )
    return {
        "q": weight(files.draw(IN, 2), files.draw(2, OUT), 3.0),
        "conv": weight(
            files.draw(3, 2, 4, 4), files.draw(4, 7), None, in_axes=(0, 1, 2), out_axes=(3,)
        ),
        "stack": weight(
            files.draw(3, IN, 2), files.draw(3, 2, OUT), 5.0,
            in_axes=(1,), out_axes=(2,), shared_axes=(0,),
        ),
    }  # fmt: skip


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
        ours, theirs = (
            np.asarray(lorax.materialize(PARAMS[path], x)) for x in (row, loaded.tunable[path])
        )
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
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


@pytest.mark.parametrize("save_as", [save_kohya, save_mlx])
def test_kinds_a_format_cannot_hold_raise(files, tmp_path, save_as):
    full = {"q": jnp.ones((IN, OUT)), "stack": make_tunable(files)["stack"]}
    with pytest.raises((UnsupportedAdapterError, AdapterMismatchError)):
        save_as("out", full, NAMES)
    assert not (tmp_path / "out").exists()


def test_mlx_has_one_rank_and_scale(files, tmp_path):
    with pytest.raises(UnsupportedAdapterError, match="one rank and scale"):
        save_mlx("out", make_tunable(files), NAMES)
    assert not (tmp_path / "out").exists()


def test_two_modules_of_one_flat_name_raise(files):
    row = make_tunable(files)["q"]
    with pytest.raises(AdapterMismatchError, match="are both called `lora_unet_a_b`"):
        save_kohya("k", {"x": row, "y": row}, {"x": Linear("a.b"), "y": Linear("a_b")})


@pytest.mark.parametrize("form", ["kohya", "mlx", "diffusers", "peft"])
def test_convert_writes_every_format(shell, files, form):
    row = make_tunable(files)["q"]
    save_adapter("a.safetensors", {"blocks/0/to_q/kernel": row})
    shell.succeed(f"convert a.safetensors out --to {form}")
    adapter = open_adapter("out")
    assert adapter.format == form
    [written] = adapter.rows.values()
    np.testing.assert_allclose(delta_of(written), delta_of(row), rtol=1e-6)


# Names


def test_rename_fits_another_prefix(shell, files):
    module = "language_model.model.layers.0.self_attn.q_proj"
    files.peft(files.pair(module, OUT, IN), target_modules=[module])
    base = "model.language_model.layers.0.self_attn.q_proj"
    files.base({f"{base}.weight": files.draw(OUT, IN)})
    assert "has no tensor of that name" in shell.fail("verify adapter --base base")
    rename = r"--rename ^language_model\.model\. model.language_model."
    shell.succeed(f"verify adapter --base base {rename}")
    shell.succeed(f"merge adapter --base base --out merged {rename}")
    shell.succeed(f"convert adapter out --to peft {rename}")
    shell.succeed("verify out --base base")
    assert shell(f"diff adapter out {rename}").code == 0
    assert shell("diff adapter out").code == 1


def test_rename_still_reports_missing_tensors(shell, files):
    files.peft(files.pair("lm.layers.0.q_proj", OUT, IN), target_modules=["q_proj"])
    files.base({f"model.lm.layers.{k}.q_proj.weight": files.draw(OUT, IN) for k in range(2)})
    rename = r"--rename ^lm\. model.lm."
    assert "layers.1.q_proj" in shell.fail(f"verify adapter --base base {rename}")


@pytest.mark.parametrize("rename", ["--rename ( x", r"--rename a \2"])
def test_rename_of_a_bad_pattern_is_explained(shell, files, rename):
    files.peft(files.pair("a", OUT, IN), target_modules=["a"])
    assert "is not a pattern" in shell.fail(f"convert adapter out --to native {rename}")


def test_rename_to_one_name_raises(shell, files):
    files.peft(files.pair("a", OUT, IN) | files.pair("b", OUT, IN), target_modules=["a", "b"])
    assert "renamed" in shell.fail("convert adapter out --to native --rename [ab] c")


# Several adapters, and scales


@pytest.fixture
def two(files):
    deltas = []
    for name in ("one", "two"):
        pair = files.pair(Q, OUT, IN)
        files.peft(pair, name, target_modules=["q_proj"])
        deltas.append(2 * pair[f"{Q}.lora_B.weight"] @ pair[f"{Q}.lora_A.weight"])
    base = files.draw(OUT, IN)
    files.base({f"{Q}.weight": base})
    return base, *deltas


@pytest.mark.parametrize(
    ("line", "scales"),
    [
        ("one two --base base", (1, 1)),
        ("one two --base base --sum", (1, 1)),
        ("one two --base base --scale 0.5 -2", (0.5, -2)),
        ("one two --base base --scale 0.25 --sum", (0.25, 0.25)),
        ("one --base base --scale 3", (3, 0)),
    ],
)
def test_adapters_are_merged_with_their_scales(shell, files, two, line, scales):
    base, first, second = two
    shell.succeed(f"merge {line} --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    expected = base + scales[0] * first + scales[1] * second
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6)


def test_half_precision_is_rounded_once(shell, files, two):
    base, first, second = two
    files.base({f"{Q}.weight": base.astype(ml_dtypes.bfloat16)})
    shell.succeed("merge one two --base base --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    wide = base.astype(ml_dtypes.bfloat16).astype(np.float32) + first + second
    np.testing.assert_allclose(merged.astype(np.float32), wide, rtol=2**-8)


def test_scales_are_one_or_one_for_each(shell, two):
    assert "2 adapters, and there are 3 scales" in shell.fail(
        "merge one two --base base --out merged --scale 1 2 3"
    )


def test_order_counts_where_a_module_is_replaced(shell, files, two):
    _, first, _ = two
    head = files.draw(OUT, IN)
    files.peft({f"{Q}.weight": head}, "whole", target_modules=[], modules_to_save=["q_proj"])
    shell.succeed("merge one whole --base base --out m", warning="after another adapter")
    np.testing.assert_allclose(files.read("m/model.safetensors")[f"{Q}.weight"], head, rtol=1e-6)
    shell.succeed("merge whole one --base base --out n")
    merged = files.read("n/model.safetensors")[f"{Q}.weight"]
    np.testing.assert_allclose(merged, head + first, rtol=0, atol=2e-6)


# What is none of them


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_adapter.bin", b"x", "AdapterHub"),
        ("adapter_model.bin", b"x", "a pickle"),
        ("pytorch_lora_weights.bin", b"x", "a pickle"),
        ("config.json", b"{}", "folder of a model"),
        ("notes.txt", b"x", "should have one of"),
    ],
)
def test_folder_of_another_kind_raises(shell, name, content, message):
    pathlib.Path("folder").mkdir()
    pathlib.Path("folder", name).write_bytes(content)
    assert message in shell.fail("inspect folder")


def test_model_without_an_adapter_raises(shell, files):
    save({f"{Q}.weight": files.draw(OUT, IN)})
    assert "of no format that is known" in shell.fail("inspect a.safetensors")


def test_a_single_file_may_have_any_name(shell, files):
    pathlib.Path("folder").mkdir()
    save({f"{Q}.lora_A.weight": files.draw(RANK, IN), f"{Q}.lora_B.weight": files.draw(OUT, RANK)},
         "folder/style.safetensors")  # fmt: skip
    assert open_adapter("folder").format == "diffusers"


# Bad input: whatever a file of any format holds, there is an adapter, or one error of ours.

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
    "mlx": {"a.lora_a": (5, 2), "a.lora_b": (2, 6), "a.m": (6,)},
}
SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@pytest.mark.parametrize("form", TENSORS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_files_are_read_or_refused(tmp_path_factory, form, data):
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
        adapter = open_adapter(path)
    except AdapterError as error:
        assert str(error).startswith(str(folder))
    else:
        assert adapter.rows


@pytest.mark.parametrize("save_as", [save_kohya, save_mlx, save_diffusers, save_peft])
def test_an_interrupted_save_leaves_the_old_file(files, tmp_path, monkeypatch, save_as):
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
