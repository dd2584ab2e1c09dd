"""Networks that step partial differential equations."""

import jax
from pdequinox.arch import ClassicFNO, ClassicUNet

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal


@model("Fourier neural operator")
def fno() -> Subject:
    module = ClassicFNO(1, 4, 7, hidden_channels=8, num_modes=5, num_blocks=2, key=KEY)
    return equinox(module, lambda module, x: jax.vmap(module)(x), normal(3, 4, 26))


@model("U-Net")
def unet() -> Subject:
    module = ClassicUNet(2, 5, 7, hidden_channels=7, num_levels=1, key=KEY)
    return equinox(module, lambda module, x: jax.vmap(module)(x), normal(3, 5, 8, 8))
