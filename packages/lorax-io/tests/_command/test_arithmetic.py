"""`lorax combine`, `lorax resize` and `lorax extract`."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import Linear, load_peft, open_adapter, save_adapter, save_peft

NAMES = {"q/kernel": Linear("model.q"), "v/kernel": Linear("model.v")}
SHAPES = {"q/kernel": (7, 5), "v/kernel": (7, 9)}


def adapter(seed, rank=2, alpha=None):
    numbers = np.random.default_rng(seed)
    draw = lambda *sizes: jnp.asarray(numbers.normal(size=sizes), jnp.float32)  # noqa: E731
    return {
        path: lorax.LoraWeight(draw(fan_in, rank), draw(rank, fan_out), rank, alpha)
        for path, (fan_in, fan_out) in SHAPES.items()
    }


def deltas(tunable):
    zeros = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    absent = {path: tunable.get(path) for path in zeros}
    return lorax.merge_params(zeros, absent)


def save_two():
    one, two = adapter(0, 2, 4.0), adapter(1, 3)
    save_peft("one", one, NAMES, base_model="me/base", task_type="CAUSAL_LM")
    save_peft("two", two, NAMES)
    return one, two


def read(folder) -> Any:
    params = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    return load_peft(folder, params, NAMES)[1]


def assert_close(actual, expected, tolerance=1e-5):
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], rtol=1e-4, atol=tolerance)


def test_combine_writes_the_weighted_sum_in_the_first_format(shell):
    one, two = save_two()
    out = shell.succeed("combine one two --out both --weights 0.5 -2")
    assert "both: 2 parameters" in out and "from the weighted sum" in out
    expected = jax.tree.map(lambda x, y: 0.5 * x - 2 * y, deltas(one), deltas(two))
    assert_close(deltas(read("both")), expected)
    opened = open_adapter("both")
    assert opened.config is not None and opened.config.base_model_name_or_path == "me/base"


@pytest.mark.parametrize(
    "options",
    [
        "--method svd --rank 2",
        "--method ties_svd --density 0.5",
        "--method dare_linear_svd --density 0.5 --seed 3",
    ],
)
def test_combine_by_other_methods_and_formats(shell, options):
    save_two()
    shell.succeed(f"combine one two --out both.safetensors --to native {options}")
    words = options.replace("--", "").split()
    settings: dict[str, Any] = dict(zip(words[::2], words[1::2], strict=True))
    key = jax.random.key(int(settings.pop("seed", 0)))
    numbers = {"rank": int, "density": float}
    settings = {k: numbers.get(k, str)(v) for k, v in settings.items()}
    adapters = {"1. one": (read("one"), 1.0), "2. two": (read("two"), 1.0)}
    expected, _ = lorax.combine_adapters(adapters, **settings, key=key)
    combined_rows = open_adapter("both.safetensors").rows
    paths = {"model/q/kernel": "q/kernel", "model/v/kernel": "v/kernel"}
    assert combined_rows.keys() == paths.keys()
    # Random masks depend on the path.
    if "dare" not in options:
        assert_close(deltas({paths[p]: w for p, w in combined_rows.items()}), deltas(expected))


def test_combine_disjoint_adapters(shell):
    save_two()
    save_adapter("other.safetensors", {"x": adapter(0)["q/kernel"]})
    assert "adapts no parameter that one adapts" in shell.fail(
        "combine one other.safetensors --out both"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("combine one two --out x --weights 1", "2 adapters, but --weights has 1 numbers"),
        ("combine one two --out x --method cat", "not one of concatenate"),
        ("combine one two --out x --method linear", "needs equal ranks"),
        ("combine one two --out x --method ties", "needs a density"),
        ("resize one x", "give a rank, an energy or a tolerance"),
        ("resize one x --energy 2", "from 0 to 1"),
        ("extract --base a --tuned b --out x --rank 2 --to peft --targets (", "regular expression"),
    ],
)
def test_invalid_settings_raise(shell, line, message):
    save_two()
    assert message in shell.fail(line)


def test_resize_to_a_lower_rank(shell):
    _, two = save_two()
    assert "from the original" in shell.succeed("resize two small --rank 1")
    expected, _ = lorax.resize_adapter(two, 1)
    resized = read("small")
    assert resized["q/kernel"].rank == 1
    assert_close(deltas(resized), deltas(expected))
    shell.succeed("combine one two --out both")
    shell.succeed("resize both resized --tolerance 1e-6")
    assert read("resized")["q/kernel"].rank == 5  # all that the matrix has


def write(path, tensors):
    path.parent.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def tuned(shell, tmp_path):
    """A base and its fine-tuned version, with an embedding and a convolution."""
    numbers = np.random.default_rng(3)
    draw = lambda *sizes: numbers.normal(size=sizes).astype(np.float32)  # noqa: E731
    base = {
        "model.embed_tokens.weight": draw(11, 7),
        "model.q.weight": draw(5, 7),
        "model.conv.weight": draw(6, 4, 3, 2),
        "model.norm.weight": draw(7),
    }
    a, b = draw(7, 2), draw(2, 5)
    window, out = draw(3, 2, 4, 2), draw(2, 6)
    after = base | {
        "model.q.weight": base["model.q.weight"] + (a @ b).T,
        "model.conv.weight": base["model.conv.weight"] + np.einsum("hwir,ro->oihw", window, out),
    }
    write(tmp_path / "base" / "model.safetensors", base)
    write(tmp_path / "tuned" / "model.safetensors", after)
    return base, after


def test_extracted_adapter_restores_the_fine_tuned_model(shell, tuned, tmp_path):
    out = shell.succeed("extract --base base --tuned tuned --out extracted --rank 2 --to peft")
    assert "extracted: 2 parameters" in out
    shell.succeed("merge extracted --base base --out merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    for name, expected in tuned[1].items():
        np.testing.assert_allclose(merged[name], expected, rtol=1e-4, atol=1e-5)


def test_missing_modules_are_named(shell, tuned, tmp_path):
    after = tuned[1] | {
        "model.embed_tokens.weight": tuned[1]["model.embed_tokens.weight"] * 2,
        "model.norm.weight": tuned[1]["model.norm.weight"] * 2,
    }
    write(tmp_path / "more" / "model.safetensors", after)
    line = "extract --base base --tuned more --out extracted --rank 2 --to peft --energy 0.9"
    code, _, err = shell(line)
    assert code == 0
    assert "`model.embed_tokens.weight`" in err and "`model.norm.weight`" in err
    code, _, err = shell(line.replace("extracted", "one") + r" --targets model\.q")
    assert code == 0 and "`model.conv.weight`" in err
    assert list(open_adapter("one").rows) == ["model/q/kernel"]


def test_extract_from_conv1d(shell, tuned, tmp_path):
    turned = {name: tuned[k]["model.q.weight"].T.copy() for k, name in enumerate(("base", "tuned"))}
    for name, matrix in turned.items():
        write(tmp_path / f"{name}1d" / "model.safetensors", {"c_attn.weight": matrix})
    shell.succeed(
        "extract --base base1d --tuned tuned1d --out extracted --rank 2 --to peft --fan-in-fan-out"
    )
    shell.succeed("merge extracted --base base1d --out merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(merged["c_attn.weight"], turned["tuned"], rtol=1e-4, atol=1e-5)


def test_extract_errors(shell, tuned, tmp_path):
    base, after = tuned
    line = "extract --base base --tuned other --out extracted --rank 2 --to peft"
    for other, message in (
        (base, "does not differ from the base in any module"),
        ({k: v for k, v in after.items() if "norm" not in k}, "`model.norm.weight` is (7,)"),
        (after | {"model.q.weight": np.ones((5, 8), np.float32)}, "is not the same model"),
        (after | {"model.q.weight": after["model.q.weight"] * np.nan}, "model.q.weight"),
    ):
        write(tmp_path / "other" / "model.safetensors", other)
        assert message in shell.fail(line)
        assert not (tmp_path / "extracted").exists()


def test_extract_from_half_precision(shell, tuned, tmp_path):
    for name, tensors in zip(("base", "tuned"), tuned, strict=True):
        narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
        write(tmp_path / f"{name}16" / "model.safetensors", narrow)
    shell.succeed("extract --base base16 --tuned tuned16 --out extracted --rank 4 --to peft")
    extracted = open_adapter("extracted").rows["model/q/kernel"]
    assert extracted.rank == 4 and extracted.a.dtype == np.float32
