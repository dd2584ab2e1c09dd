"""What PEFT calls a tuner: a kind of adapter, in PEFT's config and keys."""

import collections
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lorax import Adapter

from ...._errors import UnsupportedAdapterError
from ...._layouts import Layouts, Linear
from ...._places import Array, Factor, Place
from ..config import PeftConfig
from ..patterns import suffixes

Shapes = Mapping[str, tuple[int, ...]]


class Module(NamedTuple):
    """One adapted module, by the name that PEFT matches patterns with."""

    name: str
    place: Place
    weight: Any


class Scaling(NamedTuple):
    """The settings of a config that apply to all modules together."""

    config: PeftConfig
    # Alpha and scaling of modules whose config holds an equal scale in another form.
    original_scaling: Mapping[str, Mapping[str, Any]] = {}


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
        tables: those of them that only an embedding has.
        common: tensors of the whole adapter, which are in no module.
        renamed: keys of its config that are fields of `PeftConfig` under another name.
        fields: the fields of `PeftConfig` that its config has beside the common ones.
        lacking: the common ones that its config does not have.
        defaults: of PEFT, where they are not those of LoRA.
        harmless: keys that change nothing in the numbers that the tensors give.
        beyond: keys that change them in a way that is not read, unless they are null or false.
        init: the key for how the factors begin.
        only_bias: what a config says where the biases of adapted modules alone are trained.
        folded: the factor that is multiplied where the scale is folded in.
        tells_shape: whether the tensors of a module tell the shape of its weight.
    """

    peft_type: ClassVar[str]
    called: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    tables: ClassVar[tuple[str, ...]] = ()
    common: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    lacking: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    defaults: ClassVar[Mapping[str, Any]] = {}
    harmless: ClassVar[tuple[str, ...]] = ()
    beyond: ClassVar[Mapping[str, str]] = {}
    init: ClassVar[str | None] = None
    only_bias: ClassVar[str] = "lora_only"
    folded: ClassVar[str | None] = None
    tells_shape: ClassVar[bool] = True

    def writes(self, weight: Any) -> bool:
        """Whether an adapter is of this kind."""
        raise NotImplementedError

    def check_start(self, value: Any) -> None:
        """Refuses a value of `init` that changes what the tensors mean."""

    def check_config(self, config: PeftConfig) -> None:
        """Warns of what else a config says."""

    def check_keys(self, keys: Collection[str], config: PeftConfig) -> None:
        """Refuses a file that lacks what its config says that is in it."""

    def mixes(self, kinds: Collection[str]) -> bool:
        """Whether one folder may have adapters of all these kinds of the core."""
        return len(kinds) == 1

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        """The keys that a module may have."""
        return self.marks

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        """The adapter without arrays of a module with tensors of these shapes."""
        raise NotImplementedError

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        """Where the tensors of an adapter are stored, those of frozen factors among them."""
        raise NotImplementedError

    def targets(self, config: PeftConfig, place: Place, module: str) -> bool | None:
        """Whether the config says that a module is adapted; None where it does not say."""
        if place.layout.by_parameter:
            return config.targets_parameter(place.pattern_name(module))
        return config.targets(module)

    def spread(
        self, tensors: Mapping[str, Any], config: PeftConfig, places: Mapping[str, Place]
    ) -> Mapping[str, Any]:
        """The tensors, with those that modules have in common in each of them."""
        return tensors

    def gathered(self, parts: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        """The tensors that modules have in common, from the part of each, by path.

        Raises:
            UnsupportedAdapterError: where the parts are not of one tensor.
        """
        return {}

    def beside(self, modules: Sequence[Module]) -> list[Module]:
        """Those of the modules that are not targets in its config, but have their own key."""
        return []

    def bias(
        self, tensors: Mapping[str, Any], config: PeftConfig, module: str
    ) -> Callable[[Array], Array] | None:
        """The changed bias beside a module's weight; None where the adapter does not change it."""
        return None

    def needs_base(self, config: PeftConfig) -> str | None:
        """Why an adapter has no meaning without its base; None where it has."""
        return None

    def written(self, config: PeftConfig) -> dict[str, Any]:
        """Further keys, without which PEFT does not read a config."""
        return {}

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        """The shape of the weight, for a module whose layout nobody gave."""
        raise NotImplementedError

    def check(self, config: PeftConfig, names: Layouts, place: Place) -> None:
        """Refuses what PEFT does beyond the adapter of one parameter."""

    def in_peft(self, config: PeftConfig, modules: Sequence[Module]) -> PeftConfig:
        """The config with what PEFT alone has to know.

        Raises:
            UnsupportedAdapterError: where it has no key for it.
        """
        return config

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        """Rank and scale of every module: the most frequent ones, and patterns for the others."""
        ranks: dict[str, Any] = {module.name: module.weight.rank for module in modules}
        r = most_frequent(ranks)
        alphas = dict.fromkeys(ranks, r)
        if not fold_scale:
            alphas = {module.name: alpha_of(module.weight, False) for module in modules}
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


def the_one(modules: Sequence[Module], called: str, label: str, of: Callable[[Any], Any]) -> Any:
    """The common value of all modules, where a config has one key for all of them.

    Raises:
        UnsupportedAdapterError: where they have several.
    """
    owners = {of(module.weight): module.name for module in modules}
    if len(owners) > 1:
        (one, first), (other, second), *_ = owners.items()
        raise UnsupportedAdapterError(
            f"`{first}` has {called} of {label} {one}, and `{second}` of {other}. PEFT has one for "
            "all modules. Use `save_adapter` or `save_merged`."
        )
    return next(iter(owners))


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


def check_linear(place: Place, called: str) -> None:
    """Refuses layouts other than a linear layer, where PEFT has an adapter of these alone."""
    check_flat(place, called)
    if not isinstance(place.layout, Linear):
        raise UnsupportedAdapterError(
            f"`{place.path}` has {called}, which PEFT has for linear layers alone, and its layout "
            f"is {type(place.layout).__name__}. Use `save_adapter` or `save_merged`."
        )


def check_flat(place: Place, called: str) -> None:
    """Refuses layouts that PEFT has no such adapter for."""
    if place.layout.by_parameter or not place.factors:
        raise UnsupportedAdapterError(
            f"`{place.path}` has {called}, which PEFT does not have for a layout "
            f"{type(place.layout).__name__}. Use `save_adapter` or `save_merged`."
        )
