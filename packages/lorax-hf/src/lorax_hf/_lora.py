"""`lora`: adapts a model so that it takes `(frozen, tunable)` in place of its parameters."""

from typing import Any

from ._library import part_of


def lora(model: Any, **options: Any) -> Any:
    """Adapts a model to take `(frozen, tunable)` as `params`, in calls and in `generate`.

    Args:
        model: a PyTorch module or the function that `from_torch` returns, or a Flax model of
            transformers.
        **options: the options of `lorax.lora`, `on_materialize` and `on_unused`. A PyTorch module
            also takes `train` and `scan_layers`, as in `from_torch`.

    Returns:
        The adapted model; the given one is not changed.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> model = transformers.FlaxGPT2LMHeadModel(config)
        >>> spec = lorax_hf.spec(model, rank=2)
        >>> frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0))
        >>> adapted = lorax_hf.lora(model)
        >>> adapted(jnp.ones((1, 5), int), params=(frozen, tunable)).logits.shape
        (1, 5, 31)
    """
    return part_of(model).lora(model, **options)
