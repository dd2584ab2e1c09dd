"""The chips for which programs are compiled, on a machine without them.

XLA's compilers for TPU and GPU run on any host. The first comes with libtpu, the second with JAX's
CUDA plugin. The second also needs a description of the chip, which the `.txtpb` files contain.
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

HERE = pathlib.Path(__file__).parent


class Target(NamedTuple):
    """Chips of one kind in a topology."""

    platform: str
    topology: str
    chip: str | None = None

    def devices(self) -> list[jax.Device]:
        """Devices to compile for; nothing can run on them."""
        if self.chip is None:
            described = topologies.get_topology_desc(self.topology, platform=self.platform)
        else:
            described = topologies.get_topology_desc(
                platform=self.platform,
                topology=self.topology,
                target_config=(HERE / self.chip).read_text(),
            )
        return list(described.devices)


TARGETS = {
    "v5e-4": Target("tpu", "v5e:2x2"),
    "v5e-16": Target("tpu", "v5e:4x4"),
    "v6e-4": Target("tpu", "v6e:2x2"),
    "h100-8": Target("cuda", "1x1x8", "nvidia_h100_80gb.txtpb"),
    "a100-8": Target("cuda", "1x1x8", "nvidia_a100_80gb.txtpb"),
}

# The axes of a mesh over 4, 8 or 16 chips: `data` takes the batch, `model` the weights.
SHAPES = {4: (2, 2), 8: (4, 2), 16: (4, 4)}


def mesh_of(target: Target) -> Mesh:
    """A mesh of `data` by `model` over all chips of a target."""
    devices = target.devices()
    grid = np.array(devices).reshape(SHAPES[len(devices)])
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
