"""Frozen trees on disk, quantized or not: one safetensors file.

A tensor is named by its path in the tree. A quantized weight at `attn/kernel` is the tensors
`attn/kernel/codes`, `attn/kernel/scales` and what else its format has, codes of four bits two to a
byte; the frozen factors beside a base are further ones. How each base is held is JSON in the file's
header.
"""

from .load import load_frozen as load_frozen
from .save import save_frozen as save_frozen
