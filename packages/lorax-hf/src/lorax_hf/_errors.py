"""Errors and warnings about PyTorch modules."""

from lorax import LoraxError, LoraxWarning


class OperatorError(LoraxError, NotImplementedError):
    """A PyTorch operator that torchax cannot run in JAX; `register_op` adds one."""


class StaticCacheError(LoraxError, NotImplementedError):
    """The model's cache cannot have a constant size, so `generate` cannot compile it."""


class ScanError(LoraxError, ValueError):
    """The layers of a PyTorch module cannot become one scan; the message says why."""


class CheckpointError(LoraxError, ValueError):
    """The files of a PyTorch module are damaged, incomplete, or those of another module."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A file or folder of a PyTorch module does not exist."""


class QuantizedModuleError(LoraxError, TypeError):
    """The PyTorch module has quantized weights, which cannot be run in JAX."""


class ModuleWarning(LoraxWarning):
    """A PyTorch module or its files are used differently than in PyTorch."""
