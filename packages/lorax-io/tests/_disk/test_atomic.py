"""Interrupted saves leave the complete old or new adapter on disk."""

import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorax import LoraWeight
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    Linear,
    load_adapter,
    load_frozen,
    load_peft,
    save_adapter,
    save_frozen,
    save_peft,
)

SIZE = 300  # of a side: a few hundred kilobytes, which are not written at once
NAMES = {f"w{k}": Linear(f"layers.{k}.proj") for k in range(3)}


def make_params():
    return {path: np.ones((SIZE, SIZE), np.float32) for path in NAMES}


def make_tunable(which):
    """The adapters 1 and 2, which differ in every value and setting."""
    a, b = (np.full(shape, which, np.float32) for shape in ((SIZE, 4), (4, SIZE)))
    return {path: LoraWeight(a, b, rank=4, alpha=which) for path in NAMES}


def save_native(path, which):
    save_adapter(path, make_tunable(which), metadata={"which": str(which)})


def save_base(path, which):
    save_frozen(path, {name: np.full((SIZE, SIZE), which, np.float32) for name in NAMES})


def save_folder(path, which):
    save_peft(path, make_tunable(which), NAMES)


def which_native(path):
    """Which adapter a file contains. The loader checks that it is complete."""
    return which_tree(load_adapter(path, params=make_params()))


def which_base(path):
    [base] = {
        float(x) for w in load_frozen(path, params=make_params()).values() for x in np.unique(w)
    }
    return int(base)


def which_folder(path):
    return which_tree(load_peft(path, make_params(), NAMES)[1])


def which_tree(tunable):
    numbers = {
        float(x) for weight in tunable.values() for x in (weight.alpha, *np.unique(weight.a))
    }
    assert len(numbers) == 1
    return int(numbers.pop())


# Killed processes

