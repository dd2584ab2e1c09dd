"""The command with every kind of adapter."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from comparing import assert_close, assert_same
from kinds_of_adapters import KINDS, NAMES, NEED_PAIR, make_pair, make_params

import lorax
from lorax import (
    Pair,
    merge_params,
)
from lorax_io import (
    load_adapter,
    save_adapter,
    save_peft,
)
from lorax_io._command import main


def run(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


@pytest.mark.parametrize(
    ("kind", "save_pair"),
    [(kind, True) for kind in KINDS] + [(kind, False) for kind in KINDS if kind not in NEED_PAIR],
)
def test_command_reads_native_files(tmp_path, file, capsys, kind, save_pair):
    pair, params = make_pair(kind), make_params()
    saved = pair if save_pair else pair.tunable
    base, other, converted = (
        tmp_path / name for name in ("base.safetensors", "other", "converted")
    )
    safetensors.numpy.save_file({k: np.asarray(x) for k, x in params.items()}, base)
    save_adapter(file, saved)
    changed = jax.tree.map(lambda x: x * 1.5, pair.tunable)
    save_adapter(other, pair._replace(tunable=changed) if save_pair else changed)

    code, out = run(capsys, "inspect", file)
    assert code == 0 and pair.tunable["kernel"].kind in out
    assert run(capsys, "verify", file, "--base", base) == (
        0,
        f"{file}: 3 parameters, OK, fits {base}\n",
    )
    assert run(capsys, "diff", file, file)[0] == 0
    code, out = run(capsys, "diff", file, other)
    assert code == 1 and out.count("numbers") == 3
    assert run(capsys, "convert", file, converted, "--to", "native")[0] == 0
    assert converted.read_bytes() == file.read_bytes()

    run(capsys, "merge", file, "--base", base, "--out", tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / base.name)
    assert_close(merged, jax.tree.map(np.asarray, merge_params(pair)))


def test_command_reads_peft_dora(tmp_path, file, capsys):
    pair, params = make_pair("dora"), make_params()
    folder, base = tmp_path / "peft", tmp_path / "base.safetensors"
    save_peft(folder, {"kernel": pair.tunable["kernel"]}, NAMES)
    safetensors.numpy.save_file({"q.weight": np.asarray(params["kernel"].T, order="C")}, base)
    assert "dora" in run(capsys, "inspect", folder)[1]
    assert "1 parameters" in run(capsys, "verify", folder, "--base", base)[1]
    run(capsys, "convert", folder, file, "--to", "native")
    loaded = load_adapter(file, params={"q": {"kernel": params["kernel"]}})
    assert_same(loaded["q"]["kernel"], pair.tunable["kernel"])
    converted = tmp_path / "converted"
    run(capsys, "convert", file, converted, "--to", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (converted / name).read_bytes() == (folder / name).read_bytes()
    run(capsys, "merge", folder, "--base", base, "--out", tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / base.name)
    assert_close(merged["q.weight"], np.asarray(merge_params(pair)["kernel"].T))


def test_differing_frozen_factors_are_reported(file, capsys, tmp_path):
    pair = make_pair("dora")
    save_adapter(file, pair)
    other = tmp_path / "other"
    frozen = dict(pair.frozen)
    weight = frozen["kernel"]
    frozen["kernel"] = lorax.FrozenWeight(weight.base, {"square": weight.factors["square"] * 2})
    save_adapter(other, Pair(frozen, pair.tunable))
    code, out = run(capsys, "diff", file, other)
    assert code == 1 and out.count("frozen factors") == 1


def test_biases_without_their_weights_stay_biases(shell, files, tmp_path):
    """PEFT cannot load a module of `modules_to_save` that only has a bias."""
    biases = {"up.base_layer.bias": files.draw(6), "norm.bias": files.draw(5)}
    tensors = files.pair("up", 6, 5) | biases
    files.peft(tensors, target_modules=["up"], bias="all")
    shell.succeed("convert adapter out --to peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("all", None)
    written = files.read("out/adapter_model.safetensors")
    assert written.keys() == {f"base_model.model.{name}" for name in tensors}
    weights = {"up.weight": files.draw(6, 5), "norm.weight": files.draw(5)}
    files.base(weights | {"up.bias": files.draw(6), "norm.bias": files.draw(5)})
    shell.succeed("verify out --base base")
