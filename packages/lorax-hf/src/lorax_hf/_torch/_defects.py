"""Known defects of PyTorch models in JAX that are not mended, and what to do about each."""

from .._defects import Defect

DEFECTS: tuple[Defect, ...] = ()
