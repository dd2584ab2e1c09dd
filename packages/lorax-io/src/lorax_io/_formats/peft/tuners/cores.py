"""Tucker cores over a convolution's window, which LoHa and LoKr use (`use_effective_conv2d`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import Groups, Place
from ..config import PeftConfig
from .tuner import Module


def check_window(place: Place, module: str, key: str) -> None:
    """Rejects a core for a weight without a window."""
    if not _has_window(place):
        raise AdapterFileError(
            f"has `{key}` for `{module}`, a core over a window, and `{place.path}` has none."
        )


def core_groups(place: Place, weight: Any, left: int, right: int) -> Groups:
    """The axes of a core, (rank of the outputs, rank of the inputs, *window).

    PEFT's `Conv1d` has a window of two axes, the second of one entry.
    """
    channels, *window = place.inputs
    if channels != (_channels(weight),):
        raise UnsupportedAdapterError(
            f"`{place.path}` has a core over all axes but {_channels(weight)}, and PEFT one "
            f"over all but the channels, which are {channels}. Use `save_adapter` or `save_merged`."
        )
    return ((right,), (left,), *window, *([()] if len(window) == 1 else []))


def _channels(weight: Any) -> int:
    return weight.split_axes[0] if weight.kind == "lokr" else weight.channel_axis


def with_cores(
    config: PeftConfig, called: str, modules: Sequence[Module], cores: Mapping[str, bool]
) -> PeftConfig:
    """The config with `use_effective_conv2d`, by whether the convolutions have cores.

    Raises:
        UnsupportedAdapterError: if some of the modules with a window have a core and others do not.
    """
    windows = {module.name for module in modules if _has_window(module.place)}
    found = {name: has_core for name, has_core in cores.items() if name in windows}
    if len({*found.values()}) > 1:
        one, other = (
            next(n for n, has_core in found.items() if has_core == x) for x in (True, False)
        )
        raise UnsupportedAdapterError(
            f"`{one}` has {called} with a core and `{other}` without. PEFT has one setting for all "
            "modules. Use `save_adapter` or `save_merged`."
        )
    return config.replace(use_effective_conv2d=any(found.values()))


def _has_window(place: Place) -> bool:
    return any(place.sizes[axis] != 1 for group in place.inputs[1:] for axis in group)