# Forks a process that saves 1 and 2 repeatedly, and reports when it has started. JAX was used
# before the fork, so after it only NumPy is used.
CHILD = """
import importlib.util, os, sys, time, warnings
warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("saving", sys.argv[1])
saving = importlib.util.module_from_spec(spec)
spec.loader.exec_module(saving)
save, path = getattr(saving, sys.argv[2]), sys.argv[3]
save(path, 1)
begin = time.perf_counter()
for k in (2, 1, 2, 1):
    save(path, k)
print((time.perf_counter() - begin) / 2, flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)
        while True:
            save(path, 2)
            save(path, 1)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


class Saver:
    """A process that saves until it is killed, any number of times."""

    def __init__(self, save, path):
        command = [sys.executable, "-c", CHILD, __file__, save.__name__, str(path)]
        self.process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )
        self.seconds = float(self.line())  # of saving both adapters, since a disk may be busy

    def line(self):
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def save_and_die(self, seconds):
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        pid = int(self.line())
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        assert self.line() == "dead"

    def close(self):
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def kill(save, folder, name, times):
    """The different states of the folder after each kill. Most kills interrupt a save."""
    saver, draw = Saver(save, folder / name), random.Random(0)
    states, within = set(), 0
    try:
        for _ in range(times):
            saver.save_and_die(draw.uniform(0, max(0.04, 1.5 * saver.seconds)))
            left = [file for file in folder.iterdir() if file.name.startswith(".")]
            within += bool(left)
            for file in left:
                file.unlink()
            states.add(tuple(sorted((p.name, p.read_bytes()) for p in folder.iterdir())))
    finally:
        saver.close()
    assert within > times / 8
    return states


def put(folder, state):
    folder.mkdir(exist_ok=True)
    for name, data in state:
        (folder / name).write_bytes(data)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("save", "which", "times"), [(save_native, which_native, 120), (save_base, which_base, 60)]
)
def test_killed_process_leaves_a_complete_file(tmp_path, save, which, times):
    states = kill(save, tmp_path, "adapter", times)
    assert len(states) == 2
    for state in states:
        put(tmp_path, state)
        which(tmp_path / "adapter")
        assert len(state) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_process_leaves_a_complete_or_rejected_folder(tmp_path):
    outcomes = []
    for state in kill(save_folder, tmp_path, "", 80):
        put(tmp_path, state)
        try:
            outcomes.append(which_folder(tmp_path))
        except AdapterFileError as error:
            assert "does not belong to these weights" in str(error)
            outcomes.append("refused")
    assert {1, 2} <= set(outcomes) <= {1, 2, "refused"}
    assert outcomes.count(1) == outcomes.count(2) == 1


def test_new_weights_with_the_old_config_raise(tmp_path, monkeypatch):
    """The state after a kill between the two files."""
    save_folder(tmp_path, 1)
    monkeypatch.setattr("lorax_io._formats.peft.folder.write_text", lambda path, text: None)
    save_folder(tmp_path, 2)
    with pytest.raises(AdapterFileError, match="does not belong to these weights"):
        which_folder(tmp_path)


# Failing writes


class Full(OSError):
    """A disk that is full."""

    def __init__(self, *args, **kwargs):
        super().__init__(errno.ENOSPC, "No space left on device")


def fail(*args, **kwargs):
    raise Full


def fail_half_way(tensors, path, metadata=None):
    pathlib.Path(path).write_bytes(b"the first half of")
    raise safetensors.SafetensorError("I/O error: No space left on device")


def write_text_half_way(self, text, **kwargs):
    self.write_bytes(text.encode()[:10])
    raise Full


FAILURES = {
    "writing": ("safetensors.numpy.save_file", fail_half_way),
    "flushing": ("os.fsync", fail),
    "replacing": ("os.replace", fail),
}
FORMS = {"native": (save_native, which_native), "peft": (save_folder, which_folder)}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "failure"), FAILURES.values(), ids=FAILURES)
def test_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch, form, name, failure):
    (save, which), path = FORMS[form], tmp_path / "adapter"
    save(path, 1)
    before = files_of(tmp_path)
    with monkeypatch.context() as patch, pytest.raises((AdapterError, Full), match="No space left"):
        patch.setattr(name, failure)
        save(path, 2)
    assert files_of(tmp_path) == before
    save(path, 2)
    assert which(path) == 2


def test_full_disk_at_the_config_leaves_a_rejected_folder(tmp_path, monkeypatch):
    save_folder(tmp_path, 1)
    names = set(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(Full):
        patch.setattr(pathlib.Path, "write_text", write_text_half_way)
        save_folder(tmp_path, 2)
    assert set(tmp_path.iterdir()) == names
    with pytest.raises(AdapterFileError, match="does not belong to these weights"):
        which_folder(tmp_path)
    save_folder(tmp_path, 2)
    assert which_folder(tmp_path) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
@pytest.mark.parametrize("form", FORMS)
def test_file_size_limit_leaves_the_old_adapter(tmp_path, form):
    """A real error of the operating system in the middle of the data."""
    import resource

    (save, which), path = FORMS[form], tmp_path / "adapter"
    save(path, 1)
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(AdapterError, match="File too large"):
            save(path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_of(tmp_path) == before
    assert which(path) == 1


# Corrupting writers

save_file = safetensors.numpy.save_file


def other_numbers(tensors, path, metadata=None):
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)


def one_bit(tensors, path, metadata=None):
    save_file(tensors, path, metadata)
    data = bytearray(pathlib.Path(path).read_bytes())
    data[-1] ^= 1
    pathlib.Path(path).write_bytes(data)


def negative_zero(tensors, path, metadata=None):
    """Values that are equal but have different bits."""
    save_file({name: np.negative(tensor) for name, tensor in tensors.items()}, path, metadata)


def cut_short(tensors, path, metadata=None):
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 100)


def columns_first(tensors, path, metadata=None):
    """Writes transposed arrays like safetensors 0.8.0, in the wrong order."""
    flat = {name: tensor.T.reshape(tensor.shape) for name, tensor in tensors.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in flat.items()}, path, metadata)


CORRUPTIONS = {
    "numbers": other_numbers,
    "bit": one_bit,
    "zeros": negative_zero,
    "cut": cut_short,
    "order": columns_first,
    "type": lambda t, path, metadata: save_file(
        {name: tensor.astype(np.float16) for name, tensor in t.items()}, path, metadata
    ),
    "shape": lambda t, path, metadata: save_file(
        {name: tensor[None] for name, tensor in t.items()}, path, metadata
    ),
    "fewer": lambda t, path, metadata: save_file(dict([*t.items()][1:]), path, metadata),
    "more": lambda t, path, metadata: save_file({**t, "x": np.ones(1)}, path, metadata),
    "names": lambda t, path, metadata: save_file(
        {f"{name}x": tensor for name, tensor in t.items()}, path, metadata
    ),
    "metadata": lambda t, path, metadata: save_file(t, path, {**metadata, "x": ""}),
    "other metadata": lambda t, path, metadata: save_file(t, path, dict.fromkeys(metadata, "")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_write_raises(tmp_path, monkeypatch, form, corrupt):
    (save, _), path = FORMS[form], tmp_path / "adapter"

    def make(which):
        numbers = np.arange(SIZE * 4, dtype=np.float32)
        return {
            path: LoraWeight(numbers.reshape(SIZE, 4), numbers.reshape(4, SIZE) * 0, rank=4)
            for path in NAMES
        }

    save(path, 1)
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "make_tunable", make)
        patch.setattr("safetensors.numpy.save_file", corrupt)
        with pytest.raises(
            (AdapterError, OSError), match="differs from what was written|not a safetensors file"
        ):
            save(path, 2)
    assert files_of(tmp_path) == before


# Paths


@pytest.mark.parametrize("form", FORMS)
def test_saving_through_a_link_writes_its_target(tmp_path, form):
    (save, which), target, link = FORMS[form], tmp_path / "target", tmp_path / "link"
    save(target, 1)
    link.symlink_to("target")
    save(link, 2)
    assert link.is_symlink()
    assert which(target) == which(link) == 2


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
@pytest.mark.parametrize("form", FORMS)
def test_replaced_files_keep_their_permissions(tmp_path, form):
    save, _ = FORMS[form]
    save(tmp_path / "adapter", 1)
    files = list(files_of(tmp_path))
    for file in files:
        file.chmod(0o600)
    save(tmp_path / "adapter", 2)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_saving_through_a_dangling_link_creates_its_target(tmp_path):
    (tmp_path / "link").symlink_to("target")
    save_native(tmp_path / "link", 2)
    assert which_native(tmp_path / "target") == 2
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("form", "path", "error", "message"),
    [
        ("native", "folder", AdapterFileError, "folder: is a folder, so no file can be written"),
        (
            "native",
            "absent/file",
            AdapterNotFoundError,
            "absent is not a folder; create it",
        ),
        (
            "native",
            "file/file",
            AdapterNotFoundError,
            "file is not a folder; create it first",
        ),
        ("peft", "file", AdapterFileError, "file: cannot be created"),
        ("peft", "file/folder", AdapterFileError, "folder: cannot be created"),
    ],
)
def test_unwritable_path_raises(tmp_path, form, path, error, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(error, match=message):
        FORMS[form][0](tmp_path / path, 1)
    assert files_of(tmp_path) == {tmp_path / "file": b"kept"}


def test_save_peft_creates_its_folder(tmp_path):
    save_folder(tmp_path / "a" / "b", 1)
    assert which_folder(tmp_path / "a" / "b") == 1


def test_unsavable_tree_writes_nothing(tmp_path):
    save_native(tmp_path / "adapter", 1)
    before = files_of(tmp_path)
    for tree in ({"w": jnp.array([jnp.nan])}, {"\ud800": np.ones(1)}, {"w": object()}):
        with pytest.raises(AdapterError):
            save_adapter(tmp_path / "adapter", tree)
    with pytest.raises(AdapterMismatchError):
        save_peft(tmp_path / "folder", make_tunable(1), {})
    assert files_of(tmp_path) == before
    assert not (tmp_path / "folder").exists()


def test_equal_adapters_give_identical_files(tmp_path):
    for save, path in ((save_native, "file"), (save_folder, "folder/adapter_model.safetensors")):
        contents = set()
        for _ in range(8):
            save(tmp_path / path.partition("/")[0], 1)
            contents.add((tmp_path / path).read_bytes())
        assert len(contents) == 1
