"""PEFT's nested wrappers around a module of experts, which appear in the keys of its factors."""

import collections
from collections.abc import Iterable, Mapping

from .._places import Place
from .._torch_names import Experts, Parameter


def wrapper_depths(places: Iterable[tuple[str, Place]]) -> dict[str, int]:
    """How many `.base_layer` the keys of each parameter of experts have, by its pattern name.

    PEFT wraps a module once for each adapted parameter; the first one is innermost.

    Args:
        places: the places of the parameters with factors, each with its module.
    """
    of_module: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for module, place in places:
        if isinstance(place.torch_name, Experts | Parameter):
            of_module[module][place.torch_name.order] = place.pattern_name(module)
    return {
        parameters[order]: depth
        for parameters in of_module.values()
        for depth, order in enumerate(sorted(parameters, reverse=True))
    }


def factor_prefix(place: Place, module: str, depths: Mapping[str, int]) -> str:
    """The prefix of the keys of a module's factors."""
    return module + ".base_layer" * depths.get(place.pattern_name(module), 0)
