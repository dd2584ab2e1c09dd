"""Checkpoints of tunix and qwix: round trips, detection by content, and damage."""

import json
import os
import pathlib
import signal
import subprocess
import sys
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
    AdapterWarning,
    Linear,
    UnsupportedAdapterError,
    load_any,
    open_adapter,
    save_tunix,
)

ocp = pytest.importorskip("orbax.checkpoint")

OUT: dict[str, Any] = {"in_axes": (0, 1), "out_axes": (2,)}
HEADS: dict[str, Any] = {"in_axes": (1,), "out_axes": (0, 2)}
PARAMS = {
    "layers": {"0": {"q": {"w": jnp.ones((4, 10, 6))}, "out": {"w": jnp.ones((4, 6, 11))}}},
    "mlp": {"kernel": jnp.ones((9, 9)), "gate": jnp.ones((9, 5))},
}
PATHS = ["layers/0/out/w", "layers/0/q/w", "mlp/gate", "mlp/kernel"]


def make(alpha=6.0, params=PARAMS, rank=3):
    spec = {
        "layers": {
            "0": {
                "q": {"w": LoraSpec(rank, alpha, **HEADS)},
                "out": {"w": LoraSpec(rank, alpha, **OUT)},
            }
        },
        "mlp": {"kernel": LoraSpec(rank, alpha), "gate": LoraSpec(rank, alpha)},
    }
    return lorax.init_lora(params, spec, jax.random.key(0), b_init="gaussian")


def save_tree(folder, tree, metadata=None):
    """Writes a step in tunix's format."""
    handlers = {"model_params": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(pathlib.Path(folder).resolve(), item_handlers=handlers) as manager:
        args = ocp.args.Composite(model_params=ocp.args.PyTreeSave(tree))
        manager.save(0, args=args, custom_metadata=metadata or {})


def leaf(*shape, value=0.5):
    return {"value": np.full(shape, value, np.float32)}


def test_checkpoint_loads_without_names(tmp_path):
    pair, folder = make(), tmp_path / "checkpoint"
    save_tunix(folder, pair.tunable, step=3)
    loaded = load_any(folder, PARAMS)
    expected = lorax.merge_params(pair)
    jax.tree.map(np.testing.assert_array_equal, lorax.merge_params(loaded), expected)
    weight = loaded.tunable["layers"]["0"]["q"]["w"]
    assert (weight.axes.inputs, weight.axes.outputs) == ((1,), (0, 2))
    # Without a base, the first axes are the inputs.
    opened = open_adapter(folder)
    assert sorted(opened.rows) == PATHS and opened.format == "tunix"
    assert opened.rows["layers/0/q/w"].a.shape == (10, 3)
    assert opened.names["layers/0/q/w"] == Linear("layers.0.q", in_axes=(0,), out_axes=(1, 2))
    assert opened.names["mlp/gate"].module == "mlp.gate"
    # A step and its tree give the same adapter.
    for inner in (folder / "3", folder / "3" / "model_params"):
        from_tree = load_any(inner, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, from_tree.tunable, loaded.tunable)


def test_missing_alpha_raises(tmp_path):
    tree = {"q": {"w_lora_a": leaf(5, 2), "w_lora_b": leaf(2, 3)}}
    save_tree(tmp_path / "a", tree)
    with pytest.raises(UnsupportedAdapterError, match=r"`alpha=` in Python, `--alpha`"):
        open_adapter(tmp_path / "a")
    assert open_adapter(tmp_path / "a", alpha=3.0).rows["q/w"].scale == 1.5
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(AdapterMismatchError, match="not a finite number"):
            open_adapter(tmp_path / "a", alpha=alpha)
    save_tree(tmp_path / "b", tree, {"lora_alpha": 5})
    assert open_adapter(tmp_path / "b").rows["q/w"].scale == 2.5
    save_tree(tmp_path / "c", tree, {"lora_alpha": "much"})
    with pytest.raises(AdapterFileError, match="not a number"):
        open_adapter(tmp_path / "c")


def test_alpha_for_a_file_with_its_own_raises(tmp_path):
    lorax_file = tmp_path / "a.safetensors"
    import lorax_io

    lorax_io.save_adapter(lorax_file, make().tunable)
    with pytest.raises(AdapterMismatchError, match="a native file stores its own"):
        open_adapter(lorax_file, alpha=3.0)


def test_scales_are_those_of_the_given_alpha(tmp_path):
    pair = make(alpha=5.0)
    save_tunix(tmp_path / "a", pair.tunable, alpha=3.0)
    loaded = load_any(tmp_path / "a", PARAMS)
    assert loaded.tunable["mlp"]["gate"].alpha == 3.0
    expected = lorax.merge_params(pair)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)  # noqa: E731
    jax.tree.map(close, lorax.merge_params(loaded), expected)


