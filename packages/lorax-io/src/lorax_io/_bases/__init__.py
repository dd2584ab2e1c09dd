"""Base models on disk: loading them, and merging adapters into them."""
