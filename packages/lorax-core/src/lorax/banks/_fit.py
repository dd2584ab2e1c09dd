"""One weight of a bank: adapters padded to a common form, and records of what they were."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter import Adapter, Neutral
from .._errors import PairError
from ..kinds.lora import LoraWeight, lora_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Records:
    """The ranks and scales of one path's adapters before padding, by slot.

    `alpha` is NaN if it is None. These are arrays and not static settings, so that replacing an
    adapter in a slot does not recompile programs.
    """

    is_present: np.ndarray  # [slots] bool
    rank: np.ndarray  # [slots] int32
    alpha: np.ndarray  # [slots] float64
    is_rslora: np.ndarray  # [slots] bool

    def scale(self) -> np.ndarray:
        """Returns the scale of each slot: [slots] float64."""
        scales = [
            lora_scale(int(rank), None if math.isnan(alpha) else float(alpha), _scaling(rslora))
            for rank, alpha, rslora in zip(self.rank, self.alpha, self.is_rslora, strict=True)
        ]
        return np.asarray(scales, np.float64)


def _scaling(is_rslora: Any) -> Any:
    return "rslora" if is_rslora else "standard"


def described(node: Any) -> str:
    return f"{node.kind} adapter" if isinstance(node, Adapter) else "parameter in full"


def neutral_of(node: Any) -> Mapping[str, Neutral] | None:
    """Returns the factors with which a node equals its base, or None if it has none."""
    return node.neutral() if isinstance(node, Adapter) else None


def is_free(neutral: Mapping[str, Neutral] | None) -> TypeGuard[Mapping[str, float]]:
    """Whether neutral factors are constants, independent of the base."""
    return neutral is not None and not any(map(callable, neutral.values()))


def blank_of(path: str, nodes: Sequence[Any], rank: int | None) -> Any:
    """Returns the node that all others are padded to: of the highest rank, with a scale of 1."""
    present = [node for node in nodes if node is not None]
    if not present:
        return None
    if not all(isinstance(node, LoraWeight) for node in present):
        return present[0]
    # a [*shared, *in, highest] and b [*shared, highest, *out]: a lower rank is padded with zeros.
    highest = max([node.rank for node in present] + ([] if rank is None else [rank]))
    first = _unscaled(present[0])
    shared = len(first.shared_axes)
    a = jax.ShapeDtypeStruct((*first.a.shape[:-1], highest), first.a.dtype)
    outputs = first.b.shape[shared + 1 :]
    b = jax.ShapeDtypeStruct((*first.b.shape[:shared], highest, *outputs), first.b.dtype)
    return dataclasses.replace(first, a=a, b=b, rank=highest)


def _unscaled(weight: LoraWeight) -> LoraWeight:
    return dataclasses.replace(weight, alpha=None, scaling="standard")


def emptied(stacked: Any) -> Any:
    """Returns the shapes of one slot of a stacked node."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def padded_to(path: str, blank: Any, node: Any) -> Any:
    """Returns a node padded to the shapes of the blank one.

    Raises:
        PairError: if it does not fit.
    """
    if blank is None:
        return None
    if node is None:
        neutral = neutral_of(blank)
        if not is_free(neutral):
            raise PairError(
                f"A slot of a bank without a {described(blank)} at `{path}` cannot stand for the "
                "base: its values would have to be those of the base. Give every adapter one, or "
                "adapt this weight with LoRA."
            )
        return blank.with_factors(
            {
                name: jnp.full(factor.shape, neutral[name], factor.dtype)
                for name, factor in blank.factors().items()
            }
        )
    if isinstance(node, LoraWeight) and isinstance(blank, LoraWeight):
        return _with_rank(path, blank, node)
    actual, expected = (_settings(each) for each in (node, blank))
    if actual != expected:
        raise PairError(
            f"The bank has {_listed(expected)} at `{path}`, but the adapter has "
            f"{_listed(actual)}. Only plain LoRA can have several ranks and scales in one bank; "
            "`as_lora` converts other kinds to it if that is exact."
        )
    return node


def _settings(node: Any) -> dict[str, Any]:
    settings = node.settings() if isinstance(node, Adapter) else {"kind": "full"}
    arrays = jax.tree.leaves(node)
    return settings | {
        "shapes": [x.shape for x in arrays],
        "dtypes": [str(x.dtype) for x in arrays],
    }


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _with_rank(path: str, blank: LoraWeight, node: LoraWeight) -> LoraWeight:
    shared = len(node.shared_axes)
    # [a 0] @ [b; 0]  =  a @ b. The gradient of the padding of a is x ⊗ (cotangent · 0), and that of
    # b is (x · 0) ⊗ cotangent: both are zero, so training keeps it zero.
    missing = blank.rank - node.rank
    if missing < 0:
        raise PairError(
            f"The adapter at `{path}` has rank {node.rank}, and the bank has room for "
            f"{blank.rank}. Stack the bank with rank={node.rank}, or lower the adapter's with "
            "`resize_adapter`."
        )
    padded = dataclasses.replace(
        _unscaled(node),
        a=_pad(node.a, node.a.ndim - 1, missing),
        b=_pad(node.b, shared, missing),
        rank=blank.rank,
    )
    actual, expected = _settings(padded), _settings(blank)
    if actual != expected:
        raise PairError(
            f"The bank has {_listed(expected)} at `{path}`, but the adapter has "
            f"{_listed(actual)}. All adapters must be for the same base and have the same dtype."
        )
    return padded


def _pad(array: Any, axis: int, missing: int) -> Any:
    return jnp.pad(array, [(0, missing if d == axis else 0) for d in range(array.ndim)])


def records_of(nodes: Sequence[Any]) -> Records:
    lora = [node if isinstance(node, LoraWeight) else None for node in nodes]
    return Records(
        np.asarray([node is not None for node in nodes]),
        np.asarray([node.rank if node else 1 for node in lora], np.int32),
        np.asarray(
            [math.nan if node is None or node.alpha is None else node.alpha for node in lora],
            np.float64,
        ),
        np.asarray([node is not None and node.scaling == "rslora" for node in lora]),
    )


def restored(record: Records | None, node: Any, slot: int) -> Any:
    if node is None or (record is not None and not record.is_present[slot]):
        return None
    row = jax.tree.map(lambda x: x[slot], node)
    if record is None or not isinstance(row, LoraWeight):
        return row
    rank, alpha = int(record.rank[slot]), float(record.alpha[slot])
    shared = len(row.shared_axes)
    return dataclasses.replace(
        row,
        # Without the padding: a [*shared, *in, rank], b [*shared, rank, *out].
        a=row.a[..., :rank],
        b=jax.lax.slice_in_dim(row.b, 0, rank, axis=shared),
        rank=rank,
        alpha=None if math.isnan(alpha) else alpha,
        scaling=_scaling(record.is_rslora[slot]),
    )