def test_linen_checkpoint_in_bfloat16_is_read(tmp_path):
    array = lambda *shape: np.full(shape, 0.5, jnp.bfloat16)  # noqa: E731
    save_tree(tmp_path / "a", {"w_lora_a": array(5, 2), "w_lora_b": array(2, 3)})
    row = open_adapter(tmp_path / "a", alpha=2).rows["w"]
    assert (row.a.dtype, row.rank) == (jnp.bfloat16, 2)


def test_last_finished_step_is_read(tmp_path):
    folder = tmp_path / "a"
    for step in (2, 10):
        save_tunix(folder, make(alpha=float(step)).tunable, step=step)
    (folder / "11.orbax-checkpoint-tmp-0").mkdir()
    (folder / "12").mkdir()
    assert open_adapter(folder).rows["mlp/gate"].alpha == 10
    with pytest.raises(AdapterError, match="has a step 10 already"):
        save_tunix(folder, make().tunable, step=10)


def test_other_arrays_are_ignored_with_a_warning(tmp_path):
    save_tree(
        tmp_path / "a", {"q": {"w": leaf(5, 3), "w_lora_a": leaf(5, 2), "w_lora_b": leaf(2, 3)}}
    )
    with pytest.warns(AdapterWarning, match="1 arrays besides the factors, such as `q/w/value`"):
        assert [*open_adapter(tmp_path / "a", alpha=2).rows] == ["q/w"]


def test_command_inspects_and_converts(shell):
    save_tunix("a", make().tunable)
    text = shell.succeed("inspect a")
    for line in ("format: tunix", "rank: 3", "alpha: 6", "scale: 2.0", "written by: lorax-io"):
        assert line in text
    shell.succeed("convert a b --to tunix --alpha 6")
    shell.succeed("diff a b")
    shell.succeed("convert a peft --to peft --rename ^layers model.layers")
    names = {torch_name.module for torch_name in open_adapter("peft").names.values()}
    assert names == {"model.layers.0.q", "model.layers.0.out", "mlp.gate", "mlp.kernel"}


def test_merge_into_a_base_in_pytorch_layout(shell, files):
    pair = make()
    save_tunix("a", pair.tunable)
    tree = {path: x for path, x in zip(PATHS, jax.tree.leaves(PARAMS), strict=True)}
    sides = {"layers.0.out": (11, 24), "layers.0.q": (24, 10), "mlp.gate": (5, 9)}
    sides["mlp.kernel"] = (9, 9)
    base = {f"{name}.weight": files.draw(*shape) for name, shape in sides.items()}
    files.base(base)
    shell.succeed("merge a --base base/model.safetensors --out merged")
    merged = files.read("merged/model.safetensors")
    q, gate = pair.tunable["layers"]["0"]["q"]["w"], pair.tunable["mlp"]["gate"]
    assert len(tree) == 4
    for name, row, rank in (("layers.0.q", q, 3), ("mlp.gate", gate, 3)):
        delta = (
            row.scale * np.asarray(row.a).reshape(-1, rank) @ np.asarray(row.b).reshape(rank, -1)
        )
        np.testing.assert_allclose(
            merged[f"{name}.weight"], base[f"{name}.weight"] + delta.T, atol=1e-5
        )


