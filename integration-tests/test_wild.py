"""The oracle and the verdicts of `nox -s wild`, on small functions."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parents[1]))

from wild import verdict  # noqa: E402
from wild.catalog import Model  # noqa: E402
from wild.finding import Finding  # noqa: E402
from wild.reach import reached  # noqa: E402

W = jnp.ones((4, 4))
X = jnp.ones((3, 4))


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"][None])[0]


def looped(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, h: h @ params["w"] + params["v"][0], x)


def branched(params, x):
    branches = (lambda w, x: x @ w, lambda w, x: x)
    return jax.lax.cond(x.sum() > 0, *branches, params["w"], x)


REACHED = {
    "product": (lambda p, x: x @ p["w"], {"w"}),
    "lookup": (lambda p, x: p["w"][x.astype(int)[:, 0]], {"w"}),
    "behind a mask": (lambda p, x: x @ jnp.tril(jnp.exp(p["w"])), {"w"}),
    "bias and gain": (lambda p, x: x * p["w"][0] + p["v"][1], set()),
    "two weights": (lambda p, x: x @ (p["w"] @ p["v"]), {"w", "v"}),
    "two weights, no data": (lambda p, x: x + (p["w"] @ p["v"])[0], set()),
    "a constant": (lambda p, x: x + (p["w"] @ jnp.eye(4))[0], set()),
    "jit and checkpoint": (jax.jit(jax.checkpoint(lambda p, x: x @ p["v"])), {"v"}),
    "scan": (scanned, {"w"}),
    "while": (looped, {"w"}),
    "cond": (branched, {"w"}),
}


@pytest.mark.parametrize("name", REACHED)
def test_reached_parameters(name):
    fn, expected = REACHED[name]
    assert reached(fn, {"w": W, "v": W}, X) == expected


RECORDED = Finding("p: m", weights=3, factored=1, materialized={"w": "`mul` has no rule"})


@pytest.mark.parametrize(
    "actual, fault, expected",
    [
        (RECORDED, None, []),
        (Finding("p: m", weights=3, factored=2), None, ["factored: 2 instead of 1", "`w`: no"]),
        (Finding("p: m", weights=3, factored=1, unreported=["v"]), None, ["`v`: yes", "`w`: no"]),
        (Finding("p: m", fault="check: 0.4"), None, ["check: 0.4"]),
        (Finding("p: m", weights=3, factored=1, fault="x"), "x", ["`w`: no"]),
        (Finding("p: m", fault="y"), "x", ["fails in another way: y"]),
        (RECORDED, "x", ["no longer fails"]),
    ],
)
def test_differences_from_recorded_results_are_reported(
    actual, fault, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(verdict, "FILE", tmp_path / "expected.json")
    model = Model("p", "m", lambda: pytest.fail("not built"), False, False, fault)
    monkeypatch.setitem(verdict.CATALOG, model.title, model)
    assert verdict.record([model], [RECORDED]) == [RECORDED]
    assert verdict.recorded() == {"p: m": RECORDED}
    differences = [str(difference) for difference in verdict.differences([model], [actual])]
    for text in expected:
        assert any(text in difference for difference in differences), differences
    assert bool(differences) == bool(expected)
