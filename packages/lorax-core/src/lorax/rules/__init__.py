"""One file for each family of primitives; importing the package fills the rule table."""

from . import (
    arithmetic as arithmetic,
    contraction as contraction,
    control_flow as control_flow,
    convolution as convolution,
    indexing as indexing,
    norms as norms,
    selection as selection,
    structural as structural,
)
