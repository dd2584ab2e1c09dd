"""kohya's names: resolution by the base, and supported kinds."""

import numpy as np
import pytest
from formats_of_files import ALPHA, ATTN, FLAT, IN, OUT, RANK, delta_of, save

from lorax_io import (
    AdapterFileError,
    UnsupportedAdapterError,
    open_adapter,
)


def test_underscores_are_resolved_by_the_base(shell, files):
    tensors = {f"{FLAT}_to_q.lora_down.weight": files.draw(RANK, IN)}
    tensors |= {f"{FLAT}_to_q.lora_up.weight": files.draw(OUT, RANK)}
    save(tensors)
    save({f"{ATTN}.to_q.weight": files.draw(OUT, IN)}, "base.safetensors")
    shell.succeed("convert a.safetensors peft --to peft --base base.safetensors")
    assert list(open_adapter("peft").names) == [f"{ATTN}.to_q".replace(".", "/") + "/kernel"]


@pytest.mark.parametrize("names", [["a.b_c", "a_b.c"], ["x.a.b.c", "y.a.b.c"], ["a.b"]])
def test_ambiguous_underscores_raise(shell, files, names):
    save({"lora_unet_a_b_c.lora_down.weight": files.draw(RANK, IN),
          "lora_unet_a_b_c.lora_up.weight": files.draw(OUT, RANK)})  # fmt: skip
    save({f"{name}.weight": files.draw(OUT, IN) for name in names}, "base.safetensors")
    message = shell.fail("merge a.safetensors --base base.safetensors --out merged")
    assert "with `_` for each `.`" in message


OF_LORA = ["lora_mid.weight", "lora_up.bias", "scalar"]
UNSUPPORTED = [*OF_LORA, "oft_blocks", "diff", "diff_b", "w_norm"]


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_kohya_keys_raise(files, key):
    save({"lora_unet_a.lora_down.weight": files.draw(RANK, IN),
          "lora_unet_a.lora_up.weight": files.draw(OUT, RANK),
          f"lora_unet_a.{key}": files.draw(OUT, 1)})  # fmt: skip
    with pytest.raises(UnsupportedAdapterError, match=f"lora_unet_a.{key}"):
        open_adapter("a.safetensors")


def test_unknown_tensor_raises(files):
    save({"lora_unet_a.lora_down.weight": files.draw(RANK, IN),
          "lora_unet_a.lora_up.weight": files.draw(OUT, RANK),
          "lora_unet_a.strange": files.draw(OUT, 1)})  # fmt: skip
    with pytest.raises(AdapterFileError, match="`lora_unet_a.strange`, which is not a factor"):
        open_adapter("a.safetensors")


def test_lycoris_is_read(files):
    loha = {f"lora_unet_a.hada_w{k}_{x}": files.draw(*((OUT, RANK) if x == "a" else (RANK, IN)))
            for k in (1, 2) for x in "ab"}  # fmt: skip
    save(loha | {"lora_unet_a.alpha": ALPHA})
    [row] = open_adapter("a.safetensors").rows.values()
    products = [loha[f"lora_unet_a.hada_w{k}_a"] @ loha[f"lora_unet_a.hada_w{k}_b"] for k in (1, 2)]
    np.testing.assert_allclose(delta_of(row), products[0] * products[1] / 2, rtol=1e-5)
