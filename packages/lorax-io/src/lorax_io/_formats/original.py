"""Files in the names of the original diffusion models: ai-toolkit's and ComfyUI's.

A name is `diffusion_model.` and a module of the model's own code, as
`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`. A product of q, k and v stays one.
"""

from .diffusers import peft_key
from .format import Content, Format
from .self_described import self_described
from .source import Source, plain_keys, stored

PREFIX = "diffusion_model."


def _recognizes(content: Content) -> bool:
    return any(name.startswith(PREFIX) for name in content.file.entries)


def _read(content: Content) -> Source:
    tensors = plain_keys(stored(content.file), PREFIX)
    return self_described({peft_key(key): tensor for key, tensor in tensors.items()})


FORMAT = Format("original", "a file of ai-toolkit or ComfyUI", _recognizes, _read)
