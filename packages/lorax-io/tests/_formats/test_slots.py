"""PEFT tensors that are missing, unknown, or of the wrong shape or dtype."""

import jax.numpy as jnp
import numpy as np
import pytest
from untrusted import (
    CONFIG,
    FILE,
    MISMATCH,
    MORE,
    NAMES,
    TENSORS,
    Q,
    V,
    assert_refused,
    floats,
    make_params,
    rows,
    without_none,
)

from lorax_io import (
    AdapterError,
    load_adapter,
    load_peft,
    read_metadata,
)


def test_unmodified_fixture_loads(place):
    place.write_native()
    assert read_metadata(place.native) == {"task": "x"}
    assert load_adapter(place.native, params=make_params())["q"].rank == 2
    tunable = load_peft(place.folder, make_params(), NAMES)[1]
    assert tunable["q"].scale == tunable["v"].scale == 2


A, B, NORM = "lora_A.weight", "lora_B.weight", "base_model.model.model.norm.weight"


def moved(*pairs):
    """The tensors under other names."""
    return {name: value for old, new in pairs for name, value in ((old, None), (new, TENSORS[old]))}


def with_value(value, name=Q + A, dtype="float32"):
    array = TENSORS[name].astype(jnp.dtype(dtype))
    array.flat[-1] = value
    return {name: array}


def typed(dtype, *names):
    return {name: TENSORS[name].astype(dtype) for name in names or TENSORS}


