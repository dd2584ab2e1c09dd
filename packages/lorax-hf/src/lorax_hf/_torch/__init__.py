"""PyTorch modules, through torchax."""
