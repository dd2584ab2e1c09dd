"""KerasHub files: round trips, detection by content, and invalid files."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    Conv,
    Linear,
    UnsupportedAdapterError,
    load_adapter,
    load_any,
    open_adapter,
    save_keras,
)

h5py = pytest.importorskip("h5py")

AXES: dict[str, Any] = {"in_axes": (0, 1), "out_axes": (2,)}
PARAMS = {"query": jnp.ones((16, 4, 6)), "out": jnp.ones((24, 5))}
NAMES = {"query": Linear("11", **AXES), "out": Linear("3")}
KERNEL = "lora/3/vars/lora_kernel_"


def make(alpha=None, rank=3, spec=None):
    spec = spec or {"query": LoraSpec(rank, alpha, **AXES), "out": LoraSpec(rank, alpha)}
    frozen, tunable = lorax.init_lora(PARAMS, spec, jax.random.key(0), b_init="gaussian")
    return lorax.Pair(frozen, tunable)


@pytest.mark.parametrize("alpha", [None, 7])
def test_file_round_trips(tmp_path, alpha):
    pair, file = make(alpha), tmp_path / "a.lora.h5"
    save_keras(file, pair.tunable, NAMES)
    loaded = load_any(file, PARAMS, NAMES)
    assert {row.scale for row in loaded.tunable.values()} == {1}
    for path, weight in lorax.merge_params(pair).items():
        np.testing.assert_allclose(lorax.merge_params(loaded)[path], weight, rtol=1e-6)
    with h5py.File(file) as read:
        assert read["lora/vars/rank"][()] == 3
        assert read["lora/11/vars/lora_kernel_a"].shape == (16, 4, 3)
        assert read["lora/11/vars/lora_kernel_b"].shape == (3, 6)
    assert not [other for other in tmp_path.iterdir() if other != file]


def test_command_inspects_and_converts(shell, files):
    save_keras("a.lora.h5", make().tunable, NAMES)
    text = shell.succeed("inspect a.lora.h5")
    assert "format: keras" in text and "rank: 3" in text and "scale: 1.0" in text
    shell.succeed("convert a.lora.h5 adapter --to peft")
    shell.succeed("convert adapter b.lora.h5 --to keras")
    converted = open_adapter("b.lora.h5")
    assert {torch_name.module for torch_name in converted.names.values()} == {"11", "3"}


REFUSED = {
    "two ranks": (
        {"query": LoraSpec(3, **AXES), "out": LoraSpec(2)},
        NAMES,
        UnsupportedAdapterError,
        "one rank",
    ),
    "another kind": (
        {"query": lorax.IA3Spec(**AXES), "out": LoraSpec(2)},
        NAMES,
        UnsupportedAdapterError,
        "plain LoRA",
    ),
    "other axes": (
        {"query": LoraSpec(3, in_axes=(0,), out_axes=(1, 2)), "out": LoraSpec(3)},
        NAMES,
        UnsupportedAdapterError,
        "the last axis of a kernel",
    ),
    "an invalid name": (
        None,
        NAMES | {"out": Linear("output")},
        AdapterMismatchError,
        "number of a layer",
    ),
    "a convolution": (None, NAMES | {"out": Conv("3")}, AdapterMismatchError, "not a Linear"),
    "a duplicate number": (None, NAMES | {"out": Linear("11")}, AdapterMismatchError, "two param"),
    "no name": (None, {"out": Linear("3")}, AdapterMismatchError, "no module for `query`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_features_raise(tmp_path, case):
    spec, names, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        save_keras(tmp_path / "a.lora.h5", make(spec=spec).tunable, names)
    assert not list(tmp_path.iterdir())


def damage(file, change):
    save_keras(file, make().tunable, NAMES)
    with h5py.File(file, "r+") as opened:
        change(opened)


def put(name, array):
    def change(file):
        if name in file:
            del file[name]
        if array is not None:
            file[name] = array

    return change


def link(target):
    def change(file):
        del file[f"{KERNEL}a"]
        file[f"{KERNEL}a"] = target

    return change


def compressed(file):
    del file[f"{KERNEL}a"]
    file.create_dataset(f"{KERNEL}a", (24, 3), np.float32, compression="gzip", fillvalue=1)


def without_numbers(file):
    del file[f"{KERNEL}a"]
    file.create_dataset(f"{KERNEL}a", (24, 3), np.float32)


ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
DAMAGE = {
    "no rank": put("lora/vars/rank", None),
    "a text rank": put("lora/vars/rank", "3"),
    "a zero rank": put("lora/vars/rank", 0),
    "a fractional rank": put("lora/vars/rank", 2.5),
    "several ranks": put("lora/vars/rank", np.array([3, 3])),
    "another rank": put("lora/vars/rank", 2),
    "one kernel": put(f"{KERNEL}b", None),
    "no kernels": put("lora/3", None),
    "a kernel with one axis": put(f"{KERNEL}a", ones(3)),
    "a second kernel with three axes": put(f"{KERNEL}b", ones(3, 2, 5)),
    "an empty kernel": put(f"{KERNEL}a", ones(0, 3)),
    "integers": put(f"{KERNEL}a", np.ones((24, 3), np.int32)),
    "not finite": put(f"{KERNEL}a", ones(24, 3) * np.inf),
    "another array": put("lora/3/vars/more", ones(2)),
    "a text layer": put("lora/x/vars/lora_kernel_a", ones(24, 3)),
    "text": put("note", "hello"),
    "a link to another file": link(h5py.ExternalLink("/etc/passwd", "x")),
    "a link": link(h5py.SoftLink("/lora/11/vars/lora_kernel_a")),
    "compressed": compressed,
    "without its data": without_numbers,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_raise(tmp_path, case):
    file = tmp_path / "a.lora.h5"
    damage(file, DAMAGE[case])
    names = NAMES if case != "no kernels" else {"query": NAMES["query"]}
    if case == "no kernels":  # of one layer; the other one alone would be an adapter
        assert len(open_adapter(file).rows) == 1
        return
    with pytest.raises(AdapterError) as raised:
        load_any(file, PARAMS, names)
    assert str(raised.value).startswith(str(file))


@pytest.mark.parametrize("end", [0, 4, 8, 100, 1000, -1])
def test_truncated_file_raises(tmp_path, end):
    file = tmp_path / "a.lora.h5"
    save_keras(file, make().tunable, NAMES)
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(AdapterFileError):
        open_adapter(file)


def test_changed_bytes_are_read_or_rejected(tmp_path):
    file, numbers = tmp_path / "a.lora.h5", np.random.default_rng(0)
    save_keras(file, make().tunable, NAMES)
    data = file.read_bytes()
    for _ in range(150):
        changed = bytearray(data)
        for place in numbers.integers(0, len(data), 3):
            changed[place] = numbers.integers(0, 256)
        file.write_bytes(changed)
        try:
            load_any(file, PARAMS, NAMES)
        except AdapterError as error:
            assert str(error).startswith(str(file))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_scaled_factors_are_rounded_once(tmp_path, dtype):
    numbers, file = np.random.default_rng(0), tmp_path / "a.lora.h5"
    a, b = (numbers.normal(size=size).astype(dtype) for size in ((24, 3), (3, 5)))
    save_keras(file, {"out": lorax.LoraWeight(a, b, 3, 1.0)}, {"out": Linear("3")})
    wide = np.float64 if dtype is np.float64 else np.float32
    with h5py.File(file) as read:
        kernels = [read[f"{KERNEL}{x}"][()] for x in "ab"]
    assert {x.dtype for x in kernels} == {np.dtype(wide)}
    np.testing.assert_array_equal(kernels[0], a.astype(wide))
    np.testing.assert_array_equal(kernels[1], (b.astype(np.float64) * (1 / 3)).astype(wide))


def test_big_endian_arrays_are_read(tmp_path):
    file, other, pair = tmp_path / "a.lora.h5", tmp_path / "b.lora.h5", make(alpha=7)
    save_keras(file, pair.tunable, NAMES)
    with h5py.File(file) as source, h5py.File(other, "w") as target:
        for path in ("rank", *(f"{n}/vars/lora_kernel_{x}" for n in (3, 11) for x in "ab")):
            name = "lora/vars/rank" if path == "rank" else f"lora/{path}"
            array = source[name][()]
            target[name] = array.astype(array.dtype.newbyteorder(">"))
    native, swapped = (load_any(path, PARAMS, NAMES).tunable for path in (file, other))
    for x, y in zip(jax.tree.leaves(native), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_keras_files_raise(tmp_path):
    file = tmp_path / "model.weights.h5"
    with h5py.File(file, "w") as opened:
        opened["layers/dense/vars/0"] = ones(3, 2)
    with pytest.raises(AdapterFileError, match="is an HDF5 file with tensors such as `layers/"):
        open_adapter(file)
    with pytest.raises(AdapterFileError, match="is an HDF5 file"):
        load_adapter(file, params=PARAMS)


def test_missing_package_raises(tmp_path, monkeypatch):
    file = tmp_path / "a.lora.h5"
    save_keras(file, make().tunable, NAMES)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    for use in (lambda: open_adapter(file), lambda: save_keras(file, make().tunable, NAMES)):
        with pytest.raises(ImportError, match=r"lorax-io\[keras\]"):
            use()
    assert pathlib.Path(file).exists()


SAVE = """
import sys, jax.numpy as jnp, lorax
from lorax_io import Linear, save_keras
row = lambda k: lorax.LoraWeight(jnp.full((512, 8), k), jnp.full((8, 512), k), rank=8)
print("ready", flush=True)
for k in range(100_000):
    save_keras(sys.argv[1], {"w": row(float(k))}, {"w": Linear("3")})
    print(k, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.011])
def test_killed_process_leaves_a_complete_file(tmp_path, seconds):
    file = tmp_path / "a.lora.h5"
    command = [sys.executable, "-c", SAVE, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        done = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    [row] = open_adapter(file).rows.values()
    numbers = np.unique(np.concatenate([np.ravel(row.a), np.ravel(row.b)]))
    assert numbers.size == 1 and numbers[0] >= done[-1]
    assert all(x == file or x.name.startswith(".a.lora.h5.") for x in tmp_path.iterdir())


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.lora.h5"
    save_keras(file, make().tunable, NAMES)
    before = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        save_keras(file, make(7).tunable, NAMES)
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]
