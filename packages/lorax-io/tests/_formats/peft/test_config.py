"""Untrusted configs: keys, types and values that PEFT does not write."""

import json

import jax
import pytest
from untrusted import CONFIG, NAMES, NESTED, assert_refused, make_params, rows, without_none

from lorax_io import (
    AdapterFileError,
    AdapterWarning,
    UnsupportedAdapterError,
    load_peft,
)


def many_keys(count):
    """A JSON object in which the first key is repeated at the end."""
    return b"{%s}" % b",".join(b'"%d":0' % (k % (count - 1)) for k in range(count))


SOUND = json.dumps(CONFIG)


TEXTS = rows(
    ("no text", b"", "is not (a )?JSON"),
    ("not JSON", b"{peft_type: LORA}", "is not (a )?JSON"),
    ("cut short", SOUND[:-1].encode(), "is not (a )?JSON"),
    ("more after it", (SOUND + "{}").encode(), "is not (a )?JSON"),
    ("NUL after it", (SOUND + "\0").encode(), "is not (a )?JSON"),
    ("array", b"[]", "is not a JSON object"),
    ("null", b"null", "is not a JSON object"),
    ("string", b'"LORA"', "is not a JSON object"),
    ("key twice", (SOUND[:-1] + ', "r": 4}').encode(), "has the key 'r' twice"),
    (
        "key twice within",
        (SOUND[:-1] + ', "rank_pattern": {"q": 1, "q": 2}}').encode(),
        "'q' twice",
    ),
    ("no UTF-8", SOUND.encode().replace(b"LORA", b"\xff"), "is not UTF-8 text"),
    ("UTF-16", SOUND.encode("utf-16"), "is not UTF-8 text"),
    ("byte order mark", b"\xef\xbb\xbf" + SOUND.encode(), "is not (a )?JSON"),
    ("deep", f'{{"peft_type": {NESTED}}}'.encode(), "is not JSON that can be read"),
    ("deep objects", b'{"a":' * 100_000, "is not JSON that can be read"),
    ("a number of 10^5 digits", b'{"r": %s}' % (b"9" * 100_000), "is not JSON that can be read"),
    ("17 MiB", SOUND.encode() + b" " * (17 * 2**20), "is larger than"),
    ("many keys, one twice", many_keys(200_000), "'0' twice"),
)


def test_unreadable_config_raises(place, monkeypatch):
    def forbid(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    jax.devices()  # JAX also reads files when it is first used
    monkeypatch.setattr("pathlib.Path.read_text", forbid)
    assert_refused(place, "peft", AdapterFileError, "cannot be read: .*Permission denied")


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_config_that_is_not_an_object_raises(place, text, message):
    place.config.write_bytes(text)
    assert_refused(place, "peft", AdapterFileError, message)


def config_text(changes):
    values = without_none({**{k: json.dumps(v) for k, v in CONFIG.items()}, **changes})
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return "{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in texts.items()) + "}"


def of_q(values):
    return " ".join(f'{{"q":{value}}}' for value in values)


# For each key, values that PEFT never writes.
VALUES = {
    "r": 'true false null 4.0 0 -1 1e999 NaN "4" [4] {} 1048577 ' + "9" * 400,
    "lora_alpha": 'true null NaN Infinity -Infinity 1e999 "8" [8] {} ' + "9" * 400,
    "use_rslora": '0 1 "true" {}',
    "rank_pattern": '[] "q" 4 true ' + of_q(["0", "-1", "true", "2.0", "null", "[]"]),
    "alpha_pattern": '[] "q" 4 ' + of_q(["true", "null", "NaN", '"4"', "1e999", "9" * 400]),
    "target_modules": '4 true {} [4] [null] [["q"]]',
    "target_parameters": '"q" 4 {} [4] [null] true',
    "exclude_modules": "4 {} [4] true",
    "layers_to_transform": 'true "0" 0.0 [0.0] [true] ["0"] {}',
    "layers_pattern": "4 {} [4] true",
    "modules_to_save": '"score" 4 {} [4] true',
    "bias": 'null true 0 [] "some" "None"',
    "fan_in_fan_out": '0 "false" {}',
    "lora_dropout": 'null true NaN "0" []',
    "task_type": '0 [] {} "causal_lm" "OTHER" true',
    "base_model_name_or_path": "0 {} true",
    "revision": "0 {} true",
}


TYPES = [
    pytest.param(key, value, id=f"{key}={value[:20]}")
    for key, values in VALUES.items()
    for value in values.split(" ")
]


