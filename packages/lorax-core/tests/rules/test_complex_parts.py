"""Complex weights made of real ones, and the real and imaginary parts of complex weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax._terms import Label, Term

struct = jax.ShapeDtypeStruct
C64 = jnp.complex64
TWO = {"w": (11, 7), "v": (11, 7)}
COMPLEX = {"w": struct((11, 7), C64)}
MATERIALIZED = {"materializes": True}


def parts(z):
    return jnp.tanh(z.real) + z.imag


def then_complex_dot(change):
    return lambda p, x: parts(lax.complex(x, x[::-1]) @ change(p["w"]))


def from_two_weights(p, x):
    return parts(lax.complex(x, x) @ lax.complex(p["w"], p["v"]))


def times_1j(p, x):
    w = p["w"].astype(C64) + 1j * p["v"].astype(C64)
    return parts(lax.complex(x, x) @ w)


def squared_norm(p, x):
    return x * (p["w"].real ** 2 + p["w"].imag ** 2).sum(0)[None]


ROWS = [
    ("complex-of-two-weights", from_two_weights, TWO, {"w": 2, "v": 3}, [(3, 11)]),
    ("complex-with-an-array", from_two_weights, TWO, {"w": 2, "v": 0}, [(3, 11)]),
    ("complex-with-an-array-first", from_two_weights, TWO, {"w": 0, "v": 2}, [(3, 11)]),
    ("complex-by-arithmetic", times_1j, TWO, {"w": 2, "v": 3}, [(3, 11)]),
    ("real", lambda p, x: x @ p["w"].real, COMPLEX, {"w": 2}, [(3, 11)]),
    ("imag", lambda p, x: x @ p["w"].imag, COMPLEX, {"w": 2}, [(3, 11)]),
    ("both-parts", lambda p, x: jnp.tanh(x @ p["w"].real) + x @ p["w"].imag, COMPLEX, {"w": 2},
     [(3, 11)]),
    ("real-of-complex", lambda p, x: x @ lax.complex(p["w"], p["v"]).real, TWO, {"w": 2, "v": 0},
     [(3, 11)]),
    ("imag-of-complex", lambda p, x: x @ (lax.complex(p["w"], p["v"]) * (1 + 2j)).imag, TWO,
     {"w": 2, "v": 2}, [(3, 11)]),
    ("real-of-three-factors",
     lambda p, x, s: x @ (p["w"] * lax.complex(s, s + 1)[None]).real, COMPLEX, {"w": 2},
     [(3, 11), (7,)]),
    ("concatenated-parts",
     lambda p, x: x @ jnp.concatenate([p["w"].real, p["w"].imag], 1), COMPLEX, {"w": 2}, [(3, 11)]),
    ("conj", then_complex_dot(jnp.conj), COMPLEX, {"w": 2}, [(3, 11)]),
    ("conj-transpose", then_complex_dot(lambda w: w.conj().T), COMPLEX, {"w": 2}, [(3, 7)]),
    ("conj-of-a-real-weight", then_complex_dot(lambda w: lax.conj(w)), {"w": (11, 7)}, {"w": 2},
     [(3, 11)]),
    ("part-of-a-product-with-a-phase",
     lambda p, x, s: x @ (p["w"] * jnp.exp(1j * s.astype(C64))[:, None]).real, COMPLEX, {"w": 2},
     [(3, 11), (11,)]),
    ("squared-norm-by-parts", squared_norm, COMPLEX, {"w": 2}, [(3, 7)]),
    ("squared-norm-by-conj", lambda p, x: x * (p["w"] * p["w"].conj()).sum(0).real[None], COMPLEX,
     {"w": 2}, [(3, 7)]),
    ("norm", lambda p, x: x * jnp.linalg.norm(p["w"], axis=0)[None], COMPLEX, {"w": 2}, [(3, 7)],
     MATERIALIZED),
    ("abs", lambda p, x: x @ jnp.abs(p["w"]), COMPLEX, {"w": 2}, [(3, 11)], MATERIALIZED),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_complex_parts(check_row, row):
    check_row(*row)


@pytest.mark.parametrize("k", range(3))
def test_complex_in_leaves_one_complex_factor(k):
    i, o, r = Label(0, 5), Label(1, 3), Label(2, 2)
    labels = ((i, r), (r, o), (o,))
    generator = np.random.default_rng(0)
    factors = [
        jnp.asarray(generator.normal(size=s) + 1j * generator.normal(size=s), C64)
        for s in ([label.size for label in names] for names in labels)
    ]
    term = Term(tuple(factors), labels, ((i,), (o,)))
    moved = term.complex_in(k)
    assert [jnp.iscomplexobj(f) for f in moved.factors] == [j == k for j in range(3)]
    assert np.allclose(moved.array(C64), term.array(C64), rtol=1e-5)
