"""`eva_ranks`: distributes ranks by the variance that principal components explain."""

import dataclasses
import math
from typing import Any

import jax

from ._adapter_spec import AdapterSpec
from ._collect import Collected
from ._errors import SpecError
from ._pair import flatten_params
from ._spec import LORA_FREEZE


def eva_ranks(spec: Any, collected: Collected) -> Any:
    """Returns a spec whose ranks follow the variance that components of the inputs explain.

    The sum of all ranks is the budget. Components are granted in order of the share of variance
    that they explain, up to `rho` times its rank for each weight. `alpha` changes with the rank, so
    that the scale is kept. A stack of weights has a single rank: one of its components costs as
    many ranks as the stack has entries, and its share is their mean. A weight that gets no
    component is frozen. This is the redistribution of `peft.EvaConfig`.

    Args:
        spec: the spec that `collect_starts` was given; weights with `EvaStart(rho=…)` share ranks.
        collected: the result of `collect_starts`.

    Returns:
        A spec tree for `init_lora`, with the same `collected`.

    Raises:
        SpecError: if `collected` has a path that the spec does not have, or does not adapt.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import EvaStart, LoraSpec, collect_starts, eva_ranks
        >>> model = lambda params, x: (x @ params["v"], x[:, :1] @ params["w"])
        >>> params = {"v": jnp.ones((5, 3)), "w": jnp.ones((1, 3))}
        >>> spec = {"v": LoraSpec(1, init=EvaStart(rho=2.0)), "w": LoraSpec(1, init="eva")}
        >>> x = jax.random.normal(jax.random.key(0), (8, 5))
        >>> ranks = eva_ranks(spec, collect_starts(model, params, spec, [x]))
        >>> ranks["v"].rank, ranks["w"].rank
        (1, 1)
    """
    is_leaf = lambda node: node is None or isinstance(node, AdapterSpec)  # noqa: E731
    leaves, structure = flatten_params(jax.tree.map(_Opaque, spec, is_leaf=is_leaf))
    specs = {path: leaf.spec for path, leaf in leaves}
    if unknown := sorted(collected.keys() - specs.keys()):
        raise SpecError(f"`collected` has `{unknown[0]}`, which the spec does not have.")
    ratios = {path: x["ratios"] for path, x in collected.items() if "ratios" in x}
    for path in ratios:
        if getattr(specs[path], "collects", None) is None:
            raise SpecError(
                f"`{path}` has the spec {specs[path]!r}, whose rank cannot be redistributed, and "
                "`collected` has its components. Pass the spec that `collect_starts` was given."
            )
    budget = sum(len(ratio) * specs[path].size for path, ratio in ratios.items())
    shares = [
        (-float(share), path, len(ratio))
        for path, ratio in ratios.items()
        for share in ratio.mean(0)
    ]
    ranks = dict.fromkeys(ratios, 0)
    for _, path, cost in sorted(shares, key=lambda item: item[0]):
        if cost <= budget:
            budget, ranks[path] = budget - cost, ranks[path] + 1
    news = [
        _with_rank(spec, ranks[path]) if path in ranks else spec for path, spec in specs.items()
    ]
    return jax.tree.unflatten(structure, news)


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Wraps a leaf of a spec tree, so that tree functions treat it as one."""

    spec: Any


def _with_rank(spec: Any, rank: int) -> Any:
    if rank == 0:
        return LORA_FREEZE
    if not hasattr(spec, "rank"):
        return dataclasses.replace(spec, spec=_with_rank(spec.spec, rank))
    if spec.alpha is None:
        return spec.with_size(rank)
    ratio = rank / spec.rank
    # scale = alpha / rank, or alpha / √rank for rsLoRA, is kept.
    alpha = spec.alpha * (math.sqrt(ratio) if spec.scaling == "rslora" else ratio)
    return dataclasses.replace(spec, rank=rank, alpha=alpha)
