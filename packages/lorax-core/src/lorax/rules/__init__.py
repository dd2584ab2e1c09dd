"""The rules, one file per family of primitives. Importing this package fills the rule table.

It exports everything that a custom rule needs.
"""

from .._equation import Equation as Equation
from .._factored import FactoredArray as FactoredArray, is_weight as is_weight
from .._registry import defrule as defrule
from .._terms import Inexpressible as Inexpressible, Label as Label, Term as Term
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
    ragged_dot as ragged_dot,
    selection as selection,
    shards as shards,
    structural as structural,
)
from .contraction import add_product as add_product

__all__ = [
    "Equation",
    "FactoredArray",
    "Inexpressible",
    "Label",
    "Term",
    "add_product",
    "defrule",
    "is_weight",
]
