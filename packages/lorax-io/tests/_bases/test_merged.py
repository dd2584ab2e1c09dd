"""Merged models in folders: every tensor once, bit for bit, or no folder."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    AdapterNotFoundError,
    Conv1D,
    Experts,
    Linear,
    Tensor,
    save_merged,
)
from lorax_io._disk.tensors import write_tensors

NAMES = {
    "q": Linear("h.{}.q", shared_axes=(0,)),
    "gpt2": Conv1D("gpt2"),
    "experts": Experts("mlp", parameter="up", shared_axes=(0,)),
    "norm": Tensor("norm", parameter="weight"),
    "head": Linear("head"),
}
AXES: dict[str, Any] = {"in_axes": (1,), "out_axes": (2,), "shared_axes": (0,)}


def draw(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def make_pair(dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapts `q` (three layers) and `gpt2`, freezes `experts`, and trains `norm` and `head`."""
    frozen = {
        "q": draw(3, 5, 4, dtype=dtype),
        "gpt2": draw(5, 4, dtype=dtype),
        "experts": draw(2, 5, 4, dtype=dtype),
        "norm": None,
        "head": None,
        "not an array": "text",
    }
    tunable = dict.fromkeys(frozen) | {
        "q": lorax.LoraWeight(draw(3, 5, 2), draw(3, 2, 4), rank=2, alpha=3.0, **AXES),
        "gpt2": lorax.LoraWeight(draw(5, 2), draw(2, 4), rank=2),
        "norm": draw(5),
        "head": draw(5, 7),
    }
    return frozen, tunable


def expected_tensors(frozen, tunable):
    merged = lorax.merge_params(frozen, tunable)
    layers = {f"h.{k}.q.weight": merged["q"][k].T for k in range(3)}
    return layers | {
        "gpt2.weight": merged["gpt2"],
        "mlp.up": merged["experts"],
        "norm.weight": tunable["norm"],
        "head.weight": tunable["head"].T,
    }


def assert_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "merged"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_file_contains_the_merged_model(folder, dtype):
    pair = make_pair(dtype)
    save_merged(folder, *pair, NAMES)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert_tensors(tensors, expected_tensors(*pair))
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert not np.array_equal(tensors["gpt2.weight"], pair[0]["gpt2"])


