"""Base models on disk, and what becomes of them when an adapter is merged."""
