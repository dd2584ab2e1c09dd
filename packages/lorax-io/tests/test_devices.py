"""Adapters on several devices, and in several processes."""

import functools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import traceback
import tracemalloc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

import lorax
from lorax import LoraSpec, LoraWeight
from lorax_io import (
    AdapterError,
    Embedding,
    Linear,
    Tensor,
    load_adapter,
    load_base,
    load_frozen,
    load_peft,
    save_adapter,
    save_frozen,
    save_merged,
    save_peft,
)
from lorax_io._disk.tensors import TensorFile

# The number of devices is set before JAX starts. So one separate process runs all functions
# `check_…` below, and each test reports the result of one.

RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("devices", sys.argv[1])
devices = importlib.util.module_from_spec(spec)
spec.loader.exec_module(devices)
getattr(devices, sys.argv[2])(*sys.argv[3:])
"""


FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(function, *args, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, __file__, function.__name__, *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **FAST},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """The last output line of a process, as JSON."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out}\n{err}"
    return json.loads(out.splitlines()[-1])


SPECS = {
    "dense": P("x", "y"),
    "heads": P("x", "y", None),
    "stack": P("y", None, "x"),
    "table": P(None, ("x", "y")),
    "replicated": P(),
    "bias": P("y"),
}
SHAPES = {
    "dense": (8, 16),
    "heads": (8, 4, 6),
    "stack": (4, 6, 8),
    "table": (7, 16),
    "replicated": (5, 3),
    "bias": (16,),
}
TUNED = {
    "dense": LoraSpec(2, 4),
    "heads": LoraSpec(3, in_axes=[0]),
    "stack": LoraSpec(2, 8, "rslora", shared_axes=[0]),
    "table": LoraSpec(2),
    "replicated": LoraSpec(2),
    "bias": lorax.LORA_FULL,
}
NAMES = {
    "dense": Linear("layer.dense"),
    "heads": Linear("layer.heads", in_axes=[0]),
    "stack": Linear("layers.{}.stack", shared_axes=[0]),
    "table": Embedding("layer.table"),
    "replicated": Linear("layer.replicated"),
    "bias": Tensor("layer.dense"),
}


def make_mesh():
    return jax.make_mesh((2, 4), ("x", "y"))


def make_params():
    random = np.random.default_rng(0)
    return {name: random.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def make_sharded():
    mesh = make_mesh()
    return {
        name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
        for name, array in make_params().items()
    }


def make_tunable():
    """Factors from NumPy, since compiling random ones in JAX takes longer than the tests."""
    shapes = jax.eval_shape(lambda: lorax.init_lora(make_params(), TUNED, jax.random.key(0))[1])
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), shapes)


def placed_by_init(params, tunable):
    """The tree with the shardings of `init_lora`."""
    init = functools.partial(lorax.init_lora, a_init="zeros", key=jax.random.key(0))
    blank = init(params, TUNED)[1]
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tunable, blank)