@pytest.mark.parametrize("shard_bytes", [1, 300, 500, 10**9])
def test_shards_contain_every_tensor_once(folder, shard_bytes):
    pair = make_pair()
    save_merged(folder, *pair, NAMES, shard_bytes=shard_bytes)
    expected = expected_tensors(*pair)
    sizes = {"q": 240, "gpt2": 80, "experts": 160, "norm": 20, "head": 140}
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    count = {1: 5, 300: 3, 500: 2, 10**9: 1}[shard_bytes]
    if count == 1:
        assert files == ["model.safetensors"]
        return
    assert files == [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    shards = {file: safetensors.numpy.load_file(folder / file) for file in files}
    stored = {name: file for file, shard in shards.items() for name in shard}
    assert stored == index["weight_map"]
    assert sum(map(len, shards.values())) == len(stored)
    assert_tensors({name: shards[file][name] for name, file in stored.items()}, expected)
    for shard in shards.values():
        parameters = {name.replace(".weight", "").partition(".")[0] for name in shard}
        bytes_ = sum(tensor.nbytes for tensor in shard.values())
        assert bytes_ <= shard_bytes or len(parameters) == 1


def test_large_parameter_does_not_limit_shards_of_others(folder):
    params = {"a": draw(2, 3), "b large": draw(20, 30), "c": draw(2, 3)}
    names = {path: Linear(path) for path in params}
    save_merged(folder, params, dict.fromkeys(params), names, shard_bytes=50)
    shards = [safetensors.numpy.load_file(file).keys() for file in sorted(folder.glob("*-of-*"))]
    assert shards == [{"a.weight"}, {"b large.weight"}, {"c.weight"}]


CONFIG = {"model_type": "llama", "vocab_size": 7, "é": None}


@pytest.mark.parametrize("form", ["dict", "file", "string"])
def test_config_is_written_to_the_folder_of_the_weights(folder, tmp_path, form):
    file = tmp_path / "some config.json"
    file.write_text(json.dumps(CONFIG, ensure_ascii=False), encoding="utf-8")
    config = {"dict": CONFIG, "file": file, "string": str(file)}[form]
    save_merged(folder, *make_pair(), NAMES, config=config)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == CONFIG
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_missing_config_raises_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lorax_io._bases.merged.write_tensors", pytest.fail)
    with pytest.raises(AdapterNotFoundError, match="config.json"):
        save_merged(folder, *make_pair(), NAMES, config=tmp_path / "config.json")


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError("the disk is full"), Interrupt()], ids=["full", "key"])
def test_interrupted_save_leaves_no_folder(folder, tmp_path, monkeypatch, error):
    calls = []

    def interrupted(*arguments: Any, **options: Any):
        write_tensors(*arguments, **options)
        calls.append(arguments)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr("lorax_io._bases.merged.write_tensors", interrupted)
    with pytest.raises(type(error)):
        save_merged(folder, *make_pair(), NAMES, shard_bytes=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save_merged(folder, *make_pair(), NAMES)


def test_leftovers_of_a_killed_process_are_removed(folder, tmp_path):
    unfinished = tmp_path / ".merged.unfinished"
    unfinished.mkdir()
    (unfinished / "model-00001-of-00009.safetensors").write_text("half")
    save_merged(folder, *make_pair(), NAMES)
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_nonempty_folder_raises(folder):
    folder.mkdir()
    save_merged(folder, *make_pair(), NAMES)
    before = (folder / "model.safetensors").read_bytes()
    for taken in (folder, folder / "model.safetensors"):
        with pytest.raises(AdapterError, match="already exists"):
            save_merged(taken, *make_pair(), NAMES)
    assert (folder / "model.safetensors").read_bytes() == before


def without(names, *paths):
    return {path: torch_name for path, torch_name in names.items() if path not in paths}


def with_leaves(**rows) -> tuple[dict[str, Any], dict[str, Any]]:
    frozen, tunable = make_pair()
    return {path: leaf for path, leaf in frozen.items() if path not in rows}, tunable | rows


@pytest.mark.parametrize(
    ("pair", "names", "message"),
    [
        (make_pair(), without(NAMES, "experts"), "no module for `experts`"),
        (make_pair(), NAMES | {"gpt2": Conv1D("head")}, "two parameters the tensor `head.weight`"),
        (make_pair(), NAMES | {"q": Linear("h.q", shared_axes=(0,))}, "q: needs one `{}`"),
        (with_leaves(gpt2=make_pair()[1]["gpt2"]), NAMES, "adapts `gpt2`"),
        (with_leaves(more=jnp.ones(3)), NAMES, "adapts `more`"),
    ],
    ids=["no name", "same tensor", "same layer", "no base", "not in the base"],
)
def test_incomplete_or_ambiguous_names_raise(folder, tmp_path, pair, names, message):
    frozen, tunable = pair
    with pytest.raises(AdapterMismatchError, match=message):
        save_merged(folder, frozen, tunable, names)
    assert not list(tmp_path.iterdir())


def test_nan_in_a_merged_weight_raises(folder, tmp_path):
    frozen, tunable = make_pair()
    tunable["norm"] = jnp.array([1.0, np.nan])
    with pytest.raises(AdapterError, match=r"`norm.weight` holds NaN"):
        save_merged(folder, frozen, tunable, NAMES)
    assert not list(tmp_path.iterdir())


def test_infinity_in_an_unchanged_base_is_saved(folder):
    frozen, tunable = make_pair()
    frozen["mask"] = jnp.array([0.0, -np.inf])
    tunable["mask"] = None
    save_merged(folder, frozen, tunable, NAMES | {"mask": Tensor("attn", parameter="mask")})
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(tensors["attn.mask"], [0.0, -np.inf])


def test_two_stack_entries_with_one_name_raise(folder, tmp_path):
    frozen = {"w": jnp.ones((12, 12, 3, 5))}
    names = {"w": Linear("h.{}{}", shared_axes=(0, 1))}  # the same for (1, 10) and (11, 0)
    with pytest.raises(AdapterMismatchError, match="two parameters the tensor `h.110.weight`"):
        save_merged(folder, frozen, {"w": None}, names)
    assert not list(tmp_path.iterdir())
