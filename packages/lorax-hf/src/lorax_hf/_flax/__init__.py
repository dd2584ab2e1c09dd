"""The Flax models of transformers 4."""
