"""`lora`: a model of transformers that takes the pair in place of its parameters."""

from typing import Any

import lorax


class AdaptedModel:
    """A Flax model of transformers under `lorax.lora`, called as the model is.

    What is not a call is the model's own: `adapted.config`, `adapted.dtype`, ….
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        self._options = options
        self._call = lorax.lora(model.__call__, (), argnames="params", **options)
        self._generate = lorax.lora(model.generate, (), argnames="params", **options)

    def __call__(self, *args: Any, params: Any, **kwargs: Any) -> Any:
        """The model's outputs: `adapted(input_ids, params=(frozen, tunable)).logits`."""
        return self._call(*args, params=params, **kwargs)

    def generate(self, *args: Any, params: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with the pair in place of its parameters."""
        return self._generate(*args, params=params, **kwargs)

    # A copy is adapted anew: it must call its own copy of the model.
    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AdaptedModel.__init__(self, state["model"], **state["options"])

    def __getattr__(self, name: str) -> Any:
        # Before `__init__` or `__setstate__` there is no model to ask.
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def lora(model: Any, **options: Any) -> AdaptedModel:
    """The model with `(frozen, tunable)` for `params`, in calls and in `generate`.

    Args:
        model: a Flax model of transformers.
        **options: those of `lorax.lora`: `on_materialize`, `on_unused`.

    Returns:
        The adapted model; the one given is not changed.

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
    return AdaptedModel(model, **options)
