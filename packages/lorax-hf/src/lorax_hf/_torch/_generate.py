"""`generate`: decoding with a causal model, in one compiled loop with a static cache."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

import lorax
from lorax import ArgumentError

from .._errors import StaticCacheError
from ._adapted import AdaptedModule
from ._decoder import Decoder, check_length
from ._function import ModuleFunction


class Options(NamedTuple):
    """The settings that a compiled program depends on, as in `lorax_hf.generate`."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def generate(
    fn: Any, params: Any, ids: Any, mask: Any, rng: jax.Array | None, options: Options
) -> jax.Array:
    """The prompts and the generated tokens, [batch, prompt + new]."""
    lora: Mapping[str, Any] = {}
    if isinstance(fn, AdaptedModule):
        if isinstance(params, Mapping):
            raise ArgumentError(
                "generate: an adapted module takes the pair `(frozen, tunable)` as its parameters."
            )
        fn, lora = fn.function, fn.options
    if not isinstance(fn, ModuleFunction):
        raise ArgumentError(
            "generate takes the function that `from_torch` or `load_torch` returns, or the "
            "object that `lora` returns."
        )
    if fn.module.training:
        raise ArgumentError(
            "generate: the function is in training mode. Create it without `train=True`."
        )
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ArgumentError(
            f"ids must be integers of shape [batch, length], not {ids.dtype} {ids.shape}."
        )
    if 0 in ids.shape:
        raise ArgumentError(f"ids of the shape {ids.shape} have no prompt to continue.")
    if options.max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens={options.max_new_tokens} must be at least 1.")
    if options.do_sample and rng is None:
        raise ArgumentError("do_sample=True needs `rng=`, a `jax.random` key.")
    _check_sampling(options)
    length = ids.shape[1] + options.max_new_tokens
    check_length(fn.module, length)
    mask = None if mask is None else _padding(mask, ids.shape)
    key = (length, options, *sorted(lora.items()))
    if key not in fn.programs:
        fn.programs[key] = jax.jit(_program(fn, length, options, lora))
    try:
        return fn.programs[key](params, ids, mask, rng)
    except jax.errors.ConcretizationTypeError as error:
        raise StaticCacheError(
            f"{fn.__name__} has Python control flow that depends on the contents of its cache, so "
            "the cache has no constant size. Generate in PyTorch."
        ) from error


def _padding(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """An attention mask as integers; raises `ArgumentError` if it pads a prompt on its right."""
    mask = jnp.asarray(mask)
    if mask.shape != shape:
        raise ArgumentError(f"attention_mask has the shape {mask.shape}, but ids have {shape}.")
    mask = (mask != 0).astype(jnp.int32)
    if not isinstance(mask, Tracer) and not bool(mask[:, -1].all()):
        raise ArgumentError(
            "attention_mask is zero at the end of a prompt: pad prompts on their left, since new "
            "tokens follow the last one."
        )
    return mask


def _check_sampling(options: Options) -> None:
    """Raises `ArgumentError` for settings with which no token, or every token, would be drawn."""
    for name, is_valid, range_of in (
        (
            "temperature",
            options.temperature > 0,
            "above 0; for the most likely token, leave out do_sample",
        ),
        ("top_k", options.top_k is None or options.top_k >= 1, "at least 1, or None"),
        (
            "top_p",
            options.top_p is None or 0 < options.top_p <= 1,
            "above 0 and at most 1, or None",
        ),
    ):
        if not is_valid:
            raise ArgumentError(f"{name}={getattr(options, name)} must be {range_of}.")


def _program(
    fn: ModuleFunction, length: int, options: Options, lora: Mapping[str, Any]
) -> Callable[..., jax.Array]:
    decode = fn.around(lambda module: Decoder(module, length))
    lora = {**lora, "on_unused": "allow"}

    def run(params: Any, ids: Any, mask: Any, rng: Any) -> jax.Array:
        if not isinstance(params, Mapping):  # a pair
            step = lorax.lora(decode, **lora)
        else:
            step = decode
        batch, prompt = ids.shape
        if mask is not None:
            # New tokens are attended to; the causal mask hides those not generated yet.
            mask = jnp.concatenate([mask, jnp.ones((batch, length - prompt), mask.dtype)], axis=1)
            places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [batch, length]
        else:
            places = jnp.broadcast_to(jnp.arange(length), (batch, length))
        keys = None if rng is None else jax.random.split(rng, options.max_new_tokens)

        def chosen(logits: Any, done: Any, index: Any) -> tuple[Any, Any]:
            token = _next(logits, None if keys is None else keys[index], options).astype(ids.dtype)
            if not options.eos_token_ids:
                return token, done
            token = jnp.where(done, options.pad_token_id, token).astype(ids.dtype)
            return token, done | jnp.isin(token, jnp.asarray(options.eos_token_ids))

        def one(carry: Any, index: Any) -> Any:
            token, done, state = carry
            place = jax.lax.dynamic_slice_in_dim(places, prompt + index - 1, 1, axis=1)
            logits, state = step(params, token[:, None], mask, place, state)
            token, done = chosen(logits, done, index)
            return (token, done, state), token

        logits, state = step(params, ids, mask, places[:, :prompt], None)
        token, done = chosen(logits, jnp.zeros(batch, bool), 0)
        indices = jnp.arange(1, options.max_new_tokens)
        _, rest = jax.lax.scan(one, (token, done, state), indices)  # [new - 1, batch]
        return jnp.concatenate([ids, token[:, None], rest.T], axis=1)

    return run


def _next(logits: jax.Array, key: Any, options: Options) -> jax.Array:
    """The next token of each sequence, from logits [batch, vocabulary]."""
    if not options.do_sample:
        return jnp.argmax(logits, axis=-1)
    logits = logits.astype(jnp.float32) / options.temperature
    if options.top_k is not None:
        least = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if options.top_p is not None:
        # Keeps the fewest tokens whose probabilities sum to `top_p`, and always the most likely.
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < options.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
