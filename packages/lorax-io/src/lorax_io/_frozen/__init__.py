"""Frozen trees on disk, quantized or not, as one safetensors file.

A tensor is named by its path in the tree. A quantized weight at `attn/kernel` is the tensors
`attn/kernel/codes`, `attn/kernel/scales` and so on; 4-bit codes are packed, two to a byte. Frozen
factors are further tensors. The format of each base is JSON in the file's header.
"""

from .load import load_frozen as load_frozen
from .save import save_frozen as save_frozen
