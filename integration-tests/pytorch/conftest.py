"""Sets one thread for PyTorch: the models are small, and tests run in parallel."""

import pathlib
import sys

import jax
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples/finetune", "benchmarks")]
torch.set_num_threads(1)
# These programs run once, so compilation dominates.
jax.config.update("jax_disable_most_optimizations", True)
