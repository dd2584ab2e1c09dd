"""The command `lorax`: its output, files and exit codes."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from comparing import assert_same

import lorax
from lorax_io import (
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Parameter,
    Tensor,
    load_adapter,
    load_peft,
    read_metadata,
    save_adapter,
    save_diffusers,
    save_merged,
    save_peft,
    write_names,
)
from lorax_io._command import main

# A small model with every kind of module. Only `square` is square.
SHAPES = {
    "embed/embedding": (11, 5),
    "conv/kernel": (2, 3, 5, 4),
    "h/0/q/kernel": (5, 3),
    "h/0/q/bias": (3,),
    "h/0/square/kernel": (5, 5),
    "h/0/experts/down": (4, 5, 3),
    "h/0/router/weight": (4, 5),
    "norm/weight": (5,),
    "head/kernel": (5, 7),
}
NAMES = {
    "embed/embedding": Embedding("embed"),
    "conv/kernel": Conv("conv"),
    "h/0/q/kernel": Linear("h.0.q"),
    "h/0/q/bias": Tensor("h.0.q"),
    "h/0/square/kernel": Linear("h.0.square"),
    "h/0/experts/down": Experts("h.0.experts", parameter="down", shared_axes=(0,)),
    "h/0/router/weight": Parameter("h.0.router", in_axes=(1,), out_axes=(0,)),
    "norm/weight": Tensor("norm", parameter="weight"),
    "head/kernel": Linear("head"),
}
FULL = ("h/0/q/bias", "norm/weight", "head/kernel")
PLAIN = ("h/0/q/kernel", "h/0/square/kernel")


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    """Runs each test in a temporary folder."""
    monkeypatch.chdir(tmp_path)


def make_params(paths=tuple(SHAPES), dtype: Any = np.float32):
    numbers = np.random.default_rng(0)
    return {path: numbers.normal(size=SHAPES[path]).astype(dtype) for path in paths}


def make_tunable(paths=tuple(SHAPES)) -> dict[str, Any]:
    """Factors from NumPy, since `init_lora` compiles for each shape."""
    numbers = np.random.default_rng(1)

    def row(path):
        shape, roles = SHAPES[path], NAMES[path].at(path, SHAPES[path]).axes
        shared, inputs, outputs = ([shape[axis] for axis in axes] for axes in roles)
        draw = lambda *sizes: numbers.normal(size=sizes).astype(np.float32)  # noqa: E731
        if path in FULL:
            return draw(*shape)
        a, b = draw(*shared, *inputs, 2), draw(*shared, 2, *outputs)
        axes = {"in_axes": roles.inputs, "out_axes": roles.outputs, "shared_axes": roles.shared}
        return lora(a, b, alpha=8.0, **axes)

    return {path: row(path) for path in paths}


def lorax_command(line, capsys):
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


def succeed(line, capsys):
    code, out, err = lorax_command(line, capsys)
    assert (code, err) == (0, "")
    return out


def fail(line, capsys):
    code, out, err = lorax_command(line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("lorax: ") and "Traceback" not in err
    return err


def lora(a, b, **settings: Any):
    return lorax.LoraWeight(jnp.asarray(a), jnp.asarray(b), rank=a.shape[-1], **settings)


def make_frozen(dtype: Any = np.float32):
    return {path: None if path in FULL else x for path, x in make_params(dtype=dtype).items()}


# inspect


def save_each(paths=PLAIN, metadata=None):
    tunable = make_tunable(paths)
    save_adapter("native.safetensors", tunable, metadata=metadata)
    save_peft("peft", tunable, NAMES, base_model="me/base", task_type="CAUSAL_LM")
    save_diffusers("diffusers", tunable, NAMES)
    return tunable


@pytest.mark.parametrize(
    ("adapter", "about"),
    [
        ("native.safetensors", {"format": "native", "task": "reviews"}),
        ("peft", {"format": "peft", "base": "me/base", "task": "CAUSAL_LM"}),
        ("peft/adapter_model.safetensors", {"format": "peft"}),
        ("diffusers", {"format": "diffusers"}),
        ("diffusers/pytorch_lora_weights.safetensors", {"format": "diffusers"}),
    ],
)
def test_inspect_prints_every_format(adapter, about, capsys):
    tunable = save_each(metadata={"task": "reviews"})
    report = json.loads(succeed(f"inspect {adapter} --json", capsys))
    table = succeed(f"inspect {adapter}", capsys)
    assert report.items() >= about.items()
    assert report["parameters trained"] == lorax.count_params(tunable)
    assert [line["path"] for line in report["parameters"]] == sorted(PLAIN)
    for line in report["parameters"]:
        weight = tunable[line["path"]]
        delta = lorax.materialize(jnp.zeros(SHAPES[line["path"]]), weight)
        assert (line["kind"], line["dtype"]) == ("lora", "float32")
        assert (line["rank"], line["alpha"], line["scale"]) == (2, 8, 4)
        assert line["shapes"] == [list(weight.a.shape), list(weight.b.shape)]
        assert line["norm"] == pytest.approx(float(jnp.linalg.norm(delta)))
        assert line["path"] in table
    assert all(f"{key}: {value}" in table for key, value in about.items())
    assert "5×2 · 2×3" in table


def test_inspect_prints_every_kind_of_parameter(capsys):
    tunable = make_tunable()
    save_peft("peft", tunable, NAMES)
    lines = json.loads(succeed("inspect peft --json", capsys))["parameters"]
    kinds = {line["path"]: line["kind"] for line in lines}
    # A fully saved weight is a plain tensor, since a native file does not contain module types.
    expected = {path: "full" if path in FULL else "lora" for path in SHAPES if "head" not in path}
    assert kinds == expected | {"head/weight": "full"}
    for line in lines:
        if line["kind"] == "lora":
            path = line["path"]
            delta = lorax.materialize(jnp.zeros(SHAPES[path]), tunable[path])
            assert line["norm"] == pytest.approx(float(jnp.linalg.norm(delta)))


@pytest.mark.parametrize("path", ["[red]w", "layers/:warning:", "a" * 200])
def test_inspect_prints_names_unchanged(path, capsys):
    save_adapter("a.safetensors", {path: jnp.ones(3)}, metadata={"[bold]": ":smile:"})
    out = succeed("inspect a.safetensors", capsys)
    assert path in out and "[bold]: :smile:" in out


def test_norm_of_complex_factors(capsys):
    a, b = jnp.array([[3j], [4]], jnp.complex64), jnp.array([[1j, 1]], jnp.complex64)
    save_adapter("a.safetensors", {"w": lorax.LoraWeight(a, b, rank=1), "z": a})
    lines = json.loads(succeed("inspect a.safetensors --json", capsys))["parameters"]
    assert [line["norm"] for line in lines] == pytest.approx([50**0.5, 5])


# verify


def save_torch_base(paths=tuple(SHAPES), prefix="", dtype: Any = np.float32):
    """Writes a base in PyTorch's format."""
    params = make_params(paths, dtype)
    tensors = {f"{prefix}{torch_name(path)}": to_torch(path, x) for path, x in params.items()}
    safetensors.numpy.save_file(tensors, "base.safetensors")
    return tensors


