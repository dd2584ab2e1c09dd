"""Files from strangers: each is refused with one error type, and nothing has changed after it."""

import io
import json
import os
import pickle
import socket
import struct
import time
import zipfile

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
    AdapterNotFoundError,
    AdapterWarning,
    Embedding,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    load_adapter,
    load_pair,
    load_peft,
    open_adapter,
    read_metadata,
    save_adapter,
    save_peft,
)

SECONDS = 10  # in which the worst of files is refused; an honest one takes milliseconds

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
        "no array": None,
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
    """A native file and a PEFT folder that are sound until a row spoils them."""

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
        """The sound native file, with other metadata and tensors; None takes one away."""
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


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


LOADERS = {
    "native": lambda place, params: load_adapter(place.native, params=params),
    "metadata": lambda place, params: read_metadata(place.native),
    "peft": lambda place, params: load_peft(place.folder, params, NAMES),
}


def assert_refused(place, loader, error, message):
    """Raises just this error in time, says where, and changes neither files nor parameters."""
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
    """A parametrization of which each row begins with its name."""
    names = [row[0] for row in table]
    assert len(set(names)) == len(names)
    return [pytest.param(*row[1:], id=row[0]) for row in table]


def test_unmodified_fixture_loads(place):
    place.write_native()
    assert read_metadata(place.native) == {"task": "x"}
    assert load_adapter(place.native, params=make_params())["q"].rank == 2
    tunable = load_peft(place.folder, make_params(), NAMES)[1]
    assert tunable["q"].scale == tunable["v"].scale == 2


# Containers: what is not a safetensors file, for every loader.


def container(header, data=b"", size=None):
    """The bytes of a safetensors file with this header, whatever it says."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def tensor(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def without(values, name):
    return {k: v for k, v in values.items() if k != name}


def zip_file():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": [1.0]}))
    return file.getvalue()


ZEROS = bytes(8)
NO_FILE = "is not a safetensors file"
TWICE = b'{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "w": %s}'

CONTAINERS = rows(
    ("no bytes", b"", f"{NO_FILE}.*header too small"),
    ("two bytes", b"{}", f"{NO_FILE}.*header too small"),
    ("seven bytes", bytes(7), f"{NO_FILE}.*header too small"),
    ("no header", container(b""), NO_FILE),
    ("header too large", container(b"{}", size=100_000_001), "header too large"),
    ("header of 2^63 bytes", container(b"{}", size=2**63), "header too large"),
    ("header of 2^64-1 bytes", container(b"{}", size=2**64 - 1), "header too large"),
    ("header past the end", container(b"{}", size=3), "invalid header length"),
    ("text", b"a long text, and no tensors in it", "header too large"),
    ("pickle", pickle.dumps({"w": [1.0]}, protocol=2), "is a pickle"),
    ("pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ("web page", b"<!DOCTYPE html><html>", "is a web page"),
    ("GGUF", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    ("HDF5", b"\x89HDF\r\n", "is an HDF5 file"),
    ("zip, as torch writes it", zip_file(), "is a zip archive"),
    ("not JSON", container(b"{nothing}"), "invalid JSON in header"),
    ("JSON cut short", container(b'{"w": {'), "invalid JSON in header"),
    ("JSON array", container([]), "invalid JSON in header"),
    ("JSON string", container("w"), "invalid JSON in header"),
    ("JSON null", container(None), "invalid JSON in header"),
    ("NUL after the JSON", container(b"{}\0"), "invalid JSON in header"),
    ("two objects", container(b"{}{}"), "invalid JSON in header"),
    ("NaN in the JSON", container(b'{"w": NaN}'), "invalid JSON in header"),
    ("metadata of a number", container({"__metadata__": {"x": 1}}), "invalid JSON in header"),
    ("metadata of objects", container({"__metadata__": {"x": {}}}), "invalid JSON in header"),
    ("metadata is a list", container({"__metadata__": []}), "invalid JSON in header"),
    ("tensor is a number", container({"w": 3}), "invalid JSON in header"),
    ("negative size", container({"w": tensor(shape=(-2,))}, ZEROS), "invalid JSON in header"),
    ("size of a float", container({"w": tensor(shape=(2.0,))}, ZEROS), "invalid JSON in header"),
    ("size of true", container({"w": tensor(shape=(True,))}, ZEROS), "invalid JSON in header"),
    ("size of 2^64", container({"w": tensor(shape=(2**64,))}, ZEROS), "invalid JSON in header"),
    ("negative offset", container({"w": tensor(begin=-8)}, ZEROS), "invalid JSON in header"),
    ("unknown type", container({"w": tensor("F31")}, ZEROS), "invalid JSON in header"),
    ("type in small letters", container({"w": tensor("f32")}, ZEROS), "invalid JSON in header"),
    *(
        (f"no {field}", container({"w": without(tensor(), field)}, ZEROS), "invalid JSON in header")
        for field in ("dtype", "shape", "data_offsets")
    ),
    ("field twice", container(TWICE[:6] + b'{"dtype":"F32","dtype":"F32"}}'), "invalid JSON"),
    ("no UTF-8", container(b'{"\xff": {}}'), "invalid UTF-8 in header"),
    ("lone surrogate", container(b'{"\\ud800": {}}'), "invalid JSON in header"),
    ("data cut short", container({"w": tensor()}, ZEROS[:5]), "not fully covered"),
    ("no data", container({"w": tensor()}), "not fully covered"),
    ("bytes after the data", container({"w": tensor()}, ZEROS + b"0"), "not fully covered"),
    ("bytes after nothing", container({}, b"0"), "not fully covered"),
    ("hole", container({"w": tensor(begin=4, end=12)}, bytes(12)), "invalid offset"),
    ("overlap", container({"w": tensor(), "x": tensor(begin=4, end=12)}, bytes(12)), "offset"),
    ("the same bytes twice", container({"w": tensor(), "x": tensor()}, ZEROS), "offset"),
    ("offsets reversed", container({"w": tensor(begin=8, end=0)}, ZEROS), "invalid offset"),
    ("offset past 2^63", container({"w": tensor(end=2**63)}, ZEROS), NO_FILE),
    ("shape of other size", container({"w": tensor(shape=(3,))}, ZEROS), "invalid shape"),
    ("type of other size", container({"w": tensor("F16")}, ZEROS), "invalid shape"),
    ("size overflows", container({"w": tensor(shape=(2**40, 2**40))}, ZEROS), "overflow"),
    ("bits overflow", container({"w": tensor("F64", (2**61,))}, ZEROS), "overflow"),
    (
        "key twice",
        container(TWICE % b'{"dtype":"U8","shape":[8],"data_offsets":[0,8]}', ZEROS),
        "'w' twice",
    ),
    (
        "metadata twice",
        container(b'{"__metadata__": {}, "__metadata__": {}}'),
        "__metadata__|twice",
    ),
    ("metadata key twice", container(b'{"__metadata__": {"x": "1", "x": "2"}}'), "'x' twice"),
    ("space before the header", container(b" {}"), "does not begin with '{'"),
    ("newline before the header", container(b"\n{}"), "does not begin with '{'"),
    (
        "4-bit floats",
        container({"w": tensor("F4", (16,))}, ZEROS),
        "type F4, which JAX does not have",
    ),
    ("6-bit floats", container({"w": tensor("F6_E2M3", (4,), end=3)}, ZEROS[:3]), "type F6_E2M3"),
    ("deep header", container(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), NO_FILE),
)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("data", "message"), CONTAINERS)
def test_non_safetensors_file_raises(place, loader, data, message):
    (place.weights if loader == "peft" else place.native).write_bytes(data)
    assert_refused(place, loader, AdapterFileError, message)


def test_a_large_header_with_one_key_twice_raises_in_time(place):
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    entries = [entry % (k % 99_999) for k in range(100_000)]
    place.weights.write_bytes(container(b"{" + b",".join(entries) + b"}"))
    assert_refused(place, "peft", AdapterFileError, "'0' twice")


# What is there where a file is expected.


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def moved_out(path):
    """A link in the place of a file, to a copy of it outside its folder."""
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def moved_through(path):
    outside = path.parent.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    (path.parent / "inside").symlink_to(outside)
    path.symlink_to("inside/" + path.name)


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replaced_by_socket(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


def only_pickle(path):
    path.rename(path.with_name("adapter_model.bin"))


PLACES = rows(
    ("no file", lambda path: path.unlink(), AdapterNotFoundError, "no such file"),
    ("link to nothing", lambda path: link(path, "nothing"), AdapterNotFoundError, "no such file"),
    ("link to itself", lambda path: link(path, path.name), AdapterFileError, "cannot be opened"),
    ("folder", replaced_by_folder, AdapterFileError, "is a folder"),
    ("pipe", replaced_by_pipe, AdapterFileError, "neither a file nor a folder"),
    ("socket", replaced_by_socket, AdapterFileError, "neither a file nor a folder"),
    ("device", lambda path: link(path, "/dev/zero"), AdapterFileError, "neither a file nor a"),
)


@pytest.mark.skipif(os.name != "posix", reason="has other files")
@pytest.mark.parametrize("which", ["native", "config", "weights"])
@pytest.mark.parametrize(("spoil", "error", "message"), PLACES)
def test_non_file_raises(place, which, spoil, error, message):
    place.write_native()
    spoil(getattr(place, which))
    assert_refused(place, "native" if which == "native" else "peft", error, message)


@pytest.mark.parametrize("which", ["config", "weights"])
@pytest.mark.parametrize("spoil", [moved_out, moved_through])
def test_a_link_that_leaves_the_folder_raises(place, which, spoil):
    spoil(getattr(place, which))
    assert_refused(place, "peft", AdapterFileError, "is a link to .*, outside its folder")


@pytest.mark.parametrize("which", ["config", "weights"])
def test_a_link_within_the_folder_is_followed(place, which):
    path = getattr(place, which)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].rank == 2


def test_a_folder_may_be_a_link(place):
    folder = place.home / "link"
    folder.symlink_to(place.folder)
    assert load_peft(folder, make_params(), NAMES)[1]["q"].rank == 2


def make_cache(place):
    """The layout of the Hub's cache: files are links to `blobs` beside `snapshots`."""
    repo = place.home / "models--me--adapter"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for k, path in enumerate((place.config, place.weights)):
        path.rename(repo / "blobs" / str(k))
        (snapshot / path.name).symlink_to(f"../../blobs/{k}")
    place.folder.rmdir()
    place.folder = snapshot
    place.config, place.weights = (snapshot / p.name for p in (place.config, place.weights))


