"""Models of transformers, adapted as a user would, compiled without a device."""

import jax
import jax.numpy as jnp
import pytest
import transformers
from jax.sharding import PartitionSpec as P

import lorax
import lorax_hf
from compiling import compiled, on_mesh, shapes_of
from programs import OPTIMIZER, step_of, weight_sizes

GPT2 = transformers.GPT2Config(n_layer=2, n_embd=320, n_head=4, vocab_size=1792, n_positions=64)
BERT = transformers.BertConfig(
    hidden_size=320, num_hidden_layers=2, num_attention_heads=4, intermediate_size=896,
    vocab_size=1792,
)  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=320, num_hidden_layers=2, num_attention_heads=4, intermediate_size=896,
    image_size=8, patch_size=8,
)  # fmt: skip
# As in test_core.py, the number of tokens is a power of two: an image of one patch has two tokens.
TOKENS, IMAGES = ((2, 32), jnp.int32), ((8, 3, 8, 8), jnp.float32)
MODELS = {
    "GPT-2": (transformers.FlaxGPT2LMHeadModel, GPT2, "input_ids", TOKENS),
    "BERT": (transformers.FlaxBertForMaskedLM, BERT, "input_ids", TOKENS),
    "ViT": (transformers.FlaxViTForImageClassification, VIT, "pixel_values", IMAGES),
}
EVERYWHERE = P(("data", "model"))


@pytest.mark.parametrize("name", MODELS)
def test_models_create_no_weight_sized_array(mesh, report, name):
    """Each device has all weights and a part of the batch."""
    cls, config, argument, ((first, *rest), dtype) = MODELS[name]
    model = cls(config, _do_init=False)
    params = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), model.input_shape))
    params = on_mesh(mesh, params, lambda _: P())
    batch = jax.ShapeDtypeStruct((mesh.size * first, *rest), dtype)
    batch = on_mesh(mesh, batch, lambda _: EVERYWHERE)

    spec = lorax_hf.spec(model, params, rank=8, targets="all-linear")
    init = lambda params: lorax.init_lora(params, spec, jax.random.key(0))  # noqa: E731
    frozen, tunable = shapes_of(mesh, init, params)
    adapted = lorax_hf.lora(model)

    def plain(params, batch):
        return model(**{argument: batch}, params=params).logits

    def ours(tunable, frozen, batch):
        return adapted(**{argument: batch}, params=(frozen, tunable)).logits

    def on_vectors(vectors, kernels, batch):
        return plain(
            jax.tree.map(first_not_none, vectors, kernels, is_leaf=lambda x: x is None), batch
        )

    # For comparison, the model without adapters trains everything but its kernels.
    vectors = jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else None, params)
    kernels = jax.tree.map(lambda leaf: leaf if leaf.ndim >= 2 else None, params)
    step, base = step_of(ours, loss), step_of(on_vectors, loss)
    programs = {
        "forward": ((ours, tunable, frozen, batch), (plain, params, batch)),
        "training step": (
            (step, tunable, shapes_of(mesh, OPTIMIZER.init, tunable), frozen, batch),
            (base, vectors, shapes_of(mesh, OPTIMIZER.init, vectors), kernels, batch),
        ),
    }
    for program, (adapted_form, plain_form) in programs.items():
        adapted_facts, plain_facts = compiled(*adapted_form), compiled(*plain_form)
        report(f"{name}: {program}", adapted_facts, plain_facts)
        for size in weight_sizes(tunable, frozen):
            assert adapted_facts.arrays[size] <= plain_facts.arrays[size], (
                f"{program}: {size} entries"
            )


def loss(logits, _):
    return jnp.mean(logits**2)


def first_not_none(vector, kernel):
    return kernel if vector is None else vector
