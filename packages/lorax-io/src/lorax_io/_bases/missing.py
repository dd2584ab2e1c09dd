"""Finds tensors that an adapter should have, according to its config and base, but lacks."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .._errors import AdapterFileError, warn
from .._formats.peft.config import PeftConfig


class Prefixes(NamedTuple):
    """How an adapter's names differ from those of a base: by their prefixes."""

    pairs: frozenset[tuple[str, str]]  # a prefix in the adapter, and the one in the base

    @classmethod
    def of(cls, matched: Iterable[tuple[str, str]]) -> "Prefixes":
        """The prefixes in which matched names, (adapter's, base's), differ."""
        return cls(frozenset(begins(ours, theirs) for ours, theirs in matched))

    def of_adapter(self, name: str) -> set[str]:
        """The names that a tensor of the base may have in the adapter."""
        return {
            ours + name[len(theirs) :] for ours, theirs in self.pairs if name.startswith(theirs)
        }


def begins(ours: str, theirs: str) -> tuple[str, str]:
    """What is left of two names without their common end, in whole parts."""
    left, right = ours.split("."), theirs.split(".")
    same = 0
    while same < min(len(left), len(right)) and left[-1 - same] == right[-1 - same]:
        same += 1
    begins = (parts[: len(parts) - same] for parts in (left, right))
    first, second = (".".join([*begin, ""]) if begin else "" for begin in begins)
    return first, second


def lacking(
    config: PeftConfig, shapes: Mapping[str, Any], matched: Mapping[str, str], saved: bool = True
) -> dict[str, str]:
    """The base's tensors that the adapter lacks, with the reason why it should have each.

    Args:
        config: the adapter's config.
        shapes: the base's tensors, by name.
        matched: the tensors that the adapter has: the base's name, by the adapter's.
        saved: whether to consider `modules_to_save`.
    """
    if not config.is_given:
        return {}
    prefixes = Prefixes.of(matched.items())
    present = set(matched.values())
    kinds = {_kind(name): name for name in sorted(present)}
    reasons: dict[str, str] = {}
    for name in shapes.keys() - present:
        for known in prefixes.of_adapter(name):
            module, _, parameter = known.rpartition(".")
            if saved and config.saves(module):
                reasons[name] = "`modules_to_save` of its config has it"
            elif config.targets_parameter(known):
                reasons[name] = "it is among the `target_parameters` of its config"
            elif parameter == "weight" and len(shapes[name].shape) > 1:
                targeted = config.targets(module)
                if targeted:
                    reasons[name] = "it is a target in its config"
                elif targeted is None and _kind(name) in kinds:
                    reasons[name] = f"`{kinds[_kind(name)]}` is adapted"
    return reasons


def _kind(name: str) -> str:
    """The name with its numbers, such as those of layers, replaced by `#`."""
    return re.sub(r"\d+", "#", name)


def check_lacking(base: object, reasons: Mapping[str, str], allowed: bool = False) -> None:
    """Rejects an adapter that lacks some of its tensors, or warns if that is allowed.

    Raises:
        AdapterFileError: naming the first of these tensors.
    """
    if not reasons:
        return
    name = min(reasons, key=_in_order)
    more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    message = f"lacks the tensors of `{name}` of {base}{more}: {reasons[name]}."
    if not allowed:
        raise AdapterFileError(
            f"{message} The file was truncated, or the adapter was not completely gathered when "
            "it was saved. If these should stay as they are in the base, pass `--allow-missing`.",
        )
    warn(f"{message} They stay as they are.")


def _in_order(name: str) -> list[Any]:
    """A sort key that puts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