def torch_name(path):
    return f"{NAMES[path].module}.{NAMES[path].parameter}"


def to_torch(path, array):
    name = NAMES[path]
    if isinstance(name, Conv):
        array = array.transpose(3, 2, 0, 1)
    elif isinstance(name, Linear):
        array = array.T
    return np.ascontiguousarray(array)


@pytest.mark.parametrize("adapter", ["native.safetensors", "peft", "diffusers"])
def test_verify_accepts_a_complete_adapter(adapter, capsys):
    save_each()
    assert succeed(f"verify {adapter}", capsys) == f"{adapter}: 2 parameters, OK\n"


def test_verify_accepts_an_adapter_that_fits_its_base(capsys):
    save_each()
    save_torch_base()
    safetensors.numpy.save_file(make_params(), "flat.safetensors")
    for line in ("peft --base base", "diffusers --base base", "native.safetensors --base flat"):
        assert ", OK, fits" in succeed(f"verify {line}.safetensors", capsys)


def with_nan(content):
    content[-4:] = np.float32(np.nan).tobytes()
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "not a safetensors file"),
        (lambda content: b"", "not a safetensors file"),
        (with_nan, "NaN or infinity"),
    ],
    ids=["truncated", "empty", "nan"],
)
@pytest.mark.parametrize(
    "file",
    [
        "native.safetensors",
        "peft/adapter_model.safetensors",
        "diffusers/pytorch_lora_weights.safetensors",
    ],
)
def test_verify_rejects_a_damaged_file(file, change, message, capsys):
    save_each()
    file = pathlib.Path(file)
    file.write_bytes(change(bytearray(file.read_bytes())))
    assert message in fail(f"verify {file}", capsys)


