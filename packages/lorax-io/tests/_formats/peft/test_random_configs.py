"""Random configs and settings are read, or rejected with one error type."""

import json

import pytest
from hypothesis import given, strategies as st
from random_files import NAMES, VALUES, examples, load_or_refuse, make_params, make_tunable

from lorax_io import (
    AdapterError,
    load_peft,
    save_peft,
)

KEYS = (
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules target_parameters"
    " exclude_modules layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out"
    " lora_dropout task_type base_model_name_or_path revision init_lora_weights use_dora lora_bias"
    " inference_mode auto_mapping runtime_config another"
)


SOUND = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["norm"],
}


CONFIGS = st.dictionaries(st.sampled_from(KEYS.split()), VALUES, max_size=3)


@given(changes=CONFIGS, sound=st.sampled_from((SOUND, {})) | st.just(SOUND))
@examples(250)
def test_random_config_is_read_or_rejected(home, changes, sound):
    folder = home / "configs"
    if not folder.exists():
        save_peft(folder, make_tunable(), NAMES)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b'"lorax"', b'"other"'))
    (folder / "adapter_config.json").write_text(json.dumps(sound | changes))
    load_or_refuse(lambda: load_peft(folder, make_params(), NAMES)[1], make_tunable())


@given(value=VALUES)
@examples(60)
def test_random_invalid_configs_raise(home, value):
    folder = home / "values"
    if not folder.exists():
        save_peft(folder, make_tunable(), NAMES)
    (folder / "adapter_config.json").write_text(json.dumps(value))
    with pytest.raises(AdapterError):
        load_peft(folder, make_params(), NAMES)
