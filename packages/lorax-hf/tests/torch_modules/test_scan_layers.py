"""`scan_layers` equals the unrolled module, with one program for all equal layers."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
from torch import nn

import lorax
import lorax_hf
from lorax import testing
from lorax_hf._torch._equal import difference
from lorax_hf._torch._layers import Run, members_of

IDS = jnp.asarray(tiny_torch.IDS)
TURNS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "sliding_window": 3,
    "use_sliding_window": True,
}
KINDS = {"llama": {}, "gpt2": {"n_layer": 3}, "mixtral": {}, "qwen3": TURNS, "gpt_oss": TURNS}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_torch.causal(kind, **changes) for kind, changes in KINDS.items()}


STACKS = {"gpt2": {"transformer.h.0:3"}, "qwen3": {"model.layers.0:4:2", "model.layers.1:4:2"}}


@pytest.mark.parametrize("kind", STACKS)
def test_values_and_gradients_equal_the_unrolled_module(kind, models):
    fn, params = lorax_hf.from_torch(models[kind])
    scan, stacks = lorax_hf.from_torch(models[kind], scan_layers=True)
    assert {".".join(name.split(".")[:3]) for name in stacks if ":" in name} == STACKS[kind]

    def loss(fn):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(fn(p, IDS).logits))))

    (value, gradient), (expected, unrolled) = loss(scan)(stacks), loss(fn)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, parts in scan.members.items():
        expected = unrolled[name] if parts == (name,) else jnp.stack([unrolled[p] for p in parts])
        largest = jnp.abs(expected).max()
        np.testing.assert_allclose(gradient[name], expected, atol=2e-5 * largest, err_msg=name)


def test_stacks_are_adapted_and_not_materialized(models):
    model = models["mixtral"]
    fn, params = lorax_hf.from_torch(model, scan_layers=True)
    spec = lorax_hf.spec(fn, rank=2, targets="experts")
    assert spec == lorax_hf.spec(model, params, rank=2, targets="experts")
    assert sum(isinstance(leaf, lorax.LoraSpec) for leaf in spec.values()) == 2
    testing.check(lambda p, x: fn(p, x).logits, params, spec, IDS, transforms=False)


def test_number_of_equations_does_not_grow():
    counts = []
    for layers in (3, 6):
        fn, params = lorax_hf.from_torch(
            tiny_torch.causal("llama", num_hidden_layers=layers), scan_layers=True
        )
        counts.append(len(jax.make_jaxpr(lambda p, fn=fn: fn(p, IDS).logits)(params).eqns))
    assert counts[0] == counts[1]


def test_inputs_of_spec_are_traced_with_the_scan(models):
    fn, params = lorax_hf.from_torch(models["mixtral"], scan_layers=True)
    spec = lorax_hf.spec(fn, rank=2, targets=["mlp.gate"], inputs=(IDS,))
    assert spec["model.layers.0:2.mlp.gate.weight"] == lorax.LoraSpec(
        2, None, "standard", (2,), (1,), (0,)
    )


def test_peft_names_are_those_of_single_layers(models):
    fn, _ = lorax_hf.from_torch(models["gpt_oss"], scan_layers=True)
    names = lorax_hf.peft_names(fn)
    assert names["model.layers.1:4:2.mlp.experts.down_proj"] == {
        "type": "Experts",
        "module": "model.layers.{}.mlp.experts",
        "parameter": "down_proj",
        "order": 2,
        "in_axes": [2],
        "out_axes": [3],
        "shared_axes": [0, 1],
        "numbers": [1, 3],
    }
    assert names["model.layers.0:4:2.self_attn.q_proj.bias"]["shared_axes"] == [0]
    assert names["lm_head.weight"]["module"] == "lm_head"


def test_layers_are_targeted_together(models):
    fn, _ = lorax_hf.from_torch(models["gpt_oss"], scan_layers=True)
    spec = lorax_hf.spec(fn, targets=["q_proj"], layers=[1, 3])
    chosen = [name for name, leaf in spec.items() if leaf != lorax.LORA_FREEZE]
    assert chosen == ["model.layers.1:4:2.self_attn.q_proj.weight"]
    with pytest.raises(lorax.SpecError, match=r"layers=\[1\].*one parameter for the layers \[1, 3"):
        lorax_hf.spec(fn, targets=["q_proj"], layers=1)
    with pytest.raises(lorax.SpecError, match=r"no layer 7.*\[0, 1, 2, 3\]"):
        lorax_hf.spec(fn, targets=["q_proj"], layers=7)


def test_dropout_differs_between_layers():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(torch.ones_like(x)) + 0 * self.inner(x)

    fn, params = lorax_hf.from_torch(
        nn.Sequential(*(Noise() for _ in range(4))), train=True, scan_layers=True
    )
    x = jnp.zeros((50, 3))
    run = jax.jit(lambda k: fn(params, x, rng=jax.random.key(k)))
    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()
    # With the same draw in every layer, all values would be 0 or 8.
    assert set(np.unique(run(0))) == {0, 2, 4, 6, 8}
    with pytest.raises(TypeError, match="rng="):
        fn(params, x)


class Layer(nn.Module):
    def __init__(self, number, width=4, **more):
        super().__init__()
        self.layer_idx = number
        self.product = nn.Linear(width, width)
        self.register_buffer("scale", torch.full((), 1.0 + number))
        vars(self).update(more)

    def forward(self, x, mask=None, cache=None):
        if cache is not None:
            cache[self.layer_idx] = x
        x = torch.tanh(self.product(x)) * self.scale + x
        return x if mask is None else x * mask


class Tower(nn.Module):
    """Layers, and a function that runs them."""

    def __init__(self, layers, run):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, x):
        return self.run(self.layers, x)


def in_turn(layers, x, **more):
    for layer in layers:
        x = layer(x, **more)
    return x


def twice(layers, x):
    return in_turn(layers, in_turn(layers, x), mask=torch.ones_like(x) / 2)


X = jnp.sin(jnp.arange(8.0)).reshape(2, 4)


@pytest.mark.parametrize("run", [in_turn, twice])
def test_buffers_and_repeated_runs_equal_the_unrolled_module(run):
    tower = tiny_torch.randomized(Tower([Layer(k) for k in range(5)], run))
    fn, params = lorax_hf.from_torch(tower, scan_layers=["layers"])
    assert fn.buffers["layers.0:5.scale"].shape == (5,)
    with torch.no_grad():
        expected = tower(torch.from_numpy(np.array(X))).numpy()
    for _ in range(2):
        np.testing.assert_allclose(fn(params, X), expected, rtol=2e-6)


def test_runs_of_layers():
    a, b = (lambda k: Layer(k, kind="a")), (lambda k: Layer(k, kind="b"))
    cases = {
        "aaaa": ["0:4"],
        "abab": ["0:4:2", "1:4:2"],
        "baaa": ["1:4"],
        "aabaab": ["0:6:3", "1:6:3", "2:6:3"],
        "aabb": ["0:2", "2:4"],
        "aaba": ["0:2"],
    }
    for kinds, expected in cases.items():
        layers = [{"a": a, "b": b}[kind](k) for k, kind in enumerate(kinds)]
        tower = tiny_torch.randomized(Tower(layers, in_turn))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fn, params = lorax_hf.from_torch(tower, scan_layers=True)
        stacks = sorted({name.split(".")[1] for name in params if ":" in name})
        assert stacks == expected, kinds
        left = [name for name in params if re.match(r"layers\.\d+\.", name)]
        assert bool(left) == bool(caught)
        with torch.no_grad():
            output = tower(torch.from_numpy(np.array(X))).numpy()
        np.testing.assert_allclose(fn(params, X), output, rtol=2e-6)


def test_unscanned_layers_warn():
    tower = Tower([Layer(0, kind="first"), *(Layer(k, kind="x") for k in (1, 2))], in_turn)
    with pytest.warns(UserWarning, match=r"layers 0 of `layers` are not.*`kind` is 'x', not 'firs"):
        lorax_hf.from_torch(tower, scan_layers=True)


def times(factor):
    return lambda x: x * factor


def hooked(factor):
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, args, y: y * factor)
    return layer


DIFFERENT = {
    "class": (nn.Linear(3, 3), nn.Bilinear(3, 3, 3), "it is a Bilinear, not a Linear"),
    "shape": (nn.Linear(3, 3), nn.Linear(3, 4), r"`weight` has the shape \(4, 3\), not \(3, 3\)"),
    "bias": (nn.Linear(3, 3), nn.Linear(3, 3, bias=False), "`bias` is a NoneType, not a Parameter"),
    "attribute": (nn.LayerNorm(3), nn.LayerNorm(3, eps=2.0), "`eps` is 2.0, not 1e-05"),
    "inner": (
        nn.Sequential(nn.Conv1d(2, 2, 1)),
        nn.Sequential(nn.Conv1d(2, 2, 1, groups=2)),
        r"`0.weight` has the shape \(2, 1, 1\)",
    ),
    "function": (Layer(0, f=torch.sin), Layer(1, f=torch.cos), "`f` is <built-in"),
    "closure": (
        Layer(0, f=times("a")),
        Layer(1, f=times("b")),
        "`f.closure.0` is 'b', not 'a'",
    ),
    "index": (Layer(0), Layer(2), "`layer_idx` is 2, not 0"),
    "number in a list": (Layer(0, f=[5]), Layer(1, f=[6]), "`f.0` is 6, not 5"),
    "tensor in a list": (
        Layer(0, f=[torch.zeros(2)]),
        Layer(1, f=[torch.ones(2)]),
        "`f.0` has other values",
    ),
    "module in a list": (
        Layer(0, f=[nn.Linear(2, 2)]),
        Layer(1, f=[nn.Linear(2, 2)]),
        "`f.0.weight` has other values",
    ),
    "hook": (hooked(2.0), hooked(3.0), "`Linear` has other hooks"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_between_layers_are_reported(case):
    one, other, message = DIFFERENT[case]
    assert re.match(message, difference(one, other, 1) or ""), difference(one, other, 1)
    assert difference(one, one, 0) is None


def beyond(layers, x):
    return in_turn(layers, x) + layers[0](x)


def changed(layers, x):
    for layer in layers:
        x = layer(x) * 2
    return x


def collected(layers, x):
    inputs = []
    for layer in layers:
        x = layer(x)
        inputs.append(x)
    return inputs


def masks(layers, x):
    for k, layer in enumerate(layers):
        x = layer(x, mask=x * 0 + k) if k == 0 else layer(x, mask=torch.ones(4) * k)
    return x


def started(layers, x):
    layers[0](x)
    return x


def restarted(layers, x):
    for layer in layers:
        layer(x)
    return x


def backwards(layers, x):
    return in_turn(list(layers)[::-1], x)


USED = "the outputs of single layers are used"
WRONG = {
    "order": (backwards, "layer 2 of `layers` is called before layer 0"),
    "side by side": (lambda layers, x: sum(each(x) for each in layers), USED),
    "some": (lambda layers, x: in_turn(list(layers)[:2], x), USED),
    "beyond": (beyond, USED),
    "changed": (changed, USED),
    "collected": (collected, USED),
    "masks": (masks, "layer 1 of `layers` is called with other `mask` than layer 0"),
    "start": (started, "layer 1 of `layers` is not called, and those before it are"),
    "other": (restarted, "layer 1 of `layers` does not take what the layer before it returns"),
    "index": (lambda layers, x: in_turn(layers, x, cache={}), "a layer uses its index, `layer_idx"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unscannable_layers_raise_when_called(case):
    run, message = WRONG[case]
    fn, params = lorax_hf.from_torch(Tower([Layer(k) for k in range(3)], run), scan_layers=True)
    with pytest.raises(ValueError, match=message):
        fn(params, X)


def test_caches_and_hidden_states_raise(models):
    fn, params = lorax_hf.from_torch(models["llama"], scan_layers=True)
    with pytest.raises(ValueError, match=r"uses its index, `self_attn.layer_idx`.*a cache"):
        fn(params, IDS, use_cache=True)
    with pytest.raises(ValueError, match="`output_hidden_states`, but scanned layers"):
        fn(params, IDS, output_hidden_states=True)
    fn(params, IDS)


def test_modules_without_equal_layers_raise():
    cases = [
        (nn.Linear(3, 3), True, "Linear has no equal layers.*It has no list of layers"),
        (Tower([Layer(0), Layer(1, 5)], in_turn), True, "Layer 1 of `layers` differs from layer 0"),
        (Tower([Layer(0)] * 2, in_turn), ["layers"], "no equal layers.*is tied"),
        (Tower([Layer(0), Layer(1)], in_turn), ["blocks"], "no list of layers called 'blocks'.*It"),
    ]
    for module, scan_layers, message in cases:
        with pytest.raises(ValueError, match=message):
            lorax_hf.from_torch(module, scan_layers=scan_layers)


def test_load_torch_into_stacks(models, tmp_path):
    for kind in ("mixtral", "gpt_oss"):
        models[kind].save_pretrained(tmp_path / kind)
        expected = lorax_hf.from_torch(models[kind], scan_layers=True)[1]
        mesh = jax.make_mesh((1,), ("x",))
        placed = jax.sharding.NamedSharding(mesh, jax.P())
        for sharding in (None, placed):
            fn, params = lorax_hf.load_torch(
                tmp_path / kind, scan_layers=True, sharding=sharding, dtype=jnp.float32
            )
            assert params.keys() == expected.keys()
            for name in params:
                np.testing.assert_array_equal(params[name], expected[name], err_msg=name)
                assert sharding is None or params[name].sharding == sharding
            assert fn.members.keys() == expected.keys()


def test_generate_accepts_stacks():
    model = tiny_torch.randomized_causal("qwen3")
    fn, params = lorax_hf.from_torch(model)
    scan, stacks = lorax_hf.from_torch(model, scan_layers=True)
    expected = lorax_hf.generate(fn, params, IDS, max_new_tokens=4)
    np.testing.assert_array_equal(lorax_hf.generate(scan, stacks, IDS, max_new_tokens=4), expected)
    spec = lorax_hf.spec(scan, rank=2, targets="all-linear")
    frozen, tunable = lorax.init_lora(stacks, spec, jax.random.key(0))
    pair = frozen, testing.random_factors(tunable, jax.random.key(1))
    adapted = lorax_hf.lora(scan, on_materialize="error")
    tokens = adapted.generate(IDS, params=pair, max_new_tokens=4)
    merged = lorax.merge_params(*pair)
    np.testing.assert_array_equal(tokens, lorax_hf.generate(scan, merged, IDS, max_new_tokens=4))


def test_names_of_stack_members():
    runs = [Run("a.b", 1, 2, 2), Run("c", 0, 1, 3)]
    names = ["x", *(f"a.b.{k}.w" for k in range(6)), *(f"c.{k}.v.w" for k in range(3)), "cc.0.w"]
    assert members_of(names, runs) == {
        "x": ("x",),
        "a.b.0.w": ("a.b.0.w",),
        "a.b.1:5:2.w": ("a.b.1.w", "a.b.3.w"),
        "a.b.2:5:2.w": ("a.b.2.w", "a.b.4.w"),
        "a.b.5.w": ("a.b.5.w",),
        "c.0:3.v.w": ("c.0.v.w", "c.1.v.w", "c.2.v.w"),
        "cc.0.w": ("cc.0.w",),
    }
