"""Trainable tokens: `trainable_tokens_delta`, which holds the new rows, not their change."""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, TokensWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Place
from ...._torch_names import Embedding
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, the_one

MARK = "trainable_tokens_delta"


class Tokens(Tuner):
    """Rows that replace some of an embedding's."""

    peft_type = "TRAINABLE_TOKENS"
    called = "trainable tokens"
    marks = (MARK,)
    tables = (MARK,)
    fields = ("token_indices",)
    lacking = (
        *("fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "modules_to_save",
    )
    init = "init_weights"
    harmless = ("init_weights",)
    tells_shape = False

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, TokensWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        return rows_of_table(place, config.token_indices, shapes.get(MARK, ()))

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        return row_factors(place, MARK)

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        shape = shapes.get(MARK, ())
        if len(shape) != 2:
            raise AdapterFileError(f"has `{MARK}` of `{module}` of shape {shape}.")
        return Sides(shape[1], (1 + max(config.token_indices, default=0),))

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        indices = the_one(modules, self.called, "indices", lambda weight: weight.indices)
        return Scaling(PeftConfig(peft_type=self.peft_type, token_indices=list(indices)))


def rows_of_table(place: Place, indices: Sequence[int], shape: tuple[int, ...]) -> Adapter:
    """The adapter of an embedding's rows, without arrays."""
    _check(place)
    (vocabulary,) = place.axes.inputs
    if not shape or len({*indices}) < len(indices) or len(indices) != shape[0]:
        raise AdapterFileError(
            f"has rows of shape {shape} for `{place.path}`, and its config has {len(indices)} "
            "token indices, each of which should be there once."
        )
    if max(indices) >= place.sizes[vocabulary]:
        raise UnsupportedAdapterError(
            f"replaces the row {max(indices)} of `{place.path}`, which has "
            f"{place.sizes[vocabulary]}. It is for a base of a larger vocabulary."
        )
    shared, inputs, outputs = place.axes
    return TokensWeight(None, tuple(indices), inputs, outputs, shared)


def row_factors(place: Place, key: str) -> tuple[Factor, ...]:
    """The key and axes of the tensor of rows."""
    _check(place)
    return (Factor(key, "values", ((RANK,), place.outputs)),)


def _check(place: Place) -> None:
    if not isinstance(place.torch_name, Embedding) or len(place.axes.inputs) > 1:
        raise UnsupportedAdapterError(
            f"replaces rows of `{place.path}`; its entry in `names` is "
            f"{type(place.torch_name).__name__}, not Embedding with one axis of rows. PEFT also "
            "does so for a head; give such a head an Embedding in `names`, or merge it in PEFT."
        )
