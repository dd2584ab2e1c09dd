"""`jax.example_libraries.stax`, the oldest library of layers for JAX."""

from jax.example_libraries import stax

from ..catalog import Subject, model
from ..frameworks import KEY, normal


@model("stax: convolutions with identity and projection")
def residual() -> Subject:
    main = stax.serial(stax.Conv(10, (3, 3), padding="SAME"), stax.Relu, stax.Conv(9, (1, 1)))
    both = stax.parallel(main, stax.Conv(9, (1, 1)))
    init, apply = stax.serial(
        *(stax.Conv(7, (3, 3), padding="SAME"), stax.Gelu, stax.FanOut(2), both, stax.FanInSum),
        *(stax.Flatten, stax.Dense(5), stax.LogSoftmax),
    )
    _, params = init(KEY, (2, 6, 6, 3))
    return Subject(apply, params, (normal(2, 6, 6, 3),))
