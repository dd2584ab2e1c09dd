"""Lorax for the Flax models of Hugging Face transformers.

So far this package only guards its ground: importing it fails where the installed transformers
holds no Flax model.
"""

import importlib.metadata

from ._check import check_transformers as check_transformers

__all__ = ["check_transformers"]
__version__ = importlib.metadata.version("lorax-hf")

check_transformers()
