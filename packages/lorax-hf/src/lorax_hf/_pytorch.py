"""PyTorch modules as JAX functions: `from_torch`, `load_torch`, `generate`, `register_op`."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
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
    """A PyTorch module as a pure JAX function of its parameters, and the parameters.

    The function is called as the module is, `fn(params, *args, **kwargs)`, with JAX arrays for
    tensors, and returns what the module returns, with arrays in it; `jax.jit`, `jax.grad` and
    `lorax.lora` take it as any other. It keeps a copy of the module without weights, so that later
    changes of the module do not reach it, and the module may be deleted.

    Parameters that the module ties are one array under one name. Buffers, such as rotary tables and
    batch statistics, are constants of the function, in `fn.buffers`. Models of transformers return
    no cache unless the call says `use_cache=True`.

    Args:
        module: any `torch.nn.Module`: a model of transformers or diffusers, or your own.
        sharding: of every parameter, a dict from names, or a function of name and shape; by default
            arrays are where JAX puts them.
        dtype: of floating parameters and persistent buffers; by default the module's.
        train: whether dropout and what else is for training is on. The call then takes `rng=`, a
            key of `jax.random`.
        scan_layers: whether equal layers that follow each other are one `jax.lax.scan`, so that a
            program does not grow with their number; or the names of the lists of layers. Their
            parameters are stacked in one array, such as `model.layers.0:30.mlp.up_proj.weight`.

    Returns:
        The function, and a flat dict of arrays by PyTorch's names.

    Raises:
        ImportError: where PyTorch or torchax is missing or too new; says what to install.
        OperatorError: when called, where torchax lacks an operator.
        QuantizedModuleError: where the module holds quantized weights.
        ValueError: where no layers can be scanned, and when called, where the module does more with
            them than calling one after the other; says why.

    Warns:
        UserWarning: of layers that `scan_layers` leaves out.

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
    """`from_torch` of a folder's model, whose weights never are tensors of PyTorch.

    The module is built without memory, and each tensor of the safetensors files is read onto its
    devices before the next one. With a sharding, each device reads its part alone. What
    transformers converts when it loads an older file is converted here, too.

    Args:
        folder: with config.json and model.safetensors, or its parts and their index.
        sharding: as in `from_torch`.
        dtype: of floating parameters; by default the files'.
        train: as in `from_torch`.
        module: a module on the meta device; by default one of the class in config.json.
        scan_layers: as in `from_torch`. The largest tensor is then that of all layers.

    Returns:
        The function and the parameters, as from `from_torch`; `fn` is what `spec` and `peft_names`
        take, and `fn.module` the module without weights.

    Raises:
        FileNotFoundError: where the folder lacks a file.
        ValueError: where a tensor is missing or has another shape.
        QuantizedModuleError: where the files hold quantized weights.

    Warns:
        UserWarning: where the files have tensors that the module does not have.

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
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> jax.Array:
    """Continues prompts with a causal model, in one compiled loop with a cache of constant size.

    Args:
        fn: of `from_torch` or `load_torch`, or a module that `lora` returns.
        params: its parameters, or the pair `(frozen, tunable)`.
        ids: the prompts, integers [batch, length].
        max_new_tokens: how many tokens follow.
        attention_mask: [batch, length], zero where a prompt is padded, on its left.
        do_sample: whether tokens are drawn at random, not the likeliest taken.
        temperature: by which logits are divided before a token is drawn.
        top_k: draws from the likeliest tokens alone, so many.
        top_p: draws from the likeliest tokens alone, whose probabilities sum to it.
        rng: the key of `jax.random` for it.
        eos_token_id: the token that ends a sequence; `pad_token_id` follows it.
        pad_token_id: by default, the token that ends a sequence.

    Returns:
        The prompts and what follows, [batch, length + max_new_tokens].

    Raises:
        StaticCacheError: where the model's cache cannot have a constant size; says why.

    Example:
        >>> import jax.numpy as jnp, lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> fn, params = lorax_hf.from_torch(transformers.GPT2LMHeadModel(config))
        >>> lorax_hf.generate(fn, params, jnp.ones((2, 5), int), max_new_tokens=3).shape
        (2, 8)
    """
    need("torch")
    from ._torch._generate import Options, generate as run

    pad = eos_token_id if pad_token_id is None else pad_token_id
    options = Options(max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id, pad)
    return run(fn, params, ids, attention_mask, rng, options)


def register_op(op: Any, function: Callable[..., Any]) -> None:
    """Runs a PyTorch operator as a function of JAX arrays, in every module from now on.

    Args:
        op: the operator, such as `torch.ops.aten.roll`, or its name, such as `"aten.roll"`.
        function: takes the operator's arguments, with JAX arrays for tensors, and returns arrays.

    Example:
        >>> import jax.numpy as jnp, lorax_hf
        >>> lorax_hf.register_op("aten.nextafter", jnp.nextafter)
    """
    need("torch")
    from ._torch._environment import register

    register(op, function)
