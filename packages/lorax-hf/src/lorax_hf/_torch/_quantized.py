"""Rejects modules with quantized weights, which are recognized by their packages."""

import torch

from .._errors import QuantizedModuleError

# The packages whose modules or tensors hold quantized weights.
_PACKAGES = (
    "aqlm",
    "auto_gptq",
    "autoawq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "quanto",
    "torch.ao.nn.quantized",
    "torch.nn.quantized",
    "torchao",
    "vptq",
)


INSTEAD = (
    "Build the model from its config without quantization_config, pass it to `from_torch`, and "
    "read the checkpoint as its parameters: `lorax_io.load_base(folder, lorax_hf.peft_names(fn), "
    "params=params)`."
)


def refuse_quantized(module: torch.nn.Module) -> None:
    """Raises `QuantizedModuleError` for the first module that holds quantized weights."""
    for name, owner in module.named_modules():
        kinds = [type(owner), *(type(p) for p in owner._parameters.values() if p is not None)]
        for kind in kinds:
            if any(f"{kind.__module__}.".startswith(f"{package}.") for package in _PACKAGES):
                _refuse(name, f"{kind.__module__}.{kind.__qualname__}")
    # transformers also sets `is_quantized` if the config dequantizes, as for a GGUF file.
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if getattr(module, "is_quantized", False) is True and not getattr(config, "dequantize", False):
        _refuse("", type(module).__name__)


def _refuse(name: str, kind: str) -> None:
    where = f"`{name}`" if name else "the module"
    raise QuantizedModuleError(
        f"{where} holds quantized weights ({kind}), which are not supported. {INSTEAD}"
    )
