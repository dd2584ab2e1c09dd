"""A PyTorch module on a mesh: values of one device, and collectives of a hand-written model."""

import collections
import functools
import re

import jax
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

import lorax
import lorax_hf
import lorax_io
import torch_step
from lorax import testing

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
TARGETS = ["self_attn.q_proj", "self_attn.v_proj"]
# All sizes differ, except those that eight devices divide.
CONFIG = transformers.LlamaConfig(
    vocab_size=104,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)
HAND_WRITTEN = torch_step.hand_written.Config(2, 4, 2, 100_000.0, 1e-6)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    """A saved adapter with random factors."""
    fn, params = lorax_hf.from_torch(module)
    spec = lorax_hf.spec(fn, rank=2, targets=TARGETS)
    tunable = lorax.init_lora(params, spec, jax.random.key(0)).tunable
    tunable = testing.random_factors(tunable, jax.random.key(1))
    path = tmp_path_factory.mktemp("adapter")
    lorax_io.save_peft(path, tunable, lorax_hf.peft_names(fn), task_type="CAUSAL_LM")
    return path


def unsharded(name, shape):
    """Places every parameter on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def fully_sharded(name, shape):
    """Shards every weight along its outputs, which are the second axis in a stack."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    stack = [None] * (":" in name)
    axes = [*stack, "data"] if len(shape) == 2 + len(stack) else []
    return NamedSharding(mesh, PartitionSpec(*axes))


def gradient(logits, pair, sharding):
    """The collectives of the compiled gradient, and its values."""
    apply = lorax.lora(logits, on_materialize="error", on_unused="error")
    ids = jax.random.randint(jax.random.key(3), (16, 6), 0, 104)
    ids = jax.device_put(ids, sharding("ids", ids.shape))

    def loss(tunable, frozen, ids):
        return torch_step.next_token_loss(apply((frozen, tunable), ids), ids)

    frozen, tunable = pair
    compiled = jax.jit(jax.value_and_grad(loss)).lower(tunable, frozen, ids).compile()
    counts = collections.Counter(re.findall(rf" ({KINDS})(?:-start)?\(", compiled.as_text()))
    return counts, jax.device_get(compiled(tunable, frozen, ids))


def module_gradient(module, folder, sharding, **options):
    fn, params = lorax_hf.from_torch(module, sharding=sharding, **options)
    pair = lorax_io.load_peft(folder, params, lorax_hf.peft_names(fn))
    return gradient(lambda params, ids: fn(params, ids).logits, pair, sharding)


def difference(actual, expected):
    """The largest difference of two trees, relative to the largest entry of each array."""
    errors = jax.tree.map(lambda x, y: abs(x - y).max() / abs(y).max(), actual, expected)
    return max(jax.tree.leaves(errors))


OPTIONS = {"unrolled": {}, "scanned": {"scan_layers": True}}


@pytest.fixture(scope="module")
def on_eight(module, folder):
    """The collectives and values of the module's gradient on eight devices, by its options."""
    return functools.cache(
        lambda form: module_gradient(module, folder, fully_sharded, **OPTIONS[form])
    )


@pytest.mark.parametrize("form", OPTIONS)
def test_eight_devices_compute_the_gradient_of_one(module, folder, on_eight, form):
    counts, actual = on_eight(form)
    none, expected = module_gradient(module, folder, unsharded, **OPTIONS[form])
    assert counts["all-gather"] > 0 and not none
    assert difference(actual, expected) < 1e-5


def test_collectives_are_those_of_a_hand_written_model(module, folder, on_eight):
    params = lorax_hf.from_torch(module, sharding=fully_sharded)[1]
    tree = torch_step.as_hand_written(params)
    pair = lorax_io.load_peft(folder, tree, lorax_io.flax_names(tree))
    logits = functools.partial(torch_step.hand_logits, config=HAND_WRITTEN)
    assert on_eight("unrolled")[0] == gradient(logits, pair, fully_sharded)[0]


def test_scan_has_no_more_collectives_than_a_hand_written_scan(module, folder, on_eight):
    """Not equal, since XLA chooses the layout of a loop itself."""
    fn, params = lorax_hf.from_torch(module, sharding=fully_sharded, scan_layers=True)
    pair = lorax_io.load_peft(folder, params, lorax_hf.peft_names(fn))
    counts, actual = on_eight("scanned")
    hand_counts, expected = gradient(hand_written_scan, pair, fully_sharded)
    assert 0 < counts.total() <= hand_counts.total()
    assert difference(actual, expected) < 1e-5


def hand_written_scan(params, ids):
    """The logits of the example's Llama, with a scan over the same stacked layers."""
    table, stack = params["model.embed_tokens.weight"], "model.layers.0:2."
    layers = {name.removeprefix(stack): x for name, x in params.items() if name.startswith(stack)}

    def body(x, arrays):
        return torch_step.hand_written.layer(
            torch_step.as_hand_written(arrays), x, HAND_WRITTEN
        ), None

    x, _ = jax.lax.scan(body, table[ids], layers)
    x = torch_step.hand_written.rms_norm(x, params["model.norm.weight"], HAND_WRITTEN.norm_eps)
    return x @ table.T
