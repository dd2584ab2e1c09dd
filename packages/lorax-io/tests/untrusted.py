"""Valid files for tests to damage, and the check that loading them raises."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    Embedding,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    load_adapter,
    load_peft,
    read_metadata,
    save_adapter,
)

SECONDS = 10  # time limit for rejecting the worst file; valid files take milliseconds


LAYER = "model.layers.0.self_attn"


Q, V = f"base_model.model.{LAYER}.q_proj.", f"base_model.model.{LAYER}.v_proj."


NAMES = {
    "q": Linear(f"{LAYER}.q_proj"),
    "v": Linear(f"{LAYER}.v_proj"),
    "bias": Tensor(f"{LAYER}.v_proj"),
    "embed": Embedding("model.embed_tokens"),
    "norm": Tensor("model.norm", parameter="weight"),
    "head": Linear("score"),
}


def make_params():
    return {
        "q": jnp.ones((5, 3)),
        "v": jnp.ones((5, 3)),
        "bias": jnp.ones(3),
        "embed": jnp.ones((7, 5)),
        "norm": jnp.ones(5),
        "head": jnp.ones((5, 2)),
        "not an array": None,
    }


def make_tunable():
    spec = {name: 0 for name in make_params()} | {"q": lorax.LoraSpec(2, 4), "norm": -1}
    return lorax.init_lora(make_params(), spec, jax.random.key(0))[1]


def floats(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


TENSORS = {
    Q + "lora_A.weight": floats(2, 5),
    Q + "lora_B.weight": floats(3, 2),
    V + "lora_A.weight": floats(2, 5),
    V + "lora_B.weight": floats(3, 2),
}


class Place:
    """A valid native file and PEFT folder, which a row can damage."""

    def __init__(self, home):
        self.home = home
        self.native = home / "adapter.safetensors"
        self.folder = home / "peft"
        self.config = self.folder / "adapter_config.json"
        self.weights = self.folder / "adapter_model.safetensors"
        self.folder.mkdir()
        self.write(CONFIG, TENSORS)

    def write(self, config, tensors, metadata=None):
        self.config.write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, self.weights, metadata or {"format": "pt"})

    def write_native(self, changes=None, tensors=None):
        """Writes the native file with changed metadata and tensors; None removes one."""
        save_adapter(self.native, make_tunable(), base=make_params(), metadata={"task": "x"})
        with safetensors.safe_open(self.native, "numpy") as file:
            metadata = file.metadata()
        own = safetensors.numpy.load_file(self.native)
        own = without_none(own | (tensors or {}))
        metadata = without_none(metadata | (changes or {}))
        safetensors.numpy.save_file(own, self.native, metadata)

    def contents(self):
        files = sorted(self.home.rglob("*"))
        return {path: path.read_bytes() if path.is_file() else None for path in files}


def without_none(values):
    return {name: value for name, value in values.items() if value is not None}


LOADERS = {
    "native": lambda place, params: load_adapter(place.native, params=params),
    "metadata": lambda place, params: read_metadata(place.native),
    "peft": lambda place, params: load_peft(place.folder, params, NAMES),
}


def assert_refused(place, loader, error, message):
    """Checks that loading raises this error in time, names the file, and changes nothing."""
    params, before, begin = make_params(), place.contents(), time.monotonic()
    with pytest.raises(AdapterError, match=message) as raised:
        LOADERS[loader](place, params)
    assert time.monotonic() - begin < SECONDS
    assert type(raised.value) is error
    where = place.folder if loader == "peft" else place.native
    assert str(raised.value).startswith(str(where))
    assert len(str(raised.value)) < 2000
    assert place.contents() == before
    assert jax.tree.all(jax.tree.map(np.array_equal, params, make_params()))


def rows(*table):
    """A parametrization whose rows begin with their ids."""
    names = [row[0] for row in table]
    assert len(set(names)) == len(names)
    return [pytest.param(*row[1:], id=row[0]) for row in table]


def tensor(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def without(values, name):
    return {k: v for k, v in values.items() if k != name}


NESTED = "[" * 100_000 + "]" * 100_000


FILE, MISMATCH, MORE = AdapterFileError, AdapterMismatchError, UnsupportedAdapterError


KEY = "lorax.adapter"


LORA = {
    "kind": "lora",
    "rank": 2,
    "alpha": 4,
    "scaling": "standard",
    "in_axes": [0],
    "out_axes": [1],
    "shared_axes": [],
}
