"""What PEFT calls a tuner: a kind of adapter, in PEFT's config and keys."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lorax import Adapter

from ...._errors import UnsupportedAdapterError
from ...._layouts import Layouts
from ...._places import Factor, Place
from ..config import PeftConfig
from ..patterns import suffixes

Shapes = Mapping[str, tuple[int, ...]]


class Module(NamedTuple):
    """One adapted module, by the name that PEFT matches patterns with."""

    name: str
    place: Place
    weight: Any


class Scaling(NamedTuple):
    """What a config says of all modules together."""

    config: PeftConfig
    unsaid: Mapping[str, Mapping[str, Any]] = {}  # alpha and scaling, where it has another form


class Sides(NamedTuple):
    """The shape of a module's weight as its factors tell it: (out, in, *window)."""

    out: int
    inputs: tuple[int, ...]


class Tuner:
    """One kind of adapter in PEFT: a row of `TUNERS`.

    Attributes:
        peft_type: what its configs say.
        called: what people call it.
        marks: what its keys end in; each begins a tensor's name in a module.
        renamed: keys of its config that are fields of `PeftConfig` under another name.
        fields: the fields of `PeftConfig` that its config has beside the common ones.
        harmless: keys that change nothing in the numbers that the tensors give.
        folded: the factor that is multiplied where the scale is folded in.
    """

    peft_type: ClassVar[str]
    called: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    renamed: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    harmless: ClassVar[tuple[str, ...]] = ()
    folded: ClassVar[str | None] = None

    def writes(self, weight: Any) -> bool:
        """Whether an adapter is of this kind."""
        raise NotImplementedError

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        """The keys that a module may have."""
        return self.marks

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        """The adapter without arrays of a module with tensors of these shapes."""
        raise NotImplementedError

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        """Where the tensors of an adapter are stored."""
        raise NotImplementedError

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        """The shape of the weight, for a module whose layout nobody gave."""
        raise NotImplementedError

    def check(self, config: PeftConfig, names: Layouts, place: Place) -> None:
        """Refuses what PEFT does beyond the adapter of one parameter."""

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        """Rank and scale of every module: the most frequent ones, and patterns for the others."""
        ranks: dict[str, Any] = {name: weight.rank for name, _, weight in modules}
        r = most_frequent(ranks)
        alphas = dict.fromkeys(ranks, r)
        if not fold_scale:
            alphas = {name: alpha_of(weight, False) for name, _, weight in modules}
        alpha = most_frequent(alphas)
        config = PeftConfig(
            peft_type=self.peft_type,
            r=r,
            lora_alpha=alpha,
            rank_pattern=pattern(ranks, r),
            alpha_pattern=pattern(alphas, alpha),
        )
        return Scaling(config)


def alpha_of(weight: Any, rslora: bool) -> float:
    """The alpha that gives the weight's scale; an integer where it is one, as PEFT writes it."""
    scaling = getattr(weight, "scaling", "standard")
    if weight.alpha is not None and (scaling == "rslora") == rslora:
        alpha = weight.alpha
    else:
        alpha = weight.scale * (math.sqrt(weight.rank) if rslora else weight.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def most_frequent(values: Mapping[str, Any]) -> Any:
    """The value that most of them have."""
    return collections.Counter(values.values()).most_common(1)[0][0]


def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """An entry for each module that has another value, by its full name.

    PEFT matches a key with the ends of names, so one that ends another name is tied to its begin.
    """
    longer = {end for name in values for end in suffixes(name)[1:]}
    return {
        f"^{re.escape(name)}" if name in longer else name: value
        for name, value in values.items()
        if value != default
    }


def check_flat(place: Place, called: str) -> None:
    """Refuses layouts that PEFT has no such adapter for."""
    if place.layout.by_parameter or not place.factors:
        raise UnsupportedAdapterError(
            f"`{place.path}` has {called}, which PEFT does not have for a layout "
            f"{type(place.layout).__name__}. Use `save_adapter` or `save_merged`."
        )