@pytest.mark.parametrize("adapter", ["native.safetensors", "peft", "diffusers"])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"other.weight": np.ones((3, 5), np.float32)}, "has no tensor of that name"),
        ({"h.0.q.weight": np.ones((6, 6), np.float32)}, " of shape "),
    ],
    ids=["names", "shapes"],
)
def test_verify_rejects_a_mismatched_base(adapter, base, message, capsys):
    save_each(paths=PLAIN[:1])
    if adapter == "native.safetensors":
        base = {"h/0/q/kernel" if name == "h.0.q.weight" else name: x for name, x in base.items()}
    safetensors.numpy.save_file(base, "base.safetensors")
    assert message in fail(f"verify {adapter} --base base.safetensors", capsys)


def test_verify_rejects_a_base_with_another_fingerprint(capsys):
    params = make_params(PLAIN)
    save_adapter("a.safetensors", make_tunable(PLAIN), base=params)
    safetensors.numpy.save_file(params, "base.safetensors")
    succeed("verify a.safetensors --base base.safetensors", capsys)
    safetensors.numpy.save_file(make_params(), "base.safetensors")
    message = "belongs to another base"
    assert message in fail("verify a.safetensors --base base.safetensors", capsys)


def test_verify_warns_about_another_dtype(capsys):
    save_adapter("a.safetensors", make_tunable(PLAIN), base=make_params(PLAIN))
    safetensors.numpy.save_file(make_params(PLAIN, np.float16), "base.safetensors")
    code, _, err = lorax_command("verify a.safetensors --base base.safetensors", capsys)
    assert code == 0
    assert err.startswith("lorax: warning: ") and "other dtypes" in err


def change_config(**values):
    file = pathlib.Path("peft/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_warning_is_printed_once(capsys):
    save_peft("peft", make_tunable(PLAIN), NAMES)
    change_config(some_news=1)
    save_torch_base(PLAIN)
    code, _, err = lorax_command("verify peft --base base.safetensors", capsys)
    assert (code, err.count("some_news")) == (0, 1)


# diff


def difference(first, second, capsys):
    save_adapter("first.safetensors", first)
    save_adapter("second.safetensors", second)
    line = "diff first.safetensors second.safetensors"
    code, out, err = lorax_command(f"{line} --json", capsys)
    assert (lorax_command(line, capsys)[0], err) == (code, "")
    rows = json.loads(out, parse_constant=pytest.fail)
    assert code == (1 if rows else 0)
    return [tuple(row.values()) for row in rows]


EXPERT_AXES = {"in_axes": (1,), "out_axes": (2,), "shared_axes": (0,)}
A, B = np.eye(5, 2, dtype=np.float32), np.eye(2, 3, dtype=np.float32)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"w": lora(A, B)}, {"w": lora(A, B)}, []),
        (
            {"w": lora(A, B, alpha=2.0)},
            {"w": lora(A, B, alpha=3.0)},
            ("w", "alpha 2.0 and 3.0", 0.5),
        ),
        ({"w": lora(A, B)}, {"w": lora(A, 1.25 * B)}, ("w", "numbers", 0.25)),
        ({"w": lora(A, B)}, {"w": lora(2 * A, B / 2)}, ("w", "numbers", 0)),
        ({"w": lora(A, 0 * B)}, {"w": lora(A, B)}, ("w", "numbers", None)),
        ({"w": lora(A, B)}, {"w": lora(A[:, :1], B[:1])}, ("w", "rank 2 and 1", 0.5**0.5)),
        ({"w": lora(A, B)}, {"w": lora(A[:4], B)}, ("w", "numbers", None)),
        ({"w": lora(A, B)}, {"w": jnp.ones((5, 3))}, ("w", "kind lora and full", None)),
        ({"w": jnp.ones(4)}, {"w": jnp.full(4, 1.5)}, ("w", "numbers", 0.5)),
        ({"w": jnp.zeros(1)}, {"w": -jnp.zeros(1)}, ("w", "numbers", 0)),
        ({"w": jnp.ones(4)}, {"w": jnp.ones(4, jnp.bfloat16)}, ("w", "numbers", 0)),
        ({"w": jnp.ones(4), "v": A}, {"w": jnp.ones(4)}, ("v", "only in the first", None)),
        ({"w": jnp.ones(4)}, {"w": jnp.ones(4), "v": A}, ("v", "only in the second", None)),
    ],
    ids=[
        "same",
        "alpha",
        "numbers",
        "same delta",
        "first is zero",
        "rank",
        "shape",
        "kind",
        "full",
        "sign of zero",
        "dtype",
        "first only",
        "second only",
    ],
)
def test_diff_reports_each_difference_and_its_size(first, second, expected, capsys):
    differences = difference(first, second, capsys)
    assert len(differences) == bool(expected)
    for path, description, relative in differences:
        assert expected[0] == path and expected[1] in description
        assert relative == (None if expected[2] is None else pytest.approx(expected[2], abs=1e-6))


