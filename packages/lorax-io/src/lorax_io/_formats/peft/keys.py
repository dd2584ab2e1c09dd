"""Reads and writes `adapter_config.json`: the values that each key may have."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import regex

from ..._disk.tensors import is_number, parse_json
from ..._errors import AdapterFileError, UnsupportedAdapterError, warn
from .config import TASK_TYPES, PeftConfig
from .patterns import is_plain
from .tuners import TUNERS, Tuner

_LARGEST = 16 * 2**20  # bytes; ten times a config with a rank for each of 10⁵ experts
_LONGEST_PATTERN = 4096
_MOST_PATTERNS = 10_000


class _Key(NamedTuple):
    """The values that a key of the file may have."""

    accepts: Callable[[Any], bool]
    description: str


def _or_none(key: _Key) -> _Key:
    return _Key(lambda x: x is None or key.accepts(x), f"{key.description}, or null")


def _is_strings(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(item, str) for item in x)


def _is_integer(x: Any) -> bool:
    return type(x) is int


def _is_rank(x: Any) -> bool:
    return _is_integer(x) and 1 <= x <= 2**20


_RANK = _Key(_is_rank, "a positive integer")
_NUMBER = _Key(is_number, "a finite number")
_FLAG = _Key(lambda x: isinstance(x, bool), "true or false")
_STRING = _Key(lambda x: isinstance(x, str), "a string")
_STRINGS = _Key(_is_strings, "a list of strings")
_FLAG_OR_NONE = _or_none(_FLAG)
_NAMES = _Key(lambda x: isinstance(x, str) or _is_strings(x), "a list of names, or a pattern")
_LAYERS = _Key(
    lambda x: _is_integer(x) or (isinstance(x, list) and all(map(_is_integer, x))),
    "an integer or a list of integers",
)


def _are_tokens(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(_is_integer(n) and 0 <= n < 2**31 for n in x)


_TOKENS = _Key(_are_tokens, "a list of token indices")
_COUNT = _Key(lambda x: _is_integer(x) and 0 <= x <= 2**20, "an integer that is not negative")
_BLOCKS = _Key(
    lambda x: (
        isinstance(x, dict)
        and _is_rank(x.get("nblocks", 1))
        and all(
            x.get(f"target_modules_bd_{k}") is None or _is_strings(x[f"target_modules_bd_{k}"])
            for k in "ab"
        )
    ),
    "an object with nblocks, target_modules_bd_a and target_modules_bd_b",
)


def _patterns(value: _Key) -> _Key:
    return _Key(
        lambda x: isinstance(x, dict) and all(map(value.accepts, x.values())),
        f"an object of names, each with {value.description}",
    )


_KEYS: dict[str, _Key] = {
    "r": _RANK,
    "lora_alpha": _NUMBER,
    "use_rslora": _FLAG_OR_NONE,
    "use_dora": _FLAG_OR_NONE,
    "rank_pattern": _or_none(_patterns(_RANK)),
    "alpha_pattern": _or_none(_patterns(_NUMBER)),
    "target_modules": _or_none(_NAMES),
    "target_parameters": _or_none(_STRINGS),
    "exclude_modules": _or_none(_NAMES),
    "layers_to_transform": _or_none(_LAYERS),
    "layers_pattern": _or_none(_NAMES),
    "modules_to_save": _or_none(_STRINGS),
    "bias": _Key(lambda x: x in ("none", "all", "lora_only"), "none, all or lora_only"),
    "fan_in_fan_out": _FLAG_OR_NONE,
    "lora_dropout": _NUMBER,
    "task_type": _or_none(_Key(lambda x: x in TASK_TYPES, " or ".join(TASK_TYPES))),
    "base_model_name_or_path": _or_none(_STRING),
    "revision": _or_none(_STRING),
    "peft_version": _or_none(_STRING),
    "feedforward_modules": _or_none(_NAMES),
    "decompose_both": _FLAG,
    "decompose_factor": _Key(_is_integer, "an integer"),
    "use_effective_conv2d": _FLAG,
    "projection_prng_key": _Key(lambda x: _is_integer(x) and 0 <= x < 2**63, "an integer"),
    "save_projection": _FLAG,
    "oft_block_size": _COUNT,
    "block_share": _FLAG,
    "use_cayley_neumann": _FLAG,
    "num_cayley_neumann_terms": _Key(lambda x: _is_integer(x) and 2 <= x <= 100, "from 2 to 100"),
    "coft": _FLAG_OR_NONE,
    "eps": _or_none(_NUMBER),
    "gralora_k": _RANK,
    "use_bdlora": _or_none(_BLOCKS),
    "trainable_token_indices": _or_none(
        _Key(
            lambda x: (
                _are_tokens(x)
                or (isinstance(x, dict) and bool(x) and all(map(_are_tokens, x.values())))
            ),
            "a list of token indices, or an object of them by module",
        )
    ),
    "token_indices": _TOKENS,
    "lora_bias": _FLAG_OR_NONE,
}
# The keys that all tuners have.
_COMMON = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "fan_in_fan_out", "task_type", "base_model_name_or_path", "revision"),
)
_HARMLESS = frozenset(("peft_type", "auto_mapping", "inference_mode", "runtime_config"))

# Keys for which PEFT reads null, "" and [] as if the key were absent.
_ABSENT_IF_EMPTY = frozenset(
    "use_rslora use_dora fan_in_fan_out modules_to_save layers_to_transform layers_pattern"
    " exclude_modules target_parameters init_lora_weights base_model_name_or_path"
    " use_bdlora lora_bias trainable_token_indices"
    " revision".split()
)
# PEFT itself fails on null here. It is read as an empty table of patterns.
_ABSENT_IF_NULL = frozenset(("rank_pattern", "alpha_pattern"))


def read_config(path: Path) -> PeftConfig:
    """Reads a config file and checks every key.

    Raises:
        AdapterFileError: if it is not a JSON object, or a value is not one that PEFT writes.
        UnsupportedAdapterError: if the kind of adapter is not supported.
    """
    if path.stat().st_size > _LARGEST:
        raise AdapterFileError(f"is larger than {_LARGEST} bytes, too large for a config.")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except UnicodeError as error:
        raise AdapterFileError(f"is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}") from error
    return config_of(values)


def config_of(values: Any) -> PeftConfig:
    """A config from its JSON, checked key by key."""
    if not isinstance(values, dict):
        raise AdapterFileError("is not a JSON object.")
    tuner = _check_kind(values)
    ignored = {*tuner.harmless, *_HARMLESS, tuner.init}
    values = {k: v for k, v in values.items() if k not in ignored and not _is_absent(k, v)}
    values = {tuner.renamed.get(key, key): value for key, value in values.items()}
    if values.get("bias") == tuner.only_bias:
        values["bias"] = "lora_only"
    known = (*_COMMON, *tuner.fields)
    key_of = {field: key for key, field in tuner.renamed.items()}
    for name in (*known, "peft_version"):
        if name in values and not _KEYS[name].accepts(values[name]):
            raise AdapterFileError(
                f"has {key_of.get(name, name)} = {_brief(values[name])}; it must be "
                f"{_KEYS[name].description}."
            )
    if unknown := sorted(values.keys() - {*known, "peft_version"} - tuner.beyond.keys()):
        warn(f"keys that this version does not know are ignored: {', '.join(unknown)}.")
    kept = {name: values[name] for name in (*known, "peft_version") if name in values}
    config = PeftConfig(**{**tuner.defaults, **kept}, peft_type=tuner.peft_type)
    _check_patterns(config)
    tuner.check_config(config)
    return config


def config_to_json(config: PeftConfig) -> dict[str, Any]:
    """The config as JSON data; newer keys are written only if they differ from their defaults.

    PEFT before 0.14 rejects a config with a key that it does not know.
    """
    tuner = TUNERS[config.peft_type]
    newer = {
        "use_rslora": False,
        "use_dora": False,
        "exclude_modules": None,
        "target_parameters": None,
        "use_bdlora": None,
        "lora_bias": False,
        "trainable_token_indices": None,
    }
    key_of = {field: key for key, field in tuner.renamed.items()}
    names = [name for name in (*_COMMON, *tuner.fields) if name not in tuner.lacking]
    values = {name: getattr(config, name) for name in names}
    if values.get("bias") == "lora_only":
        values["bias"] = tuner.only_bias
    kept = {
        key_of.get(name, name): value
        for name, value in values.items()
        if name not in newer or value != newer[name]
    }
    return {
        **kept,
        **tuner.written(config),
        "peft_type": config.peft_type,
        "auto_mapping": None,
        "inference_mode": True,
        **({} if tuner.init is None else {tuner.init: True}),
    }


def _is_absent(key: str, value: Any) -> bool:
    if value is None:
        return key in _ABSENT_IF_EMPTY | _ABSENT_IF_NULL
    return key in _ABSENT_IF_EMPTY and value in ("", [])


def _check_kind(values: Mapping[str, Any]) -> Tuner:
    kind = values.get("peft_type")
    tuner = TUNERS.get(kind) if isinstance(kind, str) else None
    if kind is None and ("model_type" in values or "architectures" in values):
        raise AdapterFileError("is the config of a model, not of an adapter.")
    if tuner is None:
        raise (AdapterFileError if kind is None else UnsupportedAdapterError)(
            f"has peft_type = {_brief(kind)}; only adapters of type {', '.join(TUNERS)} are read."
        )
    for name, description in tuner.beyond.items():
        if values.get(name):
            raise UnsupportedAdapterError(
                f"the adapter {description} ({name}); read as plain {tuner.called} it would be "
                "wrong. Merge it in PEFT (`merge_and_unload`), or load it there."
            )
    if tuner.init is not None:
        tuner.check_start(values.get(tuner.init))
    return tuner


def _check_patterns(config: PeftConfig) -> None:
    patterns = list(_patterns_of(config))
    if (longest := max(map(len, patterns), default=0)) > _LONGEST_PATTERN:
        raise AdapterFileError(f"has a pattern of {longest} characters.")
    patterns = [pattern for pattern in patterns if not is_plain(pattern)]
    if len(patterns) > _MOST_PATTERNS:
        raise AdapterFileError(f"has {len(patterns)} patterns, too many for a config.")
    for pattern in patterns:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(
                f"has {_brief(pattern)}, which is not a regular expression ({error})."
            ) from error


def _patterns_of(config: PeftConfig) -> Iterator[str]:
    for target in (config.target_modules, config.exclude_modules, config.feedforward_modules):
        if isinstance(target, str):
            yield target
    yield from (*config.rank_pattern, *config.alpha_pattern)
    layers = config.layers_pattern
    yield from [layers] if isinstance(layers, str) else layers or []


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
