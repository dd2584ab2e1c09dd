"""`peft_names`: where each parameter of a model is in PyTorch, for `lorax_io`."""

from typing import Any

from ._modules import Parameter, config_of, ends_in, parameters_of
from ._presets import TOKEN_TABLES

# Classes whose head is the table of tokens, if the config ties them.
_WITH_HEAD = ("LMHead", "CausalLM", "ConditionalGeneration", "MaskedLM", "PreTraining", "MTModel")


def peft_names(model: Any, params: Any = None) -> dict[str, dict[str, Any]]:
    """The module and the layout of each parameter, as `lorax_io.save_peft` and others take them.

    Plain data, which may go to a file as JSON for the command `lorax` (`--names`).

    Args:
        model: a Flax model of transformers, or its config.
        params: its parameters, of arrays or shapes; by default the model's own.

    Returns:
        For each path, `{"layout": …, "module": …}` and what else the layout takes.

    Example:
        >>> import lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> lorax_hf.peft_names(config)["h/0/attn/c_attn/kernel"]
        {'layout': 'Conv1D', 'module': 'h.0.attn.c_attn', 'in_axes': [1], 'out_axes': [0]}
    """
    rows, _ = parameters_of(model, params)
    tied = bool(getattr(config_of(model), "tie_word_embeddings", False)) and _has_head(model)
    return {row.path: _layout(row, tied) for row in rows}


def _layout(row: Parameter, tied: bool) -> dict[str, Any]:
    ndim = len(row.leaf.shape)
    if row.name == "kernel" and ndim >= 2:
        if row.is_conv1d:
            return {"layout": "Conv1D", "module": row.module, "in_axes": [1], "out_axes": [0]}
        if ndim == 2:
            return {"layout": "Linear", "module": row.module}
        grouped = {"grouped": True} if ends_in(row.preset.grouped, row.module) else {}
        return {"layout": "Conv", "module": row.module, **grouped}
    if row.name == "embedding":
        is_tied = {"tied": True} if tied and ends_in(TOKEN_TABLES, row.module) else {}
        return {"layout": "Embedding", "module": row.module, **is_tied}
    return {"layout": "Tensor", "module": row.module, "parameter": row.torch_name}


def _has_head(model: Any) -> bool:
    names = [type(model).__name__, *(config_of(model).architectures or ())]
    return any(word in name for name in names for word in _WITH_HEAD)