def test_diff_prints_a_table(capsys):
    save_adapter("first.safetensors", {"w": lora(A, B)})
    save_adapter("second.safetensors", {"w": lora(A, 1.25 * B)})
    code, out, _ = lorax_command("diff first.safetensors second.safetensors", capsys)
    assert code == 1 and "numbers" in out and "0.25" in out
    out = succeed("diff first.safetensors first.safetensors", capsys)
    assert out == "the same 1 parameters, bit for bit\n"
    fail("diff first.safetensors third.safetensors", capsys)


def test_diff_compares_formats(capsys):
    save_each()
    succeed("diff native.safetensors peft", capsys)
    succeed("diff peft diffusers", capsys)


# convert


def test_convert_roundtrip_is_bit_identical(capsys):
    tunable = make_tunable()
    save_adapter("a.safetensors", tunable, metadata={"task": "x"})
    write_names("names.json", NAMES)
    succeed("convert a.safetensors peft --to peft --names names.json", capsys)
    _, loaded = load_peft("peft", make_params(), NAMES)
    assert_same(loaded, tunable)
    succeed("convert peft b.safetensors --to native --names names.json", capsys)
    assert_same(load_adapter("b.safetensors", like=tunable), tunable)
    succeed("diff a.safetensors b.safetensors", capsys)
    succeed("convert a.safetensors c.safetensors --to native", capsys)
    assert read_metadata("c.safetensors") == {"task": "x"}


@pytest.mark.parametrize("path", SHAPES)
def test_convert_without_names_uses_flax_names(path, capsys):
    paths = {path, "h/0/q/kernel"}
    tunable = make_tunable(tuple(sorted(paths)))
    save_peft("peft", tunable, NAMES)
    succeed("convert peft a.safetensors --to native", capsys)
    if path == "head/kernel":  # a full matrix, whose module type is unknown
        tunable = {"head/weight": tunable.pop("head/kernel").T, **tunable}
    assert_same(load_adapter("a.safetensors", like=tunable), tunable)


