"""Merges of several adapters with scales."""

import ml_dtypes
import numpy as np
import pytest
from formats_of_files import IN, OUT, Q


@pytest.fixture
def two(files):
    deltas = []
    for name in ("one", "two"):
        pair = files.pair(Q, OUT, IN)
        files.peft(pair, name, target_modules=["q_proj"])
        deltas.append(2 * pair[f"{Q}.lora_B.weight"] @ pair[f"{Q}.lora_A.weight"])
    base = files.draw(OUT, IN)
    files.base({f"{Q}.weight": base})
    return base, *deltas


@pytest.mark.parametrize(
    ("line", "scales"),
    [
        ("one two --base base", (1, 1)),
        ("one two --base base --sum", (1, 1)),
        ("one two --base base --scale 0.5 -2", (0.5, -2)),
        ("one two --base base --scale 0.25 --sum", (0.25, 0.25)),
        ("one --base base --scale 3", (3, 0)),
    ],
)
def test_adapters_are_merged_with_their_scales(shell, files, two, line, scales):
    base, first, second = two
    shell.succeed(f"merge {line} --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    expected = base + scales[0] * first + scales[1] * second
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6)


def test_half_precision_is_rounded_once(shell, files, two):
    base, first, second = two
    files.base({f"{Q}.weight": base.astype(ml_dtypes.bfloat16)})
    shell.succeed("merge one two --base base --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    wide = base.astype(ml_dtypes.bfloat16).astype(np.float32) + first + second
    np.testing.assert_allclose(merged.astype(np.float32), wide, rtol=2**-8)


def test_wrong_number_of_scales_raises(shell, two):
    assert "2 adapters, but --scale has 3 numbers" in shell.fail(
        "merge one two --base base --out merged --scale 1 2 3"
    )


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_nonfinite_scale_raises(shell, two, scale):
    assert "--scale: is not a finite number" in shell.fail(
        f"merge one --base base --out merged --scale {scale}"
    )


def test_later_adapter_replaces_a_module(shell, files, two):
    _, first, _ = two
    head = files.draw(OUT, IN)
    files.peft({f"{Q}.weight": head}, "full", target_modules=[], modules_to_save=["q_proj"])
    shell.succeed(
        "merge one full --base base --out m", warning="discards the change of another adapter"
    )
    np.testing.assert_allclose(files.read("m/model.safetensors")[f"{Q}.weight"], head, rtol=1e-6)
    shell.succeed("merge full one --base base --out n")
    merged = files.read("n/model.safetensors")[f"{Q}.weight"]
    np.testing.assert_allclose(merged, head + first, rtol=0, atol=2e-6)
