"""Names by Flax's convention, and files of names."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

import lorax
import lorax_io
from lorax_io import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Parameter,
    Tensor,
    TorchName,
    flax_names,
    read_names,
    write_names,
)


def make_params():
    return {
        "embed": {"embedding": jnp.ones((7, 5))},
        "layers": [{"q": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}] * 2,
        "norm": {"scale": jnp.ones(5), "bias": jnp.ones(5)},
        "ln": {"weight": jnp.ones(5)},
        "kernel": jnp.ones((5, 3)),
        "steps": None,
    }


EXPECTED = {
    "embed/embedding": Embedding("embed"),
    "layers/0/q/kernel": Linear("layers.0.q"),
    "layers/0/q/bias": Tensor("layers.0.q"),
    "layers/1/q/kernel": Linear("layers.1.q"),
    "layers/1/q/bias": Tensor("layers.1.q"),
    "norm/scale": Tensor("norm", parameter="weight"),
    "norm/bias": Tensor("norm"),
    "ln/weight": Tensor("ln", parameter="weight"),
    "kernel": Linear(""),
}


@pytest.mark.parametrize("shapes", [False, True])
def test_flax_names_follow_the_flax_convention(shapes):
    params = jax.eval_shape(make_params) if shapes else make_params()
    assert flax_names(params) == EXPECTED


def test_given_names_take_precedence():
    torch_name = Linear("lm_head", in_axes=(0,))
    assert flax_names(make_params(), {"kernel": torch_name}) == EXPECTED | {"kernel": torch_name}
    conv = {"conv": {"kernel": jnp.ones((2, 2, 5, 3))}}
    assert flax_names(conv, {"conv/kernel": Conv("c")}) == {"conv/kernel": Conv("c")}


@pytest.mark.parametrize(
    ("params", "names", "message"),
    [
        ({"c": {"kernel": jnp.ones((2, 5, 3))}}, {}, "^c/kernel: has 3 axes and the name `kernel`"),
        ({"c": {"weight": jnp.ones((5, 3))}}, {}, "has 2 axes and the name `weight`"),
        ({"c": {"bias": jnp.ones((5, 3))}}, {}, "has 2 axes and the name `bias`"),
        ({"c": {"scale": jnp.ones(())}}, {}, "has 0 axes"),
        ({"c": {"gamma": jnp.ones(3)}}, {}, "the name `gamma`"),
        ({"kernel": jnp.ones((5, 3))}, {"kernal": Linear("x")}, "^kernal: is in `names` and not"),
    ],
    ids=["conv", "matrix", "biases", "scalar", "name", "unknown"],
)
def test_ambiguous_axes_raise(params, names, message):
    with pytest.raises(AdapterMismatchError, match=message):
        flax_names(params, names)


def test_old_argument_name_warns():
    given = {"kernel": Linear("lm_head", in_axes=(0,))}
    with pytest.warns(DeprecationWarning, match=r"flax_names\(layouts=…\) is now called `names`"):
        assert flax_names(make_params(), layouts=given) == flax_names(make_params(), given)
        assert flax_names(make_params(), given, layouts={}) == flax_names(make_params(), given)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "names.json"


AXES: dict[str, Any] = {"in_axes": (1, 2), "out_axes": (3, -1), "shared_axes": (0,)}
STACK: dict[str, Any] = {**AXES, "numbers": (3, 1)}
TORCH_NAMES = {
    "linear": Linear("h.{}.q", **STACK, parameter="w"),
    "conv1d": Conv1D("h.{}.q", **STACK, parameter="w"),
    "embedding": Embedding("h.{}.e", **STACK, parameter="w", tied=True),
    "conv": Conv("h.{}.c", **STACK, parameter="w", channel_axis=2, grouped=True),
    "experts": Experts("mlp", **AXES, parameter="w", order=3, out_first=True, swapped=True),
    "stacked experts": Experts(
        "h.{}.mlp", shared_axes=(0, 1), parameter="up", swapped=False, numbers=(4,)
    ),
    "parameter": Parameter("h.{}.p", **STACK, parameter="w", order=2),
    "tensor": Tensor("h.{}.n", **STACK, parameter="w", flat=True),
    "plain/é": Linear("é"),
    "default": Tensor("n"),
}


def test_names_round_trip(file):
    write_names(file, TORCH_NAMES)
    torch_names = read_names(str(file))
    assert torch_names == TORCH_NAMES
    assert list(torch_names) == list(TORCH_NAMES)  # in the same order
    assert [type(torch_name) for torch_name in torch_names.values()] == list(
        map(type, TORCH_NAMES.values())
    )
    write_names(file, {})  # replaces the file
    assert read_names(file) == {}


def test_only_non_default_fields_are_written(file):
    write_names(file, {"w": Linear("q"), "b": Tensor("q"), "s": Tensor("n", parameter="weight")})
    assert json.loads(file.read_text()) == {
        "w": {"type": "Linear", "module": "q"},
        "b": {"type": "Tensor", "module": "q"},
        "s": {"type": "Tensor", "module": "n", "parameter": "weight"},
    }


def test_old_files_are_read_with_a_warning(file):
    file.write_text('{"w": {"layout": "Linear", "module": "q"}}')
    with pytest.warns(DeprecationWarning, match="w: its key `layout` is now called `type`"):
        assert read_names(file) == {"w": Linear("q")}


def test_old_name_of_the_class_warns():
    with pytest.warns(DeprecationWarning, match="Layout is now called `TorchName`") as caught:
        assert lorax_io.Layout is TorchName
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'Layouts'"):
        getattr(lorax_io, "Layouts")  # noqa: B009


def test_every_field_of_every_type_has_a_case():
    """Otherwise a new field could be lost in a round trip."""
    for kind in {type(torch_name) for torch_name in TORCH_NAMES.values()}:
        torch_names = [
            torch_name for torch_name in TORCH_NAMES.values() if type(torch_name) is kind
        ]
        for field in dataclasses.fields(kind):
            assert any(
                getattr(torch_name, field.name) != field.default for torch_name in torch_names
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not (a )?JSON"),
        (b"{", "is not (a )?JSON"),
        (b"\xff\xfe{\0}\0", "is not UTF-8 text"),
        (b"[" * 100_000, "is not (a )?JSON"),
        (b"[]", "is not a JSON object of names"),
        (b'{"w": null}', "is not a JSON object of names"),
        (b'{"w": {}, "w": {}}', "the key 'w' twice"),
        (b'{"w": {"module": "q"}}', "`w` .*`type` is not one of Linear, Conv1D"),
        (b'{"w": {"type": "TorchName", "module": "q"}}', "`w` .*is not one of Linear"),
        (b'{"w": {"type": ["Linear"], "module": "q"}}', "`w` .*is not one of Linear"),
    ],
)
def test_other_files_raise(file, content, message):
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match=message):
        read_names(file)


@pytest.mark.parametrize(
    ("type_", "fields", "message"),
    [
        ("Linear", {"module": None}, "module = null"),
        ("Linear", {"tied": True}, "unexpected keyword argument 'tied'"),
        ("Linear", {"parameter": 3}, "parameter = 3"),
        ("Linear", {"in_axes": 0}, "in_axes = 0"),
        ("Linear", {"in_axes": ["0"]}, "in_axes = "),
        ("Linear", {"out_axes": [True]}, "out_axes = "),
        ("Linear", {"shared_axes": None}, "shared_axes = null"),
        ("Linear", {"shared_axes": [0]}, "one `{}` in its module"),
        ("Linear", {"module": "h.{}.q"}, "one `{}` in its module"),
        ("Linear", {"module": "h.{q}"}, "one `{}` in its module"),
        ("Experts", {"module": "h.{}.q", "shared_axes": [0]}, "one `{}` in its module"),
        ("Experts", {"swapped": 1, "shared_axes": [0]}, "swapped = 1"),
        ("Experts", {"order": "0", "shared_axes": [0]}, 'order = "0"'),
        ("Linear", {"numbers": [0]}, "a number for each module of its one stack"),
        (
            "Linear",
            {"module": "{}", "shared_axes": [0], "numbers": [1, 1]},
            "a number for each module",
        ),
        ("Linear", {"module": "{}", "shared_axes": [0], "numbers": []}, "numbers = "),
        ("Linear", {"module": "{}", "shared_axes": [0], "numbers": 2}, "numbers = 2"),
        ("Linear", {"module": "{}", "shared_axes": [0], "numbers": [-1]}, "numbers = "),
        ("Conv", {"channel_axis": 1.0}, r"channel_axis = 1\.0"),
        ("Embedding", {"tied": None}, "tied = null"),
    ],
    ids=str,
)
def test_invalid_fields_raise(file, type_, fields, message):
    file.write_text(json.dumps({"w": {"type": type_, "module": "q"} | fields}))
    with pytest.raises(AdapterFileError, match=f"`w`.*{message}"):
        read_names(file)


def test_number_of_modules_must_match_the_stack():
    torch_name = Linear("h.{}.q", shared_axes=(0,), numbers=(3, 1))
    assert torch_name.at("q", (2, 5, 4)).modules == {(0,): "h.3.q", (1,): "h.1.q"}
    with pytest.raises(AdapterMismatchError, match=r"numbers 2 modules, and it stacks \[3\]"):
        _ = torch_name.at("q", (3, 5, 4)).modules


def test_either_axis_can_be_the_input():
    plain = Parameter("p", parameter="w")
    turned = plain.fitted(lorax.Axes((), (0,), (1,)))
    first, second = ([factor[1:] for factor in x.at("p", (5, 3)).factors] for x in (plain, turned))
    assert first == [("a", ((-1,), (1,))), ("b", ((0,), (-1,)))]
    assert second == [("b", ((-1,), (1,))), ("a", ((0,), (-1,)))]
    name = Parameter("p", parameter="w", in_axes=(1,), out_axes=(0,))
    assert name.fitted(lorax.Axes((), (0,), (1,))) is name


def test_missing_module_raises(file):
    file.write_text('{"w": {"type": "Linear"}}')
    with pytest.raises(AdapterFileError, match="`w` .*'module'"):
        read_names(file)


def test_missing_file_raises(file):
    with pytest.raises(AdapterNotFoundError, match="no such file"):
        read_names(file)


@given(st.dictionaries(st.text(), st.text().filter(lambda name: not {*"{}"} & {*name})))
def test_any_text_round_trips(tmp_path_factory, modules):
    file = tmp_path_factory.getbasetemp() / "any names.json"
    names = {path: Linear(module) for path, module in modules.items()}
    write_names(file, names)
    assert read_names(file) == names
