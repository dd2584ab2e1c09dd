"""The programs that the benchmarks compare have the same losses and gradients."""

import functools
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bank_steps  # noqa: E402
import library_models  # noqa: E402
import models  # noqa: E402
from adapted import adapt  # noqa: E402
from layer_ops import PLAIN, FlatLoraOps, FusedLoraOps, LoraOps  # noqa: E402
from steps import objective  # noqa: E402
from workloads import ADAPTERS, WORKLOADS  # noqa: E402

SMALL = functools.partial(models.blocks, 2, 8, 12, heads=2, batch=3, time=5)
MODELS = {
    "blocks": SMALL,
    "scanned": lambda: SMALL(scan=True, remat=True),
    "MLP": lambda: models.mlp((5, 7, 11, 3), batch=2),
    "convnet": lambda: models.convnet(2, 6, 4, 3),
    "tied": lambda: models.tied(13, 8, 12, 2, 5),
    "experts": lambda: models.experts(3, 11, 4, 6, 10),
    "Linen": lambda: library_models.linen_attention(2, 8, 2, 3, 5),
    "FlaxGPT2": lambda: library_models.flax_gpt2(
        2, 5, n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=7
    ),
}
CASES = list(itertools.product(MODELS, (LoraOps, FlatLoraOps)))


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4 * float(abs(np.asarray(y)).max()))


@pytest.mark.filterwarnings("ignore:TensorFlow and JAX classes are deprecated")
@pytest.mark.parametrize(
    ("name", "ops"), [*CASES, ("blocks", FusedLoraOps), ("scanned", FusedLoraOps)]
)
def test_ours_equals_the_hand_written_model(name, ops):
    model = MODELS[name]()
    adapted = adapt(model, 2)
    gradient = lambda fn: jax.jit(jax.value_and_grad(lambda *args: objective(fn(*args))))  # noqa: E731
    ours = gradient(adapted.apply)(adapted.tunable, adapted.frozen, model.batch)
    hand_written = gradient(model.with_ops(ops()))(adapted.factors, model.params, model.batch)
    assert_close(ours, hand_written)


def test_decoding_one_token_gives_equal_outputs():
    model = models.decoding(2, 8, 12, heads=2, past=4)
    programs = WORKLOADS["one token"].programs(model, adapt(model, 2))
    outputs = {name: program.fn(*program.calls[0]) for name, program in programs.items()}
    for name in ("ours", "hand-written, flat", "merged"):
        assert_close(outputs[name], outputs["hand-written"])
    assert abs(outputs["base"][0] - outputs["hand-written"][0]).max() > 1e-3


def test_decoding_the_last_token_equals_the_full_forward_pass():
    model = SMALL(batch=1)
    x = model.batch
    full_output = model.apply(model.params, x)
    cache, keys_and_values = [], []
    h = x
    for p in model.params:
        h, (k, v) = models.block(PLAIN, 2, dict.fromkeys(p), p, h)
        cache.append((k[:, :-1], v[:, :-1]))
        keys_and_values.append((k[:, -1], v[:, -1]))
    decoding = models.decoding(2, 8, 12, heads=2, past=4)
    output = decoding.apply(model.params, {"x": x[:, -1:], "cache": cache})
    assert_close(output, (full_output[:, -1:], keys_and_values))


def test_adapters_in_one_call_equal_one_call_each():
    model = SMALL(batch=1)
    programs = WORKLOADS["8 adapters"].programs(model, adapt(model, 2))
    at_once, _ = programs["ours"].fn(*programs["ours"].calls[0])
    in_turn = [programs["ours, in turn"].fn(*call)[0] for call in programs["ours, in turn"].calls]
    assert at_once.shape == (ADAPTERS,)
    assert len(set(map(float, in_turn))) == ADAPTERS
    assert_close(at_once, np.array(in_turn))


@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": True}], ids=["GPT", "scanned"])
def test_adapters_trained_in_a_bank_equal_adapters_trained_alone(options):
    with jax.enable_x64(True):
        model = models.blocks(2, 64, 96, heads=2, batch=1, time=5, **options)
        assert bank_steps.difference(bank_steps.to_double(model), slots=5) < 1e-6
