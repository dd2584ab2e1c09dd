"""Errors for files and folders that are not adapters say what they are."""

import pathlib

import pytest
from formats_of_files import IN, OUT, RANK, TO_Q, Q, save

from lorax_io import AdapterWarning, open_adapter


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_adapter.bin", b"x", "AdapterHub"),
        ("adapter_model.bin", b"x", "a pickle"),
        ("pytorch_lora_weights.bin", b"x", "a pickle"),
        ("config.json", b"{}", "folder of a model"),
        ("notes.txt", b"x", "should have one of"),
    ],
)
def test_folder_of_another_kind_raises(shell, name, content, message):
    pathlib.Path("folder").mkdir()
    pathlib.Path("folder", name).write_bytes(content)
    assert message in shell.fail("inspect folder")


def test_model_without_an_adapter_raises(shell, files):
    save({f"{Q}.weight": files.draw(OUT, IN)})
    assert "in no known format" in shell.fail("inspect a.safetensors")


def test_single_file_can_have_any_name(shell, files):
    pathlib.Path("folder").mkdir()
    save({f"{Q}.lora_A.weight": files.draw(RANK, IN), f"{Q}.lora_B.weight": files.draw(OUT, RANK)},
         "folder/style.safetensors")  # fmt: skip
    assert open_adapter("folder").format == "diffusers"


def test_folder_with_two_adapters_warns(files):
    files.peft(files.pair(Q, OUT, IN), target_modules=["q_proj"])
    save(files.pair(f"unet.{TO_Q}", OUT, IN), "adapter/pytorch_lora_weights.safetensors")
    with pytest.warns(AdapterWarning, match="`adapter_model.safetensors`, which is read, and `py"):
        assert open_adapter("adapter").format == "peft"
    assert open_adapter("adapter/pytorch_lora_weights.safetensors").format == "diffusers"
