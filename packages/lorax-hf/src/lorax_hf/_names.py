"""`peft_names`: the PyTorch name of each parameter, for `lorax_io`."""

from typing import Any

from ._library import described


def peft_names(model: Any, params: Any = None) -> dict[str, dict[str, Any]]:
    """The PyTorch name of each parameter, for `lorax_io.save_peft` and others.

    The result is plain data, which can be written as JSON for the command `lorax` (`--names`).

    Args:
        model: a PyTorch module or the function that `from_torch` returns, a Flax model of
            transformers, or the config of one.
        params: the model's parameters, as arrays or shapes; by default its own.

    Returns:
        By path, `{"type": …, "module": …}` and the further arguments of that type.

    Example:
        >>> import lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> lorax_hf.peft_names(config)["h/0/attn/c_attn/kernel"]
        {'type': 'Conv1D', 'module': 'h.0.attn.c_attn', 'in_axes': [1], 'out_axes': [0]}
    """
    return {row.path: dict(row.torch_name) for row in described(model, params).rows}
