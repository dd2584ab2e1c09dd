"""The native format: one safetensors file, one tensor for each array of the tunable tree.

A tensor is named by its path in the tree: LoRA at `attn/kernel` is the tensors `attn/kernel/a` and
`attn/kernel/b`. All other settings (kind, rank, alpha, axes) are JSON in the file's header, with an
optional fingerprint of the base. If a pair is saved, its frozen factors are tensors as well, whose
names the header lists.
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