def test_convert_reads_stacked_layers_and_experts(capsys):
    names = {
        "q": Linear("h.{}.q", shared_axes=(0,)),
        "up": Experts("h.{}.mlp", parameter="up", shared_axes=(0, 1), swapped=False),
        "norm": Tensor("h.{}.norm", parameter="weight", shared_axes=(0,)),
        "k": Linear("h.{}.k", shared_axes=(0,), numbers=(4, 1)),
    }
    draw = lambda *sizes: np.random.default_rng(0).normal(size=sizes)  # noqa: E731
    q = lora(draw(3, 5, 1), draw(3, 1, 2), in_axes=(1,), out_axes=(2,), shared_axes=(0,))
    up = lora(draw(3, 4, 5, 1), draw(3, 4, 1, 2), in_axes=(2,), out_axes=(3,), shared_axes=(0, 1))
    k = lora(draw(2, 5, 1), draw(2, 1, 3), in_axes=(1,), out_axes=(2,), shared_axes=(0,))
    tunable = {"q": q, "up": up, "norm": jnp.ones((3, 5)), "k": k}
    save_peft("peft", tunable, names)
    write_names("names.json", names)
    succeed("convert peft a.safetensors --to native --names names.json", capsys)
    assert_same(load_adapter("a.safetensors", like=tunable), tunable)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"q": Linear("h.0.k")}, "is not in `names`"),
        ({"q": Linear("h.0.q", out_axes=(1, 2))}, "load_peft"),
        ({"q": Tensor("h.0.q")}, "is not in `names`"),
        ({"q": Linear("{}.0.q", shared_axes=(0,))}, "is not in `names`"),
        ({"q": Linear("h.{}.q", shared_axes=(0,))}, "lacks some of the modules"),
        ({"q": Linear("h.{}.q", shared_axes=(0,), numbers=(0, 2))}, "lacks `h.2.q`"),
    ],
    ids=["module", "heads", "type", "no number", "gap", "numbers"],
)
def test_convert_rejects_names_that_do_not_match(names, message, capsys):
    tunable = make_tunable(PLAIN[:1])
    module = "h.1000000.q" if message.startswith("lacks some") else "h.0.q"
    save_peft("peft", tunable, {"h/0/q/kernel": Linear(module)})
    write_names("names.json", names)
    assert message in fail("convert peft a.safetensors --to native --names names.json", capsys)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_convert_folds_the_scale(to, capsys):
    tunable = make_tunable(PLAIN)
    save_adapter("a.safetensors", tunable)
    succeed(f"convert a.safetensors out --to {to} --fold-scale", capsys)
    lines = json.loads(succeed("inspect out --json", capsys))["parameters"]
    assert {line["scale"] for line in lines} == {1.0}
    _, out, _ = lorax_command("diff a.safetensors out --json", capsys)
    for row in json.loads(out):
        assert row["difference"] == "alpha 8.0 and 2" and row["relative"] < 1e-6


def test_convert_to_diffusers_and_back(capsys):
    tunable = save_each()
    succeed("convert native.safetensors d --to diffusers --prefix unet", capsys)
    tensors = safetensors.numpy.load_file("d/pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.h.0.") for name in tensors)
    succeed("convert d b.safetensors --to native", capsys)
    assert_same(load_adapter("b.safetensors", like=tunable), tunable)


def test_convert_keeps_the_base_name_of_a_peft_folder(capsys):
    save_peft(
        "a", make_tunable(PLAIN), NAMES, base_model="me/m", revision="v1", task_type="SEQ_CLS"
    )
    keys = ("base_model_name_or_path", "revision", "task_type")
    for options, expected in {
        "": ("me/m", "v1", "SEQ_CLS"),
        "--base-model me/n": ("me/n", None, "SEQ_CLS"),
        "--task-type CAUSAL_LM": ("me/m", "v1", "CAUSAL_LM"),
    }.items():
        succeed(f"convert a b --to peft {options}", capsys)
        config = json.loads(pathlib.Path("b/adapter_config.json").read_text())
        assert tuple(config[key] for key in keys) == expected


# merge


def merged_by_library(tunable, dtype: Any = np.float32):
    """The tensors that `save_merged` writes."""
    save_merged("expected", make_frozen(dtype), tunable, NAMES)
    return safetensors.numpy.load_file("expected/model.safetensors")


def assert_tensors(actual, expected, rounding=0.0):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        bound = rounding * np.abs(tensor.astype(np.float64)).max()
        np.testing.assert_allclose(
            actual[name].astype(np.float64), tensor, rtol=0, atol=bound, err_msg=name
        )


# PyTorch has another order of axes, so products are summed in another order.
ROUNDING = 4 * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_merge_equals_save_merged_up_to_rounding(prefix, dtype, capsys):
    tunable = make_tunable()
    tunable |= {path: tunable[path].astype(dtype) for path in FULL}
    save_peft("peft", tunable, NAMES)
    base = save_torch_base(prefix=prefix, dtype=jnp.dtype(dtype))
    expected = merged_by_library(tunable, dtype=jnp.dtype(dtype))
    out = succeed("merge peft --base base.safetensors --out merged", capsys)
    assert out == "merged: 9 tensors, 9 of them adapted\n"
    tensors = safetensors.numpy.load_file("merged/base.safetensors")
    assert_tensors(tensors, {prefix + name: x for name, x in expected.items()}, ROUNDING)
    # The merged model differs from the base; otherwise copies would pass.
    assert all((tensors[name] != base[name]).any() for name in tensors if "embed" in name)


