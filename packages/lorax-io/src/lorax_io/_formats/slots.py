"""Matches the tensors of an adapter with those that the names and the config allow.

Unknown and missing tensors are errors. PEFT ignores the former, warns about the latter, and lets a
file replace base weights.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .._bases.ties import is_embedding, is_head
from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError, warn
from .._places import Place, packed_shape
from .._torch_names import MAGNITUDE, Embedding, TorchName, tensor_name
from .._tree import suggestion
from .biases import is_bias
from .peft.config import PeftConfig
from .peft.tuners import FACTOR, TUNERS
from .peft.tuners.lora import BIAS, MID
from .source import Source, Stored
from .wrappers import factor_prefix, wrapper_depths

WHOLE = "whole"
Places = Mapping[str, Place]

_SAVED_AGAIN = ("embed_tokens", "lm_head")
# Parts of keys by which adapters of unsupported kinds are recognized.
_OTHERS = {
    "lora_diag": "KaSA",
    ".oft_r.": "OFT as PEFT before 0.15 had it",
    "gralora_A_general": "GraLoRA with a second product",
    "gralora_B_general": "GraLoRA with a second product",
    "boft_": "BOFT",
    "randlora_": "RandLoRA",
}


class Slot(NamedTuple):
    """Where a tensor belongs."""

    path: str  # of the parameter
    entry: tuple[int, ...]  # the index of its module into the stack
    key: str  # of a factor, or "whole"


# The tensors of each parameter, by path and slot.
SlotTensors = dict[str, dict[Slot, Stored]]


def find(source: Source, places: Places) -> SlotTensors:
    """Assigns each tensor to its slot; unknown and missing tensors are errors."""
    source.tuner.check_keys(source.tensors.keys(), source.config)
    slots = _slots(source, places)
    biases = {
        module for place in places.values() if is_bias(place) for module in place.modules.values()
    }
    slots_of: SlotTensors = {}
    for key, tensor in source.tensors.items():
        if key.endswith(f".{BIAS}"):
            _check_bias(key, biases, source.config)
            continue
        if key not in slots:
            _check_needless(source, key, slots, places)
            continue
        slot = slots[key]
        if slot.key == WHOLE and not _may_be_whole(source.config, key):
            if not is_of_vocabulary(key, places[slot.path].torch_name):
                raise _needless_whole(source.config, tensor)
            warn(
                f"has the whole of `{key}`, which its config does not list. PEFT saves it so where "
                "the vocabulary was resized; it replaces that of the base."
            )
        slots_of.setdefault(slot.path, {})[slot] = tensor
    _check_targets(source, slots_of, places)
    return slots_of


def _check_bias(key: str, biases: Collection[str], config: PeftConfig) -> None:
    module = key.removesuffix(f".{BIAS}")
    if not config.lora_bias:
        raise UnsupportedAdapterError(
            f"has `{key}`, a bias in its factors, and `lora_bias` of its config does not say so."
        )
    if module not in biases:
        raise UnsupportedAdapterError(
            f"has `{key}`, a bias in the factors of `{module}`, and `{module}` has none "
            "in the base. Merge the adapter in PEFT."
        )


def is_of_vocabulary(key: str, torch_name: TorchName | None = None) -> bool:
    """Whether a tensor is an embedding or head, which PEFT saves if the vocabulary was resized."""
    module, _, parameter = key.rpartition(".")
    is_table = isinstance(torch_name, Embedding) or is_embedding(module) or is_head(module)
    return parameter == "weight" and is_table and not module.endswith(".base_layer")


def _slots(source: Source, places: Places) -> dict[str, Slot]:
    """The slot of every tensor that is allowed, by module and key."""
    experts = [
        (module, place)
        for place in places.values()
        for module in place.modules.values()
        if place.torch_name.by_parameter and source.tuner.targets(source.config, place, module)
    ]
    depths = wrapper_depths(experts)
    wrapped = {module for module, _ in experts}
    unwrapped = set[str]()
    slots: dict[str, Slot] = {}
    for path, place in places.items():
        adaptable = source.tuner.keys(place, source.config) if place.factors else ()
        parameter = place.torch_name.parameter
        for index, module in place.modules.items():
            prefix = factor_prefix(place, module, depths)
            keys = {f"{prefix}.{key}": key for key in adaptable}
            if place.torch_name.by_parameter and place.pattern_name(module) not in depths:
                if module in wrapped | unwrapped:
                    keys = {}  # the module's factors belong to another of its parameters
                unwrapped.add(module)
            keys[tensor_name(module, parameter)] = WHOLE
            if parameter == "bias":
                keys[f"{module}.base_layer.bias"] = WHOLE
            for key, kind in keys.items():
                slot = Slot(path, index, kind)
                if slots.setdefault(key, slot) != slot:
                    raise AdapterMismatchError(
                        f"`names` gives `{slots[key].path}` and `{path}` the same tensor `{key}`."
                    )
    return slots


def _needless_whole(config: PeftConfig, tensor: Stored) -> AdapterFileError:
    """The error for a tensor that is not a factor, nor a whole weight by the config."""
    if config.is_given:
        return AdapterFileError(
            f"`{tensor.name}` would replace a base weight, and neither `modules_to_save` nor "
            "`bias` of its config says so."
        )
    return AdapterFileError(
        f"has `{tensor.name}`, which is not a factor of a supported kind, and the file has no "
        "config that describes it. Merge the adapter with the library that wrote it."
    )


def _may_be_whole(config: PeftConfig, key: str) -> bool:
    module, _, parameter = key.rpartition(".")
    if config.saves(module):
        return True
    adapted = module.endswith(".base_layer")
    return parameter == "bias" and (config.bias == "all" or (adapted and config.bias != "none"))


def _check_needless(source: Source, key: str, slots: Mapping[str, Slot], places: Places) -> None:
    """Accepts a tensor without a slot if PEFT writes it redundantly; raises for all others."""
    tensor = source.tensors[key]
    module = key.removesuffix(".base_layer.weight")
    siblings = {f"{module}.{mark}" for mark in source.tuner.marks} & slots.keys()
    factors = siblings & source.tensors.keys()
    if module != key and factors:
        _check_copy(tensor, module, places[slots[min(factors)].path])
        return
    _check_kind(source, tensor, key)
    if match := FACTOR.search(key):
        module = key[: match.start()]
        known = [slot_key.removesuffix(match[0]) for slot_key in slots if match[0] in slot_key]
        raise AdapterMismatchError(
            f"adapts the module `{module}`, which is not in `names`.{suggestion(module, known)}"
        )
    raise AdapterMismatchError(
        f"has `{tensor.name}`, which is not a factor and does not fit a parameter in `names`."
    )


def _check_kind(source: Source, tensor: Stored, key: str) -> None:
    """Rejects a tensor of another kind of adapter than the config's."""
    kinds = dict(_OTHERS)
    for tuner in TUNERS.values():
        kinds |= {
            f".{mark}": tuner.called for mark in tuner.marks if mark not in source.tuner.marks
        }
    if not source.config.use_dora:
        kinds[MAGNITUDE] = "DoRA, with a magnitude for each output"
    has_cores = "is for convolutions alone" if not source.config.is_given else "PEFT does not have"
    kinds[MID] = f"LoRA with a Tucker core, which {has_cores}"
    for mark, description in kinds.items():
        if key.endswith(mark) if mark.startswith(".") else mark in key:
            raise UnsupportedAdapterError(
                f"`{tensor.name}` is of an adapter that is {description}."
            )