def test_the_cache_of_the_hub_is_read(place):
    make_cache(place)
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].rank == 2


def test_a_link_that_leaves_the_cache_of_the_hub_raises(place):
    make_cache(place)
    outside = place.home / "outside"
    place.weights.resolve().rename(outside)
    link(place.weights, outside)
    assert_refused(place, "peft", AdapterFileError, "is a link to .*, outside its folder")


def test_a_pickle_is_never_read(place):
    only_pickle(place.weights)
    assert_refused(place, "peft", AdapterFileError, "are a pickle, which may run code")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: place.config.unlink(), "adapter_config.json: there is no such file"),
        (
            lambda place: setattr(place, "folder", place.home / "no"),
            "is not a folder.*pull_from_hub",
        ),
        (lambda place: setattr(place, "folder", place.weights), "is not a folder"),
    ],
    ids=["no config", "no folder", "a file"],
)
def test_non_peft_folder_raises(place, spoil, message):
    spoil(place)
    assert_refused(place, "peft", AdapterNotFoundError, message)


# Configs.


def many_keys(count):
    """An object of which the last key is the first, too."""
    return b"{%s}" % b",".join(b'"%d":0' % (k % (count - 1)) for k in range(count))


NESTED = "[" * 100_000 + "]" * 100_000
SOUND = json.dumps(CONFIG)

TEXTS = rows(
    ("no text", b"", "is not (a )?JSON"),
    ("not JSON", b"{peft_type: LORA}", "is not (a )?JSON"),
    ("cut short", SOUND[:-1].encode(), "is not (a )?JSON"),
    ("more after it", (SOUND + "{}").encode(), "is not (a )?JSON"),
    ("NUL after it", (SOUND + "\0").encode(), "is not (a )?JSON"),
    ("array", b"[]", "is not a JSON object"),
    ("null", b"null", "is not a JSON object"),
    ("string", b'"LORA"', "is not a JSON object"),
    ("key twice", (SOUND[:-1] + ', "r": 4}').encode(), "has the key 'r' twice"),
    (
        "key twice within",
        (SOUND[:-1] + ', "rank_pattern": {"q": 1, "q": 2}}').encode(),
        "'q' twice",
    ),
    ("no UTF-8", SOUND.encode().replace(b"LORA", b"\xff"), "is not UTF-8 text"),
    ("UTF-16", SOUND.encode("utf-16"), "is not UTF-8 text"),
    ("byte order mark", b"\xef\xbb\xbf" + SOUND.encode(), "is not (a )?JSON"),
    ("deep", f'{{"peft_type": {NESTED}}}'.encode(), "is not JSON that can be read"),
    ("deep objects", b'{"a":' * 100_000, "is not JSON that can be read"),
    ("a number of 10^5 digits", b'{"r": %s}' % (b"9" * 100_000), "is not JSON that can be read"),
    ("17 MiB", SOUND.encode() + b" " * (17 * 2**20), "is larger than"),
    ("many keys, one twice", many_keys(200_000), "'0' twice"),
)


def test_a_config_that_may_not_be_read_raises(place, monkeypatch):
    def forbid(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", forbid)
    assert_refused(place, "peft", AdapterFileError, "cannot be read: .*Permission denied")


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_config_that_is_not_an_object_raises(place, text, message):
    place.config.write_bytes(text)
    assert_refused(place, "peft", AdapterFileError, message)


def config_text(changes):
    values = without_none({**{k: json.dumps(v) for k, v in CONFIG.items()}, **changes})
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return "{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in texts.items()) + "}"


