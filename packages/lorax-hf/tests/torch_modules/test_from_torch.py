"""`from_torch`: values and gradients of modules equal PyTorch's, and module state is restored."""

import collections
import dataclasses
import gc
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
import transformers
from torch import nn

import lorax
import lorax_hf
from lorax import testing

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)


def both(module, *arrays, **options):
    """The outputs of a module in PyTorch and, compiled, in JAX."""
    fn, params = lorax_hf.from_torch(module, **options)
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, arrays))
    return expected, jax.jit(fn)(params, *map(jnp.asarray, arrays))


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected.numpy(), rtol=tolerance, atol=tolerance)


class Own(nn.Module):
    """A custom module with a tied weight, a list of constants, and tensors created in `forward`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.BatchNorm1d(7))
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.second.weight = self.first.weight
        self.plain = torch.full((7,), 0.25)
        self.listed = [torch.arange(7.0)]
        self.calls = 0

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        self.last = self.inner(x)
        made = torch.arange(7) / 7
        return self.second(self.first(self.last)) * scale + self.plain + self.listed[0] * made


MODULES = {
    "linear": lambda: nn.Linear(6, 5),
    "own": Own,
    "normalized": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 5, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 11, batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_values_equal_torch(name):
    module = tiny_torch.randomized(MODULES[name]())
    expected, output = both(module, X)
    assert_close(output, expected)


@pytest.mark.parametrize("kind", tiny_torch.CAUSAL)
def test_transformers_models_equal_torch(kind):
    model = tiny_torch.causal(kind)
    fn, params = lorax_hf.from_torch(model)
    with torch.no_grad():
        expected = model(torch.from_numpy(tiny_torch.IDS), use_cache=False).logits
    output = jax.jit(fn)(params, input_ids=jnp.asarray(tiny_torch.IDS))
    assert type(output).__name__ == type(model(torch.from_numpy(tiny_torch.IDS))).__name__
    assert list(output) == ["logits"]
    assert_close(output.logits, expected)


def test_gradients_equal_torch():
    model = tiny_torch.causal("qwen3")
    fn, params = lorax_hf.from_torch(model)
    ids = tiny_torch.IDS
    weights = np.sin(np.arange(2 * 7 * 199)).reshape(2, 7, 199).astype(np.float32)
    gradient = jax.grad(lambda p: (fn(p, jnp.asarray(ids)).logits * weights).sum())(params)
    (model(torch.from_numpy(ids)).logits * torch.from_numpy(weights)).sum().backward()
    assert gradient.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert_close(gradient[name] / scale.item(), parameter.grad / scale, 1e-4)


def test_tied_parameters_are_one_array_and_one_adapter():
    model = tiny_torch.causal("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fn, params = lorax_hf.from_torch(model)
    assert "model.embed_tokens.weight" in params and "lm_head.weight" not in params
    assert len(params) == len(list(model.parameters()))
    assert lorax_hf.peft_names(model)["model.embed_tokens.weight"]["tied"] is True
    spec = lorax_hf.spec(model, rank=3, targets="embeddings")
    run = lambda p, ids: fn(p, ids).logits  # noqa: E731
    testing.check(run, params, spec, jnp.asarray(tiny_torch.IDS), transforms=False)
    untied = tiny_torch.causal("qwen3", tie_word_embeddings=False)
    assert "tied" not in lorax_hf.peft_names(untied)["model.embed_tokens.weight"]


def test_buffers_are_constants():
    module = tiny_torch.randomized(Own())
    fn, params = lorax_hf.from_torch(module)
    assert fn.buffers.keys() == {
        *(f"inner.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        "plain",
    }
    assert not fn.buffers.keys() & params.keys()
    assert fn.buffers["plain"].dtype == np.float32


def test_module_state_is_restored():
    module = tiny_torch.randomized(Own())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fn, params = lorax_hf.from_torch(module)
    attributes = set(vars(fn.module))
    for _ in range(2):
        jax.jit(fn)(params, jnp.asarray(X))
    assert set(vars(fn.module)) == attributes and fn.module.calls == 0
    assert module.calls == 0 and not hasattr(module, "last")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    with jax.checking_leaks():
        jax.jit(fn)(params, jnp.asarray(X) + 1)


def test_module_is_restored_after_an_error():
    class Fails(nn.Linear):
        def forward(self, x):
            self.last_output = super().forward(x)
            raise ValueError("mine")

    fn, params = lorax_hf.from_torch(Fails(6, 5))
    with pytest.raises(ValueError, match="mine") as caught:
        fn(params, jnp.asarray(X))
    assert not hasattr(fn.module, "last_output") and isinstance(fn.module.weight, nn.Parameter)
    assert any("the module (Fails)" in note for note in caught.value.__notes__)


def test_module_can_be_changed_and_deleted():
    module = nn.Linear(6, 5)
    fn, params = lorax_hf.from_torch(module)
    output = fn(params, jnp.asarray(X))
    with torch.no_grad():
        module.weight.zero_()
    np.testing.assert_array_equal(fn(params, jnp.asarray(X)), output)
    weight = weakref.ref(module.weight)
    del module
    gc.collect()
    assert weight() is None
    assert all(parameter.device.type == "meta" for parameter in fn.module.parameters())


def test_dropout_uses_the_key():
    fn, params = lorax_hf.from_torch(nn.Dropout(0.25), train=True)
    x = jnp.ones((40, 50))
    one, same, other = (fn(params, x, rng=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_allclose(np.unique(one), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float((one == 0).mean()) - 0.25) < 0.05
    compiled = jax.jit(fn)(params, x, rng=jax.random.key(0))
    np.testing.assert_array_equal(compiled, one)
    with pytest.raises(TypeError, match="Dropout draws random numbers.*rng="):
        fn(params, x)
    still, _ = lorax_hf.from_torch(nn.Dropout(0.25).train())
    np.testing.assert_array_equal(still({}, x), x)


def test_dropout_of_a_model_is_adapted():
    model = tiny_torch.causal("gpt2", resid_pdrop=0.5, attn_pdrop=0.0, embd_pdrop=0.0)
    fn, params = lorax_hf.from_torch(model, train=True)
    spec = lorax_hf.spec(model, rank=2)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    ids = jnp.asarray(tiny_torch.IDS)
    adapted = jax.jit(lorax.lora(fn, on_materialize="error", on_unused="error"))
    ones = [adapted((frozen, tunable), ids, rng=jax.random.key(k)).logits for k in (0, 0, 1)]
    np.testing.assert_array_equal(ones[0], ones[1])
    assert float(jnp.abs(ones[0] - ones[2]).max()) > 0.01
    expected = fn(params, ids, rng=jax.random.key(0)).logits
    np.testing.assert_allclose(ones[0], expected, atol=1e-5)


def test_dropout_of_attention():
    fn, params = lorax_hf.from_torch(Attends(dropout_p=0.5), train=True)
    x = jnp.sin(jnp.arange(24.0)).reshape(1, 4, 6)
    drawn = jax.vmap(lambda key: fn(params, x, rng=key))(jax.random.split(jax.random.key(0), 4000))
    plain, _ = lorax_hf.from_torch(Attends())
    assert float(jnp.std(drawn, axis=0).min()) > 0.01
    np.testing.assert_allclose(drawn.mean(0), plain(params, x), atol=0.08)


def test_batch_statistics_in_training_warn():
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with pytest.warns(UserWarning, match="`1` normalizes by the statistics of the batch"):
        fn, params = lorax_hf.from_torch(module, train=True)
    output = jax.jit(fn)(params, jnp.asarray(X))
    assert_close(output, module.train()(torch.from_numpy(X)).detach(), 1e-4)


def test_layer_drop_in_python_is_disabled():
    class Drops(nn.Linear):
        layerdrop = 0.5

    with pytest.warns(UserWarning, match="layerdrop of Drops draws random numbers in Python"):
        fn, _ = lorax_hf.from_torch(Drops(6, 5), train=True)
    assert fn.module.layerdrop == 0 and Drops.layerdrop == 0.5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    model = tiny_torch.causal("llama")
    fn, params = lorax_hf.from_torch(model, dtype=dtype)
    assert {array.dtype for array in params.values()} == {jnp.dtype(dtype)}
    # Rotary tables are not in files, and stay in float32 as in PyTorch.
    assert fn.buffers["model.rotary_emb.inv_freq"].dtype == np.float32
    output = jax.jit(fn)(params, jnp.asarray(tiny_torch.IDS)).logits
    assert output.dtype == dtype
    name = {jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}[dtype]
    with torch.no_grad():
        expected = model.to(name)(torch.from_numpy(tiny_torch.IDS), use_cache=False).logits
    assert_close(output.astype(jnp.float32), expected.float(), 0.02)
    again, same = lorax_hf.from_torch(model)
    assert {array.dtype for array in same.values()} == {jnp.dtype(dtype)}
    for key in params:
        np.testing.assert_array_equal(same[key], params[key])


def test_shardings():
    mesh = jax.make_mesh((1,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    module = nn.Linear(6, 5)
    shardings = {
        "all": split,
        "dict": {"weight": split, "bias": split},
        "function": lambda name, shape: split if len(shape) == 2 else replicated,
    }
    for name, sharding in shardings.items():
        _, params = lorax_hf.from_torch(module, sharding=sharding)
        assert params["weight"].sharding == split
        assert params["bias"].sharding == (replicated if name == "function" else split)
    with pytest.raises(lorax.ArgumentError, match="no entry for the parameter `bias`"):
        lorax_hf.from_torch(module, sharding={"weight": split})


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    first: torch.Tensor
    count: int


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.make = make

    def forward(self, x):
        return self.make(x * self.weight)


RETURNS = {
    "tuple": lambda y: (y, None, 2),
    "list": lambda y: [y, [y]],
    "dict": lambda y: {"b": y, "a": {"c": y}},
    "namedtuple": lambda y: Point(y, y),
    "dataclass": lambda y: Record(y, 3),
    "ordered": lambda y: collections.OrderedDict(z=y, a=y),
}


@pytest.mark.parametrize("name", RETURNS)
def test_outputs_have_the_same_structure(name):
    fn, params = lorax_hf.from_torch(Returns(RETURNS[name]))
    output = jax.jit(fn)(params, jnp.asarray(X))
    expected = RETURNS[name](jnp.asarray(X))
    assert type(output) is type(expected)
    for one, other in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unsupported_output_raises():
    fn, params = lorax_hf.from_torch(Returns(lambda y: object()))
    with pytest.raises(TypeError, match="returns a object, which is neither an array"):
        fn(params, jnp.asarray(X))
    model, ids = tiny_torch.causal("llama"), jnp.asarray(tiny_torch.IDS)
    fn, params = lorax_hf.from_torch(model)
    with pytest.raises(TypeError, match="returns a DynamicCache.*use_cache=False"):
        fn(params, ids, use_cache=True)


def test_gradients_stop_where_torch_stops_them():
    def straight_through(y):
        return y + (torch.round(y) - y).detach()

    def without(y):
        with torch.no_grad():
            factor = y.square()
        return factor * y

    for make, slope in ((straight_through, 1.0), (without, None)):
        fn, params = lorax_hf.from_torch(Returns(make))
        gradient = jax.grad(lambda p, f=fn: f(p, jnp.asarray(X)).sum())(params)["weight"]
        expected = X.sum(0) if slope else (X**2 * X).sum(0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)


class Attends(nn.Module):
    """Attention with its own weights, called by a module."""

    def __init__(self, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 36).reshape(6, 6))
        self.options = options

    def forward(self, x, mask=None):
        q = (x @ self.weight).unflatten(-1, (2, 3)).transpose(1, 2)
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, q, q, mask, **self.options)


ATTENTION = {
    "plain": ({}, None),
    "causal": ({"is_causal": True}, None),
    "scale": ({"scale": 0.3}, None),
    "float mask": ({}, np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 1, 4, 4)),
    "bool mask": ({}, np.tril(np.ones((1, 1, 4, 4), bool))),
    "padded": ({}, np.tril(np.ones((4, 4), bool)) & (np.arange(4) >= 2)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    options, mask = ATTENTION[name]
    module = Attends(**options)
    x = np.sin(np.arange(24.0, dtype=np.float32)).reshape(1, 4, 6)
    arguments = [x] if mask is None else [x, mask]
    expected, output = both(module, *arguments)
    assert_close(output, expected)
    fn, params = lorax_hf.from_torch(module)
    weights = np.cos(np.arange(24, dtype=np.float32)).reshape(1, 2, 4, 3)
    gradient = jax.grad(lambda p: (fn(p, *map(jnp.asarray, arguments)) * weights).sum())(params)[
        "weight"
    ]
    (module(*map(torch.from_numpy, arguments)) * torch.from_numpy(weights)).sum().backward()
    assert_close(gradient, module.weight.grad, 1e-4)


class Named(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(input=x, weight=self.weight, bias=self.bias)


def test_product_with_keyword_arguments_is_factored():
    module = tiny_torch.randomized(Named(6, 5))
    expected, output = both(module, X)
    assert_close(output, expected)
    fn, params = lorax_hf.from_torch(module)
    spec = lorax_hf.spec(module, rank=2, targets=lambda name: True)
    testing.check(fn, params, spec, jnp.asarray(X), transforms=False)


def test_padding_has_no_gradient_and_its_table_stays_factored():
    module = nn.Embedding(11, 6, padding_idx=2)
    fn, params = lorax_hf.from_torch(module)
    ids = jnp.array([[1, 2, 2, 5], [7, 2, 1, 1]])
    gradient = jax.grad(lambda p: fn(p, ids).sum())(params)["weight"]
    module(torch.tensor(np.asarray(ids))).sum().backward()
    assert_close(gradient, module.weight.grad)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(gradient[2], gradient[1])
    spec = {"weight": lorax.LoraSpec(2, in_axes=(0,), out_axes=(1,))}
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    lorax.lora(fn, on_materialize="error")((frozen, tunable), ids)


def test_invalid_arguments_raise():
    fn, params = lorax_hf.from_torch(nn.Linear(6, 5))
    with pytest.raises(TypeError, match="takes JAX arrays, not tensors"):
        fn(params, torch.ones(4, 6))
    with pytest.raises(ValueError, match="of Linear lacks `bias`"):
        fn({"weight": params["weight"]}, jnp.asarray(X))
    with pytest.raises(ValueError, match="has `scale`, which the module does not have"):
        fn({**params, "scale": params["bias"]}, jnp.asarray(X))
    coded = {**params, "weight": lorax.quantize({"w": params["weight"]}, {"w": "int8"})["w"]}
    with pytest.raises(TypeError, match="`weight` is quantized.*`lorax.lora\\(fn\\)`"):
        fn(coded, jnp.asarray(X))
    with pytest.raises(TypeError, match="a dict of parameters by name.*not list"):
        fn(list(params.values()), jnp.asarray(X))
    with pytest.raises(ValueError, match="`weight` is on the meta device.*load_torch"):
        lorax_hf.from_torch(nn.Linear(6, 5, device="meta"))
    with pytest.raises(TypeError, match="`weight` of a lazy module"):
        lorax_hf.from_torch(nn.LazyLinear(5))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, not int"):
        lorax_hf.from_torch(3)


def test_branch_on_values_raises_with_explanation():
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    fn, params = lorax_hf.from_torch(nn.Sequential(Branches(6, 6)))
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        jax.jit(fn)(params, jnp.asarray(X))
    assert any("`0` (Branches) has Python control flow" in note for note in caught.value.__notes__)


def test_missing_operator_raises_and_can_be_added():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return torch.special.airy_ai(x.abs() + 1) * self.weight

    fn, params = lorax_hf.from_torch(nn.Sequential(nn.Identity(), Uses()))
    name = "special_airy_ai"
    message = rf"`aten::{name}`, which `1` \(Uses\) uses.*register_op\('aten.{name}'"
    with pytest.raises(lorax_hf.OperatorError, match=message):
        fn(params, jnp.asarray(X))
    lorax_hf.register_op(f"aten.{name}", lambda x: 2 * x)
    np.testing.assert_allclose(fn(params, jnp.asarray(X)), 2 * (abs(X) + 1), rtol=1e-6)


def test_quantized_modules_raise():
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    class Marked(nn.Linear):
        is_quantized = True

    with pytest.raises(lorax_hf.QuantizedModuleError, match="`1` holds.*bitsandbytes.*load_base"):
        lorax_hf.from_torch(nn.Sequential(nn.Linear(6, 5), Linear4bit(5, 4)))
    with pytest.raises(lorax_hf.QuantizedModuleError, match="the module holds.*Marked"):
        lorax_hf.from_torch(Marked(6, 5))
    dequantized = Marked(6, 5)
    dequantized.config = SimpleNamespace(
        quantization_config=transformers.GgufConfig(dequantize=True)
    )
    lorax_hf.from_torch(dequantized)
    with pytest.raises(lorax_hf.QuantizedModuleError, match="bitsandbytes"):
        lorax_hf.spec(Linear4bit(5, 4), targets="all-linear")


@pytest.mark.parametrize("package", ["gptqmodel.nn", "torch.ao.nn.quantized.dynamic", "hqq.core"])
def test_quantized_modules_of_other_packages_raise(package):
    kind = type("Packed", (nn.Linear,), {"__module__": package})
    with pytest.raises(lorax_hf.QuantizedModuleError, match=f"`0` holds.*{package}.Packed"):
        lorax_hf.from_torch(nn.Sequential(kind(6, 5)))


def test_import_patch_is_undone():
    from torch._ops import OpOverloadPacket

    lorax_hf.from_torch(nn.Linear(6, 5))
    with pytest.raises(AttributeError):
        torch.ops.aten.prod.no_such_overload  # noqa: B018
    assert OpOverloadPacket.__getattr__.__module__ == "torch._ops"


def test_adapters_equal_merged_weights():
    model = tiny_torch.causal("gpt_oss")
    chosen = [lorax_hf.spec(model, rank=3, targets=each) for each in ("attention", "experts")]
    with jax.enable_x64(True):
        fn, params = lorax_hf.from_torch(model, dtype=jnp.float64)
        spec = {name: chosen[0][name] or chosen[1][name] for name in params}
        run = lambda p, ids: fn(p, ids).logits  # noqa: E731
        testing.check(
            run, params, spec, jnp.asarray(tiny_torch.IDS), tolerance=1e-7, transforms=False
        )
