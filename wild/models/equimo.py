"""Vision models on Equinox: learned tokens and positions, windows, depthwise convolutions."""

from typing import Any

import equimo.vision.models as zoo
import equinox as eqx
import jax

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal


def vision(module: Any, size: int) -> Subject:
    def call(module: Any, images: jax.Array) -> jax.Array:
        run = eqx.nn.inference_mode(module)
        return jax.vmap(lambda image: run(image, key=KEY, inference=True))(images)

    return equinox(module, call, normal(2, 3, size, size))


@model("vision transformer", single=True)
def transformer() -> Subject:
    sizes = {"img_size": 16, "in_channels": 3, "dim": 24, "patch_size": 4}
    return vision(
        zoo.VisionTransformer(**sizes, num_heads=[3], depths=[2], num_classes=5, key=KEY), 16
    )


@model("ConvNeXt")
def convnext() -> Subject:
    return vision(zoo.ConvNeXt(3, depths=[1, 1], dims=[12, 20], num_classes=5, key=KEY), 16)


@model("MLLA, linear attention")
def mlla() -> Subject:
    sizes = {"img_size": 16, "in_channels": 3, "dim": 12, "patch_size": 4}
    return vision(zoo.Mlla(**sizes, depths=[2], num_heads=[3], num_classes=5, key=KEY), 16)