def test_merge_recognizes_weights_of_gpt2(capsys):
    paths = ("h/0/q/kernel", "h/0/square/kernel")
    tunable = make_tunable(paths)
    names = {path: Conv1D(NAMES[path].module) for path in paths}
    save_peft("peft", tunable, names)
    params = make_params(paths)
    tensors = {torch_name(path): x for path, x in params.items()}
    safetensors.numpy.save_file(tensors, "base.safetensors")
    save_merged("expected", params, tunable, names)
    succeed("merge peft --base base.safetensors --out merged", capsys)
    merged = safetensors.numpy.load_file("merged/base.safetensors")
    assert_tensors(merged, safetensors.numpy.load_file("expected/model.safetensors"), ROUNDING)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("out_first", [False, True])
def test_merge_infers_the_axes_of_experts(out_first, swapped, capsys):
    path = "h/0/experts/down"
    experts = Experts(
        "h.0.experts", parameter="down", shared_axes=(0,), swapped=swapped, out_first=out_first
    )
    tunable = make_tunable((path,))
    save_peft("peft", tunable, {path: experts})
    params = make_params((path,))
    save_merged("expected", params, tunable, {path: experts})
    base = params[path].swapaxes(1, 2) if out_first else params[path]
    safetensors.numpy.save_file({torch_name(path): base.copy()}, "base.safetensors")
    succeed("merge peft --base base.safetensors --out merged", capsys)
    tensors = safetensors.numpy.load_file("merged/base.safetensors")
    expected = safetensors.numpy.load_file("expected/model.safetensors")
    np.testing.assert_allclose(tensors[torch_name(path)], expected[torch_name(path)], rtol=1e-6)


def test_merge_recognizes_experts_by_name_suffix(capsys):
    path = "h/0/experts/down"
    save_peft("peft", make_tunable((path,)), NAMES)
    change_config(target_parameters=["experts.down"])
    save_torch_base((path,))
    succeed("merge peft --base base.safetensors --out merged", capsys)


def make_base_folder(files=2):
    """A base folder like those of transformers: shards, index, config, tokenizer, and a pickle."""
    tensors = save_torch_base()
    folder = pathlib.Path("base")
    folder.mkdir()
    shards = [f"model-{k + 1:05}-of-{files:05}.safetensors" for k in range(files)]
    weight_map = {name: shards[k % files] for k, name in enumerate(sorted(tensors))}
    for shard in shards:
        part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
        safetensors.numpy.save_file(part, folder / shard, {"format": "pt"})
    texts = {
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}),
        "config.json": '{"model_type": "tiny"}',
        "tokenizer.json": "{}",
        "merges.txt": "a b",
        "tokenizer.model": "m",
        "chat_template.jinja": "{{ x }}",
        "modeling_custom.py": "",
        "vocabulary.tiktoken": "IQ== 0",
        "pytorch_model.bin": "pickle",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return weight_map, texts


