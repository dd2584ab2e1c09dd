"""Every Flax class of transformers: its spec equals a traced one, and its adapter is correct."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lorax
import lorax_hf
from lorax import testing

jax.config.update("jax_disable_most_optimizations", True)

CLASSES = tiny.classes()


def outputs(model):
    """The model as a function of its parameters that returns only array outputs."""

    def run(params, inputs):
        with lorax_hf.clip_mended():
            output = model(**inputs, params=params, return_dict=True)
        return {k: v for k, v in output.items() if k != "past_key_values" and hasattr(v, "shape")}

    return run


def make(name, **options):
    with lorax_hf.clip_mended(), warnings.catch_warnings():
        warnings.simplefilter("ignore", lorax_hf.DefectWarning)
        return tiny.make(name, **options)


def spec_of(model, *args, **kwargs):
    with warnings.catch_warnings(), lorax_hf.clip_mended():
        warnings.simplefilter("ignore", lorax_hf.DefectWarning)
        warnings.simplefilter("ignore", lorax.UnadaptedWarning)
        return lorax_hf.spec(model, *args, **kwargs)


@pytest.mark.parametrize("name", CLASSES)
def test_axes_equal_those_of_a_trace(name):
    do_init = CLASSES[name] in lorax_hf.COMPOSITES  # does not support `_do_init=False`
    model = make(name, _do_init=do_init)
    params = model.params if do_init else model.params_shape_tree
    inputs = tiny.inputs_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorax.UnadaptedWarning)  # a classifier with one class
        traced = lorax.infer_spec(outputs(model), params, inputs, rank=2, skip_small=False)
    spec = spec_of(model, params, rank=2, targets=lambda module: True)
    traced_leaves = jax.tree_util.tree_leaves_with_path(traced, is_leaf=is_spec)
    named_module = jax.tree.leaves(spec, is_leaf=is_spec)
    assert sum(map(is_spec, named_module)) >= 6
    for (path, traced_leaf), leaf in zip(traced_leaves, named_module, strict=True):
        if path[-1].key == "weight_v":
            # Weight normalization is a parametrization in PyTorch, which PEFT does not adapt.
            assert is_spec(traced_leaf) and not is_spec(leaf), path
            continue
        # A table with one row, such as a class token, does not take part in a product.
        if is_spec(traced_leaf) and traced_leaf.rank == 2:
            assert is_spec(leaf), path
            assert (leaf.in_axes, leaf.out_axes) == (traced_leaf.in_axes, traced_leaf.out_axes), (
                path
            )
            assert traced_leaf.shared_axes == (), path


def is_spec(leaf):
    return isinstance(leaf, lorax.LoraSpec)


def test_every_model_type_has_a_preset():
    kinds = {
        kind.removesuffix("_text_model").removesuffix("_vision_model") for kind in CLASSES.values()
    }
    assert kinds - lorax_hf.PRESETS.keys() == lorax_hf.COMPOSITES.keys()
    from transformers.models.auto.modeling_flax_auto import FLAX_MODEL_MAPPING_NAMES

    named = set(FLAX_MODEL_MAPPING_NAMES)
    assert named <= lorax_hf.PRESETS.keys() | lorax_hf.COMPOSITES.keys()


# One class of each architecture. The others only add one or two dense layers.
ONE = {kind: name for name, kind in CLASSES.items()}


WITH_A_POOLER_FOR_NOTHING = ("encoder-decoder", "vision-encoder-decoder")


@pytest.mark.parametrize("kind", ONE)
def test_adapters_equal_merged_models(kind):
    with jax.enable_x64(True):
        # In float64, so that the tolerance can be small. Some models compute parts in float32
        # anyway.
        model = make(ONE[kind], dtype=jnp.float64)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.params)
        targets = "default" if kind in ("resnet", "regnet") else "all-linear"
        # The decoder uses the outputs of the encoder's layers, not of its pooler.
        unused = ["encoder.pooler.dense"] if kind in WITH_A_POOLER_FOR_NOTHING else None
        spec = spec_of(model, params, rank=2, alpha=3, targets=targets, exclude=unused)
        run, inputs = outputs(model), tiny.inputs_of(model)
        testing.check(run, params, spec, inputs, tolerance=1e-7, transforms=False)
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
        adapted = jax.jit(lorax.lora(run, on_materialize="error", on_unused="error"))
        actual, plain = adapted((frozen, tunable), inputs), jax.jit(run)(params, inputs)
        for name in plain:
            np.testing.assert_array_equal(actual[name], plain[name])
