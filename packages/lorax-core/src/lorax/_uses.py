"""Records of how weights are used, and the warnings about them.

The interpreter records every use of every weight. The warnings and errors of `lora` and the table
of `explain` are made from this record.
"""

import dataclasses
import warnings
from collections.abc import Hashable, Sequence

from ._errors import (
    MaterializeError,
    MaterializeWarning,
    UnusedAdapterError,
    UnusedAdapterWarning,
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation's use of one weight.

    Attributes:
        source: the path of the parameter, or a position inside a shared body.
        kind: "product" (a dot or a convolution), "rows" (entries picked, and terms added to them),
            "materialized" or "returned".
        primitive: the name of the primitive.
        shape: the shape of the weight there.
        line: the user's source line, or empty.
        reason: why a weight was materialized, as a clause whose subject is the primitive.
    """

    source: Hashable
    kind: str
    primitive: str
    shape: tuple[int, ...]
    line: str
    reason: str = ""


NO_RULE = "has no rule for low-rank factors"


def announce(
    paths: Sequence[str], uses: Sequence[Use], on_materialize: str, on_unused: str
) -> None:
    """Warns or raises about weights that were materialized and adapters that are unused."""
    # Only adapted weights: a quantized base without an adapter is decoded wherever it is read. The
    # dict removes duplicates, such as the uses of equal steps.
    adapted = [use for use in dict.fromkeys(uses) if use.source in paths]
    built = [use for use in adapted if use.kind in ("materialized", "returned")]
    if built and on_materialize == "error":
        raise MaterializeError("\n".join(map(_built, built)))
    if on_materialize == "warn":
        for use in built:
            warnings.warn(_built(use), MaterializeWarning, stacklevel=3)
    used = {use.source for use in uses}
    unused = [path for path in paths if path not in used]
    if unused and on_unused == "error":
        raise UnusedAdapterError(_unused(unused))
    if unused and on_unused == "warn":
        warnings.warn(_unused(unused), UnusedAdapterWarning, stacklevel=3)


def _built(use: Use) -> str:
    if use.kind == "returned":
        return (
            f"`{use.source}` is returned by the function, so the adapted weight of shape "
            f"{_shape(use.shape)} is materialized. Return a value computed from it instead, or "
            "pass on_materialize='allow'."
        )
    return (
        f"`{use.source}` is used by `{use.primitive}` as an array of shape {_shape(use.shape)} at "
        f"{use.line or 'an unknown line'}, which {use.reason or NO_RULE}, so the adapted "
        "weight is materialized there. Give it LORA_FREEZE or LORA_FULL, merge it with "
        "merge_params, or accept the cost with on_materialize='allow'."
    )


def _shape(shape: Sequence[int]) -> str:
    """Formats a shape as Python does; sizes may be NumPy integers or symbols."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def _unused(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        subject = f"the adapter of `{paths[0]}`, so it trains nothing. Give such a parameter"
    else:
        names = ", ".join(f"`{path}`" for path in paths[:8])
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        subject = f"the adapters of {names}{more}: they train nothing. Give such parameters"
    return (
        f"Nothing that the function returns depends on {subject} LORA_FREEZE, or pass "
        "on_unused='allow'."
    )