def _check_copy(tensor: Stored, module: str, place: Place) -> None:
    """Accepts the copy of the base's weight that PEFT saves with an adapted embedding or head."""
    if (
        not isinstance(place.torch_name, Embedding)
        and module.rpartition(".")[2] not in _SAVED_AGAIN
    ):
        raise AdapterFileError(f"`{tensor.name}` would replace a base weight.")
    wanted = packed_shape(place.whole, place.sizes)
    if tensor.shape != wanted:
        raise AdapterMismatchError(
            f"has `{tensor.name}` of shape {tensor.shape}, where the base has {wanted}: it belongs "
            "to a base of another vocabulary."
        )


def _check_targets(source: Source, slots_of: SlotTensors, places: Places) -> None:
    """Checks that the modules with tensors are exactly the targets of the config."""
    config = source.config
    for path, place in places.items():
        keys = {slot.key for slot in slots_of.get(path, ())}
        for module in place.modules.values():
            if config.saves(module) and keys != {WHOLE}:
                raise AdapterFileError(
                    f"`modules_to_save` of its config has `{module}`, but the file lacks "
                    f"`{module}.{place.torch_name.parameter}`."
                )
            if not place.factors or config.saves(module):
                continue
            targeted = source.tuner.targets(config, place, module)
            if targeted is False and keys - {WHOLE}:
                raise AdapterFileError(
                    f"has factors for `{module}`, which is not a target in its config; PEFT would "
                    "ignore them."
                )
            if targeted and not keys - {WHOLE}:
                raise AdapterFileError(
                    f"lacks the factors of `{module}`, which is a target in its config."
                )
