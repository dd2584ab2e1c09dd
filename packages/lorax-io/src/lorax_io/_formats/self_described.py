"""Sources of formats without a config: ranks come from shapes, and alphas from scalar tensors."""

from collections.abc import Mapping

import numpy as np

from .._disk.tensors import check_finite
from .._errors import AdapterFileError, UnsupportedAdapterError
from .._torch_names import MAGNITUDE
from .peft.config import PeftConfig
from .peft.tuners import FACTOR, TUNERS
from .peft.tuners.tuner import most_frequent, pattern
from .source import Source, Stored

ALPHA = "alpha"


def self_described(
    tensors: Mapping[str, Stored],
    *,
    scales: Mapping[str, float] | None = None,
    part: str | None = None,
) -> Source:
    """The source of an adapter whose config is inferred from its tensors.

    Args:
        tensors: tensors by module and PEFT's key, without PEFT's prefix; a module may have a scalar
            `alpha`.
        scales: the scales of modules that are stored elsewhere. All other modules have their
            `alpha`, or a scale of 1.
        part: the part of a pipeline.

    Raises:
        AdapterFileError: if an alpha does not have factors, or a rank cannot be inferred.
        UnsupportedAdapterError: if the factors are of no known kind, or of several.
    """
    factors = {key: tensor for key, tensor in tensors.items() if not key.endswith(f".{ALPHA}")}
    alphas = {key.removesuffix(f".{ALPHA}"): x for key, x in tensors.items() if key not in factors}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in factors.items():
        if match := FACTOR.search(key):
            modules.setdefault(key[: match.start()], {})[match[1]] = tensor.shape
    if lonely := sorted(alphas.keys() - modules.keys()):
        raise AdapterFileError(f"has `{alphas[lonely[0]].name}`, but not its factors.")
    keys = {key for shapes in modules.values() for key in shapes}
    kinds = [kind for kind, tuner in TUNERS.items() if keys & {*tuner.marks}]
    if len(kinds) != 1:
        named = " and ".join(TUNERS[kind].called for kind in kinds) or "no kind that is known"
        raise UnsupportedAdapterError(f"has factors of {named}; they must be of one kind.")
    ranks = {module: _rank(module, shapes) for module, shapes in modules.items()}
    known = {module: _number(alpha) for module, alpha in alphas.items()}
    known |= dict.fromkeys((m for m, shapes in modules.items() if _is_full(shapes)), 1)
    known |= {module: (scales or {})[module] * ranks[module] for module in scales or {}}
    each = {module: known.get(module, rank) for module, rank in ranks.items()}
    r, alpha = most_frequent(ranks), most_frequent(each)
    config = PeftConfig(
        peft_type=kinds[0],
        r=r,
        lora_alpha=alpha,
        rank_pattern=pattern(ranks, r),
        alpha_pattern=pattern(each, alpha),
        target_modules=sorted(modules),
        use_dora=MAGNITUDE in keys,
        is_given=False,
    )
    return Source(factors, config, part=part)


def _rank(module: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The rank of a module, from the shape of its first factor that has one."""
    for key, axis in _RANK_AXES.items():
        shape = shapes.get(key, ())
        if len(shape) > axis:
            return max(shape[axis], 1)
    if _is_full(shapes):
        return 1
    raise AdapterFileError(f"has no factor of `{module}` that tells its rank.")


def _is_full(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether both matrices of LoKr are full, so that alpha is ignored."""
    return "lokr_w1" in shapes and "lokr_w2" in shapes


_RANK_AXES = {
    "lora_A.weight": 0,
    "lora_embedding_A": 0,
    "hada_t1": 0,
    "hada_w1_a": 1,
    "lokr_t2": 0,
    "lokr_w2_a": 1,
    "lokr_w1_a": 1,
}


def _number(tensor: Stored) -> float:
    """The value of a tensor with one number."""
    if int(np.prod(tensor.shape)) != 1:
        raise AdapterFileError(f"has `{tensor.name}` of shape {tensor.shape}, not one number.")
    array = np.asarray(tensor.view(), np.float64)
    check_finite(tensor.name, array)
    return float(array.reshape(()))
