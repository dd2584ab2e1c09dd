"""One thread for PyTorch: these models are small, and the tests run side by side."""

import jax
import torch

torch.set_num_threads(1)
# These programs run once: their compilation is what takes the time.
jax.config.update("jax_disable_most_optimizations", True)
