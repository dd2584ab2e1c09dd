"""OFT: `oft_R.weight`, the entries above the diagonal of each block's skew-symmetric matrix."""

import math
import re
from collections.abc import Sequence
from typing import Any

from lorax import Adapter, OftWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError, warn
from ...._places import RANK, Factor, Place
from ...._torch_names import Embedding, Linear
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, the_one

_ABOVE = RANK - 1  # the second inner axis of the adapter's layout; the first is within a block
_SINCE = "0.18.0"  # the first PEFT release with the same Cayley–Neumann series as `lorax`
_TABLE = "oft_embedding_R.weight"


class Oft(Tuner):
    """A block-diagonal rotation of the inputs, or of the rows of a table."""

    peft_type = "OFT"
    called = "OFT"
    marks = ("oft_R.weight", _TABLE)
    tables = (_TABLE,)
    fields = (
        *("oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
        *("coft", "eps", "bias"),
    )
    lacking = ()
    defaults = {"oft_block_size": 32}
    harmless = ("r", "module_dropout", "init_weights")
    init = "init_weights"
    only_bias = "oft_only"
    tells_shape = False

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, OftWeight)

    def check_config(self, config: PeftConfig) -> None:
        if config.coft and not (config.eps or 0) > 0:
            raise AdapterFileError(f"has eps = {config.eps} under coft; it must be positive.")
        if config.use_cayley_neumann and _release(config.peft_version) < _release(_SINCE):
            warn(
                f"was written by PEFT before {_SINCE}, which used another series for its "
                "rotations. It is read with the series of newer PEFT releases, which differs "
                "slightly."
            )

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        return (self.marks[isinstance(place.torch_name, Embedding)],)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        side, axes = self._turned(place)
        size = _block_size(shapes, module)
        if place.sizes[axes[-1]] % size:
            raise UnsupportedAdapterError(
                f"is OFT of blocks of {size}, which do not divide the last axis of `{place.path}` "
                f"that it turns, of size {place.sizes[axes[-1]]}. Give it one such axis in `names`."
            )
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        shared, inputs, outputs = place.axes
        eps = config.eps if config.coft else None
        blocks = (side, axes[-1], False, config.block_share, terms, eps)
        return OftWeight(None, size, *blocks, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        side, axes = self._turned(place)
        if (weight.side, weight.channel_axis) != (side, axes[-1]):
            raise UnsupportedAdapterError(
                f"`{place.path}` turns the axis {weight.channel_axis} of its side "
                f"{weight.side!r}, and PEFT the axis {axes[-1]} of {side!r}. Use `save_adapter` or "
                "`save_merged`."
            )
        if weight.alone and not weight.block_share and len(axes) > 1:
            raise UnsupportedAdapterError(
                f"`{place.path}` has blocks that some of its axes share, and PEFT all or none. Use "
                "`save_adapter` or `save_merged`."
            )
        key = self.marks[side == "out"]
        blocks = () if weight.block_share else axes
        return (Factor(key, "q", (blocks, (_ABOVE,))),)

    def _turned(self, place: Place) -> tuple[Any, tuple[int, ...]]:
        """The side that PEFT rotates, and its axes."""
        if isinstance(place.torch_name, Embedding):
            return "out", place.outputs
        if not isinstance(place.torch_name, Linear):
            raise UnsupportedAdapterError(
                f"`{place.path}` has OFT, which PEFT has for linear layers and embeddings, and for "
                "convolutions in another form: there it turns window and channels together. Use "
                "`save_adapter` or `save_merged`."
            )
        return "in", place.axes.inputs

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        size = _block_size(shapes, module) * next(iter(shapes.values()))[0]
        return Sides(size, (1,)) if _TABLE in shapes else Sides(1, (size,))

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        one = lambda label, of: the_one(modules, self.called, label, of)  # noqa: E731
        terms = one("terms", lambda weight: weight.terms)
        eps = one("bound eps", lambda weight: weight.eps)
        bound: dict[str, Any] = {} if eps is None else {"coft": True, "eps": eps}
        exact: dict[str, Any] = {} if terms is None else {"num_cayley_neumann_terms": terms}
        return Scaling(
            PeftConfig(
                peft_type=self.peft_type,
                oft_block_size=one("block size", lambda weight: weight.block_size),
                block_share=one("shared blocks", lambda weight: weight.block_share),
                use_cayley_neumann=terms is not None,
                fan_in_fan_out=any(module.place.torch_name.fan_in_fan_out for module in modules),
                **exact,
                **bound,
            )
        )

    def written(self, config: PeftConfig) -> dict[str, Any]:
        return {"r": 0, "peft_version": _SINCE}


def _release(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a release; empty, which is less than all others, if not known."""
    return tuple(int(part) for part in re.findall(r"\d{1,6}", version or "")[:2])


def _block_size(shapes: Shapes, module: str) -> int:
    """The size of a block, from the number of entries above its diagonal."""
    shape = next(iter(shapes.values()), ())
    above = shape[1] if len(shape) == 2 else 0
    size = (1 + math.isqrt(1 + 8 * above)) // 2
    if above < 1 or size * (size - 1) // 2 != above:
        raise AdapterFileError(
            f"has `oft_R` of `{module}` of shape {shape}; its rows have the entries above the "
            "diagonal of a square matrix."
        )
    return size