def of_q(values):
    return " ".join(f'{{"q":{value}}}' for value in values)


# Each key with values that PEFT never writes there.
VALUES = {
    "r": 'true false null 4.0 0 -1 1e999 NaN "4" [4] {} 1048577 ' + "9" * 400,
    "lora_alpha": 'true null NaN Infinity -Infinity 1e999 "8" [8] {} ' + "9" * 400,
    "use_rslora": '0 1 "true" {}',
    "rank_pattern": '[] "q" 4 true ' + of_q(["0", "-1", "true", "2.0", "null", "[]"]),
    "alpha_pattern": '[] "q" 4 ' + of_q(["true", "null", "NaN", '"4"', "1e999", "9" * 400]),
    "target_modules": '4 true {} [4] [null] [["q"]]',
    "target_parameters": '"q" 4 {} [4] [null] true',
    "exclude_modules": "4 {} [4] true",
    "layers_to_transform": 'true "0" 0.0 [0.0] [true] ["0"] {}',
    "layers_pattern": "4 {} [4] true",
    "modules_to_save": '"score" 4 {} [4] true',
    "bias": 'null true 0 [] "some" "None"',
    "fan_in_fan_out": '0 "false" {}',
    "lora_dropout": 'null true NaN "0" []',
    "task_type": '0 [] {} "causal_lm" "OTHER" true',
    "base_model_name_or_path": "0 {} true",
    "revision": "0 {} true",
}
TYPES = [
    pytest.param(key, value, id=f"{key}={value[:20]}")
    for key, values in VALUES.items()
    for value in values.split(" ")
]


@pytest.mark.parametrize(("key", "value"), TYPES)
def test_a_key_with_another_type_raises(place, key, value):
    place.config.write_text(config_text({key: value}))
    assert_refused(place, "peft", AdapterFileError, f"has {key} = .*; it must be ")


NULLS = (
    "rank_pattern alpha_pattern target_modules target_parameters exclude_modules revision"
    " layers_to_transform layers_pattern modules_to_save task_type base_model_name_or_path"
    " use_rslora use_dora fan_in_fan_out init_lora_weights"
)
EMPTY = (
    "base_model_name_or_path revision init_lora_weights use_rslora use_dora fan_in_fan_out"
    " modules_to_save layers_to_transform layers_pattern exclude_modules target_parameters"
)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, "null") for key in NULLS.split()]
    + [(key, value) for key in EMPTY.split() for value in ('""', "[]")],
)
def test_an_empty_value_is_read_as_an_absent_key(place, key, value):
    place.config.write_text(config_text({key: value}))
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].scale == 2


@pytest.mark.parametrize("key", ["merge_weights", "enable_lora", "runtime_config"])
def test_keys_of_other_releases_of_peft_are_read(place, key):
    place.config.write_text(config_text({key: "null"}))
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].scale == 2


KINDS = rows(
    ("no peft_type", {"peft_type": None}, AdapterFileError, "peft_type = None; only .* LORA"),
    (
        "model's config",
        {"peft_type": None, "model_type": '"llama"'},
        AdapterFileError,
        "of a model",
    ),
    ("null peft_type", {"peft_type": "null"}, AdapterFileError, "peft_type = None"),
    *(
        (f"peft_type {kind}", {"peft_type": kind}, UnsupportedAdapterError, "has peft_type = ")
        for kind in '"lora" "BOFT" "RANDLORA" "FOURIERFT" "XLORA" "ROAD"'
        ' "PREFIX_TUNING" "PROMPT_TUNING" "" 0 [] {} ["LORA"] true'.split()
    ),
    *(
        (f"init {init}", {"init_lora_weights": init}, UnsupportedAdapterError, "changes the base")
        for init in '"pissa" "pissa_niter_16" "olora" "loftq" "corda" "bogus" 2'.split()
    ),
    *(
        (f"{key} {value}", {key: value}, UnsupportedAdapterError, rf"\({key}\); read as plain LoRA")
        for key, value in {
            "layer_replication": "[[0,4],[2,5]]",
            "alora_invocation_tokens": "[1,2]",
            "use_qalora": "true",
            "kasa_config": '{"beta":1.0}',
            "monteclora_config": '{"a":1}',
            "velora_config": '{"a":1}',
            "arrow_config": '{"top_k":3}',
            "megatron_config": '{"a":1}',
            "ensure_weight_tying": "true",
            "enable_lora": "[true,false,true]",
        }.items()
    ),
)


MADE_UP = rows(
    ("biases that are not there", {"lora_bias": "true"}, AdapterFileError, "lacks .*lora_B.bias"),
    (
        "rows that are not there",
        {"trainable_token_indices": "[0]"},
        AdapterFileError,
        "the rows of",
    ),
    (
        "rows of a table that are not there",
        {"trainable_token_indices": '{"embed_tokens":[0]}'},
        AdapterFileError,
        "lacks the rows of `embed_tokens`",
    ),
    *(
        (
            f"token indices {value}",
            {"trainable_token_indices": value},
            AdapterFileError,
            "token ind",
        )
        for value in ("3", "[-1]", "[0.5]", "[true]", '{"a":1}', '{"a":[]}', '"all"')
    ),
    ("blocks of no module", {"use_bdlora": '{"nblocks":2}'}, AdapterFileError, "on neither side"),
    *(
        (f"blocks {value}", {"use_bdlora": value}, AdapterFileError, "it must be an object with nb")
        for value in ('{"nblocks":0}', '{"nblocks":"2"}', "true", '{"target_modules_bd_a":"q"}')
    ),
)


@pytest.mark.parametrize(("changes", "error", "message"), [*KINDS, *MADE_UP])
def test_more_than_plain_lora_raises(place, changes, error, message):
    place.config.write_text(config_text(changes))
    assert_refused(place, "peft", error, message)


def test_unknown_key_raises(place):
    place.config.write_text(config_text({"temperature": "1"}))
    with pytest.warns(AdapterWarning, match="does not know are ignored: temperature"):
        load_peft(place.folder, make_params(), NAMES)


# Patterns: each of these is tried wherever a pattern is allowed.

PATTERNED = {
    "target_modules": lambda pattern: {"target_modules": pattern},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 2}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 4}},
    "layers_pattern": lambda pattern: {"layers_pattern": pattern, "layers_to_transform": [0]},
}
BAD_PATTERNS = {
    "open group": "(q_proj",
    "closed group": "q_proj)",
    "groups the wrong way round": "q)|(v",
    "star": "*",
    "open class": "[q",
    "escape at the end": "q\\",
    "group that is not there": r"(q)\2",
    "open lookbehind": "(?<=q",
    "bad name of a group": "(?P<1>q)",
    "deep": "(" * 2000 + "q" + ")" * 2000,
    "long": "(q)" * 1366,
    "long and plain": "q" * 4097,
    "list that is not there": r"\L<names>",
}
# A name at which these take for ever: `regex` sees through the simplest, such as `(a+)+$`.
LONG_NAME = "model.layers.0." + "a" * 32 + "!.0.proj"
SLOW_PATTERNS = {
    "alternatives": "(?:.|..)*[!X]{2}",
    "words": r"(?:\w|\w\w|[.!])*[!X]{2}",
    "many dots": ".*?" * 14 + "[!X]{2}",
    "nested": "((?:.|..)*[a.])*[!X]{2}",
    "lookahead": r"(?:(?=(\w|!))(?:.|..))+[!X]{2}",
    "recursion": "(?R)",
}