@pytest.mark.parametrize(("key", "value"), TYPES)
def test_config_value_of_another_type_raises(place, key, value):
    place.config.write_text(config_text({key: value}))
    assert_refused(place, "peft", AdapterFileError, f"has {key} = .*; it must be ")


NULLS = (
    "rank_pattern alpha_pattern target_modules target_parameters exclude_modules revision"
    " layers_to_transform layers_pattern modules_to_save task_type base_model_name_or_path"
    " use_rslora use_dora fan_in_fan_out init_lora_weights"
)


EMPTY = (
    "base_model_name_or_path revision init_lora_weights use_rslora use_dora fan_in_fan_out"
    " modules_to_save layers_to_transform layers_pattern exclude_modules target_parameters"
)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, "null") for key in NULLS.split()]
    + [(key, value) for key in EMPTY.split() for value in ('""', "[]")],
)
def test_empty_value_is_read_as_a_missing_key(place, key, value):
    place.config.write_text(config_text({key: value}))
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].scale == 2


@pytest.mark.parametrize("key", ["merge_weights", "enable_lora", "runtime_config"])
def test_keys_of_other_peft_releases_are_accepted(place, key):
    place.config.write_text(config_text({key: "null"}))
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].scale == 2


KINDS = rows(
    ("no peft_type", {"peft_type": None}, AdapterFileError, "peft_type = None; only .* LORA"),
    (
        "model's config",
        {"peft_type": None, "model_type": '"llama"'},
        AdapterFileError,
        "of a model",
    ),
    ("null peft_type", {"peft_type": "null"}, AdapterFileError, "peft_type = None"),
    *(
        (f"peft_type {kind}", {"peft_type": kind}, UnsupportedAdapterError, "has peft_type = ")
        for kind in '"lora" "BOFT" "RANDLORA" "FOURIERFT" "XLORA" "ROAD"'
        ' "PREFIX_TUNING" "PROMPT_TUNING" "" 0 [] {} ["LORA"] true'.split()
    ),
    *(
        (f"init {init}", {"init_lora_weights": init}, UnsupportedAdapterError, "changes the base")
        for init in '"pissa" "pissa_niter_16" "olora" "loftq" "corda" "bogus" 2'.split()
    ),
    *(
        (f"{key} {value}", {key: value}, UnsupportedAdapterError, rf"\({key}\); read as plain LoRA")
        for key, value in {
            "layer_replication": "[[0,4],[2,5]]",
            "alora_invocation_tokens": "[1,2]",
            "use_qalora": "true",
            "kasa_config": '{"beta":1.0}',
            "monteclora_config": '{"a":1}',
            "velora_config": '{"a":1}',
            "arrow_config": '{"top_k":3}',
            "megatron_config": '{"a":1}',
            "ensure_weight_tying": "true",
            "enable_lora": "[true,false,true]",
        }.items()
    ),
)


MADE_UP = rows(
    ("missing biases", {"lora_bias": "true"}, AdapterFileError, "lacks .*lora_B.bias"),
    (
        "rows that are not there",
        {"trainable_token_indices": "[0]"},
        AdapterFileError,
        "the rows of",
    ),
    (
        "rows of a table that are not there",
        {"trainable_token_indices": '{"embed_tokens":[0]}'},
        AdapterFileError,
        "lacks the rows of `embed_tokens`",
    ),
    *(
        (
            f"token indices {value}",
            {"trainable_token_indices": value},
            AdapterFileError,
            "token ind",
        )
        for value in ("3", "[-1]", "[0.5]", "[true]", '{"a":1}', '{"a":[]}', '"all"')
    ),
    ("blocks of no module", {"use_bdlora": '{"nblocks":2}'}, AdapterFileError, "on neither side"),
    *(
        (f"blocks {value}", {"use_bdlora": value}, AdapterFileError, "it must be an object with nb")
        for value in ('{"nblocks":0}', '{"nblocks":"2"}', "true", '{"target_modules_bd_a":"q"}')
    ),
)


@pytest.mark.parametrize(("changes", "error", "message"), [*KINDS, *MADE_UP])
def test_unsupported_config_features_raise(place, changes, error, message):
    place.config.write_text(config_text(changes))
    assert_refused(place, "peft", error, message)


def test_unknown_key_warns(place):
    place.config.write_text(config_text({"temperature": "1"}))
    with pytest.warns(AdapterWarning, match="does not know are ignored: temperature"):
        load_peft(place.folder, make_params(), NAMES)