BROKEN = {
    "one factor": ({"w_lora_a": leaf(5, 2)}, "lacks `w_lora_b`"),
    "two ranks": ({"w_lora_a": leaf(5, 2), "w_lora_b": leaf(3, 4)}, "of a batch of"),
    "a batch": ({"w_lora_a": leaf(4, 5, 2), "w_lora_b": leaf(4, 2, 3)}, "of a batch of"),
    "a vector": ({"w_lora_a": leaf(2), "w_lora_b": leaf(2, 3)}, "of a batch of"),
    "not finite": ({"w_lora_a": leaf(5, 2, value=np.nan), "w_lora_b": leaf(2, 3)}, "NaN"),
    "integers": (
        {"w_lora_a": np.ones((5, 2), np.int32), "w_lora_b": np.ones((2, 3), np.int32)},
        "int32",
    ),
    "no factors": ({"w": leaf(5, 2)}, "in no known format"),
    "twice": (
        {"w_lora_a": leaf(5, 2), "w_lora_b": leaf(2, 3)} | {"q/w_lora_b": leaf(2, 3)},
        "lacks `q/w_lora_a`",
    ),
    "duplicate names": (
        {
            **{"a.b": {"w_lora_a": leaf(5, 2), "w_lora_b": leaf(2, 3)}},
            **{"a": {"b": {"w_lora_a": leaf(5, 2), "w_lora_b": leaf(2, 3)}}},
        },
        "get one name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_raise(tmp_path, case):
    tree, message = BROKEN[case]
    save_tree(tmp_path / "a", tree)
    with pytest.raises(AdapterError, match=message) as raised:
        open_adapter(tmp_path / "a", alpha=2.0 if case != "no factors" else None)
    assert str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize("cause", [MemoryError, PermissionError])
def test_errors_outside_the_file_are_not_reported_as_damage(tmp_path, monkeypatch, cause):
    import orbax.checkpoint as ocp

    def fail(*args, **options):
        raise cause("there is none left")

    save_tunix(tmp_path / "a", make().tunable)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    with pytest.raises(cause, match="none left"):
        open_adapter(tmp_path / "a", alpha=2.0)


def test_zero_alpha_is_folded_into_b(tmp_path):
    weight = lorax.LoraWeight(jnp.ones((5, 2)), jnp.ones((2, 3)), 2, 0.0)
    save_tunix(tmp_path / "a", {"w": weight})
    row = load_any(tmp_path / "a", {"w": jnp.ones((5, 3))}).tunable["w"]
    assert row.scale and not row.b.any()
    with pytest.raises(AdapterError, match="alpha=0; it must be a finite number other than 0"):
        save_tunix(tmp_path / "b", {"w": weight}, alpha=0)


def test_mismatched_shapes_raise(tmp_path):
    save_tunix(tmp_path / "a", make().tunable)
    wider = jax.tree.map(lambda x: jnp.ones((*x.shape[:-1], x.shape[-1] + 1)), PARAMS)
    with pytest.raises(AdapterMismatchError, match="for axes"):
        load_any(tmp_path / "a", wider)
    with pytest.raises(AdapterMismatchError, match="not in the parameters"):
        load_any(tmp_path / "a", {"layers": PARAMS["layers"]})
    cubes = {"w_lora_a": leaf(4, 2), "w_lora_b": leaf(2, 16)}
    save_tree(tmp_path / "b", cubes)
    row = load_any(tmp_path / "b", {"w": jnp.ones((4, 4, 4))}, alpha=2).tunable["w"]
    assert row.axes.inputs == (0,)
    save_tree(tmp_path / "c", {"w_lora_a": leaf(4, 2), "w_lora_b": leaf(2, 3, 4)})
    with pytest.raises(AdapterMismatchError, match="in several ways"):
        load_any(tmp_path / "c", {"w": jnp.ones((3, 4, 4))}, alpha=2)


REFUSED = {
    "another kind": (lorax.IA3Spec(), "plain LoRA"),
    "stacked": (LoraSpec(2, shared_axes=(0,)), "without shared axes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_features_raise(tmp_path, case):
    spec, message = REFUSED[case]
    shape = (3, 4, 5) if case == "stacked" else (4, 5)
    _, tunable = lorax.init_lora({"w": jnp.ones(shape)}, {"w": spec}, jax.random.key(0))
    with pytest.raises(UnsupportedAdapterError, match=message):
        save_tunix(tmp_path / "a", tunable)
    assert not list(tmp_path.iterdir())


def test_several_alphas_raise_or_are_folded(tmp_path):
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
    spec = {"a": LoraSpec(2, 4), "b": LoraSpec(2, 6)}
    pair = lorax.init_lora(params, spec, jax.random.key(0), b_init="gaussian")
    with pytest.raises(UnsupportedAdapterError, match="several alphas"):
        save_tunix(tmp_path / "a", pair.tunable)
    save_tunix(tmp_path / "a", pair.tunable, alpha=4)
    merged = lorax.merge_params(load_any(tmp_path / "a", params))
    for name, weight in lorax.merge_params(pair).items():
        np.testing.assert_allclose(merged[name], weight, rtol=1e-6)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# TensorStore calls into an event loop that Orbax has closed after the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_to_any_file_is_rejected_or_harmless(tmp_path):
    """Truncated, changed and removed files give an error of this package or the same values."""
    save_tunix(tmp_path / "a", make().tunable)
    expected = jax.tree.leaves(load_any(tmp_path / "a", PARAMS).tunable)
    numbers = np.random.default_rng(0)
    outcomes = set()
    for path in files_of(tmp_path / "a"):
        data = path.read_bytes()
        changed = bytearray(data)
        if data:
            changed[int(numbers.integers(0, len(data)))] ^= 255
        for damaged in (data[: len(data) // 2], bytes(changed), None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            try:
                actual = jax.tree.leaves(load_any(tmp_path / "a", PARAMS, alpha=6.0).tunable)
                outcomes.add("read")
                for one, other in zip(actual, expected, strict=True):
                    np.testing.assert_array_equal(one, other)
            except AdapterError as error:
                outcomes.add("refused")
                assert str(error).startswith(str(tmp_path))
            path.write_bytes(data)
    assert outcomes == {"read", "refused"}


def test_invalid_metadata_raises(tmp_path):
    save_tunix(tmp_path / "a", make().tunable)
    path = tmp_path / "a" / "0" / "model_params" / "_METADATA"
    content = json.loads(path.read_text())
    first = next(iter(content["tree_metadata"].values()))
    for value in ({}, [], {"tree_metadata": {}}, {"tree_metadata": {"x": first}}, None):
        path.write_text(json.dumps(value))
        with pytest.raises(AdapterError):
            load_any(tmp_path / "a", PARAMS)


def test_link_in_a_checkpoint_raises(tmp_path):
    save_tunix(tmp_path / "a", make().tunable)
    (tmp_path / "a" / "0" / "model_params" / "more").symlink_to("/etc/passwd")
    with pytest.raises(AdapterFileError, match="has a link"):
        open_adapter(tmp_path / "a")


SAVE = """
import sys, jax.numpy as jnp, lorax
from lorax_io import save_tunix
row = lambda k: lorax.LoraWeight(jnp.full((64, 2), k), jnp.full((2, 64), k), rank=2, alpha=2.0)
print("ready", flush=True)
for k in range(10_000):
    save_tunix(sys.argv[1], {"w": row(float(k))}, step=k)
    print(k, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_process_leaves_complete_steps(tmp_path):
    command = [sys.executable, "-c", SAVE, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        done = [int(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    row = open_adapter(tmp_path / "a").rows["w"]
    assert float(row.a[0, 0]) >= done[-1]
    assert np.unique(row.a).size == np.unique(row.b).size == 1


def test_missing_package_raises(tmp_path, monkeypatch):
    save_tunix(tmp_path / "a", make().tunable)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for use in (lambda: open_adapter(tmp_path / "a"), lambda: save_tunix("b", make().tunable)):
        with pytest.raises(ImportError, match=r"lorax-io\[orbax\]"):
            use()
