"""Finds runs of equal layers in a module, and stacks their parameters for a scan.

The layers 0 to 29 of `model.layers` are one stack, whose parameters are called
`model.layers.0:30.self_attn.q_proj.weight`. Where kinds of layers alternate, such as sliding and
full attention, each has its own stack, `model.layers.0:30:2…` and `model.layers.1:30:2…`.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from .._errors import ModuleWarning, ScanError
from ._equal import difference
from ._state import tied_names


class Stack(NamedTuple):
    """Equal layers of one list, whose parameters are stacked."""

    owner: str  # the name of the list of layers
    numbers: range

    @property
    def name(self) -> str:
        """The stack's name, in place of a layer's: `model.layers.0:30`."""
        step = f":{self.numbers.step}" if self.numbers.step > 1 else ""
        return f"{inside(self.owner)}{self.numbers.start}:{self.numbers.stop}{step}"

    @property
    def layers(self) -> list[str]:
        """The name of each layer."""
        return [f"{inside(self.owner)}{number}" for number in self.numbers]


def inside(module: str) -> str:
    """The prefix of the names in a module; empty for the outermost."""
    return f"{module}." if module else ""


def named_module(module: str) -> str:
    """A module's name for a message."""
    return f"`{module}`" if module else "the module"


class Run(NamedTuple):
    """Consecutive layers that repeat with a period: all equal, or the same few in turn."""

    owner: str
    start: int
    period: int
    times: int

    @property
    def numbers(self) -> range:
        return range(self.start, self.start + self.period * self.times)

    @property
    def stacks(self) -> list[Stack]:
        """The stacks of the run, one for each layer of the period."""
        stop = self.numbers.stop
        starts = range(self.start, self.start + self.period)
        return [Stack(self.owner, range(first, stop, self.period)) for first in starts]


# For each name in `params`, the names of the module's tensors that it holds: usually only itself.
Members = Mapping[str, tuple[str, ...]]


def members_of(names: Iterable[str], runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Maps each name in `params` to the names of the module's tensors that it holds."""
    stacks = {layer: stack for run in runs for stack in run.stacks for layer in stack.layers}
    members: dict[str, tuple[str, ...]] = {}
    for name in names:
        layer = next((prefix for prefix in _prefixes(name) if prefix in stacks), None)
        if layer is None:
            members[name] = (name,)
        else:
            stack, rest = stacks[layer], name[len(layer) :]
            members[f"{stack.name}{rest}"] = tuple(f"{each}{rest}" for each in stack.layers)
    return members


def stacked(arrays: Mapping[str, Any], members: Members, stack: Callable[[Any], Any]) -> Any:
    """The arrays of a module, with those of equal layers stacked by `stack`."""
    return {
        name: arrays[name] if parts == (name,) else stack([arrays[part] for part in parts])
        for name, parts in members.items()
    }


def unstacked(arrays: Mapping[str, Any], members: Members) -> dict[str, Any]:
    """The inverse of `stacked`."""
    arrays_by_name: dict[str, Any] = {}
    for name, parts in members.items():
        if parts == (name,):
            arrays_by_name[name] = arrays[name]
        else:
            arrays_by_name |= {part: arrays[name][k] for k, part in enumerate(parts)}
    return arrays_by_name


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def runs_in(module: nn.Module, names: Iterable[str]) -> list[Run]:
    """The runs that were scanned, by the names of parameters; empty if none is stacked."""
    owners = {match[1] or "" for name in names if (match := _STACK.match(name))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `from_torch` has warned
        return runs_of(module, owners)


_STACK = re.compile(r"(?:(.+?)\.)?\d+:\d+(:\d+)?\.")


def runs_of(module: nn.Module, wanted: bool | Collection[str]) -> list[Run]:
    """The runs of equal layers in the outermost lists of a module.

    Args:
        module: any module.
        wanted: whether to look for runs, or the names of the lists to look in.

    Raises:
        ScanError: if there are no runs, or a named list has none; the message says why.

    Warns:
        ModuleWarning: about layers of these lists that are not in a run.
    """
    if not wanted:
        return []
    named = None if wanted is True else [wanted] if isinstance(wanted, str) else list(wanted)
    lists = {path: each for path, each in module.named_modules() if _is_list(each)}
    if unknown := [path for path in named or () if path not in lists]:
        raise ScanError(
            f"scan_layers: {type(module).__name__} has no list of layers called {unknown[0]!r}. "
            f"It has {', '.join(map(repr, lists)) or 'none'}."
        )
    tied = {name for names in tied_names(module).items() for name in (names[0], *names[1])}
    runs: list[Run] = []
    why: dict[str, str] = {}
    for path, layers in lists.items():
        if any(path.startswith(inside(run.owner)) for run in runs):
            continue  # within a layer
        if named is None and not any(_has_parts(layer) for layer in layers):
            continue
        if named is None or path in named:
            of_path, why[path] = _runs(path, list(layers), tied)
            runs += of_path
    failed = [path for path in named or () if not any(run.owner == path for run in runs)]
    if failed or not runs:
        reasons = [why[path] for path in failed or why if why[path]]
        raise ScanError(
            f"scan_layers: {type(module).__name__} has no equal layers in a row. "
            + (" ".join(reasons) or "It has no list of layers.")
        )
    for path in {run.owner: None for run in runs}:
        numbers = {number for run in runs if run.owner == path for number in run.numbers}
        rest = [number for number in range(len(lists[path])) if number not in numbers]
        if rest:
            warnings.warn(
                f"scan_layers: the layers {', '.join(map(str, rest))} of {named_module(path)} are "
                f"not scanned. {why[path]}",
                ModuleWarning,
                stacklevel=5,
            )
    return runs


def _is_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1


def _has_parts(layer: nn.Module) -> bool:
    """Whether a layer has submodules with parameters, unlike the linear layers of a head."""
    return any(next(child.parameters(), None) is not None for child in layer.children())


def _runs(path: str, layers: list[nn.Module], tied: set[str]) -> tuple[list[Run], str]:
    """The runs of a list of layers, and why its first two different layers differ."""
    kinds, why = _kinds(path, layers, tied)
    runs: list[Run] = []
    start = 0
    while start < len(kinds):
        period, times = _longest(kinds[start:])
        if times > 1:
            runs.append(Run(path, start, period, times))
        start += period * times
    return runs, why


def _longest(kinds: list[int]) -> tuple[int, int]:
    """The period and the number of repetitions that cover most of the beginning of a list."""
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        times = 1
        while kinds[times * period : (times + 1) * period] == kinds[:period]:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _kinds(path: str, layers: list[nn.Module], tied: set[str]) -> tuple[list[int], str]:
    """For each layer, the index of the first equal one; and why the first two that differ do."""
    kinds: list[int] = []
    why = ""
    for number, layer in enumerate(layers):
        names = [f"{inside(path)}{number}.{name}" for name, _ in layer.named_parameters()]
        if not names or tied.intersection(names):
            if names and not why:
                why = f"`{min(tied.intersection(names))}` is tied to another parameter."
            kinds.append(-1 - number)  # like no other
            continue
        first = [k for k in dict.fromkeys(kinds) if k >= 0]
        reasons = {k: difference(layers[k], layer, number - k) for k in first}
        same = next((k for k, reason in reasons.items() if reason is None), number)
        if same == number and first and not why:
            reason = reasons[first[0]]
            why = f"Layer {number} of {named_module(path)} differs from layer {first[0]}: {reason}."
        kinds.append(same)
    return kinds, why
