"""PEFT's `adapter_config.json`: what it says of each module, and what in it is refused."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex

from ._errors import AdapterFileError, AdapterWarning, UnsupportedAdapterError
from ._tensors import is_number, parse_json

CONFIG_NAME = "adapter_config.json"
_LARGEST = 16 * 2**20  # bytes; a rank for each of 10⁵ experts is a tenth of it
_LONGEST_PATTERN = 4096
_MOST_PATTERNS = 10_000
# For untrusted regular expressions, which take microseconds: one match, and all for one adapter.
_SECONDS_EACH = 1.0
_SECONDS = 5.0

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

# The heads that PEFT trains in full for some of them, whatever a config says.
HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The keys that matter to the numbers, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool | None = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    target_modules: Sequence[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def replace(self, **values: Any) -> "PeftConfig":
        """The same with other values."""
        return dataclasses.replace(self, **values)

    def rank(self, name: str) -> int:
        """The rank of a module."""
        return self._ranks.find(name, self.r)

    def alpha(self, name: str) -> float:
        """The alpha of a module."""
        return self._alphas.find(name, self.lora_alpha)

    def targets(self, name: str) -> bool | None:
        """Whether PEFT adapts a module; None where that depends on more than its name."""
        if self.target_modules is None or _is_all_linear(self.target_modules):
            return None
        if self._excludes(name) or not self._includes(name):
            return False
        return self.layers_to_transform is None or self._is_in_layers(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter of a module of experts."""
        return not self._parameters.isdisjoint(suffixes(name))

    def saves(self, name: str) -> bool:
        """Whether a module is trained in full, by itself or in another that is.

        PEFT compares the ends of names, dots or no dots.
        """
        outer = prefixes(name) if self._saved else []
        return any(module[k:] in self._saved for module in outer for k in range(len(module) + 1))

    def reading(self) -> "PeftConfig":
        """The same with the heads that PEFT trains for the task, which 0.10 does not list."""
        saved = {*(self.modules_to_save or ()), *HEADS.get(self.task_type, ())}
        return self.replace(modules_to_save=sorted(saved) or None)

    def _is_in_layers(self, name: str) -> bool:
        found = (_match(pattern, name) for pattern in self._layers_patterns)
        match = next((match for match in found if match), None)
        # A pattern may hide this group, or hold one of its name that matched no number.
        index = (match.groupdict().get("index") if match else None) or ""
        return index.isdecimal() and int(index) in self._layers

    # Each list and pattern in the form to look names up in: a file may have very many of them.

    @functools.cached_property
    def _ranks(self) -> "_Patterns":
        return _Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> "_Patterns":
        return _Patterns(self.alpha_pattern)

    @functools.cached_property
    def _includes(self) -> Callable[[str], bool]:
        return _listed(self.target_modules)

    @functools.cached_property
    def _excludes(self) -> Callable[[str], bool]:
        return _listed(self.exclude_modules)

    @functools.cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.target_parameters or ())

    @functools.cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save or ())

    @functools.cached_property
    def _layers(self) -> frozenset[int]:
        layers = self.layers_to_transform
        return frozenset([layers] if isinstance(layers, int) else layers or ())

    @functools.cached_property
    def _layers_patterns(self) -> list[Any]:
        pattern = self.layers_pattern
        patterns = [pattern] if isinstance(pattern, str) else pattern or []
        texts = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns]
        return list(map(regex.compile, texts or [r".*?\.[^.]*\.(?P<index>\d+)\."]))

    def scaling_text(self) -> str:
        """What rank and scale of every module follow from, in one form."""
        keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        return json.dumps({key: getattr(self, key) for key in keys}, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """The keys that every release of PEFT since 0.7 reads, and newer ones where they differ.

        PEFT before 0.14 refuses a file with a key that it does not know.
        """
        newer = {
            "use_rslora": False,
            "use_dora": False,
            "exclude_modules": None,
            "target_parameters": None,
        }
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {k: v for k, v in values.items() if k not in newer or v != newer[k]}
        return {
            **kept,
            "peft_type": "LORA",
            "auto_mapping": None,
            "inference_mode": True,
            "init_lora_weights": True,
        }


def _is_all_linear(target: Sequence[str] | str) -> bool:
    return isinstance(target, str) and target.lower() == "all-linear"


def suffixes(name: str) -> list[str]:
    """The name, and what is left of it after each dot."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(len(parts))]


def prefixes(name: str) -> list[str]:
    """The name, and what is left of it before each dot: a module and those that it is in."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _listed(target: Sequence[str] | str | None) -> Callable[[str], bool]:
    if isinstance(target, str):
        pattern = regex.compile(rf"(?:{target})\Z")
        return lambda name: _match(pattern, name) is not None
    ends = frozenset(target or ())
    return lambda name: not ends.isdisjoint(suffixes(name))


class _Patterns:
    """Values by the first key, in their order, that matches the end of a name, as PEFT does."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = list(values.values())
        self._order = {key: k for k, key in enumerate(values)}
        self._patterns = [
            (k, regex.compile(rf"(.*\.)?({key})$"))
            for key, k in self._order.items()
            if not _is_plain(key)
        ]

    def find(self, name: str, default: Any) -> Any:
        literal = [self._order[end] for end in suffixes(name) if end in self._order]
        first = min(literal, default=len(self._values))
        for k, pattern in self._patterns:
            if k >= first:
                break
            if _match(pattern, name):
                return self._values[k]
        return self._values[first] if literal else default


def _is_plain(key: str) -> bool:
    return all(part.replace("_", "a").replace("-", "a").isalnum() for part in key.split("."))


_seconds_left = contextvars.ContextVar("seconds left for patterns", default=_SECONDS)


@contextlib.contextmanager
def distrusted(path: object) -> Generator[None]:
    """A block that uses patterns of a config: they have little time, and their errors are its."""
    token = _seconds_left.set(_SECONDS)
    try:
        yield
    except TimeoutError as error:
        raise AdapterFileError(
            path, "patterns of its config take too long to match; it is not to be trusted."
        ) from error
    except (regex.error, RecursionError) as error:
        raise AdapterFileError(
            path, f"a pattern of its config is no regular expression in its place ({error})."
        ) from error
    finally:
        _seconds_left.reset(token)


def _match(pattern: Any, name: str) -> Any:
    left = _seconds_left.get()
    if left <= 0:
        raise TimeoutError
    begin = time.perf_counter()
    try:
        return pattern.match(name, timeout=min(left, _SECONDS_EACH))
    finally:
        _seconds_left.set(left - (time.perf_counter() - begin))


class _Key(NamedTuple):
    """What a key of the file may hold."""

    accepts: Callable[[Any], bool]
    what: str


def _or_none(key: _Key) -> _Key:
    return _Key(lambda x: x is None or key.accepts(x), f"{key.what}, or null")


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


def _patterns(value: _Key) -> _Key:
    return _Key(
        lambda x: isinstance(x, dict) and all(map(value.accepts, x.values())),
        f"an object of names, each with {value.what}",
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
}

# Keys for which PEFT reads null, "" and [] as if the key were absent.
_ABSENT_IF_EMPTY = frozenset(
    "use_rslora use_dora fan_in_fan_out modules_to_save layers_to_transform layers_pattern"
    " exclude_modules target_parameters".split()
)
# PEFT itself fails on null here; writers of null mean that there is no pattern.
_ABSENT_IF_NULL = frozenset(("rank_pattern", "alpha_pattern"))

# Keys that change nothing in the numbers that the tensors give.
_HARMLESS = frozenset(
    "peft_type auto_mapping inference_mode peft_version init_lora_weights eva_config corda_config"
    " lora_ga_config loftq_config qalora_group_size megatron_core runtime_config"
    " merge_weights".split()
)

# Keys that make an adapter more than LoRA and DoRA, unless they are null, false or empty.
_BEYOND = {
    "lora_bias": "has a bias in its factors",
    "layer_replication": "repeats layers of its base",
    "alora_invocation_tokens": "is an activated LoRA, which adapts some tokens only",
    "use_qalora": "is QA-LoRA",
    "use_bdlora": "is BD-LoRA, with factors of blocks",
    "kasa_config": "is KaSA",
    "monteclora_config": "is MonteCLoRA",
    "velora_config": "is VeLoRA",
    "arrow_config": "routes between adapters",
    "megatron_config": "is for Megatron's layers",
    "trainable_token_indices": "replaces rows of the embedding",
    "ensure_weight_tying": "ties the factors of embedding and head",
    "enable_lora": "adapts parts of fused projections, as PEFT 0.2 does",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def read_config(path: Path) -> PeftConfig:
    """A config that was checked key by key.

    Raises:
        AdapterFileError: where it is no JSON object, or a value is not what PEFT writes.
        UnsupportedAdapterError: where the adapter is more than LoRA and DoRA.
    """
    if path.stat().st_size > _LARGEST:
        raise AdapterFileError(path, f"is larger than {_LARGEST} bytes, which no config is.")
    try:
        values = parse_json(path, path.read_text(encoding="utf-8"))
    except UnicodeError as error:
        raise AdapterFileError(path, f"is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise AdapterFileError(path, f"cannot be read: {error}") from error
    return config_of(path, values)


def config_of(path: Path, values: Any) -> PeftConfig:
    """A config from its JSON, checked key by key."""
    if not isinstance(values, dict):
        raise AdapterFileError(path, "is no JSON object.")
    _check_kind(path, values)
    values = {key: value for key, value in values.items() if not _is_absent(key, value)}
    for name, key in _KEYS.items():
        if name in values and not key.accepts(values[name]):
            raise AdapterFileError(
                path, f"has {name} = {_brief(values[name])}; it must be {key.what}."
            )
    if unknown := sorted(values.keys() - _KEYS.keys() - _HARMLESS - _BEYOND.keys()):
        warnings.warn(
            f"{path}: keys that this version does not know are ignored: {', '.join(unknown)}.",
            AdapterWarning,
            stacklevel=5,
        )
    config = PeftConfig(**{name: values[name] for name in _KEYS if name in values})
    _check_patterns(path, config)
    return config


def _is_absent(key: str, value: Any) -> bool:
    if value is None:
        return key in _ABSENT_IF_EMPTY | _ABSENT_IF_NULL
    return key in _ABSENT_IF_EMPTY and value in ("", [])


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise (AdapterFileError if kind is None else UnsupportedAdapterError)(
            path, f"has peft_type = {_brief(kind)}; only adapters of type LORA are read."
        )
    for name, what in _BEYOND.items():
        if values.get(name):
            raise UnsupportedAdapterError(
                path, f"the adapter {what} ({name}); read as plain LoRA it would be wrong."
            )
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise UnsupportedAdapterError(
            path,
            f"has init_lora_weights = {_brief(init)}, which changes the base weights beside the "
            "adapter. Save it in PEFT with `path_initial_model_for_weight_conversion`, which makes "
            "plain LoRA of it.",
        )


def _check_patterns(path: Path, config: PeftConfig) -> None:
    patterns = list(_patterns_of(config))
    if (longest := max(map(len, patterns), default=0)) > _LONGEST_PATTERN:
        raise AdapterFileError(path, f"has a pattern of {longest} characters.")
    patterns = [pattern for pattern in patterns if not _is_plain(pattern)]
    if len(patterns) > _MOST_PATTERNS:
        raise AdapterFileError(path, f"has {len(patterns)} patterns, which no config has.")
    for pattern in patterns:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(
                path, f"has {_brief(pattern)}, which is no regular expression ({error})."
            ) from error


def _patterns_of(config: PeftConfig) -> Iterator[str]:
    for target in (config.target_modules, config.exclude_modules):
        if isinstance(target, str):
            yield target
    yield from (*config.rank_pattern, *config.alpha_pattern)
    layers = config.layers_pattern
    yield from [layers] if isinstance(layers, str) else layers or []


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
