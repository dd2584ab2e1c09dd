"""Errors about PyTorch modules that a caller may want to catch by type."""

from lorax import LoraxError, LoraxWarning


class OperatorError(LoraxError, NotImplementedError):
    """A PyTorch operator that torchax cannot run in JAX; `register_op` adds one."""


class StaticCacheError(LoraxError, NotImplementedError):
    """A model whose cache cannot have a constant size, so that `generate` cannot compile it."""


class QuantizedModuleError(LoraxError, TypeError):
    """A PyTorch module whose weights are quantized, which cannot be run in JAX."""


class ModuleWarning(LoraxWarning):
    """A PyTorch module or its files are not used as they are in PyTorch."""
