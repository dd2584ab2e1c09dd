"""The context in which a module's operators run on arrays."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import torch

from ._aliases import Aliases
from ._blame import OperandErrors
from ._constants import Constants
from ._gradients import NoGradients
from ._in_place import InPlace
from ._random import Draws, randomness


@contextlib.contextmanager
def running(
    env: Any,
    name: str,
    rng: jax.Array | None = None,
    values: Mapping[int, torch.Tensor] | None = None,
) -> Generator[None]:
    """Inside this block, operators of PyTorch run on arrays.

    Args:
        env: the torchax environment.
        name: the name of what runs, for errors.
        rng: the key for random numbers; without it, drawing one is an error.
        values: as in `Constants`.
    """
    with (
        randomness(env, rng, name),
        env,
        NoGradients(),
        Constants(env, values or {}),
        Draws(),
        InPlace(),
        Aliases(),
        OperandErrors(),
        torch.enable_grad(),
    ):
        yield
