"""Known defects: each reported defect still exists, and the patch fixes it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers

import lorax_hf


def findings(kind, **changes):
    config = tiny.config_of(kind)
    config.update(changes)
    return [finding.problem for finding in lorax_hf.doctor(config)]


def test_model_without_defects_has_no_findings():
    assert findings("bert") == []


def test_t5_needs_the_patch():
    kind = "t5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.8 accepts it with a warning
        try:
            tiny.make("FlaxT5Model")
        except TypeError as error:
            assert "a_max" in str(error) and "jnp.clip" in findings(kind)[0]
        else:
            assert findings(kind) == []
    clip = jnp.clip
    with lorax_hf.clip_mended():
        assert findings(kind) == []
        tiny.make("FlaxT5Model")
        np.testing.assert_array_equal(jnp.clip(jnp.arange(5), a_min=1, a_max=3), [1, 1, 2, 3, 3])
        np.testing.assert_array_equal(jnp.clip(jnp.arange(5), 1, max=3), [1, 1, 2, 3, 3])
    assert jnp.clip is clip


def test_patch_is_undone_on_error():
    clip = jnp.clip
    with pytest.raises(ValueError, match="mine"), lorax_hf.clip_mended():
        raise ValueError("mine")
    assert jnp.clip is clip


def test_llama_ignores_the_rotary_base():
    assert any("rotary base" in finding for finding in findings("llama", rope_theta=5e4))
    assert findings("llama") == []
    ids = jnp.arange(6)[None]
    outputs = []
    for theta in (1e4, 1e2):
        config = tiny.config_of("llama")
        config.rope_theta = theta
        outputs.append(transformers.FlaxLlamaModel(config)(ids)[0])
    np.testing.assert_array_equal(*outputs)


def test_tied_llama_has_a_random_head():
    assert any("head random" in finding for finding in findings("llama", tie_word_embeddings=True))
    config = tiny.config_of("llama")
    config.tie_word_embeddings = True
    assert "lm_head" in transformers.FlaxLlamaForCausalLM(config).params


def test_basic_resnets_have_separate_names():
    assert any("basic" in finding for finding in findings("resnet", layer_type="basic"))
    config = tiny.config_of("resnet")
    config.layer_type = "basic"
    params = transformers.FlaxResNetModel(config).params
    layers = params["params"]["encoder"]["stages"]["0"]["layers"]["0"]["layer"]
    assert "layer_0" in layers
    names = lorax_hf.peft_names(transformers.FlaxResNetModel(config))
    path = "params/encoder/stages/0/layers/0/layer/layer_0/convolution/kernel"
    assert names[path]["module"] == "encoder.stages.0.layers.0.layer.0.convolution"


def test_electra_token_types_default_to_ones():
    assert any("token_type_ids" in finding for finding in findings("electra"))
    model = transformers.FlaxElectraModel(tiny.config_of("electra"))
    ids = jnp.arange(6)[None]
    ones, zeros = (model(ids, token_type_ids=jnp.full_like(ids, k))[0] for k in (1, 0))
    np.testing.assert_array_equal(model(ids)[0], ones)
    assert not np.allclose(ones, zeros)


def test_all_known_defects_are_returned_without_a_model():
    models = {kind for finding in lorax_hf.doctor() for kind in finding.models}
    assert models - {"t5", "mt5", "longt5"} == {"llama", "resnet", "electra"}
    assert all(finding.remedy for finding in lorax_hf.doctor())


def test_spec_warns_about_defects_of_the_model():
    with pytest.warns(lorax_hf.DefectWarning, match="token_type_ids.*transformers 4.*pass"):
        lorax_hf.spec(tiny.config_of("electra"))
    assert jax.tree.leaves(lorax_hf.spec(tiny.config_of("bert")))


def test_old_name_of_the_problem_warns():
    finding = lorax_hf.Finding((), "a problem", "a remedy")
    with pytest.warns(DeprecationWarning, match="Finding.what is now called `problem`"):
        assert finding.what == "a problem"
