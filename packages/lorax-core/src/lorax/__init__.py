"""LoRA for any JAX function: `lora`, `init_lora`, `merge_params`."""

import importlib.metadata

from . import bases, kinds, rules
from ._adapter import Adapter as Adapter, adapter_from_settings as adapter_from_settings
from ._adapter_spec import AdapterSpec as AdapterSpec
from ._arrays import path_string as path_string
from ._axes import Axes as Axes
from ._base import QuantizedWeight as QuantizedWeight
from ._collect import collect_starts as collect_starts
from ._difference import adapter_difference as adapter_difference
from ._dropout import with_dropout as with_dropout
from ._errors import (
    ArgumentError as ArgumentError,
    LoraxError as LoraxError,
    LoraxWarning as LoraxWarning,
    MaterializeError as MaterializeError,
    MaterializeWarning as MaterializeWarning,
    MissingPackageError as MissingPackageError,
    PairError as PairError,
    RankWarning as RankWarning,
    SlotError as SlotError,
    SpecError as SpecError,
    UnadaptedWarning as UnadaptedWarning,
    UnquantizedWarning as UnquantizedWarning,
    UnusedAdapterError as UnusedAdapterError,
    UnusedAdapterWarning as UnusedAdapterWarning,
)
from ._explain import Explanation as Explanation, explain as explain
from ._frozen_weight import FrozenWeight as FrozenWeight
from ._infer import infer_spec as infer_spec
from ._init import init_lora as init_lora
from ._merge import (
    Requantized as Requantized,
    count_params as count_params,
    materialize as materialize,
    merge_params as merge_params,
    unmerge as unmerge,
)
from ._pair import Pair as Pair
from ._quantize import dequantize as dequantize, quantize as quantize
from ._ranks import eva_ranks as eva_ranks
from ._spec import (
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    simple_spec as simple_spec,
    spec_from_rules as spec_from_rules,
)
from ._transform import lora as lora
from .algebra import (
    Approximation as Approximation,
    Extraction as Extraction,
    as_lora as as_lora,
    combine_adapters as combine_adapters,
    extract_lora as extract_lora,
    resize_adapter as resize_adapter,
)
from .banks import (
    AdapterBank as AdapterBank,
    InterleavedBank as InterleavedBank,
    drop_adapter as drop_adapter,
    interleave_adapters as interleave_adapters,
    mix_adapters as mix_adapters,
    select_adapters as select_adapters,
    set_adapter as set_adapter,
    stack_adapters as stack_adapters,
    unstack_adapters as unstack_adapters,
    with_scales as with_scales,
)
from .bases.fp8 import FP8 as FP8
from .bases.int4 import Int4 as Int4
from .bases.int8 import Int8 as Int8
from .bases.mxfp4 import MXFP4 as MXFP4
from .bases.nf4 import NF4 as NF4
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
from .kinds.oft import OftSpec as OftSpec, OftWeight as OftWeight, project_oft as project_oft
from .kinds.tokens import TokensSpec as TokensSpec, TokensWeight as TokensWeight
from .kinds.vera import VeraSpec as VeraSpec, VeraWeight as VeraWeight

__version__ = importlib.metadata.version("lorax-core")

__all__ = [
    "AdaloraPruner",
    "AdaloraSpec",
    "AdaloraState",
    "AdaloraWeight",
    "Adapter",
    "AdapterBank",
    "AdapterSpec",
    "Approximation",
    "ArgumentError",
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
    "Extraction",
    "FP8",
    "FrozenWeight",
    "GraloraSpec",
    "GraloraWeight",
    "IA3Spec",
    "IA3Weight",
    "Int4",
    "Int8",
    "InterleavedBank",
    "LORA_FREEZE",
    "LORA_FULL",
    "LoconSpec",
    "LoconWeight",
    "LohaSpec",
    "LohaWeight",
    "LokrSpec",
    "LokrWeight",
    "LoraFASpec",
    "LoraFAWeight",
    "LoraGAStart",
    "LoraSpec",
    "LoraWeight",
    "LoraxError",
    "LoraxWarning",
    "MXFP4",
    "MaterializeError",
    "MaterializeWarning",
    "MissSpec",
    "MissWeight",
    "MissingPackageError",
    "NF4",
    "OftSpec",
    "OftWeight",
    "Pair",
    "PairError",
    "QuantizedWeight",
    "RankWarning",
    "Requantized",
    "SlotError",
    "SpecError",
    "TokensSpec",
    "TokensWeight",
    "UnadaptedWarning",
    "UnquantizedWarning",
    "UnusedAdapterError",
    "UnusedAdapterWarning",
    "VeraSpec",
    "VeraWeight",
    "adalora_orthogonality",
    "adalora_pruner",
    "adapter_difference",
    "adapter_from_settings",
    "as_lora",
    "collect_starts",
    "combine_adapters",
    "count_params",
    "dequantize",
    "drop_adapter",
    "eva_ranks",
    "explain",
    "extract_lora",
    "infer_spec",
    "init_lora",
    "interleave_adapters",
    "lora",
    "materialize",
    "merge_params",
    "mix_adapters",
    "path_string",
    "project_oft",
    "quantize",
    "resize_adapter",
    "select_adapters",
    "set_adapter",
    "simple_spec",
    "spec_from_rules",
    "stack_adapters",
    "unmerge",
    "unstack_adapters",
    "with_dropout",
    "with_scales",
]

# Tracebacks and reprs show the names that users import.
for _module in (bases, kinds, rules):
    for _name in _module.__all__:
        getattr(_module, _name).__module__ = _module.__name__
for _value in [globals()[_name] for _name in __all__]:
    if hasattr(_value, "__module__"):
        _value.__module__ = __name__
