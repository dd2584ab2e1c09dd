"""Untrusted patterns: invalid ones, and ones that take too long to match."""

import jax.numpy as jnp
import pytest
from untrusted import CONFIG, NAMES, TENSORS, assert_refused, floats

from lorax_io import (
    AdapterFileError,
    AdapterMismatchError,
    Linear,
    load_peft,
)
from lorax_io._formats.peft.config import PeftConfig

PATTERNED = {
    "target_modules": lambda pattern: {"target_modules": pattern},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 2}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 4}},
    "layers_pattern": lambda pattern: {"layers_pattern": pattern, "layers_to_transform": [0]},
}


BAD_PATTERNS = {
    "open group": "(q_proj",
    "closed group": "q_proj)",
    "unbalanced groups": "q)|(v",
    "star": "*",
    "open class": "[q",
    "escape at the end": "q\\",
    "missing group": r"(q)\2",
    "open lookbehind": "(?<=q",
    "invalid group name": "(?P<1>q)",
    "deep": "(" * 2000 + "q" + ")" * 2000,
    "long": "(q)" * 1366,
    "long and plain": "q" * 4097,
    "missing list": r"\L<names>",
}


# Matching these against this name does not end. `regex` optimizes the simplest, such as `(a+)+$`.
LONG_NAME = "model.layers.0." + "a" * 32 + "!.0.proj"


SLOW_PATTERNS = {
    "alternatives": "(?:.|..)*[!X]{2}",
    "words": r"(?:\w|\w\w|[.!])*[!X]{2}",
    "many dots": ".*?" * 14 + "[!X]{2}",
    "nested": "((?:.|..)*[a.])*[!X]{2}",
    "lookahead": r"(?:(?=(\w|!))(?:.|..))+[!X]{2}",
    "recursion": "(?R)",
}


def write_pattern(place, key, pattern):
    config = CONFIG | {"target_modules": [LONG_NAME.partition(".")[2]]} | PATTERNED[key](pattern)
    prefix = f"base_model.model.{LONG_NAME}."
    factors = {"lora_A.weight": floats(2, 5), "lora_B.weight": floats(3, 2)}
    place.write(config, {prefix + name: tensor for name, tensor in factors.items()})


@pytest.mark.parametrize("key", PATTERNED)
@pytest.mark.parametrize("pattern", BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_invalid_pattern_raises(place, monkeypatch, key, pattern):
    monkeypatch.setitem(NAMES, "q", Linear(LONG_NAME))
    write_pattern(place, key, pattern)
    message = "not a regular expression|a pattern of 409[78] characters"
    assert_refused(place, "peft", AdapterFileError, message)


@pytest.mark.parametrize("key", list(PATTERNED)[:-1])
def test_pattern_that_is_invalid_inside_another_raises(place, key):
    place.write(CONFIG | PATTERNED[key]("(?x)q_proj # and v_proj"), TENSORS)
    assert_refused(place, "peft", AdapterFileError, "not a regular expression in its place")


@pytest.mark.parametrize("key", PATTERNED)
@pytest.mark.parametrize("pattern", SLOW_PATTERNS.values(), ids=SLOW_PATTERNS)
def test_slow_pattern_raises(place, monkeypatch, key, pattern):
    monkeypatch.setattr("lorax_io._formats.peft.patterns._SECONDS_EACH", 0.1)
    monkeypatch.setitem(NAMES, "q", Linear(LONG_NAME))
    write_pattern(place, key, pattern)
    assert_refused(place, "peft", AdapterFileError, "take too long to match")


def test_patterns_that_are_slow_together_raise(place, monkeypatch):
    monkeypatch.setattr("lorax_io._formats.peft.patterns._SECONDS", 0.5)
    pattern = "(?:.|..)*[!X]{2}"
    names = [f"model.layers.{k}." + "a" * 14 + "!.0.proj" for k in range(1000)]
    torch_names = {f"{k}": Linear(name) for k, name in enumerate(names)}
    tensors = {
        f"base_model.model.{name}.{key}": tensor
        for name in names
        for key, tensor in (("lora_A.weight", floats(2, 5)), ("lora_B.weight", floats(3, 2)))
    }
    place.write(CONFIG | {"target_modules": names, "rank_pattern": {pattern: 2}}, tensors)
    with pytest.raises(AdapterFileError, match="take too long to match"):
        load_peft(place.folder, dict.fromkeys(torch_names, jnp.ones((5, 3))), torch_names)


MANY = [f"m{k}" for k in range(200_000)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {f"({name})": 2 for name in MANY}}, "200000 patterns"),
        ({"rank_pattern": dict.fromkeys(MANY, 2), "r": 3}, r"takes \(3, 5\) at the rank 3"),
        ({"target_modules": MANY}, "not a target in its config"),
        ({"modules_to_save": [*MANY, "norm"]}, "lacks `model.norm.weight`"),
        ({"layers_to_transform": [*range(1, 200_000)]}, "not a target in its config"),
    ],
    ids=["patterns", "names with ranks", "targets", "modules to save", "layers"],
)
def test_long_lists_take_linear_time(place, changes, message):
    place.write(CONFIG | changes, TENSORS)
    error = AdapterMismatchError if "takes" in message else AdapterFileError
    assert_refused(place, "peft", error, message)


@pytest.mark.parametrize("pattern", ["layers|x", "(?P<index>layers)|x", "(?x)layers # and x"])
def test_layers_pattern_without_a_number_matches_nothing(place, pattern):
    place.write(CONFIG | {"layers_pattern": pattern, "layers_to_transform": [0]}, TENSORS)
    assert_refused(place, "peft", AdapterFileError, "not a target in its config")


@pytest.mark.parametrize(
    ("targets", "is_target"),
    [(["up"], False), (["1.up"], False), (["layers.1.up"], True), (r".*\.up", True)],
)
def test_layers_to_transform_applies_only_to_name_suffixes(targets, is_target):
    """PEFT ignores `layers_to_transform` for full names and for patterns."""
    config = PeftConfig(target_modules=targets, layers_to_transform=[0])
    assert config.targets("layers.1.up") is is_target
    excluded = config.replace(exclude_modules=["up"])
    assert excluded.targets("layers.1.up") is False
