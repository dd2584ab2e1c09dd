"""Untrusted native files of plain LoRA."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from untrusted import FILE, KEY, LORA, MISMATCH, NESTED, assert_refused, floats, rows

from lorax_io import (
    AdapterError,
)


def settings(text=None, **changes):
    """The header's settings, with changes to those of `q`."""
    values = LORA | {name: 0 for name in changes}
    texts = {name: json.dumps(value) for name, value in values.items()} | changes
    fields = ", ".join(f'"{name}": {value}' for name, value in texts.items())
    text = text or f"{{{fields}}}"
    return {KEY: f'{{"q": {text}, "norm": {{"kind": "full"}}}}'}


NATIVE = rows(
    ("no format", {"lorax.format": None}, {}, FILE, "not a native adapter; `load_peft` reads"),
    *(
        (f"format {text!r}", {"lorax.format": text}, {}, FILE, f"of format '{text}'; this version")
        for text in ("3", "", "1.0", "01", "one")
    ),
    ("no settings", {KEY: None}, {}, FILE, "is not (a )?JSON"),
    *(
        (
            f"settings {text[:9]}",
            {KEY: text},
            {},
            FILE,
            f"is not (a )?JSON|no object under '{KEY}'|'q' twice",
        )
        for text in ("", "q", "[]", "null", '"q"', "3", NESTED, '{"q": 1, "q": 2}')
    ),
    *(
        (f"settings of q {text}", settings(text), {}, FILE, "has an invalid setting for `q`")
        for text in (
            "[]",
            "3",
            "null",
            "{}",
            '{"kind": "lora"}',
            '{"kind": "full", "rank": 2}',
            '{"kind": "other"}',
            '{"kind": []}',
        )
    ),
    *(
        (
            f"{key} {text[:9]}",
            settings(**{key: text}),
            {},
            FILE,
            "has an invalid setting for `q`",
        )
        for key, texts in {
            "rank": '0 -1 true 2.0 null [2] "2"',
            "alpha": 'true NaN Infinity -Infinity 1e999 "4" [] ' + "9" * 400,
            "scaling": 'null 1 "other" [] {}',
            "in_axes": 'null 0 {} [0.0] [true] [null] "0" [[0]]',
            "out_axes": "null 1 [1.0] [false]",
            "shared_axes": 'null 0 ["0"]',
            "more": "1",
        }.items()
        for text in texts.split(" ")
    ),
    *(
        (f"{key} {text}", settings(**{key: text}), {}, MISMATCH, message)
        for key, text, message in (
            ("in_axes", "[]", "`q`.*exactly one role"),
            ("in_axes", "[2]", "`q`.*in_axes"),
            ("in_axes", "[0, 0]", "`q`.*names an axis twice"),
            ("in_axes", "[0, 1]", "`q`.*exactly one role"),
            ("in_axes", f"[{10**30}]", "`q`.*in_axes"),
            ("out_axes", "[0]", "`q`.*exactly one role"),
            ("shared_axes", "[0]", "`q`.*exactly one role"),
            ("rank", "3", r"`q/[ab]` of shape .*3"),
            ("rank", str(2**20), "`q/[ab]` of shape"),
            ("rank", str(2**62), "`q/[ab]` of shape|rank"),
            ("rank", str(10**30), "`q/[ab]` of shape|rank"),
        )
    ),
    ("missing tensor", {}, {"q/a": None}, FILE, "lacks the tensor `q/a` of its header"),
    ("missing array", {}, {"norm": None}, FILE, "lacks the tensor `norm` of its header"),
    ("more tensors", {}, {"v": floats(5, 3)}, FILE, "a tensor `v` that is not in its header"),
    (
        "full parameter and factors",
        {},
        {"q": floats(5, 3)},
        FILE,
        "a tensor `q` that is not in its header",
    ),
    (
        "one tensor of two",
        {KEY: json.dumps({"q": LORA, "q/a": {"kind": "full"}, "norm": {"kind": "full"}})},
        {},
        FILE,
        "two uses for `q/a`",
    ),
    ("other shape", {}, {"q/a": floats(6, 2)}, MISMATCH, r"`q/a` of shape \(6, 2\), but \(5, 2\)"),
    ("transposed", {}, {"q/a": floats(2, 5)}, MISMATCH, r"`q/a` of shape \(2, 5\), but \(5, 2\)"),
    ("no numbers", {}, {"q/a": floats(0)}, MISMATCH, r"`q/a` of shape \(0,\)"),
    ("other shape in full", {}, {"norm": floats(1, 5)}, MISMATCH, r"`norm` of shape \(1, 5\)"),
    ("NaN", {}, {"norm": floats(5) * np.nan}, AdapterError, "`norm` holds NaN or infinity"),
    ("infinity", {}, {"q/b": floats(2, 3) * np.inf}, AdapterError, "`q/b` holds NaN or infinity"),
    (
        "NaN in 8 bits",
        {},
        {"norm": np.full(5, np.nan, jnp.float8_e4m3fn)},
        AdapterError,
        "holds NaN",
    ),
    (
        "double precision",
        {},
        {"norm": np.ones(5)},
        MISMATCH,
        "`norm` in float64, which JAX would convert",
    ),
    ("long integers", {}, {"norm": np.ones(5, np.int64)}, MISMATCH, "`norm` in int64, which JAX"),
    ("base is not JSON", {"lorax.base": "q"}, {}, FILE, "is not (a )?JSON"),
    ("base is a list", {"lorax.base": "[]"}, {}, FILE, "no object under 'lorax.base'"),
    ("base of nothing", {"lorax.base": "{}"}, {}, MISMATCH, "belongs to another base"),
    (
        "base of numbers",
        {"lorax.base": '{"shapes": 1, "dtypes": []}'},
        {},
        MISMATCH,
        "another base",
    ),
    ("base of other content", {"lorax.base": '{"content": "0"}'}, {}, MISMATCH, "another base"),
    ("base deep", {"lorax.base": NESTED}, {}, FILE, "is not (a )?JSON"),
    *(
        (
            f"adapts {path}",
            {KEY: json.dumps({path: LORA, "norm": {"kind": "full"}})},
            {"q/a": None, "q/b": None, f"{path}/a": floats(5, 2), f"{path}/b": floats(2, 3)},
            MISMATCH,
            f"adapts `{path}`, which",
        )
        for path in ("absent", "not an array", "", "q/a", "../q")
    ),
    (
        "trains an absent array",
        {KEY: '{"w": {"kind": "full"}}'},
        {"q/a": None, "q/b": None, "norm": None, "w": floats(1)},
        MISMATCH,
        "trains `w` in full, which is not in the parameters",
    ),
    (
        "trains a non-array",
        {KEY: '{"not an array": {"kind": "full"}}'},
        {"q/a": None, "q/b": None, "norm": None, "not an array": floats(1)},
        MISMATCH,
        "which is NoneType",
    ),
    (
        "factors of a vector",
        {KEY: json.dumps({"q": LORA, "norm": LORA})},
        {"norm": None, "norm/a": floats(5, 2), "norm/b": floats(2, 1)},
        MISMATCH,
        "`norm`",
    ),
)


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), NATIVE)
def test_mismatched_native_file_raises(place, changes, tensors, error, message):
    place.write_native(changes, tensors)
    assert_refused(place, "native", error, message)
