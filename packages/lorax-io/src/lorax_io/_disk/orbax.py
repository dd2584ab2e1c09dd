"""Checkpoints of Orbax: the arrays of one tree, of which only some are read."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import MissingPackageError

from .._errors import UNEQUAL, AdapterError, AdapterFileError, AdapterWriteError, about
from .tensors import DTYPES, read_json

TREE, STEP = "_METADATA", "_CHECKPOINT_METADATA"
_MARKS = (TREE, STEP, "_sharding")
_LARGEST = 1000  # bytes in memory for each byte on disk: factors of zeros compress well
_SLACK = 2**24


class Entry(NamedTuple):
    """One array of a tree."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class OrbaxTree:
    """The arrays of a tree by path, with `/` between keys; `wanted` decides which are read.

    Orbax reads them by its own metadata. No code that a file names is run.
    """

    def __init__(self, path: Path, wanted: Callable[[str], object]) -> None:
        self.path = path
        self.metadata = _metadata(path)
        ocp = _import_orbax()
        with about(path), _sound(), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path.resolve()).item_metadata.tree
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            names = ["/".join(map(_key, keys)) for keys, _ in leaves]
            self.entries = {n: _entry(n, leaf) for n, (_, leaf) in zip(names, leaves, strict=True)}
            if len(self.entries) < len(names):
                raise AdapterFileError("has two arrays of one path.")
            kept = [name for name in names if wanted(name)]
            self._check_size(kept)
            chosen = [
                x if wanted(n) else ocp.PLACEHOLDER for n, (_, x) in zip(names, leaves, strict=True)
            ]
            item = jax.tree.unflatten(jax.tree.structure(tree), chosen)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=how)
            restored = jax.tree.leaves(
                checkpointer.restore(path.resolve(), args=args) if kept else []
            )
            self._arrays = dict(zip(kept, (x for x in restored if x is not ...), strict=True))
            for name, array in self._arrays.items():
                if (array.dtype, array.shape) != self.entries[name]:
                    raise AdapterFileError(
                        f"has `{name}` with a shape that differs from its metadata."
                    )

    def _check_size(self, names: Sequence[str]) -> None:
        entries = [self.entries[name] for name in names]
        numbers = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
        if numbers > _LARGEST * sum(_sizes(self.path)) + _SLACK:
            raise AdapterFileError("has arrays far larger than its files.")

    def view(self, name: str) -> np.ndarray[Any, Any]:
        """One of the arrays that were read, by name."""
        return self._arrays[name]


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


def _entry(name: str, leaf: Any) -> Entry:
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    if dtype is None or shape is None or np.dtype(dtype) not in DTYPES.values():
        raise AdapterFileError(f"has `{name}`, which is not an array of numbers.")
    return Entry(np.dtype(dtype), tuple(shape))


def _sizes(folder: Path) -> Generator[int]:
    """The sizes of the files in a folder that is not trusted: no link is followed."""
    for home, _, names in os.walk(folder):
        for name in names:
            path = Path(home, name)
            if path.is_symlink():
                raise AdapterFileError(f"has a link, {path.relative_to(folder)}.")
            yield path.stat().st_size


@contextlib.contextmanager
def _sound() -> Generator[None]:
    """Inside this block, errors that Orbax raises become errors of the file.

    Errors that have another cause than the file remain what they are.
    """
    try:
        with _quiet():
            yield
    except (AdapterError, MemoryError, ImportError, PermissionError):
        raise
    except Exception as error:  # of JSON, of TensorStore, and of its own, of any type
        text = " ".join(str(error).split())[:300]
        raise AdapterFileError(f"is not a valid Orbax checkpoint ({text}).") from error


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silences Orbax's log inside this block; it warns about trees that are not a step."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def is_orbax(path: Path) -> bool:
    """Whether a folder is a checkpoint, one step of it, or one tree of a step."""
    if not path.is_dir():
        return False
    return any((path / mark).exists() for mark in _MARKS) or bool(_steps(path))


def _steps(folder: Path) -> list[Path]:
    """The completed steps of a checkpoint, in order."""
    steps = [x for x in folder.iterdir() if x.name.isdecimal() and (x / STEP).is_file()]
    return sorted(steps, key=lambda step: int(step.name))


def tree_of(path: Path, preferred: str) -> Path:
    """The folder of the tree to read: in the last step, the tree of the preferred name."""
    with about(path):
        if (path / TREE).is_file():
            return path
        step = steps[-1] if (steps := _steps(path)) else path
        trees = {x.name: x for x in step.iterdir() if (x / TREE).is_file()}
        if preferred in trees or len(trees) == 1:
            return trees.get(preferred) or next(iter(trees.values()))
        others = f"several trees, {', '.join(sorted(trees))}; give one" if trees else "no tree"
        raise AdapterFileError(f"is a checkpoint of Orbax that has {others}.")


@contextlib.contextmanager
def open_orbax(path: Path, wanted: Callable[[str], object]) -> Generator[OrbaxTree]:
    """Opens a tree and reads the wanted arrays; inside the block, errors name it."""
    tree = OrbaxTree(path, wanted)
    with about(path):
        yield tree


def write_orbax(folder: Path, step: int, name: str, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes one tree as a step of a checkpoint; the step appears only when it is complete."""
    ocp = _import_orbax()
    folder = folder.resolve()
    with about(folder):
        if folder.is_file():
            raise AdapterFileError("is a file, so no folder can be written there.")
        if (folder / str(step)).exists():
            raise AdapterError(f"has a step {step} already. Give another one.")
        handlers = {name: ocp.PyTreeCheckpointHandler()}
        with _quiet(), ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
            args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree)})
            manager.save(step, args=args, custom_metadata=metadata)
            manager.wait_until_finished()
        written = OrbaxTree(folder / str(step) / name, lambda _: True)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if written.view("/".join(map(_key, keys))).tobytes() != np.asarray(leaf).tobytes():
                shutil.rmtree(folder / str(step))
                raise AdapterWriteError(UNEQUAL, folder)


def _metadata(tree: Path) -> dict[str, str]:
    """The custom metadata of a tree's step, as strings."""
    path = tree.parent / STEP
    content = read_json(path) if path.is_file() else None
    custom = content.get("custom_metadata") if isinstance(content, dict) else None
    return {k: str(v) for k, v in custom.items()} if isinstance(custom, dict) else {}


def _import_orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise MissingPackageError(
            'checkpoints of tunix and qwix need Orbax: pip install "lorax-io[orbax]"'
        ) from error
    return ocp
