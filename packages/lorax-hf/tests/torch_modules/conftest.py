"""Settings of the PyTorch tests, and tiny models."""

import pathlib
import sys

import jax
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
torch.set_num_threads(1)
# These programs run once, so compilation dominates.
jax.config.update("jax_disable_most_optimizations", True)
