"""Modified headers of `save_peft`."""

import json

import numpy as np
import pytest
import safetensors.numpy
from untrusted import CONFIG, LAYER, NAMES, NESTED, TENSORS, assert_refused, make_tunable, rows

from lorax_io import (
    AdapterFileError,
    open_adapter,
    save_peft,
)

OURS = rows(
    ("not JSON", "scales", "not (a )?JSON"),
    ("array", "[]", "no settings under 'lorax'"),
    ("nothing", "{}", "no settings"),
    ("settings are a list", '{"unsaid": []}', "no settings"),
    ("settings of a number", '{"unsaid": {"q": 4}}', "no settings"),
    ("alpha alone", '{"unsaid": {"q": {"alpha": 4}}}', "no settings"),
    *(
        (
            f"alpha {a}",
            f'{{"unsaid": {{"q": {{"alpha": {a}, "scaling": "rslora"}}}}}}',
            "no settings",
        )
        for a in ("true", "NaN", "Infinity", '"4"', "[]", "9" * 400)
    ),
    ("scaling", '{"unsaid": {"q": {"alpha": 4, "scaling": "other"}}}', "no settings"),
    ("scaling of a list", '{"unsaid": {"q": {"alpha": 4, "scaling": []}}}', "no settings"),
    ("other scales", '{"unsaid": {}, "scales": "0"}', "does not belong to these"),
    ("no scales", '{"unsaid": {}}', "does not belong to these"),
    ("scales of a list", '{"unsaid": {}, "scales": []}', "does not belong to"),
    ("deep", NESTED, "not (a )?JSON"),
)


@pytest.mark.parametrize(("text", "message"), OURS)
def test_header_not_written_by_save_peft_raises(place, text, message):
    place.write(CONFIG, TENSORS, {"format": "pt", "lorax": text})
    assert_refused(place, "peft", AdapterFileError, message)


def test_header_and_config_agree_on_the_scale(place):
    save_peft(place.folder, make_tunable() | {"norm": None}, NAMES)
    tensors = safetensors.numpy.load_file(place.weights)
    with safetensors.safe_open(place.weights, "numpy") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["lorax"])
    settings["unsaid"] = {f"{LAYER}.q_proj": {"alpha": 5, "scaling": "standard"}}
    safetensors.numpy.save_file(tensors, place.weights, metadata | {"lorax": json.dumps(settings)})
    assert_refused(place, "peft", AdapterFileError, "disagree on the scale of `.*q_proj`")


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_magnitude_keys_with_the_adapter_name_are_read(files, end):
    module, magnitude = "model.layers.0.self_attn.q_proj", files.draw(6)
    tensors = files.pair(module, 6, 5)
    if "default" in end:
        tensors = {k.replace(".weight", ".default.weight"): x for k, x in tensors.items()}
    tensors[f"{module}.lora_magnitude_vector{end}"] = magnitude
    files.peft(tensors, target_modules=["q_proj"], use_dora=True)
    [row] = open_adapter("adapter").rows.values()
    np.testing.assert_array_equal(row.magnitude, magnitude)