def assert_same(left, right, placed=False):
    """Asserts the same values and, if `placed`, the same shardings."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        if placed:
            assert x.sharding == y.sharding
            assert x.committed == y.committed


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Spy(np.ndarray):
    """An array that records the shapes of its slices."""

    view_of_file = TensorFile.view
    taken: ClassVar[list[tuple[int, ...]]] = []

    def __getitem__(self, index):
        part = super().__getitem__(index)
        Spy.taken.append(np.shape(part))
        return part

    @classmethod
    def watch(cls):
        """Makes loaders read through `Spy`; returns the list of recorded shapes."""
        TensorFile.view = lambda self, name: Spy.view_of_file(self, name).view(cls)
        cls.taken = []
        return cls.taken


def shard_shapes(tree):
    return {
        shard.data.shape for array in jax.tree.leaves(tree) for shard in array.addressable_shards
    }


# Eight devices


def check_sharded_adapter_gives_the_same_file(home):
    params, tunable, *_ = saved()
    assert not tunable["dense"].a.is_fully_replicated
    save_adapter(home / "sharded", tunable, base=params, hash_base=True)
    save_adapter(home / "host", make_tunable(), base=make_params(), hash_base=True)
    assert (home / "sharded").read_bytes() == (home / "host").read_bytes()


def check_sharded_adapter_gives_the_same_folder(home):
    _, tunable, *_ = saved()
    save_peft(home / "sharded", tunable, NAMES)
    save_peft(home / "host", make_tunable(), NAMES)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (home / "sharded" / name).read_bytes() == (home / "host" / name).read_bytes()


def check_frozen_tree_is_read_with_its_sharding(home):
    mesh = make_mesh()
    formats = {
        "dense": lorax.Int8(),
        "table": lorax.Int4(4, along=(1,)),
        "stack": lorax.NF4(along=(1,)),
    }
    shapes, specs = SHAPES | {"stack": (4, 64, 8)}, SPECS | {"table": P(None, "x")}
    random = np.random.default_rng(0)
    where = {name: NamedSharding(mesh, specs[name]) for name in formats}
    params = {n: jax.device_put(random.normal(size=shapes[n]), where[n]) for n in formats}
    frozen = lorax.quantize(params, formats)
    save_frozen(home / "sharded", frozen)
    taken = Spy.watch()
    for given in ({"like": frozen}, {"params": shapes_of(params)}):
        assert_same(load_frozen(home / "sharded", **given), frozen, placed=True)
    split = frozen["stack"].arrays["codes"].sharding.shard_shape((4, 1, 64, 8))
    assert (*split[:2], 32, split[3]) in taken and (4, 1, 32, 8) not in taken
    plain = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    loaded = load_frozen(home / "sharded", params=plain, sharding=where)
    assert_same(loaded, frozen, placed=True)
    everywhere = NamedSharding(mesh, P())
    loaded = load_frozen(home / "sharded", params=plain, sharding=everywhere)
    assert all(x.sharding.is_equivalent_to(everywhere, x.ndim) for x in jax.tree.leaves(loaded))
    save_frozen(home / "host", jax.device_get(frozen))
    scale, codes = np.ones((16, 1), np.float32), np.ones((16, 8), np.int8)
    tensors = {"up.weight": codes, "up.weight_scale": scale}
    safetensors.numpy.save_file(tensors, home / "base")
    loaded = load_base(home / "base", {"up": Linear("up")}, sharding=where["dense"])["up"]
    split = {name: x.sharding.shard_shape(x.shape) for name, x in loaded.arrays.items()}
    assert split == {"codes": (4, 4), "scales": (4,)} and loaded.sharding == where["dense"]
    assert (home / "host").read_bytes() == (home / "sharded").read_bytes()


@functools.cache
def saved():
    """Sharded parameters, their adapter, and the loaders of its file and its folder."""
    home = pathlib.Path(tempfile.mkdtemp())
    params = make_sharded()
    tunable = placed_by_init(params, make_tunable())
    save_adapter(home / "file", tunable, base=params)
    save_peft(home / "folder", tunable, NAMES)
    native = functools.partial(load_adapter, home / "file")
    peft = lambda params, **more: load_peft(home / "folder", params, NAMES, **more)[1]  # noqa: E731
    return params, tunable, (lambda params, **more: native(params=params, **more), peft), native


def check_factors_have_the_shardings_of_init_lora(home):
    params, tunable, loaders, _ = saved()
    for load in loaders:
        assert_same(load(params), tunable, placed=True)


def check_factors_have_the_shardings_of_shapes(home):
    params, tunable, loaders, _ = saved()
    for load in loaders:
        assert_same(load(shapes_of(params)), tunable, placed=True)


def check_factors_without_a_sharding_are_on_the_default_device(home):
    _, tunable, loaders, _ = saved()
    for load in loaders:
        loaded = load(make_params())
        assert_same(loaded, tunable)
        assert {x.sharding for x in jax.tree.leaves(loaded)} == {jnp.zeros(1).sharding}


def check_factors_are_on_the_device_of_their_base(home):
    _, tunable, loaders, _ = saved()
    there = SingleDeviceSharding(jax.devices()[5])
    for load in loaders:
        loaded = load(jax.device_put(make_params(), there))
        assert_same(loaded, tunable)
        assert {x.sharding for x in jax.tree.leaves(loaded)} == {there}


def check_one_sharding_applies_to_all(home):
    params, tunable, loaders, _ = saved()
    mesh = make_mesh()
    for load in loaders:
        for where in (NamedSharding(mesh, P()), SingleDeviceSharding(jax.devices()[3])):
            loaded = load(params, sharding=where)
            assert_same(loaded, tunable)
            assert {x.sharding for x in jax.tree.leaves(loaded)} == {where}


def check_tree_of_shardings_can_be_a_prefix(home):
    params, tunable, loaders, _ = saved()
    mesh = make_mesh()
    everywhere = NamedSharding(mesh, P())
    split, there = NamedSharding(mesh, P("x")), SingleDeviceSharding(jax.devices()[3])
    where: dict[str, Any] = {name: everywhere for name in SHAPES}
    where |= {"bias": split, "replicated": there}
    where["dense"] = LoraWeight(
        split, there, rank=2, alpha=4, in_axes=(0,), out_axes=(1,), shared_axes=()
    )
    for load in loaders:
        loaded = load(params, sharding=where)
        assert_same(loaded, tunable)
        assert loaded["dense"].a.sharding == loaded["bias"].sharding == split
        assert loaded["dense"].b.sharding == loaded["replicated"].a.sharding == there
        assert loaded["heads"].a.sharding == loaded["stack"].b.sharding == everywhere


def check_like_determines_shardings(home):
    _, tunable, _, native = saved()
    assert_same(native(like=tunable), tunable, placed=True)
    assert_same(native(like=shapes_of(tunable)), tunable, placed=True)
    there = SingleDeviceSharding(jax.devices()[6])
    loaded = native(like=tunable, sharding=there)
    assert {x.sharding for x in jax.tree.leaves(loaded)} == {there}


def check_each_part_is_read_separately(home):
    params, tunable, loaders, _ = saved()
    for load in loaders:
        taken = Spy.watch()
        assert_same(load(params), tunable, placed=True)
        # A stack is read from PEFT tensors one entry at a time.
        rows = {shape[1:] for shape in shard_shapes([tunable["stack"]])}
        assert set(taken) <= shard_shapes(tunable) | rows
        # At most the whole array once, and each device's part once.
        arrays = jax.tree.leaves(tunable)
        assert sum(map(math.prod, taken)) >= sum(array.size for array in arrays)
        assert len(taken) <= sum(len(array.addressable_shards) for array in arrays)


def check_uncommitted_base_merges_with_sharded_factors(home):
    some = ("dense", "table", "bias")
    params = {name: jnp.asarray(make_params()[name]) for name in some}
    tunable = {name: make_tunable()[name] for name in some}
    frozen = params | {"bias": None}
    names = {name: NAMES[name] for name in some}
    on_mesh = placed_by_init(make_sharded(), make_tunable())
    everywhere = jax.device_put(tunable, NamedSharding(make_mesh(), P()))
    for k, trained in enumerate((tunable, everywhere, {name: on_mesh[name] for name in some})):
        save_merged(home / str(k), frozen, trained, names)
    expected, *others = (
        safetensors.numpy.load_file(home / str(k) / "model.safetensors") for k in range(3)
    )
    assert len(expected) == 3
    for tensors in others:
        for name, tensor in expected.items():
            np.testing.assert_allclose(tensors[name], tensor, rtol=1e-6, atol=1e-6)


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]


def run_checks():
    outcomes: dict[str, Any] = {"memory": measure(pathlib.Path(tempfile.mkdtemp()))}
    for name in CHECKS:
        try:
            globals()[name](pathlib.Path(tempfile.mkdtemp()))
            outcomes[name] = "passed"
        except BaseException:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


@pytest.fixture(scope="module")
def checked():
    return finish(start(run_checks, devices=8))


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(checked, check):
    if checked[check] != "passed":
        pytest.fail(checked[check])


# Two processes with two devices each


def make_global(mesh, tree, specs):
    """The global tree, to which each process contributes its part."""

    def make(array, spec):
        array = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, spec), lambda index: array[index]
        )

    return jax.tree.map(make, tree, specs)


def placed(mesh, tree, specs):
    """The shapes of the parameters with their shardings."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in tree.items()
    }