def write_pattern(place, key, pattern):
    config = CONFIG | {"target_modules": [LONG_NAME]} | PATTERNED[key](pattern)
    prefix = f"base_model.model.{LONG_NAME}."
    factors = {"lora_A.weight": floats(2, 5), "lora_B.weight": floats(3, 2)}
    place.write(config, {prefix + name: tensor for name, tensor in factors.items()})


@pytest.mark.parametrize("key", PATTERNED)
@pytest.mark.parametrize("pattern", BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_a_pattern_that_is_none_raises(place, monkeypatch, key, pattern):
    monkeypatch.setitem(NAMES, "q", Linear(LONG_NAME))
    write_pattern(place, key, pattern)
    message = "not a regular expression|a pattern of 409[78] characters"
    assert_refused(place, "peft", AdapterFileError, message)


@pytest.mark.parametrize("key", list(PATTERNED)[:-1])
def test_a_pattern_that_hides_its_place_raises(place, key):
    place.write(CONFIG | PATTERNED[key]("(?x)q_proj # and v_proj"), TENSORS)
    assert_refused(place, "peft", AdapterFileError, "not a regular expression in its place")


@pytest.mark.parametrize("key", PATTERNED)
@pytest.mark.parametrize("pattern", SLOW_PATTERNS.values(), ids=SLOW_PATTERNS)
def test_a_pattern_that_takes_too_long_raises(place, monkeypatch, key, pattern):
    monkeypatch.setattr("lorax_io._formats.peft.patterns._SECONDS_EACH", 0.1)
    monkeypatch.setitem(NAMES, "q", Linear(LONG_NAME))
    write_pattern(place, key, pattern)
    assert_refused(place, "peft", AdapterFileError, "take too long to match")


def test_patterns_that_take_too_long_together_raise(place, monkeypatch):
    monkeypatch.setattr("lorax_io._formats.peft.patterns._SECONDS", 0.5)
    pattern = "(?:.|..)*[!X]{2}"
    names = [f"model.layers.{k}." + "a" * 14 + "!.0.proj" for k in range(1000)]
    layouts = {f"{k}": Linear(name) for k, name in enumerate(names)}
    tensors = {
        f"base_model.model.{name}.{key}": tensor
        for name in names
        for key, tensor in (("lora_A.weight", floats(2, 5)), ("lora_B.weight", floats(3, 2)))
    }
    place.write(CONFIG | {"target_modules": names, "rank_pattern": {pattern: 2}}, tensors)
    with pytest.raises(AdapterFileError, match="take too long to match"):
        load_peft(place.folder, dict.fromkeys(layouts, jnp.ones((5, 3))), layouts)


MANY = [f"m{k}" for k in range(200_000)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {f"({name})": 2 for name in MANY}}, "200000 patterns"),
        ({"rank_pattern": dict.fromkeys(MANY, 2), "r": 3}, r"takes \(3, 5\) at the rank 3"),
        ({"target_modules": MANY}, "not a target in its config"),
        ({"modules_to_save": [*MANY, "norm"]}, "lacks `model.norm.weight`"),
        ({"layers_to_transform": [*range(1, 200_000)]}, "not a target in its config"),
    ],
    ids=["patterns", "names with ranks", "targets", "modules to save", "layers"],
)
def test_long_lists_take_linear_time(place, changes, message):
    place.write(CONFIG | changes, TENSORS)
    error = AdapterMismatchError if "takes" in message else AdapterFileError
    assert_refused(place, "peft", error, message)


@pytest.mark.parametrize("pattern", ["layers|x", "(?P<index>layers)|x", "(?x)layers # and x"])
def test_a_layers_pattern_without_a_number_finds_no_layer(place, pattern):
    place.write(CONFIG | {"layers_pattern": pattern, "layers_to_transform": [0]}, TENSORS)
    assert_refused(place, "peft", AdapterFileError, "not a target in its config")


# Tensors of PEFT.

A, B, NORM = "lora_A.weight", "lora_B.weight", "base_model.model.model.norm.weight"


def moved(*pairs):
    """Tensors under other names."""
    return {name: value for old, new in pairs for name, value in ((old, None), (new, TENSORS[old]))}


def spoiled(value, name=Q + A, dtype="float32"):
    array = TENSORS[name].astype(jnp.dtype(dtype))
    array.flat[-1] = value
    return {name: array}


def typed(dtype, *names):
    return {name: TENSORS[name].astype(dtype) for name in names or TENSORS}


FILE, MISMATCH, MORE = AdapterFileError, AdapterMismatchError, UnsupportedAdapterError

