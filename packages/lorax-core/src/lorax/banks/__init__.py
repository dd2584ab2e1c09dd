"""Banks: many adapters of one base in one tree, whose factors have a leading axis of slots."""

from ._bank import (
    AdapterBank as AdapterBank,
    InterleavedBank as InterleavedBank,
    drop_adapter as drop_adapter,
    interleave_adapters as interleave_adapters,
    set_adapter as set_adapter,
    stack_adapters as stack_adapters,
    unstack_adapters as unstack_adapters,
)
from ._select import (
    mix_adapters as mix_adapters,
    select_adapters as select_adapters,
    with_scales as with_scales,
)
