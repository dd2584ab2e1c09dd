"""PyTorch modules as JAX functions: `from_torch`, `load_torch`, `generate`, `register_op`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Sharding

from ._extras import need

if TYPE_CHECKING:
    from ._torch._function import ModuleFunction

Placement = Sharding | Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Any] | None


def from_torch(
    module: Any,
    *,
    sharding: Placement = None,
    dtype: Any = None,
    train: bool = False,
    scan_layers: bool | Collection[str] = False,
) -> tuple["ModuleFunction", dict[str, jax.Array]]:
    """Converts a PyTorch module to a pure JAX function of its parameters.

    The function is called like the module, `fn(params, *args, **kwargs)`, with JAX arrays in place
    of tensors, and returns the module's outputs with JAX arrays in them. `jax.jit`, `jax.grad` and
    `lorax.lora` apply to it. It keeps a copy of the module without weights, so later changes to the
    module do not affect it, and the module may be deleted.

    Tied parameters become one array under one name. Buffers, such as rotary tables and batch
    statistics, are constants of the function, in `fn.buffers`. transformers models return no cache
    unless the call has `use_cache=True`.

    Args:
        module: any `torch.nn.Module`: a transformers or diffusers model, or your own. Of a wrapper,
            such as `torch.compile` returns, the module that it wraps is taken.
        sharding: where to put the parameters: one sharding, a dict of shardings by name, or a
            function of name and shape. By default JAX decides.
        dtype: the dtype of floating-point parameters and persistent buffers; by default the
            module's.
        train: whether the module is in training mode, with dropout. Calls then take `rng=`, a key
            of `jax.random`.
        scan_layers: whether to run consecutive equal layers as one `jax.lax.scan`, so that the
            compiled program does not grow with their number; or the names of the lists of layers to
            scan. Their parameters are stacked, as in `model.layers.0:30.mlp.up_proj.weight`.

    Returns:
        The function, and a flat dict of its parameters by PyTorch's names.

    Raises:
        lorax.MissingPackageError: if PyTorch or torchax is missing or too new; the message says
            what to install.
        OperatorError: in calls, if torchax lacks an operator.
        QuantizedModuleError: if the module has quantized weights.
        ArgumentError: if the module is a TorchScript module, or is wrapped for FSDP.
        ScanError: if no layers can be scanned, or, in calls, if the module does more with scanned
            layers than to call one after the other; the message says why.

    Warns:
        ModuleWarning: about layers that `scan_layers` leaves out, and hooks of the backward pass;
            in calls, about buffers that the module changes, and tensors that are constants although
            they require a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_hf, torch
        >>> fn, params = lorax_hf.from_torch(torch.nn.Linear(3, 2))
        >>> fn(params, jnp.ones((4, 3))).shape
        (4, 2)
        >>> sorted(params)
        ['bias', 'weight']
    """
    need("torch")
    from ._torch._function import ModuleFunction
    from ._torch._parameters import parameters_of
    from ._torch._wrappers import unwrapped

    module = unwrapped(module)
    fn = ModuleFunction(module, train=train, dtype=dtype, scan_layers=scan_layers)
    return fn, parameters_of(module, fn.members, sharding, dtype)


def load_torch(
    folder: Any,
    *,
    sharding: Placement = None,
    dtype: Any = None,
    train: bool = False,
    module: Any = None,
    scan_layers: bool | Collection[str] = False,
) -> tuple["ModuleFunction", dict[str, jax.Array]]:
    """Loads a transformers folder like `from_torch`, without creating PyTorch tensors of weights.

    The module is built on the meta device, and the tensors of the safetensors files are read onto
    their devices one at a time. With a sharding, each device reads only its own part. Older files
    are converted as transformers converts them.

    Args:
        folder: a folder with config.json and model.safetensors, or with its shards and their index.
        sharding: as in `from_torch`.
        dtype: the dtype of floating-point parameters; by default that of the files.
        train: as in `from_torch`.
        module: a module on the meta device; by default one of the class in config.json.
        scan_layers: as in `from_torch`. The largest array is then that of all stacked layers.

    Returns:
        The function and its parameters, as `from_torch` returns them. `spec` and `peft_names` take
        the function; `fn.module` is the module without weights.

    Raises:
        CheckpointNotFoundError: if the folder lacks a file.
        CheckpointError: if a tensor is missing, has another shape or is in two files, if tied
            tensors differ, or a tensor is in no file and computed only when the model is made.
        QuantizedModuleError: if the files have quantized weights.

    Warns:
        ModuleWarning: if the files have tensors that the module does not have, or transformers does
            not have the class that config.json names.

    Example:
        >>> import lorax_hf, tempfile, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> folder = tempfile.mkdtemp()
        >>> transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        >>> fn, params = lorax_hf.load_torch(folder)
        >>> params["transformer.wte.weight"].shape
        (31, 8)
    """
    need("torch")
    from ._torch._load import load

    return load(folder, sharding, dtype, train, module, scan_layers)


def generate(
    fn: Callable[..., Any],
    params: Any,
    ids: Any,
    *,
    max_new_tokens: int,
    attention_mask: Any = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> jax.Array:
    """Generates tokens with a causal model, in one compiled loop with a cache of constant size.

    Args:
        fn: a function of `from_torch` or `load_torch`, or an adapted module of `lora`.
        params: the parameters, or the pair `(frozen, tunable)`.
        ids: the prompts, integers [batch, length].
        max_new_tokens: the number of tokens to generate.
        attention_mask: [batch, length], zero where a prompt is padded, on its left.
        do_sample: whether to sample tokens instead of taking the most likely one.
        temperature: logits are divided by it before sampling.
        top_k: samples only from this many of the most likely tokens.
        top_p: samples only from the fewest most likely tokens whose probabilities sum to it.
        rng: the key of `jax.random` for sampling.
        eos_token_id: the token, or the tokens, that end a sequence; `pad_token_id` fills the rest.
            By default nothing ends a sequence.
        pad_token_id: by default the first of `eos_token_id`.

    Returns:
        The prompts and the generated tokens, [batch, length + max_new_tokens].

    Raises:
        StaticCacheError: if the model's cache cannot have a constant size; the message says why.
        ArgumentError: if `do_sample` has no key, the model is in training mode or has no positions
            for the new tokens, a setting is out of range, or a prompt is padded on its right.

    Warns:
        ModuleWarning: if rotary positions are beyond those that the model was trained with.

    Example:
        >>> import jax.numpy as jnp, lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> fn, params = lorax_hf.from_torch(transformers.GPT2LMHeadModel(config))
        >>> lorax_hf.generate(fn, params, jnp.ones((2, 5), int), max_new_tokens=3).shape
        (2, 8)
    """
    need("torch")
    from ._torch._generate import Options, generate as run

    ends: tuple[int, ...] = ()
    if eos_token_id is not None:
        ends = tuple(np.ravel(np.asarray(eos_token_id)).tolist())
    pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    options = Options(max_new_tokens, do_sample, temperature, top_k, top_p, ends, pad)
    return run(fn, params, ids, attention_mask, rng, options)


def register_op(op: Any, function: Callable[..., Any]) -> None:
    """Sets the JAX implementation of a PyTorch operator, for all modules from now on.

    Args:
        op: the operator, such as `torch.ops.aten.roll`, or its name, such as `"aten.roll"`.
        function: a function of the operator's arguments, with JAX arrays in place of tensors, that
            returns JAX arrays.

    Example:
        >>> import jax.numpy as jnp, lorax_hf
        >>> lorax_hf.register_op("aten.nextafter", jnp.nextafter)
    """
    need("torch")
    from ._torch._environment import register

    register(op, function)
