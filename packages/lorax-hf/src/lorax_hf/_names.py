"""`peft_names`: the PyTorch module and layout of each parameter, for `lorax_io`."""

from typing import Any

from ._library import described


def peft_names(model: Any, params: Any = None) -> dict[str, dict[str, Any]]:
    """The PyTorch module and layout of each parameter, for `lorax_io.save_peft` and others.

    The result is plain data, which can be written as JSON for the command `lorax` (`--names`).

    Args:
        model: a PyTorch module or the function that `from_torch` returns, a Flax model of
            transformers, or the config of one.
        params: the model's parameters, as arrays or shapes; by default its own.

    Returns:
        By path, `{"layout": …, "module": …}` and the layout's further arguments.

    Example:
        >>> import lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> lorax_hf.peft_names(config)["h/0/attn/c_attn/kernel"]
        {'layout': 'Conv1D', 'module': 'h.0.attn.c_attn', 'in_axes': [1], 'out_axes': [0]}
    """
    return {row.path: dict(row.layout) for row in described(model, params).rows}
