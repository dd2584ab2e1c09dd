"""Saved merged models of every kind of adapter."""

import numpy as np
import pytest
import safetensors.numpy
from kinds_of_adapters import KINDS, NAMES, make_pair

from lorax import (
    merge_params,
)
from lorax_io import (
    save_merged,
)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_equals_merge_params(tmp_path, kind):
    pair = make_pair(kind)
    save_merged(tmp_path / "merged", pair, NAMES)
    tensors = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    merged = merge_params(pair)
    np.testing.assert_array_equal(tensors["q.weight"], merged["kernel"].T)
    for k in range(2):
        flat = merged["stack"][k].reshape(8, 12).T
        np.testing.assert_array_equal(tensors[f"layers.{k}.v.weight"], flat)
