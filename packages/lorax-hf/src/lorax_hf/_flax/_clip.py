"""`clip_mended`: lets `jnp.clip` accept its old argument names, which FlaxT5 uses."""

import contextlib
import functools
import warnings
from collections.abc import Generator
from typing import Any

import jax.numpy as jnp


def clip_refuses_a_max() -> bool:
    """Whether this JAX rejects the argument `a_max`, which FlaxT5 uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.8 accepts it with a warning
        try:
            jnp.clip(jnp.zeros(()), a_max=0.0)
        except TypeError:
            return True
    return False


@contextlib.contextmanager
def clip_mended() -> Generator[None]:
    """Lets `jnp.clip` accept `a_min` and `a_max` inside this block, as FlaxT5 calls it.

    Returns:
        A context manager, which restores `jnp.clip` at the end of the block, even after an error.

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
