"""One file for each family of primitives; importing the package fills the rule table."""

from . import (
    along_axis as along_axis,
    arithmetic as arithmetic,
    branches as branches,
    calls as calls,
    collectives as collectives,
    complex_parts as complex_parts,
    contraction as contraction,
    convolution as convolution,
    custom_derivatives as custom_derivatives,
    indexing as indexing,
    loops as loops,
    norms as norms,
    selection as selection,
    shards as shards,
    structural as structural,
)