def test_merge_keeps_the_shards_and_the_other_files(tmp_path, capsys):
    tunable = make_tunable()
    save_peft("peft", tunable, NAMES)
    weight_map, texts = make_base_folder()
    expected = merged_by_library(tunable)
    succeed("merge peft --base base --out merged", capsys)
    out = tmp_path / "merged"
    copied = {name: text for name, text in texts.items() if name != "pytorch_model.bin"}
    assert {file.name for file in out.iterdir()} == {*copied, *weight_map.values()}
    assert {name: (out / name).read_text() for name in copied} == copied
    shards = {name: safetensors.numpy.load_file(out / file) for name, file in weight_map.items()}
    assert_tensors({name: shard[name] for name, shard in shards.items()}, expected, ROUNDING)
    with safetensors.safe_open(out / weight_map["norm.weight"], "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_merge_of_a_native_adapter_and_base(capsys):
    frozen, tunable = make_frozen(), make_tunable()
    save_adapter("a.safetensors", tunable, base=frozen)
    safetensors.numpy.save_file(make_params(), "base.safetensors")
    succeed("merge a.safetensors --base base.safetensors --out merged", capsys)
    tensors = safetensors.numpy.load_file("merged/base.safetensors")
    assert_tensors(tensors, jax.tree.map(np.asarray, lorax.merge_params(frozen, tunable)))


@pytest.mark.parametrize("exists", ["file", "folder"])
def test_merge_into_an_existing_folder_raises(exists, tmp_path, capsys):
    save_peft("peft", make_tunable(PLAIN), NAMES)
    save_torch_base(PLAIN)
    out = tmp_path / "merged"
    if exists == "folder":
        out.mkdir()
        out = out / "notes.txt"
    out.write_text("mine")
    assert "already exists" in fail("merge peft --base base.safetensors --out merged", capsys)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"h.0.q.weight": np.ones((5, 5), np.float32)}, "the parameter takes"),
        ({"a.h.0.q.weight": A, "b.h.0.q.weight": A}, "has no tensor of that name"),
        ({"h.0.q.weight": np.ones((3, 5), np.int8)}, "int8"),
    ],
    ids=["shape", "two prefixes", "integers"],
)
def test_merge_rejects_a_mismatched_base(tensors, message, tmp_path, capsys):
    save_peft("peft", make_tunable(PLAIN[:1]), NAMES)
    safetensors.numpy.save_file(tensors, "base.safetensors")
    assert message in fail("merge peft --base base.safetensors --out merged", capsys)
    assert {file.name for file in tmp_path.iterdir()} == {"peft", "base.safetensors"}


def test_merge_rejects_square_experts(capsys):
    names = {"e": Experts("experts", parameter="up", shared_axes=(0,))}
    weight = lora(jnp.ones((4, 3, 1)), jnp.ones((4, 1, 3)), **EXPERT_AXES)
    save_peft("peft", {"e": weight}, names)
    safetensors.numpy.save_file({"experts.up": np.ones((4, 3, 3))}, "base.safetensors")
    assert "its axes are ambiguous" in fail(
        "merge peft --base base.safetensors --out merged", capsys
    )


# Errors


@pytest.mark.parametrize(
    "line",
    [
        "inspect nowhere",
        "verify nowhere",
        "diff nowhere nowhere",
        "convert nowhere out --to native",
        "merge nowhere --base nowhere --out merged",
        "inspect text.txt",
        "inspect empty",
        "inspect plain.safetensors",
        "verify peft --base nowhere",
        "verify peft --base empty",
        "verify peft --base bad",
        "convert peft out --to native --names nowhere.json",
        "convert peft out --to native --names latin.json",
        "convert peft empty --to native",
        "convert conv.safetensors out --to peft",
        "convert full.safetensors out --to peft --names names.json",
    ],
)
def test_errors_print_one_message(line, tmp_path, capsys):
    save_peft("peft", make_tunable(PLAIN), NAMES)
    save_adapter("conv.safetensors", make_tunable(("conv/kernel",)))
    save_adapter("full.safetensors", make_tunable(("norm/weight",)))
    write_names("names.json", NAMES)
    safetensors.numpy.save_file({"w": A}, "plain.safetensors")
    (tmp_path / "text.txt").write_text("no adapter")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    for folder in ("empty", "bad"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / "model.safetensors.index.json").write_bytes(b'{"\xe9": 1}')
    before = set(tmp_path.rglob("*"))
    fail(line, capsys)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "line",
    ["", "prune a", "inspect", "diff one", "convert a b", "convert a b --to onnx", "merge a"],
)
def test_invalid_usage_prints_usage(line, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: lorax") and "error: " in err


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert", "merge"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: lorax {command}" in capsys.readouterr().out


def test_command_runs_as_a_program():
    save_adapter("first.safetensors", {"w": jnp.ones(3)})
    save_adapter("second.safetensors", {"w": jnp.zeros(3)})
    command = [sys.executable, "-m", "lorax_io._cli", "diff", "first.safetensors"]
    done = subprocess.run([*command, "second.safetensors"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "") and "numbers" in done.stdout


def test_command_is_installed():
    [script] = importlib.metadata.entry_points(group="console_scripts", name="lorax")
    assert script.load() is main


def test_control_characters_in_names_are_escaped(tmp_path, capsys):
    save_adapter(tmp_path / "a.safetensors", {"\x1b[2J": jnp.ones(3)})
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and r"\x1b[2J" in out
