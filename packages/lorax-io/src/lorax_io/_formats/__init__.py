"""The formats of adapters."""
