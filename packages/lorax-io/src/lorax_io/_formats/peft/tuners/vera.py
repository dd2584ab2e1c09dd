"""VeRA: `vera_lambda_d` and `vera_lambda_b`, and one pair of frozen matrices for all modules.

The matrices are in the file, or are drawn from a seed exactly as PyTorch draws them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax import Adapter, VeraWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError, warn
from ...._places import RANK, Array, Factor, Place
from ...stored import Stored
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, check_linear, the_one

_MATRICES = ("vera_A", "vera_B")
_LARGEST = 2**28  # the most numbers to draw from a seed, which comes from an untrusted file


class Vera(Tuner):
    """Two vectors for each module, and two frozen matrices that all modules share."""

    peft_type = "VERA"
    called = "VeRA"
    marks = ("vera_lambda_b", "vera_lambda_d")
    common = _MATRICES
    fields = ("r", "bias", "projection_prng_key", "save_projection")
    lacking = ("exclude_modules",)
    defaults = {"r": 256}
    harmless = ("d_initial", "vera_dropout", "init_weights")
    init = "init_weights"
    only_bias = "vera_only"
    tells_shape = False

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, VeraWeight)

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        return (*self.marks, *_MATRICES)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        check_linear(place, self.called)
        shared, inputs, outputs = place.axes
        return VeraWeight(None, None, config.r, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_linear(place, self.called)
        return (
            Factor("vera_lambda_b", "lambda_b", (place.outputs,)),
            Factor("vera_lambda_d", "lambda_d", ((RANK,),)),
            Factor("vera_A", "a", ((RANK,), *place.inputs)),
            Factor("vera_B", "b", (place.outputs, (RANK,))),
        )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        shape = shapes.get("vera_lambda_b", ())
        if len(shape) != 1:
            raise AdapterFileError(f"has `vera_lambda_b` of `{module}` of shape {shape}.")
        return Sides(shape[0], (1,))

    def spread(
        self, tensors: Mapping[str, Any], config: PeftConfig, places: Mapping[str, Place]
    ) -> Mapping[str, Any]:
        fans = {
            module: place.axes.sizes(place.shape)
            for place in places.values()
            for module in place.modules.values()
            if place.factors and f"{module}.vera_lambda_b" in tensors
        }
        if not fans:
            return tensors
        most = [max(sizes) for sizes in zip(*fans.values(), strict=True)]
        a, b = _matrices(tensors, config, *most)
        spread = {key: tensor for key, tensor in tensors.items() if key not in _MATRICES}
        for module, (fan_in, fan_out) in fans.items():
            spread[f"{module}.vera_A"] = a.part(config.r, fan_in)
            spread[f"{module}.vera_B"] = b.part(fan_out, config.r)
        return spread

    def gathered(self, parts: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for key, axis in zip(_MATRICES, (1, 0), strict=True):
            path, whole = max(parts[key], key=lambda part: part[1].shape[axis])
            for other, part in parts[key]:
                rows, columns = part.shape
                if not np.array_equal(whole[:rows, :columns], part):
                    raise UnsupportedAdapterError(
                        f"`{path}` and `{other}` have VeRA with their own frozen matrices, and "
                        "PEFT has one pair for all. Use `save_adapter` or `save_merged`."
                    )
            gathered[key] = whole
        return gathered

    def needs_base(self, config: PeftConfig) -> str | None:
        return "its frozen matrices are as large as the largest module of the base"

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        rank = the_one(modules, self.called, "rank", lambda weight: weight.rank)
        conv1d = any(module.place.torch_name.fan_in_fan_out for module in modules)
        return Scaling(PeftConfig(peft_type=self.peft_type, r=rank, fan_in_fan_out=conv1d))


def _matrices(
    tensors: Mapping[str, Stored], config: PeftConfig, fan_in: int, fan_out: int
) -> list[Stored]:
    """Both frozen matrices: from the file, or drawn from the seed as PEFT does."""
    if not config.save_projection:
        return _drawn(tensors, config, fan_in, fan_out)
    if lacking := [key for key in _MATRICES if key not in tensors]:
        raise AdapterFileError(
            f"lacks `{lacking[0]}`. It is drawn from a seed only where its config has "
            "save_projection = false."
        )
    for key, axis, size in zip(_MATRICES, (1, 0), (fan_in, fan_out), strict=True):
        shape = tensors[key].shape
        if len(shape) != 2 or shape[axis] < size or shape[1 - axis] != config.r:
            raise AdapterFileError(
                f"has `{tensors[key].name}` of shape {shape}, for a rank of {config.r} and a side "
                f"of {size}."
            )
    return [tensors[key] for key in _MATRICES]


def _drawn(
    tensors: Mapping[str, Stored], config: PeftConfig, fan_in: int, fan_out: int
) -> list[Stored]:
    """The matrices drawn from the seed, bit-identical to PyTorch's on a CPU.

    They depend on the largest module, so the parameters must include all of the adapter's modules.
    """
    if not tensors.keys().isdisjoint(_MATRICES):
        warn(
            "has frozen matrices, and its config has save_projection = false. As in PEFT, they are "
            "drawn from the seed."
        )
    if max(fan_in, fan_out) * config.r > _LARGEST:
        raise AdapterFileError(
            f"asks for matrices of {fan_in} and {fan_out} by {config.r} from a seed, which is more "
            "than is made."
        )
    draws = np.random.RandomState(config.projection_prng_key % 2**32)
    shapes = (config.r, fan_in), (fan_out, config.r)
    return [
        Stored.of(key, _uniform(draws, shape)) for key, shape in zip(_MATRICES, shapes, strict=True)
    ]


def _uniform(draws: np.random.RandomState, shape: tuple[int, int]) -> Array:
    """PyTorch's `uniform_`: 24 bits of each draw, scaled and shifted with one rounding."""
    bound = np.float64(np.float32(math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))))
    bits = draws.randint(0, 2**32, size=shape, dtype=np.uint32) % 2**24
    return (bits / 2**24 * np.float64(np.float32(2 * bound)) - bound).astype(np.float32)
