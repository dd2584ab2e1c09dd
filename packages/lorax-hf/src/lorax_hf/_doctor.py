"""Known defects of the Flax models in the installed libraries, and what to do about each."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers

from ._modules import config_of


class Finding(NamedTuple):
    """One defect."""

    models: tuple[str, ...]  # model types
    what: str
    remedy: str


class DefectWarning(UserWarning):
    """The installed transformers is known to be wrong for this model."""


class _Defect(NamedTuple):
    finding: Finding
    is_there: Callable[[], bool]  # in the installed libraries
    concerns: Callable[[Any], bool]  # a config


def _clip_refuses_a_max() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # all that JAX 0.8 has against it
        try:
            jnp.clip(jnp.zeros(()), a_max=0.0)
        except TypeError:
            return True
    return False


_DEFECTS = (
    _Defect(
        Finding(
            ("t5", "mt5", "longt5"),
            "the model calls `jnp.clip(a_max=…)`, which this JAX refuses",
            "make and call the model inside `with lorax_hf.clip_mended():`",
        ),
        _clip_refuses_a_max,
        lambda config: True,
    ),
    _Defect(
        Finding(
            ("llama",),
            "FlaxLlama takes 10,000 for the rotary base, whatever the config says",
            "use a checkpoint with `rope_theta` 10,000, or another implementation of the model",
        ),
        lambda: True,
        lambda config: getattr(config, "rope_theta", 10_000.0) != 10_000.0,
    ),
    _Defect(
        Finding(
            ("llama",),
            "FlaxLlamaForCausalLM leaves its head random where the config ties it to the embedding",
            'set params["lm_head"]["kernel"] to the transposed params["model"]["embed_tokens"]'
            '["embedding"] after loading',
        ),
        lambda: True,
        lambda config: bool(getattr(config, "tie_word_embeddings", False)),
    ),
    _Defect(
        Finding(
            ("resnet",),
            'the blocks of FlaxResNet with layer_type="basic" have names of their own, so that '
            "`from_pt=True` loads none of them and says nothing",
            "rename `layer/layer_0` to `layer/0` as the weights are converted; compare outputs",
        ),
        lambda: True,
        lambda config: getattr(config, "layer_type", None) == "basic",
    ),
    _Defect(
        Finding(
            ("electra",),
            "FlaxElectra takes ones for `token_type_ids` where none are given; PyTorch takes zeros",
            "pass `token_type_ids=jnp.zeros_like(input_ids)`",
        ),
        lambda: True,
        lambda config: True,
    ),
)


def doctor(model: Any = None) -> list[Finding]:
    """The defects of the installed transformers and JAX that are known.

    Args:
        model: a model or config; only what concerns it is returned. By default everything.

    Returns:
        The findings, each with its remedy; empty where none is known.

    Example:
        >>> import lorax_hf, transformers
        >>> [finding.what for finding in lorax_hf.doctor(transformers.GPT2Config())]
        []
        >>> any("electra" in finding.models for finding in lorax_hf.doctor())
        True
    """
    config = None if model is None else config_of(model)
    return [
        defect.finding
        for defect in _DEFECTS
        if defect.is_there()
        and (
            config is None
            or (config.model_type in defect.finding.models and defect.concerns(config))
        )
    ]


def warn_of_defects(model: Any) -> None:
    """A warning for each defect that concerns a model."""
    for finding in doctor(model):
        warnings.warn(
            f"{finding.what} (transformers {transformers.__version__}, JAX {jax.__version__}): "
            f"{finding.remedy}.",
            DefectWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def clip_mended() -> Generator[None]:
    """Within the block, `jnp.clip` takes `a_min` and `a_max` again, which T5 calls it with.

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
