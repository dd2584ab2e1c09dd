"""The native format: one safetensors file, one tensor for each array of the tunable tree.

A tensor is named by its path in the tree; plain LoRA at `attn/kernel` is the two tensors
`attn/kernel/a` and `attn/kernel/b`. What shapes a weight without being an array (kind, rank, alpha,
axes) is JSON in the file's header, beside what is known of the base. Of a pair, the frozen factors
beside the bases are tensors too, and the header lists their names.
"""

from .header import (
    FROZEN_KEY as FROZEN_KEY,
    PREFIX as PREFIX,
    read_metadata as read_metadata,
    user_metadata as user_metadata,
)
from .load import (
    FORMAT as FORMAT,
    load_adapter as load_adapter,
    load_pair as load_pair,
    read as read,
)
from .save import save_adapter as save_adapter, write as write