def join(process, port, home):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    # The first axis of this mesh spans processes: both have parts of `dense`, `heads` and `stack`.
    specs = SPECS | {"stack": P("x", None, "y"), "bias": P("x")}
    home = pathlib.Path(home)
    local = make_tunable()
    outcome: dict[str, Any] = {"same": True, "errors": []}

    shapes = placed(mesh, make_params(), specs)
    taken = Spy.watch()
    tunable = load_adapter(home / "one file", params=shapes)
    outcome["read"] = 4 * sum(map(math.prod, taken))
    outcome["needed"] = sum(
        shard.data.nbytes for x in jax.tree.leaves(tunable) for shard in x.addressable_shards
    )
    taken = Spy.watch()
    reloaded = load_peft(home / "one folder", shapes, NAMES)[1]
    outcome["read by peft"] = 4 * sum(map(math.prod, taken))
    for tree in (tunable, reloaded):
        assert jax.tree.structure(tree) == jax.tree.structure(local)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(local), strict=True):
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, y[shard.index])
    assert not tunable["dense"].a.is_fully_addressable

    if int(process) == 1:  # only the first process writes

        def not_here(*args, **kwargs):
            raise AssertionError("the second process writes")

        safetensors.numpy.save_file = os.replace = pathlib.Path.write_text = not_here
    base = make_global(mesh, make_params(), specs)
    save_adapter(home / "two file", tunable, base=base, hash_base=True)
    save_peft(home / "two folder", tunable, NAMES)
    outcome["exists"] = (home / "two file").exists() and (home / "two folder").exists()

    if int(process) == 0:

        def full(*args, **kwargs):
            raise safetensors.SafetensorError("No space left on device")

        safetensors.numpy.save_file = full
    for save in (
        lambda: save_adapter(home / "two file", tunable),
        lambda: save_peft(home / "two folder", tunable, NAMES),
    ):
        try:
            save()
            outcome["same"] = False
        except AdapterError as error:
            outcome["errors"].append(str(error))

    # If one process cannot read a file, all raise.
    if int(process) == 1:

        def broken(self, name):
            raise AdapterError("cannot be read here", self.path)

        TensorFile.view = broken
    missing = f"{'one' if int(process) == 0 else 'no'} file"
    for load in (
        lambda: load_adapter(home / "one file", params=shapes),
        lambda: load_peft(home / "one folder", shapes, NAMES),
        lambda: load_adapter(home / missing, like=tunable),
    ):
        try:
            load()
            outcome["same"] = False
        except AdapterError as error:
            outcome["errors"].append(str(error))
    print(json.dumps(outcome), flush=True)
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as end:
        end.bind(("localhost", 0))
        return end.getsockname()[1]


