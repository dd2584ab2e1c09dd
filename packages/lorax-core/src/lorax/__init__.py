"""LoRA for any JAX function: `lora`, `init_lora`, `merge_params`."""

import importlib.metadata

from ._adapter import (
    Adapter as Adapter,
    AdapterSpec as AdapterSpec,
    FrozenWeight as FrozenWeight,
)
from ._arrays import path_string as path_string
from ._axes import Axes as Axes
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
from ._spec import (
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    simple_spec as simple_spec,
    spec_from_rules as spec_from_rules,
)
from ._transform import lora as lora
from .kinds.dora import DoraSpec as DoraSpec, DoraWeight as DoraWeight
from .kinds.gralora import GraloraSpec as GraloraSpec, GraloraWeight as GraloraWeight
from .kinds.ia3 import IA3Spec as IA3Spec, IA3Weight as IA3Weight
from .kinds.locon import LoconSpec as LoconSpec, LoconWeight as LoconWeight
from .kinds.loha import LohaSpec as LohaSpec, LohaWeight as LohaWeight
from .kinds.lokr import LokrSpec as LokrSpec, LokrWeight as LokrWeight
from .kinds.lora import LoraSpec as LoraSpec, LoraWeight as LoraWeight
from .kinds.miss import MissSpec as MissSpec, MissWeight as MissWeight

__version__ = importlib.metadata.version("lorax-core")

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Axes",
    "DoraSpec",
    "DoraWeight",
    "Explanation",
    "FrozenWeight",
    "GraloraSpec",
    "GraloraWeight",
    "IA3Spec",
    "IA3Weight",
    "LORA_FREEZE",
    "LORA_FULL",
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
    "Pair",
    "PairError",
    "RankWarning",
    "SpecError",
    "UnadaptedWarning",
    "UnusedAdapterError",
    "UnusedAdapterWarning",
    "count_params",
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
]

# Tracebacks and reprs show the names that users import.
for _value in [globals()[_name] for _name in __all__]:
    if hasattr(_value, "__module__"):
        _value.__module__ = __name__
