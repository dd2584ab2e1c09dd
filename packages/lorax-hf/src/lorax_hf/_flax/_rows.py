"""A Flax model of transformers as rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax import Axes, SpecError

from .._ends import HEADS, TOKEN_TABLES
from .._rows import Described, Row, ends_in
from ._parameters import Parameter, config_of, parameters_of

# Parts of the names of classes with a head, which is the token embedding if the config ties them.
_WITH_HEAD = ("LMHead", "CausalLM", "ConditionalGeneration", "MaskedLM", "PreTraining", "MTModel")


def described(model: Any, params: Any = None) -> Described:
    """The rows of a model or config, and the tree of its parameters."""
    parameters, params = parameters_of(model, params)
    tied = bool(getattr(config_of(model), "tie_word_embeddings", False)) and _has_head(model)
    return Described([_row(parameter, tied) for parameter in parameters], params, _infer)


def _infer(paths: Sequence[str], inputs: Any) -> Mapping[str, Axes]:
    raise SpecError(
        "spec: `inputs` is for PyTorch modules; the axes of a Flax model's weights are known."
    )


def _row(parameter: Parameter, tied: bool) -> Row:
    axes = parameter.axes
    return Row(
        parameter.path,
        parameter.module,
        tuple(parameter.leaf.shape),
        None if axes is None else Axes((), *axes),
        _torch_name(parameter, tied),
        frozenset(_words(parameter)),
    )


def _words(row: Parameter) -> Iterator[str]:
    if row.name == "kernel":
        if ends_in(row.preset.default, row.module):
            yield "default"
        if len(row.leaf.shape) == 2 and not ends_in(HEADS, row.module):
            yield "all-linear"
        if ends_in(row.preset.attention, row.module):
            yield "attention"
        elif ends_in(row.preset.mlp, row.module):
            yield "mlp"
    if ends_in(TOKEN_TABLES, row.module):
        yield "embeddings"


def _torch_name(row: Parameter, tied: bool) -> dict[str, Any]:
    ndim = len(row.leaf.shape)
    if row.name == "kernel" and ndim >= 2:
        if row.is_conv1d:
            return {"type": "Conv1D", "module": row.module, "in_axes": [1], "out_axes": [0]}
        if ndim == 2:
            return {"type": "Linear", "module": row.module}
        grouped = {"grouped": True} if ends_in(row.preset.grouped, row.module) else {}
        return {"type": "Conv", "module": row.module, **grouped}
    if row.name == "embedding":
        is_tied = {"tied": True} if tied and ends_in(TOKEN_TABLES, row.module) else {}
        return {"type": "Embedding", "module": row.module, **is_tied}
    return {"type": "Tensor", "module": row.module, "parameter": row.tensor_name}


def _has_head(model: Any) -> bool:
    names = [type(model).__name__, *(config_of(model).architectures or ())]
    return any(word in name for name in names for word in _WITH_HEAD)