ADAPTERS = rows(
    ("b missing", {}, {Q + B: None}, FILE, "lacks `.*q_proj.lora_B.weight`, but has"),
    ("a missing", {}, {V + A: None}, FILE, "lacks `.*v_proj.lora_A.weight`, but has"),
    ("target missing", {}, {V + A: None, V + B: None}, FILE, "lacks the factors of `.*v_proj`"),
    ("no tensor", {}, dict.fromkeys(TENSORS), FILE, "has no tensors: .*ZeRO-3"),
    ("no target", {"target_modules": ["q_proj"]}, {}, FILE, "`.*v_proj`, which is not a target"),
    ("no target at all", {"target_modules": []}, {}, FILE, "which is not a target"),
    ("other case", {"target_modules": ["Q_PROJ", "v_proj"]}, {}, FILE, "which is not a target"),
    ("excluded", {"exclude_modules": ["v_proj"]}, {}, FILE, "`.*v_proj`, which is not a target"),
    ("other layers", {"layers_to_transform": [1]}, {}, FILE, "which is not a target"),
    (
        "unknown module",
        {},
        moved((V + A, V.replace("v_", "k_") + A)),
        MISMATCH,
        "`.*k_proj`, which is not in `names`. Did you mean",
    ),
    (
        "unknown tensor",
        {},
        {"base_model.model.other": floats(2)},
        MISMATCH,
        "is not a factor and does not fit",
    ),
    ("no prefix", {}, {Q[17:] + A: TENSORS[Q + A]}, FILE, "begins with `base_model.model.`"),
    (
        "half a prefix",
        {},
        moved((Q + A, Q.replace("base_model.model.", "base_model.") + A)),
        MISMATCH,
        "which is not in `names`. Did you mean",
    ),
    (
        "prefix twice",
        {},
        moved((Q + A, "base_model.model." + Q + A)),
        MISMATCH,
        "which is not in `names`",
    ),
    ("empty name", {}, {"": floats(2)}, FILE, "begins with"),
    ("prefix alone", {}, {"base_model.model.": floats(2)}, MISMATCH, "is not a factor"),
    ("no .weight", {}, moved((Q + A, Q + "lora_A")), MORE, "that is AdaLoRA"),
    ("no such key", {}, moved((Q + A, Q + "lora_C")), MISMATCH, "is not a factor"),
    ("long name", {}, {"base_model.model." + "x" * 10**6: floats(2)}, MISMATCH, "is not a factor"),
    (
        "long module",
        {},
        {"base_model.model." + "x" * 10**6 + "." + A: floats(2)},
        MISMATCH,
        "which is not in `names`",
    ),
    ("long name without prefix", {}, {"x" * 10**6: floats(2)}, FILE, "begins with"),
    (
        "two adapters",
        {},
        {Q + "lora_A.a.weight": floats(2, 5), Q + "lora_A.b.weight": floats(2, 5)},
        FILE,
        "two adapters in one file",
    ),
    (
        "named and unnamed",
        {},
        {Q + "lora_A.default.weight": floats(2, 5)},
        FILE,
        "two adapters in one file",
    ),
    (
        "an adapter for each module",
        {},
        moved(
            *(
                (m + f"lora_{x}.weight", m + f"lora_{x}.{name}.weight")
                for m, name in ((Q, "a"), (V, "b"))
                for x in "AB"
            )
        ),
        FILE,
        "two adapters in one file",
    ),
    (
        "A for B",
        {},
        {Q + A: TENSORS[Q + B], Q + B: TENSORS[Q + A]},
        MISMATCH,
        r"of shape \(3, 2\); the parameter takes \(2, 5\)",
    ),
    (
        "transposed",
        {},
        {Q + A: floats(5, 2)},
        MISMATCH,
        r"of shape \(5, 2\); the parameter takes \(2, 5\)",
    ),
    ("other width", {}, {Q + A: floats(2, 6)}, MISMATCH, r"takes \(2, 5\) at the rank 2"),
    ("other height", {}, {Q + B: floats(4, 2)}, MISMATCH, r"takes \(3, 2\)"),
    ("one axis", {}, {Q + A: floats(10)}, MISMATCH, r"of shape \(10,\)"),
    ("no axis", {}, {Q + A: floats()}, MISMATCH, r"of shape \(\)"),
    ("three axes", {}, {Q + A: floats(2, 5, 1)}, MISMATCH, r"of shape \(2, 5, 1\)"),
    ("no numbers", {}, {Q + A: floats(0, 5), Q + B: floats(3, 0)}, FILE, "without numbers"),
    ("no numbers at all", {}, {name: floats(0) for name in TENSORS}, FILE, "without numbers.*ZeRO"),
    ("other rank", {"r": 4}, {}, MISMATCH, r"takes \(4, 5\) at the rank 4 of its config"),
    ("enormous rank", {"r": 2**20}, {}, MISMATCH, "at the rank 1048576"),
    ("rank by pattern", {"rank_pattern": {"v_proj": 1}}, {}, MISMATCH, "at the rank 1 "),
    ("ranks differ", {}, {Q + A: floats(1, 5)}, MISMATCH, "at the rank 2"),
    ("NaN", {}, with_value(np.nan), AdapterError, "`q/a` holds NaN or infinity"),
    ("infinity", {}, with_value(-np.inf, V + B), AdapterError, "`v/b` holds NaN or infinity"),
    ("NaN in bfloat16", {}, with_value(np.nan, dtype="bfloat16"), AdapterError, "holds NaN"),
    ("infinity in float16", {}, with_value(np.inf, dtype="float16"), AdapterError, "holds NaN"),
    ("int32", {}, typed(np.int32), FILE, "in int32, not float16, bfloat16, float32, float64"),
    ("int8", {}, typed(np.int8, Q + A), FILE, "in int8, not"),
    ("bool", {}, typed(bool, Q + B), FILE, "in bool, not"),
    ("complex", {}, typed(np.complex64, Q + B), FILE, "in complex64, not"),
    ("8-bit floats", {}, typed(jnp.float8_e4m3fn), FILE, "in float8_e4m3fn, not"),
    ("other 8-bit floats", {}, typed(jnp.float8_e5m2, Q + A), FILE, "in float8_e5m2, not"),
    (
        "double precision",
        {},
        typed(np.float64, Q + A),
        MISMATCH,
        "in float64, which JAX would convert",
    ),
    ("base weight", {}, {NORM: floats(5)}, FILE, "would replace a base weight"),
    (
        "base weight of an adapted module",
        {},
        {Q + "weight": floats(3, 5)},
        FILE,
        "would replace a base",
    ),
    (
        "wrapped base weight with factors",
        {},
        {Q + "base_layer.weight": floats(3, 5)},
        FILE,
        "would replace a base",
    ),
    (
        "base weight in its wrapper",
        {},
        {"base_model.model.model.norm.base_layer.weight": floats(5)},
        MISMATCH,
        "is not a factor",
    ),
    (
        "base weight to save, nearly",
        {"modules_to_save": ["nor"]},
        {NORM: floats(5)},
        FILE,
        "would replace a base",
    ),
    (
        "base weight to save, nearly so",
        {"modules_to_save": ["a.norm"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    (
        "base weight to save, begin only",
        {"modules_to_save": ["mode"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    (
        "base weight to save, as a tensor",
        {"modules_to_save": ["norm.weight"]},
        {NORM: floats(5)},
        FILE,
        "would replace",
    ),
    (
        "base bias, not in the config",
        {},
        {V + "bias": floats(3)},
        FILE,
        "would replace a base weight",
    ),
    (
        "base bias, of lora_only",
        {"bias": "lora_only"},
        {V + "bias": floats(3)},
        FILE,
        "would replace",
    ),
    (
        "wrapped bias, not in the config",
        {},
        {V + "base_layer.bias": floats(3)},
        FILE,
        "would replace a base",
    ),
    (
        "weight among biases",
        {"bias": "all"},
        {NORM: floats(5)},
        FILE,
        "would replace a base weight",
    ),
    (
        "copies of weights among biases",
        {"bias": "all"},
        {"base_model.model.a.modules_to_save.weight": floats(5)},
        MISMATCH,
        "is not a factor",
    ),
    ("saved module missing", {"modules_to_save": ["norm"]}, {}, FILE, "lacks `model.norm.weight`"),
    (
        "saved and adapted",
        {"modules_to_save": ["q_proj"]},
        {},
        FILE,
        "`.*q_proj`, but the file lacks",
    ),
    (
        "saved module of other shape",
        {"modules_to_save": ["norm"]},
        {NORM: floats(6)},
        MISMATCH,
        r"takes \(5,\)",
    ),
    (
        "saved module of other type",
        {"modules_to_save": ["norm"]},
        {NORM: np.ones(5, np.int32)},
        FILE,
        "in int32",
    ),
    (
        "NaN in a saved module",
        {"modules_to_save": ["norm"]},
        {NORM: floats(5) * np.inf},
        AdapterError,
        "`norm` holds NaN",
    ),
    ("every module saved", {"modules_to_save": [""]}, {}, FILE, "but the file lacks"),
    ("DoRA", {}, {Q + "lora_magnitude_vector": floats(3)}, MORE, "DoRA, with a magnitude"),
    ("DoRA without magnitudes", {"use_dora": True}, {}, FILE, "lacks `.*lora_magnitude_vector`"),
    (
        "DoRA of one of two modules",
        {"use_dora": True},
        {Q + "lora_magnitude_vector": floats(3)},
        FILE,
        "lacks `.*v_proj.lora_magnitude_vector`",
    ),
    *(
        (
            f"DoRA with magnitudes of {shape}",
            {"use_dora": True},
            {module + "lora_magnitude_vector": floats(*shape) for module in (Q, V)},
            MISMATCH,
            r"lora_magnitude_vector` of shape .*; the parameter takes \(3,\)",
        )
        for shape in ((5,), (3, 1), (1, 3), ())
    ),
    (
        "DoRA with NaN",
        {"use_dora": True},
        {module + "lora_magnitude_vector": floats(3) * np.nan for module in (Q, V)},
        AdapterError,
        "`q/magnitude` holds NaN|lora_magnitude_vector` holds NaN",
    ),
    ("DoRA with a name", {}, {Q + "lora_magnitude_vector.default.weight": floats(3)}, MORE, "DoRA"),
    ("bias of B", {}, {Q + "lora_B.bias": floats(3)}, MORE, "`lora_bias` of its config"),
    (
        "bias of B with a name",
        {},
        {Q + "lora_B.default.bias": floats(3)},
        MORE,
        "`lora_bias` of its",
    ),
    (
        "rows of tokens",
        {},
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": floats(1, 5)},
        MORE,
        "trainable tokens",
    ),
    ("AdaLoRA", {}, {Q + "lora_E": floats(2, 1)}, MORE, "AdaLoRA"),
    ("KaSA", {}, {Q + "lora_diag": floats(2)}, MORE, "KaSA"),
    ("LoHa", {}, {Q + "hada_w1_a": floats(3, 2)}, MORE, "LoHa"),
    ("LoKr", {}, {Q + "lokr_w1": floats(3, 2)}, MORE, "LoKr"),
    ("OFT", {}, {Q + "oft_R.weight": floats(3, 2)}, MORE, "OFT"),
    ("IA3", {}, {Q + "ia3_l": floats(3, 1)}, MORE, "IA³"),
    ("VeRA", {}, {Q + "vera_lambda_b": floats(3)}, MORE, "VeRA"),
    (
        "factors of an embedding for a linear layer",
        {},
        moved((Q + A, Q + "lora_embedding_A"), (Q + B, Q + "lora_embedding_B")),
        MISMATCH,
        "which is not in `names`",
    ),
    (
        "factors of a linear layer for an embedding",
        {},
        {"base_model.model.model.embed_tokens." + A: floats(2, 7)},
        MISMATCH,
        "which is not in `names`",
    ),
)


EMBEDDING = "base_model.model.model.embed_tokens."


def embedding(shape):
    """The tensors that PEFT writes for an adapted embedding, which include the embedding itself."""
    factors = {"lora_embedding_A": floats(2, 7), "lora_embedding_B": floats(5, 2)}
    return {EMBEDDING + k: v for k, v in {**factors, "base_layer.weight": floats(*shape)}.items()}


def test_copy_of_an_embedding_is_ignored(place):
    place.write(CONFIG | {"target_modules": ["embed_tokens"]}, embedding((7, 5)))
    assert load_peft(place.folder, make_params(), NAMES)[1]["embed"].rank == 2


def test_copy_of_an_embedding_with_more_tokens_raises(place):
    place.write(CONFIG | {"target_modules": ["embed_tokens"]}, embedding((9, 5)))
    assert_refused(place, "peft", MISMATCH, r"of shape \(9, 5\), where the base has \(7, 5\)")


@pytest.mark.parametrize(("changes", "tensors", "error", "message"), ADAPTERS)
def test_mismatched_adapter_raises(place, changes, tensors, error, message):
    place.write(CONFIG | changes, without_none(TENSORS | tensors))
    assert_refused(place, "peft", error, message)
