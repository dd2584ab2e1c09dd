"""One thread for PyTorch: these models are small, and the tests run side by side."""

import torch

torch.set_num_threads(1)
