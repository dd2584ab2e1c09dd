"""`peft_names`: where each parameter of a model is in PyTorch, for `lorax_io`."""

from typing import Any

from ._library import described


def peft_names(model: Any, params: Any = None) -> dict[str, dict[str, Any]]:
    """The module and the layout of each parameter, as `lorax_io.save_peft` and others take them.

    Plain data, which may go to a file as JSON for the command `lorax` (`--names`).

    Args:
        model: a PyTorch module or the function that `from_torch` returns, a Flax model of
            transformers, or the config of one.
        params: its parameters, of arrays or shapes; by default the model's own.

    Returns:
        For each path, `{"layout": …, "module": …}` and what else the layout takes.

    Example:
        >>> import lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> lorax_hf.peft_names(config)["h/0/attn/c_attn/kernel"]
        {'layout': 'Conv1D', 'module': 'h.0.attn.c_attn', 'in_axes': [1], 'out_axes': [0]}
    """
    return {row.path: dict(row.layout) for row in described(model, params).rows}