ADAPTERS = rows(
    ("half missing", {}, {Q + B: None}, FILE, "lacks `.*q_proj.lora_B.weight`, beside"),
    ("other half missing", {}, {V + A: None}, FILE, "lacks `.*v_proj.lora_A.weight`, beside"),
    ("target missing", {}, {V + A: None, V + B: None}, FILE, "lacks the factors of `.*v_proj`"),
    ("no tensor", {}, dict.fromkeys(TENSORS), FILE, "has no tensors: .*ZeRO-3"),
    ("no target", {"target_modules": ["q_proj"]}, {}, FILE, "`.*v_proj`, which is not a target"),
    ("no target at all", {"target_modules": []}, {}, FILE, "which is not a target"),
    ("other case", {"target_modules": ["Q_PROJ", "v_proj"]}, {}, FILE, "which is not a target"),
    ("excluded", {"exclude_modules": ["v_proj"]}, {}, FILE, "`.*v_proj`, which is not a target"),
    ("other layers", {"layers_to_transform": [1]}, {}, FILE, "which is not a target"),
    (
        "unknown module",
        {},
        moved((V + A, V.replace("v_", "k_") + A)),
        MISMATCH,
        "`.*k_proj`, which is not in `names`. Did you mean",
    ),
    (
        "unknown tensor",
        {},
        {"base_model.model.other": floats(2)},
        MISMATCH,
        "is not a factor and does not fit",
    ),
    ("no prefix", {}, {Q[17:] + A: TENSORS[Q + A]}, FILE, "begins with `base_model.model.`"),
    (
        "half a prefix",
        {},
        moved((Q + A, Q.replace("base_model.model.", "base_model.") + A)),
        MISMATCH,
        "which is not in `names`. Did you mean",
    ),
    (
        "prefix twice",
        {},
        moved((Q + A, "base_model.model." + Q + A)),
        MISMATCH,
        "which is not in `names`",
    ),
    ("empty name", {}, {"": floats(2)}, FILE, "begins with"),
    ("prefix alone", {}, {"base_model.model.": floats(2)}, MISMATCH, "is not a factor"),
    ("no .weight", {}, moved((Q + A, Q + "lora_A")), MORE, "that is AdaLoRA"),
    ("no such key", {}, moved((Q + A, Q + "lora_C")), MISMATCH, "is not a factor"),
    ("long name", {}, {"base_model.model." + "x" * 10**6: floats(2)}, MISMATCH, "is not a factor"),
    (
        "long module",
        {},
        {"base_model.model." + "x" * 10**6 + "." + A: floats(2)},
        MISMATCH,
        "which is not in `names`",
    ),
    ("long name without prefix", {}, {"x" * 10**6: floats(2)}, FILE, "begins with"),
    (
        "two adapters",
        {},
        {Q + "lora_A.a.weight": floats(2, 5), Q + "lora_A.b.weight": floats(2, 5)},
        FILE,
        "two adapters in one file",
    ),
    (
        "named and unnamed",
        {},
        {Q + "lora_A.default.weight": floats(2, 5)},
        FILE,
        "two adapters in one file",
    ),
    (
        "an adapter for each module",
        {},
        moved(
            *(
                (m + f"lora_{x}.weight", m + f"lora_{x}.{name}.weight")
                for m, name in ((Q, "a"), (V, "b"))
                for x in "AB"
            )
        ),
        FILE,
        "two adapters in one file",
    ),
    (
        "A for B",
        {},
        {Q + A: TENSORS[Q + B], Q + B: TENSORS[Q + A]},
        MISMATCH,
        r"of shape \(3, 2\); the parameter takes \(2, 5\)",
    ),
    (
        "transposed",
        {},
        {Q + A: floats(5, 2)},
        MISMATCH,
        r"of shape \(5, 2\); the parameter takes \(2, 5\)",
    ),
    ("other width", {}, {Q + A: floats(2, 6)}, MISMATCH, r"takes \(2, 5\) at the rank 2"),
    ("other height", {}, {Q + B: floats(4, 2)}, MISMATCH, r"takes \(3, 2\)"),
    ("one axis", {}, {Q + A: floats(10)}, MISMATCH, r"of shape \(10,\)"),
    ("no axis", {}, {Q + A: floats()}, MISMATCH, r"of shape \(\)"),
    ("three axes", {}, {Q + A: floats(2, 5, 1)}, MISMATCH, r"of shape \(2, 5, 1\)"),
    ("no numbers", {}, {Q + A: floats(0, 5), Q + B: floats(3, 0)}, FILE, "without numbers"),
    ("no numbers at all", {}, {name: floats(0) for name in TENSORS}, FILE, "without numbers.*ZeRO"),
    ("other rank", {"r": 4}, {}, MISMATCH, r"takes \(4, 5\) at the rank 4 of its config"),
    ("enormous rank", {"r": 2**20}, {}, MISMATCH, "at the rank 1048576"),
    ("rank by pattern", {"rank_pattern": {"v_proj": 1}}, {}, MISMATCH, "at the rank 1 "),
    ("ranks differ", {}, {Q + A: floats(1, 5)}, MISMATCH, "at the rank 2"),
    ("NaN", {}, spoiled(np.nan), AdapterError, "`q/a` holds NaN or infinity"),
    ("infinity", {}, spoiled(-np.inf, V + B), AdapterError, "`v/b` holds NaN or infinity"),
    ("NaN in bfloat16", {}, spoiled(np.nan, dtype="bfloat16"), AdapterError, "holds NaN"),
    ("infinity in float16", {}, spoiled(np.inf, dtype="float16"), AdapterError, "holds NaN"),
    ("int32", {}, typed(np.int32), FILE, "in int32, not float16, bfloat16, float32, float64"),
    ("int8", {}, typed(np.int8, Q + A), FILE, "in int8, not"),
    ("bool", {}, typed(bool, Q + B), FILE, "in bool, not"),
    ("complex", {}, typed(np.complex64, Q + B), FILE, "in complex64, not"),
    ("8-bit floats", {}, typed(jnp.float8_e4m3fn), FILE, "in float8_e4m3fn, not"),
    ("other 8-bit floats", {}, typed(jnp.float8_e5m2, Q + A), FILE, "in float8_e5m2, not"),
    ("double precision", {}, typed(np.float64, Q + A), MISMATCH, "in float64, which JAX shortens"),
    ("base weight", {}, {NORM: floats(5)}, FILE, "would replace a base weight"),
    (
        "base weight of an adapted module",
        {},
        {Q + "weight": floats(3, 5)},
        FILE,
        "would replace a base",
    ),
    (
        "wrapped base weight beside factors",
        {},
        {Q + "base_layer.weight": floats(3, 5)},
        FILE,
        "would replace a base",
    ),
    (
        "base weight in its wrapper",
        {},
        {"base_model.model.model.norm.base_layer.weight": floats(5)},
        MISMATCH,
        "is not a factor",
    ),
    (
        "base weight to save, nearly",
        {"modules_to_save": ["nor"]},
        {NORM: floats(5)},
        FILE,
        "would replace a base",
    ),
    (
        "base weight to save, nearly so",
        {"modules_to_save": ["a.norm"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    (
        "base weight to save, begin only",
        {"modules_to_save": ["mode"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    (
        "base weight to save, as a tensor",
        {"modules_to_save": ["norm.weight"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    ("base bias, unsaid", {}, {V + "bias": floats(3)}, FILE, "would replace a base weight"),
    (
        "base bias, of lora_only",
        {"bias": "lora_only"},
        {V + "bias": floats(3)},
        FILE,
        "would replace",
    ),
    ("wrapped bias, unsaid", {}, {V + "base_layer.bias": floats(3)}, FILE, "would replace a base"),
    (
        "weight among biases",
        {"bias": "all"},
        {NORM: floats(5)},
        FILE,
        "would replace a base weight",
    ),
    (
        "copies of weights among biases",
        {"bias": "all"},
        {"base_model.model.a.modules_to_save.weight": floats(5)},
        MISMATCH,
        "is not a factor",
    ),
    ("saved module missing", {"modules_to_save": ["norm"]}, {}, FILE, "lacks `model.norm.weight`"),
    (
        "saved and adapted",
        {"modules_to_save": ["q_proj"]},
        {},
        FILE,
        "`.*q_proj`, but the file lacks",
    ),
    (
        "saved module of other shape",
        {"modules_to_save": ["norm"]},
        {NORM: floats(6)},
        MISMATCH,
        r"takes \(5,\)",
    ),
    (
        "saved module of other type",
        {"modules_to_save": ["norm"]},
        {NORM: np.ones(5, np.int32)},
        FILE,
        "in int32",
    ),
    (
        "NaN in a saved module",
        {"modules_to_save": ["norm"]},
        {NORM: floats(5) * np.inf},
        AdapterError,
        "`norm` holds NaN",
    ),
    ("every module saved", {"modules_to_save": [""]}, {}, FILE, "but the file lacks"),
    ("DoRA", {}, {Q + "lora_magnitude_vector": floats(3)}, MORE, "DoRA, with a magnitude"),
    ("DoRA without magnitudes", {"use_dora": True}, {}, FILE, "lacks `.*lora_magnitude_vector`"),
    (
        "DoRA of one of two modules",
        {"use_dora": True},
        {Q + "lora_magnitude_vector": floats(3)},
        FILE,
        "lacks `.*v_proj.lora_magnitude_vector`",
    ),
    *(
        (
            f"DoRA with magnitudes of {shape}",
            {"use_dora": True},
            {module + "lora_magnitude_vector": floats(*shape) for module in (Q, V)},
            MISMATCH,
            r"lora_magnitude_vector` of shape .*; the parameter takes \(3,\)",
        )
        for shape in ((5,), (3, 1), (1, 3), ())
    ),
    (
        "DoRA with NaN",
        {"use_dora": True},
        {module + "lora_magnitude_vector": floats(3) * np.nan for module in (Q, V)},
        AdapterError,
        "`q/magnitude` holds NaN|lora_magnitude_vector` holds NaN",
    ),
    ("DoRA with a name", {}, {Q + "lora_magnitude_vector.default.weight": floats(3)}, MORE, "DoRA"),
    ("bias of B", {}, {Q + "lora_B.bias": floats(3)}, MORE, "`lora_bias` of its config"),
    (
        "bias of B with a name",
        {},
        {Q + "lora_B.default.bias": floats(3)},
        MORE,
        "`lora_bias` of its",
    ),
    (
        "rows of tokens",
        {},
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": floats(1, 5)},
        MORE,
        "trainable tokens",
    ),
    ("AdaLoRA", {}, {Q + "lora_E": floats(2, 1)}, MORE, "AdaLoRA"),
    ("KaSA", {}, {Q + "lora_diag": floats(2)}, MORE, "KaSA"),
    ("LoHa", {}, {Q + "hada_w1_a": floats(3, 2)}, MORE, "LoHa"),
    ("LoKr", {}, {Q + "lokr_w1": floats(3, 2)}, MORE, "LoKr"),
    ("OFT", {}, {Q + "oft_R.weight": floats(3, 2)}, MORE, "OFT"),
    ("IA3", {}, {Q + "ia3_l": floats(3, 1)}, MORE, "IA³"),
    ("VeRA", {}, {Q + "vera_lambda_b": floats(3)}, MORE, "VeRA"),
    (
        "factors of an embedding for a linear layer",
        {},
        moved((Q + A, Q + "lora_embedding_A"), (Q + B, Q + "lora_embedding_B")),
        MISMATCH,
        "which is not in `names`",
    ),
    (
        "factors of a linear layer for an embedding",
        {},
        {"base_model.model.model.embed_tokens." + A: floats(2, 7)},
        MISMATCH,
        "which is not in `names`",
    ),
)


EMBEDDING = "base_model.model.model.embed_tokens."


def embedding(shape):
    """What PEFT writes of an adapted embedding: the embedding itself, too."""
    factors = {"lora_embedding_A": floats(2, 7), "lora_embedding_B": floats(5, 2)}
    return {EMBEDDING + k: v for k, v in {**factors, "base_layer.weight": floats(*shape)}.items()}


def test_a_copy_of_an_embedding_is_left_out(place):
    place.write(CONFIG | {"target_modules": ["embed_tokens"]}, embedding((7, 5)))
    assert load_peft(place.folder, make_params(), NAMES)[1]["embed"].rank == 2


def test_a_copy_of_an_embedding_with_more_tokens_raises(place):
    place.write(CONFIG | {"target_modules": ["embed_tokens"]}, embedding((9, 5)))
    assert_refused(place, "peft", MISMATCH, r"of shape \(9, 5\), where the base has \(7, 5\)")


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), ADAPTERS)
def test_an_adapter_that_does_not_fit_raises(place, changes, tensors, error, message):
    place.write(CONFIG | changes, without_none(TENSORS | tensors))
    assert_refused(place, "peft", error, message)


# What `save_peft` leaves in the header.

OURS = rows(
    ("not JSON", "scales", "not (a )?JSON"),
    ("array", "[]", "no settings under 'lorax'"),
    ("nothing", "{}", "no settings"),
    ("settings are a list", '{"unsaid": []}', "no settings"),
    ("settings of a number", '{"unsaid": {"q": 4}}', "no settings"),
    ("alpha alone", '{"unsaid": {"q": {"alpha": 4}}}', "no settings"),
    *(
        (
            f"alpha {a}",
            f'{{"unsaid": {{"q": {{"alpha": {a}, "scaling": "rslora"}}}}}}',
            "no settings",
        )
        for a in ("true", "NaN", "Infinity", '"4"', "[]", "9" * 400)
    ),
    ("scaling", '{"unsaid": {"q": {"alpha": 4, "scaling": "other"}}}', "no settings"),
    ("scaling of a list", '{"unsaid": {"q": {"alpha": 4, "scaling": []}}}', "no settings"),
    ("other scales", '{"unsaid": {}, "scales": "0"}', "not the one that was written with these"),
    ("no scales", '{"unsaid": {}}', "not the one that was written with these"),
    ("scales of a list", '{"unsaid": {}, "scales": []}', "not the one that was written with"),
    ("deep", NESTED, "not (a )?JSON"),
)


@pytest.mark.parametrize(("text", "message"), OURS)
def test_header_not_written_by_save_peft_raises(place, text, message):
    place.write(CONFIG, TENSORS, {"format": "pt", "lorax": text})
    assert_refused(place, "peft", AdapterFileError, message)


def test_header_and_config_agree_on_the_scale(place):
    save_peft(place.folder, make_tunable() | {"norm": None}, NAMES)
    tensors = safetensors.numpy.load_file(place.weights)
    with safetensors.safe_open(place.weights, "numpy") as file:
        metadata = file.metadata()
    ours = json.loads(metadata["lorax"])
    ours["unsaid"] = {f"{LAYER}.q_proj": {"alpha": 5, "scaling": "standard"}}
    safetensors.numpy.save_file(tensors, place.weights, metadata | {"lorax": json.dumps(ours)})
    assert_refused(place, "peft", AdapterFileError, "disagree on the scale of `.*q_proj`")


# Native files.

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


def settings(text=None, **changes):
    """The header's settings, in which those of `q` have been changed."""
    values = LORA | {name: 0 for name in changes}
    texts = {name: json.dumps(value) for name, value in values.items()} | changes
    fields = ", ".join(f'"{name}": {value}' for name, value in texts.items())
    text = text or f"{{{fields}}}"
    return {KEY: f'{{"q": {text}, "norm": {{"kind": "full"}}}}'}


NATIVE = rows(
    ("no format", {"lorax.format": None}, {}, FILE, "not a native adapter; `load_peft` reads"),
    *(
        (f"format {text!r}", {"lorax.format": text}, {}, FILE, f"of format '{text}'; this version")
        for text in ("3", "", "1.0", "01", "one")
    ),
    ("no settings", {KEY: None}, {}, FILE, "is not (a )?JSON"),
    *(
        (
            f"settings {text[:9]}",
            {KEY: text},
            {},
            FILE,
            f"is not (a )?JSON|no object under '{KEY}'|'q' twice",
        )
        for text in ("", "q", "[]", "null", '"q"', "3", NESTED, '{"q": 1, "q": 2}')
    ),
    *(
        (f"settings of q {text}", settings(text), {}, FILE, "says of `q` what is not a setting")
        for text in (
            "[]",
            "3",
            "null",
            "{}",
            '{"kind": "lora"}',
            '{"kind": "full", "rank": 2}',
            '{"kind": "other"}',
            '{"kind": []}',
        )
    ),
    *(
        (
            f"{key} {text[:9]}",
            settings(**{key: text}),
            {},
            FILE,
            "says of `q` what is not a setting",
        )
        for key, texts in {
            "rank": '0 -1 true 2.0 null [2] "2"',
            "alpha": 'true NaN Infinity -Infinity 1e999 "4" [] ' + "9" * 400,
            "scaling": 'null 1 "other" [] {}',
            "in_axes": 'null 0 {} [0.0] [true] [null] "0" [[0]]',
            "out_axes": "null 1 [1.0] [false]",
            "shared_axes": 'null 0 ["0"]',
            "more": "1",
        }.items()
        for text in texts.split(" ")
    ),
    *(
        (f"{key} {text}", settings(**{key: text}), {}, MISMATCH, message)
        for key, text, message in (
            ("in_axes", "[]", "`q`.*exactly one role"),
            ("in_axes", "[2]", "`q`.*in_axes"),
            ("in_axes", "[0, 0]", "`q`.*names an axis twice"),
            ("in_axes", "[0, 1]", "`q`.*exactly one role"),
            ("in_axes", f"[{10**30}]", "`q`.*in_axes"),
            ("out_axes", "[0]", "`q`.*exactly one role"),
            ("shared_axes", "[0]", "`q`.*exactly one role"),
            ("rank", "3", r"`q/[ab]` of shape .*3"),
            ("rank", str(2**20), "`q/[ab]` of shape"),
            ("rank", str(2**62), "`q/[ab]` of shape|rank"),
            ("rank", str(10**30), "`q/[ab]` of shape|rank"),
        )
    ),
    ("missing tensor", {}, {"q/a": None}, FILE, "lacks the tensor `q/a` of its header"),
    ("missing array", {}, {"norm": None}, FILE, "lacks the tensor `norm` of its header"),
    ("more tensors", {}, {"v": floats(5, 3)}, FILE, "a tensor `v` that is not in its header"),
    (
        "whole beside factors",
        {},
        {"q": floats(5, 3)},
        FILE,
        "a tensor `q` that is not in its header",
    ),
    (
        "one tensor of two",
        {KEY: json.dumps({"q": LORA, "q/a": {"kind": "full"}, "norm": {"kind": "full"}})},
        {},
        FILE,
        "two uses for `q/a`",
    ),
    ("other shape", {}, {"q/a": floats(6, 2)}, MISMATCH, r"`q/a` of shape \(6, 2\), but \(5, 2\)"),
    ("transposed", {}, {"q/a": floats(2, 5)}, MISMATCH, r"`q/a` of shape \(2, 5\), but \(5, 2\)"),
    ("no numbers", {}, {"q/a": floats(0)}, MISMATCH, r"`q/a` of shape \(0,\)"),
    ("other shape in full", {}, {"norm": floats(1, 5)}, MISMATCH, r"`norm` of shape \(1, 5\)"),
    ("NaN", {}, {"norm": floats(5) * np.nan}, AdapterError, "`norm` holds NaN or infinity"),
    ("infinity", {}, {"q/b": floats(2, 3) * np.inf}, AdapterError, "`q/b` holds NaN or infinity"),
    (
        "NaN in 8 bits",
        {},
        {"norm": np.full(5, np.nan, jnp.float8_e4m3fn)},
        AdapterError,
        "holds NaN",
    ),
    (
        "double precision",
        {},
        {"norm": np.ones(5)},
        MISMATCH,
        "`norm` in float64, which JAX shortens",
    ),
    ("long integers", {}, {"norm": np.ones(5, np.int64)}, MISMATCH, "`norm` in int64, which JAX"),
    ("base is not JSON", {"lorax.base": "q"}, {}, FILE, "is not (a )?JSON"),
    ("base is a list", {"lorax.base": "[]"}, {}, FILE, "no object under 'lorax.base'"),
    ("base of nothing", {"lorax.base": "{}"}, {}, MISMATCH, "belongs to another base"),
    (
        "base of numbers",
        {"lorax.base": '{"shapes": 1, "dtypes": []}'},
        {},
        MISMATCH,
        "another base",
    ),
    ("base of other content", {"lorax.base": '{"content": "0"}'}, {}, MISMATCH, "another base"),
    ("base deep", {"lorax.base": NESTED}, {}, FILE, "is not (a )?JSON"),
    *(
        (
            f"adapts {path}",
            {KEY: json.dumps({path: LORA, "norm": {"kind": "full"}})},
            {"q/a": None, "q/b": None, f"{path}/a": floats(5, 2), f"{path}/b": floats(2, 3)},
            MISMATCH,
            f"adapts `{path}`, which",
        )
        for path in ("absent", "no array", "", "q/a", "../q")
    ),
    (
        "trains what is absent",
        {KEY: '{"w": {"kind": "full"}}'},
        {"q/a": None, "q/b": None, "norm": None, "w": floats(1)},
        MISMATCH,
        "trains `w` in full, which is not in the parameters",
    ),
    (
        "trains what is not an array",
        {KEY: '{"no array": {"kind": "full"}}'},
        {"q/a": None, "q/b": None, "norm": None, "no array": floats(1)},
        MISMATCH,
        "which is NoneType",
    ),
    (
        "factors of a vector",
        {KEY: json.dumps({"q": LORA, "norm": LORA})},
        {"norm": None, "norm/a": floats(5, 2), "norm/b": floats(2, 1)},
        MISMATCH,
        "`norm`",
    ),
)


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), NATIVE)
def test_a_native_file_that_does_not_fit_raises(place, changes, tensors, error, message):
    place.write_native(changes, tensors)
    assert_refused(place, "native", error, message)


# Native files of other kinds.

DORA = {"kind": "dora", "detached": True, "delta": LORA}
IA3 = {
    "kind": "ia3",
    "side": "out",
    "gain_axes": None,
    "in_axes": [0],
    "out_axes": [1],
    "shared_axes": [],
}
MAGNITUDE = {"q/magnitude": floats(3)}
GAIN = {"q/a": None, "q/b": None, "q/gain": floats(3)}


def kinds(q, held=None, format="2"):
    """The header of a file in which `q` has these settings and these frozen factors."""
    text = json.dumps({"q": q, "norm": {"kind": "full"}})
    more = {} if held is None else {"lorax.held": held if type(held) is str else json.dumps(held)}
    return {"lorax.format": format, KEY: text} | more


def deep(depth):
    spec = LORA
    for _ in range(depth):
        spec = {"kind": "dora", "detached": True, "delta": spec}
    return spec


NO_SETTING = "says of `q` what is not a setting"
SQUARE = MAGNITUDE | {"q/square": floats(3)}
OTHER_KINDS = rows(
    *(
        (f"dora with {name} {value}", kinds(DORA | {name: value}), MAGNITUDE, FILE, NO_SETTING)
        for name, value in (
            ("detached", 1),
            ("detached", None),
            ("detached", "yes"),
            ("delta", None),
            ("delta", {}),
            ("delta", [LORA]),
            ("delta", LORA | {"rank": 0}),
            ("delta", LORA | {"a": LORA}),
            ("magnitude", LORA),
            ("in_axes", [0]),
        )
    ),
    ("dora without an adapter", kinds(without(DORA, "delta")), MAGNITUDE, FILE, NO_SETTING),
    ("dora of a gain", kinds(DORA | {"delta": IA3}), GAIN | MAGNITUDE, MISMATCH, "is a gain"),
    *(
        (
            f"dora of dora {depth}",
            kinds(deep(depth)),
            MAGNITUDE,
            AdapterError,
            "`q`|is not (a )?JSON",
        )
        for depth in (2, 100, 200, 300, 450, 600, 900)
    ),
    ("lora of lora", kinds(LORA | {"a": LORA}), {}, FILE, NO_SETTING),
    *(
        (f"ia3 with {name} {value}", kinds(IA3 | {name: value}), GAIN, FILE, NO_SETTING)
        for name, value in (
            ("side", "left"),
            ("side", None),
            ("side", ["out"]),
            ("gain_axes", 1),
            ("gain_axes", ["1"]),
            ("gain_axes", [True]),
            ("gain_axes", [[1]]),
            ("gain", [1]),
            ("rank", 2),
        )
    ),
    ("ia3 over other axes", kinds(IA3 | {"gain_axes": [9]}), GAIN, MISMATCH, "`q/gain` of shape"),
    ("ia3 on the other side", kinds(IA3 | {"side": "in"}), GAIN, MISMATCH, r"but \(5,\) would fit"),
    (
        "ia3 with factors",
        kinds(IA3),
        {"q/gain": floats(3)},
        FILE,
        "a tensor `q/[ab]` that is not in its head",
    ),
    ("dora without magnitude", kinds(DORA), {}, FILE, "lacks the tensor `q/magnitude`"),
    (
        "short magnitude",
        kinds(DORA),
        {"q/magnitude": floats(2)},
        MISMATCH,
        "`q/magnitude` of shape",
    ),
    ("held is not JSON", kinds(DORA, "q"), MAGNITUDE, FILE, "is not (a )?JSON"),
    ("held is a list", kinds(DORA, "[]"), MAGNITUDE, FILE, "no object under 'lorax.held'"),
    ("held deep", kinds(DORA, NESTED), MAGNITUDE, FILE, "is not (a )?JSON"),
    *(
        (f"held {value}", kinds(DORA, value), MAGNITUDE, FILE, "no frozen factors of `(q|w|norm)`")
        for value in (
            {"q": "square"},
            {"q": [1]},
            {"q": None},
            {"q": [["square"]]},
            {"w": ["square"]},
            {"norm": ["square"]},
        )
    ),
    ("held without tensor", kinds(DORA, {"q": ["square"]}), MAGNITUDE, FILE, "lacks the tensor"),
    ("held but not said", kinds(DORA), SQUARE, FILE, "a tensor `q/square` that is not in its head"),
    ("held twice", kinds(DORA, {"q": ["square"] * 2}), SQUARE, FILE, "two uses for `q/square`"),
    ("held and trained", kinds(DORA, {"q": ["a"]}), MAGNITUDE, FILE, "two uses for `q/a`"),
    (
        "held of another kind",
        kinds(LORA, {"q": ["square"]}),
        {"q/square": floats(3)},
        FILE,
        "frozen factor `q/square`, which a lora adapter does not have",
    ),
    (
        "held of another shape",
        kinds(DORA, {"q": ["square"]}),
        MAGNITUDE | {"q/square": floats(5)},
        MISMATCH,
        r"`q/square` of shape \(5,\), but \(3,\)",
    ),
    (
        "held of double precision",
        kinds(DORA, {"q": ["square"]}),
        MAGNITUDE | {"q/square": np.ones(3)},
        MISMATCH,
        "`q/square` in float64",
    ),
)


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), OTHER_KINDS)
def test_a_native_file_of_another_kind_that_does_not_fit_raises(
    place, changes, tensors, error, message
):
    place.write_native(changes, tensors)
    for load in (load_adapter, load_pair):
        with pytest.raises(AdapterError, match=message) as raised:
            load(place.native, params=make_params())
        assert isinstance(raised.value, error)
        assert str(raised.value).startswith(str(place.native))
        assert len(str(raised.value)) < 2000
    with pytest.raises(AdapterError):
        fit_to_itself(place.native)


def fit_to_itself(path):
    """Opens a file as the command line does, without a base; then with one of no such shape."""
    open_adapter(path)
    load_pair(path, {"q": jnp.ones((2, 2)), "norm": jnp.ones(5)})


def test_a_frozen_factor_with_nan_raises(place):
    place.write_native(kinds(DORA, {"q": ["square"]}), MAGNITUDE | {"q/square": floats(3) * np.nan})
    with pytest.raises(AdapterError, match="`q/square` holds NaN"):
        load_pair(place.native, make_params())


def test_unmodified_fixtures_of_other_kinds_load(place):
    place.write_native(kinds(DORA, {"q": ["square"]}), SQUARE)
    assert load_pair(place.native, make_params()).tunable["q"].kind == "dora"
    place.write_native(kinds(IA3), GAIN)
    assert load_pair(place.native, make_params()).tunable["q"].kind == "ia3"


def test_peft_folder_is_not_a_native_file(place):
    place.native = place.weights
    assert_refused(place, "native", AdapterFileError, "not a native adapter; `load_peft` reads")
    assert_refused(place, "metadata", AdapterFileError, "not a native adapter; `load_peft` reads")


def test_parameters_with_one_path_raise(place):
    """Their paths are all that a file knows of them."""
    save_adapter(place.native, {"w": {"v": floats(2)}})
    params = {"w": {"v": floats(2)}, "w/v": floats(3)}
    with pytest.raises(AdapterError, match="two parameters are both called `w/v`"):
        load_adapter(place.native, params=params)
    with pytest.raises(AdapterError, match="two parameters are both called `w/v`"):
        load_peft(place.folder, params, {})


def test_bools_of_other_bits_raise(place):
    save_adapter(place.native, {"w": jnp.ones(4, bool)})
    data = place.native.read_bytes()
    place.native.write_bytes(data[:-1] + b"\x02")
    with pytest.raises(AdapterFileError, match="`w` holds .* neither true nor false"):
        load_adapter(place.native, params={"w": jnp.ones(4, bool)})
