"""Turns off random choices in Python, which a compiled program would repeat in every call."""

import warnings

import torch

from .._errors import ModuleWarning

# Attributes of modules and configs, and the value that turns the random choice off.
_DRAWN_IN_PYTHON = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "apply_spec_augment": False,
}


def turn_off_host_choices(module: torch.nn.Module) -> None:
    """Turns off random choices in Python; warns about these, and about batch statistics."""
    drawn: set[str] = set()
    for owner in module.modules():
        for holder in (owner, getattr(owner, "config", None)):
            for name, neutral in _DRAWN_IN_PYTHON.items():
                if getattr(holder, name, None):
                    setattr(holder, name, neutral)
                    drawn.add(name)
    if drawn:
        warnings.warn(
            f"{', '.join(sorted(drawn))} of {type(module).__name__} draws random numbers in "
            "Python, which a compiled program would repeat in every call. It is turned off. To "
            "silence this warning, turn it off in the config.",
            ModuleWarning,
            stacklevel=4,
        )
    normalized = [
        name
        for name, owner in module.named_modules()
        if isinstance(owner, torch.nn.modules.batchnorm._BatchNorm) and owner.track_running_stats
    ]
    if normalized:
        warnings.warn(
            f"with train=True, `{normalized[0]}`{_more(normalized)} normalizes by the statistics "
            "of the batch, and its running statistics, which are not parameters, stay as they are. "
            "Without train=True it normalizes by its running statistics.",
            ModuleWarning,
            stacklevel=4,
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