def test_two_processes(tmp_path):
    tunable = make_tunable()
    save_adapter(tmp_path / "one file", tunable, base=make_params(), hash_base=True)
    save_peft(tmp_path / "one folder", tunable, NAMES)
    port = free_port()
    processes = [start(join, k, port, tmp_path, devices=2) for k in range(2)]
    first, second = map(finish, processes)
    for outcome in (first, second):
        assert outcome["same"] and outcome["exists"]
        # Each device's part. A part on both devices of a process counts twice.
        assert 0 < outcome["read"] <= outcome["needed"]
        assert 0 < outcome["read by peft"] <= outcome["needed"]
    for name in ("file", "folder/adapter_config.json", "folder/adapter_model.safetensors"):
        assert (tmp_path / f"two {name}").read_bytes() == (tmp_path / f"one {name}").read_bytes()
    assert ["No space left" in error for error in first["errors"][:2]] == [True, True]
    assert ["could not write" in error for error in second["errors"][:2]] == [True, True]
    why = "process 1: could not read its part of the adapter; its own message says why."
    assert first["errors"][2:] == [why] * 3
    assert ["cannot be read here" in error for error in second["errors"][2:4]] == [True, True]
    assert "no file" in second["errors"][4]


# Memory

COUNT, SIDE, RANK = 8, 2**14, 64  # sixteen tensors of 4 MiB each
MARGIN = 2**20  # headers, Python, and what NumPy itself allocates


def make_large(mesh):
    sharding = NamedSharding(mesh, P(("x", "y"), None))
    other = NamedSharding(mesh, P(None, ("x", "y")))
    make = lambda k: LoraWeight(  # noqa: E731
        jax.device_put(np.full((SIDE, RANK), k, np.float32), sharding),
        jax.device_put(np.full((RANK, SIDE), k, np.float32), other),
        rank=RANK,
    )
    return {f"w{k}": make(k) for k in range(COUNT)}


def peak_of(function):
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(home):
    tunable = make_large(make_mesh())
    names = {path: Linear(f"layers.{path}") for path in tunable}
    params = {path: jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for path in tunable}
    sizes = [x.nbytes for x in jax.tree.leaves(tunable)]
    save_adapter(home / "small", {"w": np.ones(3)})  # after all imports
    peaks = {
        "native": peak_of(lambda: save_adapter(home / "file", tunable)),
        "peft": peak_of(lambda: save_peft(home / "folder", tunable, names)),
    }
    peaks["load"] = peak_of(lambda: load_adapter(home / "file", params=params))
    return {**peaks, "adapter": sum(sizes), "tensor": max(sizes)}


def test_memory(checked, capsys):
    peaks = checked["memory"]
    with capsys.disabled():
        print("\nNumPy's peak in MiB:", {k: round(v / 2**20, 1) for k, v in peaks.items()})
    assert peaks["adapter"] == 2 * COUNT * SIDE * RANK * 4
    most = peaks["adapter"] + peaks["tensor"] + MARGIN
    assert peaks["native"] <= most
    # The gathered factors of one weight are in memory together with the written data.
    assert peaks["peft"] <= most + 2 * peaks["tensor"]
    assert peaks["load"] <= most
