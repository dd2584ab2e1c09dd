"""LyCORIS and lorax-io read each other's files, with equal outputs."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file
from torch import nn

import lorax
from lorax_io import (
    AdapterError,
    Conv,
    Linear,
    UnsupportedAdapterError,
    load_any,
    open_adapter,
    save_kohya,
)

CONV = {"in_axes": (0, 1, 2), "channel_axis": 2}
NAMES = {"up": Linear("up"), "conv": Conv("conv", **CONV), "one": Conv("one", **CONV)}
ORDER = {"up": (1, 0), "conv": (2, 3, 1, 0), "one": (2, 3, 1, 0)}

CASES = {
    "LoRA": {"algo": "lora"},
    "Tucker cores": {"algo": "lora", "use_tucker": True},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "LoHa": {"algo": "loha"},
    "LoHa with cores": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 2},
    "LoKr with a core": {"algo": "lokr", "factor": 1, "use_tucker": True},
}
REFUSED = {
    "DoRA of inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "DoRA with cores": {"algo": "lora", "dora_wd": True, "use_tucker": True},
    "DoRA of LoHa": {"algo": "loha", "dora_wd": True},
    "rotations": {"algo": "diag-oft"},
    "full differences": {"algo": "full"},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 32)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.one = nn.Conv2d(6, 10, 1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


def params_of(net):
    return {
        name: jnp.asarray(getattr(net, name).weight.detach().numpy().transpose(order))
        for name, order in ORDER.items()
    }


def trained(net, settings):
    """A LyCORIS network on a copy of the model, with random factors."""
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "enable_conv": True})
    model = copy.deepcopy(net)
    sizes = {"linear_dim": 3, "linear_alpha": 5, "conv_dim": 2, "conv_alpha": 3}
    network = create_lycoris(model, 1.0, **sizes, **settings)
    network.apply_to()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape, generator=numbers))
    return network, model


def outputs(model):
    """The outputs of each layer. LyCORIS 4.1 scales LoHa and LoKr twice when it merges them."""
    numbers = torch.Generator().manual_seed(2)
    shapes = {"up": (5, 24), "conv": (2, 4, 5, 5), "one": (2, 6, 3, 3)}
    with torch.no_grad():
        return {
            name: getattr(model, name)(torch.randn(shape, generator=numbers)).numpy()
            for name, shape in shapes.items()
        }


def with_params(net, params):
    model = copy.deepcopy(net)
    for name, order in ORDER.items():
        array = np.asarray(params[name]).transpose(np.argsort(order))
        getattr(model, name).weight.data = torch.tensor(array)
    return model


def assert_close(actual, expected):
    for name, array in expected.items():
        bound = 5e-6 * np.abs(array).max()
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_roundtrip_with_lycoris(net, tmp_path, case):
    network, model = trained(net, CASES[case])
    file, our_file = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    network.save_weights(str(file), torch.float32, {})
    expected = outputs(model)
    assert all(np.abs(expected[name] - x).max() > 0.1 for name, x in outputs(net).items())
    pair = load_any(file, params_of(net), NAMES)
    assert_close(outputs(with_params(net, lorax.merge_params(pair))), expected)
    assert open_adapter(file).format == "kohya"

    save_kohya(our_file, pair.tunable, NAMES, prefix="lycoris")
    theirs, ours = load_file(file), load_file(our_file)
    shapes = {name: x.shape for name, x in theirs.items()}
    assert {name: x.shape for name, x in ours.items()} == shapes
    if case == "LoKr with a core":
        return  # LyCORIS 4.1 mistakes the outputs of `lokr_w2_a` for the rank
    model = copy.deepcopy(net)
    network, _ = create_lycoris_from_weights(1.0, str(our_file), model, ours)
    network.apply_to()
    assert_close(outputs(model), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_lycoris_kinds_raise(net, tmp_path, case):
    network, _ = trained(net, REFUSED[case])
    file = tmp_path / "theirs.safetensors"
    network.save_weights(str(file), torch.float32, {})
    with pytest.raises(UnsupportedAdapterError) as raised:
        load_any(file, params_of(net), NAMES)
    assert isinstance(raised.value, AdapterError) and "theirs.safetensors" in str(raised.value)
