"""`extract_lora`: recovered adapters, best approximations, ranks, and invalid arguments."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    LORA_FREEZE,
    LORA_FULL,
    IA3Spec,
    LoraSpec,
    SpecError,
    UnadaptedWarning,
    dequantize,
    extract_lora,
    init_lora,
    lora,
    merge_params,
    quantize,
)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


BASE = {
    "kernel": random(0, 13, 9),
    "experts": random(1, 3, 11, 7),
    "heads": random(2, 8, 3, 5),
    "bias": random(3, 9),
}
SPEC = {
    "kernel": LoraSpec(4, alpha=3),
    "experts": LoraSpec(4, alpha=2, scaling="rslora", shared_axes=[0]),
    "heads": LoraSpec(4, in_axes=[0]),
    "bias": LORA_FULL,
}


def test_a_merged_adapter_is_recovered():
    pair = init_lora(BASE, SPEC, jax.random.key(5), b_init="gaussian")
    tuned = merge_params(pair) | {"bias": BASE["bias"] + 1}
    extracted, errors = extract_lora(BASE, tuned, SPEC)
    assert max(errors.values()) < 1e-5 and errors.keys() == BASE.keys() - {"bias"}
    for name, value in merge_params(extracted).items():
        np.testing.assert_allclose(value, tuned[name], rtol=1e-5, atol=1e-5)
    assert extracted.tunable["kernel"].alpha == 3
    assert extracted.frozen["kernel"] is BASE["kernel"] and extracted.frozen["bias"] is None
    x = random(6, 2, 13)
    model = lora(lambda p, x: x @ p["kernel"] + p["bias"][None], on_unused="allow")
    expected = x @ tuned["kernel"] + tuned["bias"][None]
    np.testing.assert_allclose(model(extracted, x), expected, rtol=1e-4, atol=1e-4)


def lowest_error(delta, rank):
    values = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False)
    return np.sqrt((values[..., rank:] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (2, 90, 70)])
def test_randomized_decomposition_is_close_to_the_best(shape):
    # Singular values that fall slowly, as those of full fine-tuning do.
    left, right = np.linalg.qr(random(1, *shape[:-1], shape[-2]))[0], random(2, *shape)
    right = np.linalg.qr(np.swapaxes(right, -1, -2))[0]
    k = min(shape[-2:])
    delta = jnp.asarray((left[..., :k] / np.arange(1, k + 1)) @ np.swapaxes(right[..., :k], -1, -2))
    spec = {"w": LoraSpec(3, shared_axes=[0] if len(shape) == 3 else ())}
    _, errors = extract_lora({"w": jnp.zeros(shape)}, {"w": delta}, spec)
    assert lowest_error(delta, 3) <= errors["w"] * 1.0001
    assert errors["w"] <= lowest_error(delta, 3) * 1.001


@pytest.mark.parametrize("energy", [0.3, 0.8])
def test_energy_gives_the_lowest_rank_that_keeps_it(energy):
    tuned = {"w": BASE["kernel"] + random(8, 13, 9)}
    pair, errors = extract_lora({"w": BASE["kernel"]}, tuned, {"w": 9}, energy=energy)
    delta = tuned["w"] - BASE["kernel"]
    rank = pair.tunable["w"].rank
    assert lowest_error(delta, rank) ** 2 <= 1 - energy < lowest_error(delta, rank - 1) ** 2
    assert errors["w"] == pytest.approx(lowest_error(delta, rank), rel=1e-3)
    same, _ = extract_lora({"w": BASE["kernel"]}, tuned, {"w": 9}, tolerance=(1 - energy) ** 0.5)
    assert same.tunable["w"].rank == rank
    capped, _ = extract_lora({"w": BASE["kernel"]}, tuned, {"w": 1}, energy=energy)
    assert capped.tunable["w"].rank == 1


def test_unchanged_weights_have_a_zero_adapter():
    pair, errors = extract_lora(BASE, BASE, SPEC, energy=0.9)
    assert errors == {"kernel": 0, "experts": 0, "heads": 0}
    assert not pair.tunable["kernel"].b.any()


def test_numpy_bfloat16_arrays():
    base = {"w": np.asarray(BASE["kernel"]).astype(jnp.bfloat16)}
    tuned = {"w": (np.asarray(BASE["kernel"]) + 1).astype(jnp.bfloat16)}
    pair, errors = extract_lora(base, tuned, {"w": 2})
    assert pair.tunable["w"].a.dtype == jnp.float32 and errors["w"] < 0.05


def test_changes_of_frozen_parameters_warn():
    tuned = BASE | {"bias": BASE["bias"] + 1, "heads": BASE["heads"] * 2}
    spec = SPEC | {"bias": LORA_FREEZE, "heads": LORA_FREEZE}
    with pytest.warns(UnadaptedWarning, match="`bias`, `heads` differ"):
        extract_lora(BASE, tuned, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_lora(BASE, BASE, spec)


def test_invalid_arguments_raise():
    with pytest.raises(SpecError, match="`kernel` has a IA3Spec"):
        extract_lora(BASE, BASE, SPEC | {"kernel": IA3Spec()})
    with pytest.raises(ValueError, match="`kernel` is .* in base and .* in tuned"):
        extract_lora(BASE, BASE | {"kernel": jnp.ones((13, 8))}, SPEC)
    with pytest.raises(ValueError, match="has the structure"):
        extract_lora(BASE, {"kernel": BASE["kernel"]}, SPEC)
    with pytest.raises(SpecError, match="structure"):
        extract_lora(BASE, BASE, {"kernel": 2})
    with pytest.raises(ValueError, match="energy is 2"):
        extract_lora(BASE, BASE, SPEC, energy=2)


@pytest.mark.parametrize("shape", [(11, 7), (90, 85)], ids=["exact", "randomized"])
def test_complex_parameters(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, base = (
        jax.random.normal(key, shape, jnp.complex64)
        for key, shape in zip(keys, ((shape[0], 2), (2, shape[1]), shape), strict=True)
    )
    extracted, errors = extract_lora({"w": base}, {"w": base + a @ b}, {"w": LoraSpec(2)})
    np.testing.assert_allclose(merge_params(extracted)["w"], base + a @ b, rtol=1e-3, atol=1e-4)
    assert errors["w"] < 1e-5
    _, errors = extract_lora({"w": base}, {"w": base + a @ b}, {"w": LoraSpec(1)})
    values = np.linalg.svd(a @ b, compute_uv=False)
    np.testing.assert_allclose(errors["w"], values[1] / np.hypot(*values[:2]), rtol=1e-4)


def test_randomized_decomposition_of_complex_parameters_is_close_to_the_best():
    draw = lambda seed, n: jax.random.normal(jax.random.key(seed), (n, 90), jnp.complex64)  # noqa: E731
    left, right = np.linalg.qr(draw(1, 120))[0], np.linalg.qr(draw(2, 90))[0]
    values = 1 / np.sqrt(np.arange(1, 91))
    delta = jnp.asarray((left * values) @ right.conj().T).astype(jnp.complex64)
    _, errors = extract_lora({"w": jnp.zeros_like(delta)}, {"w": delta}, {"w": LoraSpec(3)})
    least = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
    assert least <= errors["w"] * 1.0001 and errors["w"] <= least * 1.01


def test_quantized_weights_are_decoded_and_stay_quantized():
    base = {"kernel": random(0, 64, 9), "head": random(1, 64, 5), "same": random(2, 64, 5)}
    base = quantize(base, {"kernel": "nf4", "head": "int8", "same": "int8"})
    tuned = dequantize(base)
    tuned |= {"kernel": tuned["kernel"] + random(3, 64, 2) @ random(4, 2, 9)}
    tuned |= {"head": quantize({"w": tuned["head"] + random(5, 64, 5)}, {"w": "int8"})["w"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = {"kernel": 2, "head": 5, "same": LORA_FREEZE}
        pair, errors = extract_lora(base, tuned, spec)
    assert pair.frozen["kernel"] is base["kernel"] and max(errors.values()) < 1e-4
    merged, tuned = merge_params(pair), dequantize(tuned)
    for name, expected in tuned.items():
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-4)
    with pytest.warns(UnadaptedWarning, match="`kernel` differ"):
        extract_lora(base, tuned, spec | {"kernel": LORA_FREEZE})
