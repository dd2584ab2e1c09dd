"""Linear maps along an axis of a weight: cumulative sums and Fourier transforms."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import LoraSpec

struct = jax.ShapeDtypeStruct
W = {"w": (11, 7)}
C64 = jnp.complex64
COMPLEX = {"w": struct((11, 7), C64)}
HEADS = {"w": (11, 3, 5)}
FROM_MODEL = LoraSpec(2, in_axes=[0])
STACKED = LoraSpec(2, shared_axes=[0])
MATERIALIZED = {"materializes": True}


def then_dot(change):
    return lambda p, x: x @ change(p["w"])


def parts(z):
    return jnp.tanh(z.real) + z.imag


def then_complex_dot(change):
    return lambda p, x: parts(lax.complex(x, x[::-1]) @ change(p["w"]))


ROWS = [
    ("cumsum-of-inputs", then_dot(lambda w: jnp.cumsum(w, 0)), W, {"w": 2}, [(3, 11)]),
    ("cumsum-of-outputs", then_dot(lambda w: jnp.cumsum(w, 1)), W, {"w": 2}, [(3, 11)]),
    ("cumsum-backwards", then_dot(lambda w: lax.cumsum(w, 0, reverse=True)), W, {"w": 2},
     [(3, 11)]),
    ("cumsum-of-heads", lambda p, x: jnp.einsum("bi,iho->bho", x, jnp.cumsum(p["w"], 1)), HEADS,
     {"w": FROM_MODEL}, [(2, 11)]),
    ("cumsum-of-a-broadcast",
     lambda p, x: jnp.einsum("bi,nio->nbo", x, jnp.cumsum(jnp.broadcast_to(p["w"], (5, 11, 7)), 0)),
     W, {"w": 2}, [(2, 11)]),
    ("cumsum-of-a-stack", lambda p, x: jnp.einsum("ebi,eio->ebo", x, jnp.cumsum(p["w"], 0)),
     {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 11)], MATERIALIZED),
    ("cumsum-of-merged-axes", then_dot(lambda w: jnp.cumsum(w.reshape(33, 5), 0)), HEADS,
     {"w": FROM_MODEL}, [(2, 33)], MATERIALIZED),
    ("fft", then_complex_dot(lambda w: jnp.fft.fft(w, axis=-1)), COMPLEX, {"w": 2}, [(3, 11)]),
    ("fft-of-inputs", then_complex_dot(lambda w: jnp.fft.fft(w, axis=0)), COMPLEX, {"w": 2},
     [(3, 11)]),
    ("fft-of-a-real-weight", then_complex_dot(jnp.fft.fft), W, {"w": 2}, [(3, 11)]),
    ("fft-of-both-axes", then_complex_dot(jnp.fft.fft2), W, {"w": 2}, [(3, 11)]),
    ("ifft", then_complex_dot(jnp.fft.ifft), COMPLEX, {"w": 2}, [(3, 11)]),
    ("fft-and-back", then_complex_dot(lambda w: jnp.fft.ifft(jnp.fft.fft(w) * 2)), COMPLEX,
     {"w": 2}, [(3, 11)]),
    ("rfft", then_complex_dot(jnp.fft.rfft), W, {"w": 2}, [(3, 11)]),
    ("rfft-of-inputs", then_complex_dot(lambda w: jnp.fft.rfft(w, axis=0)), W, {"w": 2}, [(3, 6)]),
    ("rfft-of-both-axes", then_complex_dot(jnp.fft.rfft2), W, {"w": 2}, [(3, 11)]),
    ("irfft", then_dot(lambda w: jnp.fft.irfft(w, 13)), COMPLEX, {"w": 2}, [(3, 11)]),
    ("irfft-of-inputs", then_dot(lambda w: jnp.fft.irfft(w, axis=0)), COMPLEX, {"w": 2},
     [(3, 20)]),
    ("irfft-of-both-axes", then_dot(jnp.fft.irfft2), COMPLEX, {"w": 2}, [(3, 11)]),
    ("filtered",
     then_dot(lambda w: jnp.fft.irfft(jnp.fft.rfft(w) * jnp.arange(4).astype(C64)[None], 7)), W,
     {"w": 2}, [(3, 11)]),
    ("fft-of-a-stack", lambda p, x: jnp.einsum("ebi,eio->ebo", x, jnp.fft.fft(p["w"], axis=0).real),
     {"w": (3, 11, 7)}, {"w": STACKED}, [(3, 2, 11)], MATERIALIZED),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_along_axis(check_row, row):
    check_row(*row)
