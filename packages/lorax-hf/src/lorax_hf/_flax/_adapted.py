"""A Flax model of transformers that takes `(frozen, tunable)` in place of its parameters."""

from typing import Any

import lorax


class AdaptedModel:
    """A Flax model of transformers under `lorax.lora`, called like the model.

    All other attributes are the model's: `adapted.config`, `adapted.dtype`, ….
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

    # A copy must call its own copy of the model, so it is adapted again.
    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AdaptedModel.__init__(self, state["model"], **state["options"])

    def __getattr__(self, name: str) -> Any:
        # Avoids infinite recursion before `__init__` or `__setstate__` has set the model.
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def adapted(model: Any, **options: Any) -> AdaptedModel:
    """The model under `lorax.lora`, with its options."""
    return AdaptedModel(model, **options)
