"""LoRA for any JAX function: `lora`, `init_lora`, `merge_params`."""

import importlib.metadata

from ._adapter import (
    Adapter as Adapter,
    AdapterSpec as AdapterSpec,
    FrozenWeight as FrozenWeight,
    adapter_from_settings as adapter_from_settings,
)
from ._arrays import path_string as path_string
from ._axes import Axes as Axes
from ._collect import collect_starts as collect_starts
from ._difference import adapter_difference as adapter_difference
from ._dropout import with_dropout as with_dropout
from ._errors import (
    LoraxError as LoraxError,
    MaterializeError as MaterializeError,
    MaterializeWarning as MaterializeWarning,
    PairError as PairError,
    RankWarning as RankWarning,
    SpecError as SpecError,
    UnadaptedWarning as UnadaptedWarning,
    UnusedAdapterError as UnusedAdapterError,
    UnusedAdapterWarning as UnusedAdapterWarning,
)
from ._explain import Explanation as Explanation, explain as explain
from ._infer import infer_spec as infer_spec
from ._init import init_lora as init_lora
from ._merge import (
    count_params as count_params,
    materialize as materialize,
    merge_params as merge_params,
    unmerge as unmerge,
)
from ._pair import Pair as Pair
from ._ranks import eva_ranks as eva_ranks
from ._spec import (
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    simple_spec as simple_spec,
    spec_from_rules as spec_from_rules,
)
from ._transform import lora as lora
from .kinds.adalora import (
    AdaloraPruner as AdaloraPruner,
    AdaloraSpec as AdaloraSpec,
    AdaloraState as AdaloraState,
    AdaloraWeight as AdaloraWeight,
    adalora_orthogonality as adalora_orthogonality,
    adalora_pruner as adalora_pruner,
)
from .kinds.bdlora import BdloraSpec as BdloraSpec, BdloraWeight as BdloraWeight
from .kinds.collected import (
    CordaStart as CordaStart,
    EvaStart as EvaStart,
    LoraGAStart as LoraGAStart,
)
from .kinds.delora import DeloraSpec as DeloraSpec, DeloraWeight as DeloraWeight
from .kinds.dora import DoraSpec as DoraSpec, DoraWeight as DoraWeight
from .kinds.gralora import GraloraSpec as GraloraSpec, GraloraWeight as GraloraWeight
from .kinds.ia3 import IA3Spec as IA3Spec, IA3Weight as IA3Weight
from .kinds.locon import LoconSpec as LoconSpec, LoconWeight as LoconWeight
from .kinds.loha import LohaSpec as LohaSpec, LohaWeight as LohaWeight
from .kinds.lokr import LokrSpec as LokrSpec, LokrWeight as LokrWeight
from .kinds.lora import LoraSpec as LoraSpec, LoraWeight as LoraWeight
from .kinds.lora_fa import LoraFASpec as LoraFASpec, LoraFAWeight as LoraFAWeight
from .kinds.miss import MissSpec as MissSpec, MissWeight as MissWeight
from .kinds.oft import OftSpec as OftSpec, OftWeight as OftWeight
from .kinds.tokens import TokensSpec as TokensSpec, TokensWeight as TokensWeight
from .kinds.vera import VeraSpec as VeraSpec, VeraWeight as VeraWeight

__version__ = importlib.metadata.version("lorax-core")

__all__ = [
    "AdaloraPruner",
    "AdaloraSpec",
    "AdaloraState",
    "AdaloraWeight",
    "Adapter",
    "AdapterSpec",
    "Axes",
    "BdloraSpec",
    "BdloraWeight",
    "CordaStart",
    "DeloraSpec",
    "DeloraWeight",
    "DoraSpec",
    "DoraWeight",
    "EvaStart",
    "Explanation",
    "FrozenWeight",
    "GraloraSpec",
    "GraloraWeight",
    "IA3Spec",
    "IA3Weight",
    "LORA_FREEZE",
    "LORA_FULL",
    "LoraFASpec",
    "LoraFAWeight",
    "LoraGAStart",
    "LoconSpec",
    "LoconWeight",
    "LohaSpec",
    "LohaWeight",
    "LokrSpec",
    "LokrWeight",
    "LoraSpec",
    "LoraWeight",
    "LoraxError",
    "MaterializeError",
    "MaterializeWarning",
    "MissSpec",
    "MissWeight",
    "OftSpec",
    "OftWeight",
    "Pair",
    "PairError",
    "RankWarning",
    "SpecError",
    "TokensSpec",
    "TokensWeight",
    "UnadaptedWarning",
    "UnusedAdapterError",
    "UnusedAdapterWarning",
    "VeraSpec",
    "VeraWeight",
    "adalora_orthogonality",
    "adalora_pruner",
    "adapter_difference",
    "adapter_from_settings",
    "collect_starts",
    "count_params",
    "eva_ranks",
    "explain",
    "infer_spec",
    "init_lora",
    "lora",
    "materialize",
    "merge_params",
    "path_string",
    "simple_spec",
    "spec_from_rules",
    "unmerge",
    "with_dropout",
]

# Tracebacks and reprs show the names that users import.
for _value in [globals()[_name] for _name in __all__]:
    if hasattr(_value, "__module__"):
        _value.__module__ = __name__
