"""`clip_mended`: `jnp.clip` as T5 calls it."""

import contextlib
import functools
import warnings
from collections.abc import Generator
from typing import Any

import jax.numpy as jnp


def clip_refuses_a_max() -> bool:
    """Whether this JAX takes no `a_max`, which T5 gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # all that JAX 0.8 has against it
        try:
            jnp.clip(jnp.zeros(()), a_max=0.0)
        except TypeError:
            return True
    return False


@contextlib.contextmanager
def clip_mended() -> Generator[None]:
    """Within the block, `jnp.clip` takes `a_min` and `a_max` again, which T5 calls it with.

    Returns:
        A context manager; `jnp.clip` is what it was after the block, whatever happened in it.

    Example:
        >>> import jax.numpy as jnp, lorax_hf
        >>> with lorax_hf.clip_mended():
        ...     int(jnp.clip(jnp.array(7), a_max=5))
        5
    """
    clip = jnp.clip

    @functools.wraps(clip)
    def mended(*args: Any, **kwargs: Any) -> Any:
        renamed = {"a": "arr", "a_min": "min", "a_max": "max"}
        return clip(*args, **{renamed.get(key, key): value for key, value in kwargs.items()})

    jnp.clip = mended
    try:
        yield
    finally:
        jnp.clip = clip
