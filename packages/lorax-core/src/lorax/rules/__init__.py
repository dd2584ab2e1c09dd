"""One file for each family of primitives; importing the package fills the rule table."""

from . import (
    along_axis as along_axis,
    arithmetic as arithmetic,
    collectives as collectives,
    complex_parts as complex_parts,
    contraction as contraction,
    control_flow as control_flow,
    convolution as convolution,
    custom_derivatives as custom_derivatives,
    indexing as indexing,
    norms as norms,
    selection as selection,
    structural as structural,
)
