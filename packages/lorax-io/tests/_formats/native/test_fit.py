"""Untrusted native files of all kinds, and files for other parameters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from untrusted import (
    FILE,
    KEY,
    LORA,
    MISMATCH,
    NESTED,
    assert_refused,
    floats,
    make_params,
    rows,
    without,
)

from lorax_io import (
    AdapterError,
    AdapterFileError,
    load_adapter,
    load_pair,
    load_peft,
    open_adapter,
    save_adapter,
)

DORA = {"kind": "dora", "detached": True, "delta": LORA}


IA3 = {
    "kind": "ia3",
    "side": "out",
    "gain_axes": None,
    "in_axes": [0],
    "out_axes": [1],
    "shared_axes": [],
}


MAGNITUDE = {"q/magnitude": floats(3)}


GAIN = {"q/a": None, "q/b": None, "q/gain": floats(3)}


def kinds(q, frozen_factors=None, format="2"):
    """The header of a file in which `q` has these settings and these frozen factors."""
    text = json.dumps({"q": q, "norm": {"kind": "full"}})
    more = {}
    if frozen_factors is not None:
        is_text = type(frozen_factors) is str
        more = {"lorax.held": frozen_factors if is_text else json.dumps(frozen_factors)}
    return {"lorax.format": format, KEY: text} | more


def deep(depth):
    spec = LORA
    for _ in range(depth):
        spec = {"kind": "dora", "detached": True, "delta": spec}
    return spec


NO_SETTING = "has an invalid setting for `q`"


SQUARE = MAGNITUDE | {"q/square": floats(3)}


OTHER_KINDS = rows(
    *(
        (f"dora with {name} {value}", kinds(DORA | {name: value}), MAGNITUDE, FILE, NO_SETTING)
        for name, value in (
            ("detached", 1),
            ("detached", None),
            ("detached", "yes"),
            ("delta", None),
            ("delta", {}),
            ("delta", [LORA]),
            ("delta", LORA | {"rank": 0}),
            ("delta", LORA | {"a": LORA}),
            ("magnitude", LORA),
            ("in_axes", [0]),
        )
    ),
    ("dora without an adapter", kinds(without(DORA, "delta")), MAGNITUDE, FILE, NO_SETTING),
    (
        "dora of a gain",
        kinds(DORA | {"delta": IA3}),
        GAIN | MAGNITUDE,
        MISMATCH,
        "multiplies the weight",
    ),
    *(
        (
            f"dora of dora {depth}",
            kinds(deep(depth)),
            MAGNITUDE,
            AdapterError,
            "`q`|is not (a )?JSON",
        )
        for depth in (2, 100, 200, 300, 450, 600, 900)
    ),
    ("lora of lora", kinds(LORA | {"a": LORA}), {}, FILE, NO_SETTING),
    *(
        (f"ia3 with {name} {value}", kinds(IA3 | {name: value}), GAIN, FILE, NO_SETTING)
        for name, value in (
            ("side", "left"),
            ("side", None),
            ("side", ["out"]),
            ("gain_axes", 1),
            ("gain_axes", ["1"]),
            ("gain_axes", [True]),
            ("gain_axes", [[1]]),
            ("gain", [1]),
            ("rank", 2),
        )
    ),
    ("ia3 over other axes", kinds(IA3 | {"gain_axes": [9]}), GAIN, MISMATCH, "`q/gain` of shape"),
    ("ia3 on the other side", kinds(IA3 | {"side": "in"}), GAIN, MISMATCH, r"but \(5,\) would fit"),
    (
        "ia3 with factors",
        kinds(IA3),
        {"q/gain": floats(3)},
        FILE,
        "a tensor `q/[ab]` that is not in its head",
    ),
    ("dora without magnitude", kinds(DORA), {}, FILE, "lacks the tensor `q/magnitude`"),
    (
        "short magnitude",
        kinds(DORA),
        {"q/magnitude": floats(2)},
        MISMATCH,
        "`q/magnitude` of shape",
    ),
    ("frozen factors are not JSON", kinds(DORA, "q"), MAGNITUDE, FILE, "is not (a )?JSON"),
    (
        "frozen factors are a list",
        kinds(DORA, "[]"),
        MAGNITUDE,
        FILE,
        "no object under 'lorax.held'",
    ),
    ("frozen factors are nested", kinds(DORA, NESTED), MAGNITUDE, FILE, "is not (a )?JSON"),
    *(
        (
            f"frozen factors {value}",
            kinds(DORA, value),
            MAGNITUDE,
            FILE,
            "no frozen factors of `(q|w|norm)`",
        )
        for value in (
            {"q": "square"},
            {"q": [1]},
            {"q": None},
            {"q": [["square"]]},
            {"w": ["square"]},
            {"norm": ["square"]},
        )
    ),
    ("frozen without tensor", kinds(DORA, {"q": ["square"]}), MAGNITUDE, FILE, "lacks the tensor"),
    (
        "frozen but not in the header",
        kinds(DORA),
        SQUARE,
        FILE,
        "a tensor `q/square` that is not in its head",
    ),
    ("frozen twice", kinds(DORA, {"q": ["square"] * 2}), SQUARE, FILE, "two uses for `q/square`"),
    ("frozen and trained", kinds(DORA, {"q": ["a"]}), MAGNITUDE, FILE, "two uses for `q/a`"),
    (
        "frozen factor of another kind",
        kinds(LORA, {"q": ["square"]}),
        {"q/square": floats(3)},
        FILE,
        "frozen factor `q/square`, which a lora adapter does not have",
    ),
    (
        "frozen factor of another shape",
        kinds(DORA, {"q": ["square"]}),
        MAGNITUDE | {"q/square": floats(5)},
        MISMATCH,
        r"`q/square` of shape \(5,\), but \(3,\)",
    ),
    (
        "frozen factor in double precision",
        kinds(DORA, {"q": ["square"]}),
        MAGNITUDE | {"q/square": np.ones(3)},
        MISMATCH,
        "`q/square` in float64",
    ),
)


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), OTHER_KINDS)
def test_mismatched_native_file_of_each_kind_raises(place, changes, tensors, error, message):
    place.write_native(changes, tensors)
    for load in (load_adapter, load_pair):
        with pytest.raises(AdapterError, match=message) as raised:
            load(place.native, params=make_params())
        assert isinstance(raised.value, error)
        assert str(raised.value).startswith(str(place.native))
        assert len(str(raised.value)) < 2000
    with pytest.raises(AdapterError):
        fit_to_itself(place.native)


def fit_to_itself(path):
    """Opens a file without a base, like the command line, then with a mismatched base."""
    open_adapter(path)
    load_pair(path, {"q": jnp.ones((2, 2)), "norm": jnp.ones(5)})


def test_frozen_factor_with_nan_raises(place):
    place.write_native(kinds(DORA, {"q": ["square"]}), MAGNITUDE | {"q/square": floats(3) * np.nan})
    with pytest.raises(AdapterError, match="`q/square` holds NaN"):
        load_pair(place.native, make_params())


def test_unmodified_fixtures_of_other_kinds_load(place):
    place.write_native(kinds(DORA, {"q": ["square"]}), SQUARE)
    assert load_pair(place.native, make_params()).tunable["q"].kind == "dora"
    place.write_native(kinds(IA3), GAIN)
    assert load_pair(place.native, make_params()).tunable["q"].kind == "ia3"


def test_peft_folder_is_not_a_native_file(place):
    place.native = place.weights
    assert_refused(place, "native", AdapterFileError, "not a native adapter; `load_peft` reads")
    assert_refused(place, "metadata", AdapterFileError, "not a native adapter; `load_peft` reads")


def test_parameters_with_equal_paths_raise(place):
    """Files identify parameters only by their paths."""
    save_adapter(place.native, {"w": {"v": floats(2)}})
    params = {"w": {"v": floats(2)}, "w/v": floats(3)}
    with pytest.raises(AdapterError, match="two parameters are both called `w/v`"):
        load_adapter(place.native, params=params)
    with pytest.raises(AdapterError, match="two parameters are both called `w/v`"):
        load_peft(place.folder, params, {})


def test_invalid_bool_bytes_raise(place):
    save_adapter(place.native, {"w": jnp.ones(4, bool)})
    data = place.native.read_bytes()
    place.native.write_bytes(data[:-1] + b"\x02")
    with pytest.raises(AdapterFileError, match="`w` has a boolean .* neither true nor false"):
        load_adapter(place.native, params={"w": jnp.ones(4, bool)})
