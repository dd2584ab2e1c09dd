"""`combine_adapters` equals PEFT's `add_weighted_adapter` on the same factors."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lorax import LoraWeight, combine_adapters, materialize

SIZES = {"first": (11, 7), "second": (7, 13)}
RANKS = {"one": 4, "two": 4, "three": 3}
ALPHAS = {"one": 8, "two": 2, "three": 5}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (fan_in, fan_out) in SIZES.items():
            setattr(self, name, torch.nn.Linear(fan_in, fan_out, bias=False))

    def forward(self, x):
        return self.second(self.first(x))


def config_for(name):
    return peft.LoraConfig(
        r=RANKS[name],
        lora_alpha=ALPHAS[name],
        target_modules=list(SIZES),
        use_rslora=name == "two",
        init_lora_weights=False,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Model(), config_for("one"), adapter_name="one")
    for name in ("two", "three"):
        adapted.add_adapter(name, config_for(name))
    return adapted


def layers(model):
    return {name: getattr(model.base_model.model, name) for name in SIZES}


def tunable(model, adapter):
    def weight(layer):
        a, b = (getattr(layer, f"lora_{x}")[adapter].weight.detach().numpy().T for x in "AB")
        return LoraWeight(
            jnp.asarray(a),
            jnp.asarray(b),
            RANKS[adapter],
            ALPHAS[adapter],
            "rslora" if adapter == "two" else "standard",
        )

    return {name: weight(layer) for name, layer in layers(model).items()}


def pattern(shape):
    """A mask that is symmetric, so that a factor and its transpose have the same one."""
    rows, columns = np.indices(shape[-2:])
    return np.broadcast_to((rows + columns) * 3 % 5 < 3, shape)


@pytest.fixture
def same_masks(monkeypatch):
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: torch.tensor(pattern(p.shape).copy(), dtype=p.dtype)
    )
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: pattern(shape))


METHODS = [
    ("cat", "concatenate", {}),
    ("svd", "svd", {}),
    ("svd", "svd", {"rank": 2}),
    ("linear", "linear", {}),
    *(
        (f"{method}{suffix}", f"{method}{suffix}", {"density": density, **signs})
        for method in ("magnitude_prune", "ties", "dare_linear", "dare_ties")
        for suffix in ("", "_svd")
        # At a density of 1, PEFT does not draw a mask.
        for density in ((0.55,) if method.startswith("dare") else (0.55, 1.0))
        for signs in ([{}, {"signs": "frequency"}] if "ties" in method else [{}])
    ),
]


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
@pytest.mark.parametrize(("peft_method", "method", "options"), METHODS)
@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.5, -0.7)])
def test_combined_delta_equals_pefts(peft_method, method, options, weights, model, same_masks):
    # Concatenation and decompositions also accept different ranks.
    names = ["one", "three"] if peft_method in ("cat", "svd") else ["one", "two"]
    model.add_weighted_adapter(
        names,
        list(weights),
        "both",
        combination_type=peft_method,
        svd_rank=options.get("rank"),
        density=options.get("density"),
        majority_sign_method=options.get("signs", "total"),
    )
    adapters = {
        name: (tunable(model, name), weight) for name, weight in zip(names, weights, strict=True)
    }
    combined, _ = combine_adapters(adapters, method, key=jax.random.key(0), **options)
    for name, layer in layers(model).items():
        expected = layer.get_delta_weight("both").detach().numpy().T
        delta = materialize(jnp.zeros(SIZES[name]), combined[name])
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=2e-6)
