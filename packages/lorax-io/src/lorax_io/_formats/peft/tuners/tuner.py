"""`Tuner`, PEFT's word for a kind of adapter: its keys, its settings and its tensors."""

import collections
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lorax import Adapter

from ...._errors import UnsupportedAdapterError
from ...._places import Array, Factor, Place
from ...._torch_names import Linear, TorchNames
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
    # The alpha and scaling of modules whose config expresses the same scale differently.
    original_scaling: Mapping[str, Mapping[str, Any]] = {}


class Sides(NamedTuple):
    """The shape of a module's weight, inferred from its factors: (out, in, *window)."""

    out: int
    inputs: tuple[int, ...]


class Tuner:
    """One kind of adapter in PEFT: a row of `TUNERS`.

    Attributes:
        peft_type: its `peft_type` in a config.
        called: its name in messages.
        marks: the keys of its tensors in a module.
        tables: the keys among these that only an embedding has.
        common: the keys of tensors that all modules share and that are in no module.
        renamed: fields of `PeftConfig`, by their keys in this tuner's config if these differ.
        fields: the fields of `PeftConfig` that its config has besides the common ones.
        lacking: the common fields that its config does not have.
        defaults: PEFT's defaults, if they differ from those of LoRA.
        harmless: keys of its config that do not affect what its tensors mean.
        beyond: keys of unsupported features, unless they are null or false, with a description.
        init: the key for how factors are initialized.
        only_bias: the value of `bias` for training only the biases of adapted modules.
        folded: the factor to multiply when the scale is folded in.
        tells_shape: whether a module's tensors determine the shape of its weight.
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
        """Rejects an initialization that changes what the tensors mean."""

    def check_config(self, config: PeftConfig) -> None:
        """Rejects invalid combinations of settings, and warns about questionable ones."""

    def check_keys(self, keys: Collection[str], config: PeftConfig) -> None:
        """Rejects a file that lacks tensors that its config requires."""

    def mixes(self, kinds: Collection[str]) -> bool:
        """Whether one folder may contain adapters of all these kinds of `lorax`."""
        return len(kinds) == 1

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        """The keys of the tensors that a module may have."""
        return self.marks

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        """The adapter, without arrays, of a module whose tensors have these shapes."""
        raise NotImplementedError

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        """The keys and axes of an adapter's tensors, including those of frozen factors."""
        raise NotImplementedError

    def targets(self, config: PeftConfig, place: Place, module: str) -> bool | None:
        """Whether the config targets a module; None if the config alone does not determine it."""
        if place.torch_name.by_parameter:
            return config.targets_parameter(place.pattern_name(module))
        return config.targets(module)

    def spread(
        self, tensors: Mapping[str, Any], config: PeftConfig, places: Mapping[str, Place]
    ) -> Mapping[str, Any]:
        """The tensors, with shared ones repeated in each module."""
        return tensors

    def gathered(self, parts: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        """The tensors that modules share, from each module's part of them: the inverse of `spread`.

        Raises:
            UnsupportedAdapterError: if the parts are not of the same tensor.
        """
        return {}

    def separately_listed(self, modules: Sequence[Module]) -> list[Module]:
        """The modules that the config lists under a separate key, not as targets."""
        return []

    def bias(
        self, tensors: Mapping[str, Any], config: PeftConfig, module: str
    ) -> Callable[[Array], Array] | None:
        """A function from a module's bias to its new value; None if it is unchanged."""
        return None

    def needs_base(self, config: PeftConfig) -> str | None:
        """Why an adapter is incomplete without its base, as a clause; None if it is complete."""
        return None

    def written(self, config: PeftConfig) -> dict[str, Any]:
        """Further keys that PEFT requires in a config."""
        return {}

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        """The shape of a module's weight, from the shapes of its tensors."""
        raise NotImplementedError

    def check(self, config: PeftConfig, names: TorchNames, place: Place) -> None:
        """Rejects what PEFT does in addition to adapting one parameter."""

    def in_peft(self, config: PeftConfig, modules: Sequence[Module]) -> PeftConfig:
        """The config with further settings that PEFT needs to rebuild the same shapes.

        Raises:
            UnsupportedAdapterError: if no settings of PEFT give these shapes.
        """
        return config

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        """The ranks and scales: the most frequent ones, and patterns for all other modules."""
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
    """The alpha that gives the weight's scale; an int if it is integral, as PEFT writes it."""
    scaling = getattr(weight, "scaling", "standard")
    if weight.alpha is not None and (scaling == "rslora") == rslora:
        alpha = weight.alpha
    else:
        alpha = weight.scale * (math.sqrt(weight.rank) if rslora else weight.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def the_one(modules: Sequence[Module], called: str, label: str, of: Callable[[Any], Any]) -> Any:
    """The value of a setting that must be the same in all modules.

    Raises:
        UnsupportedAdapterError: if modules differ.
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
    """The most frequent value."""
    return collections.Counter(values.values()).most_common(1)[0][0]


def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """PEFT's pattern: an entry, by full name, for each module whose value is not the default.

    PEFT matches keys with the ends of names, so a name that is the end of another is anchored.
    """
    longer = {end for name in values for end in suffixes(name)[1:]}
    return {
        f"^{re.escape(name)}" if name in longer else name: value
        for name, value in values.items()
        if value != default
    }


def check_linear(place: Place, called: str) -> None:
    """Rejects names other than `Linear`, for kinds that PEFT supports only on linear layers."""
    check_flat(place, called)
    if not isinstance(place.torch_name, Linear):
        raise UnsupportedAdapterError(
            f"`{place.path}` has {called}, which PEFT has for linear layers alone, and it "
            f"is {type(place.torch_name).__name__}. Use `save_adapter` or `save_merged`."
        )


def check_flat(place: Place, called: str) -> None:
    """Rejects experts, and weights that PEFT cannot adapt at all."""
    if place.torch_name.by_parameter or not place.factors:
        raise UnsupportedAdapterError(
            f"`{place.path}` has {called}, which PEFT does not have for "
            f"{type(place.torch_name).__name__}. Use `save_adapter` or `save_merged`."
        )
