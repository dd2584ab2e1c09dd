"""LoKr: `lokr_w1`, or its factors `lokr_w1_a` and `lokr_w1_b`, and likewise `lokr_w2`.

With a Tucker core over the window, `lokr_t2`, `lokr_w2_a` and `lokr_w2_b` have the rank as their
first axis.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lorax import Adapter, LokrWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Groups, Place
from ..config import PeftConfig
from .cores import check_window, core_groups, with_cores
from .tuner import Module, Shapes, Sides, Tuner, check_flat

# Inner axes of the adapter's layout: the entries within a block of each split axis, the ranks of
# both matrices, and the rank of the outputs of a Tucker core.
_REST_IN, _REST_OUT, _RANK_1, _RANK_2, _RANK_OUT = (RANK - k for k in range(5))


class Lokr(Tuner):
    """The Kronecker product of two matrices, each whole or of low rank."""

    peft_type = "LOKR"
    called = "LoKr"
    marks = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        "lokr_t2",
    )
    renamed = {"alpha": "lora_alpha"}
    fields = (*Tuner.fields, "decompose_both", "decompose_factor", "use_effective_conv2d")
    harmless = ("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights")

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, LokrWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        check_flat(place, self.called)
        first, _ = _matrices(shapes, module)
        split = (place.inputs[0][0], place.outputs[0])
        if len(place.inputs[0]) > 1 or len(place.outputs) > 1:
            raise UnsupportedAdapterError(
                f"is LoKr, which splits one axis of each side, but `{place.path}` has several. "
                "Give it in_axes and out_axes of one axis each."
            )
        if place.sizes[split[1]] % first[0] or place.sizes[split[0]] % first[1]:
            raise AdapterFileError(
                f"has a first matrix of `{module}` of shape {first}, which does not divide the "
                f"parameter's {place.sizes[split[1]]} outputs and {place.sizes[split[0]]} inputs."
            )
        shared, inputs, outputs = place.axes
        narrow = ("lokr_w1_a" in shapes, "lokr_w2_a" in shapes)
        rank, alpha = config.rank(module), config.alpha(module)
        if "lokr_t2" in shapes:
            check_window(place, module, "lokr_t2")
        cut = ((first[1], first[0]), narrow, "lokr_t2" in shapes, split)
        return LokrWeight(*[None] * 7, rank, alpha, *cut, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_flat(place, self.called)
        if weight.split_axes != (place.inputs[0][0], place.outputs[0]):
            raise UnsupportedAdapterError(
                f"`{place.path}` cuts the axes {weight.split_axes}, and PEFT the channels. Use "
                "`save_adapter` or `save_merged`."
            )
        i, o = weight.split_axes
        cut = {i: _REST_IN, o: _REST_OUT}
        outputs = tuple(cut.get(axis, axis) for axis in place.outputs)
        inputs = tuple(tuple(cut.get(axis, axis) for axis in group) for group in place.inputs)
        flat = tuple(axis for group in inputs for axis in group)
        first = _matrix(1, weight.narrow[0], (o,), ((i,),), (i,), _RANK_1)
        if weight.tucker:
            return (
                *first,
                Factor("lokr_t2", "core", core_groups(place, weight, _RANK_2, _RANK_OUT)),
                Factor("lokr_w2_a", "b2", ((_RANK_OUT,), outputs)),
                Factor("lokr_w2_b", "a2", ((_RANK_2,), inputs[0])),
            )
        return *first, *_matrix(2, weight.narrow[1], outputs, inputs, flat, _RANK_2)

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        first, second = _matrices(shapes, module)
        return Sides(first[0] * second[0], (first[1] * second[1], *second[2:]))

    def in_peft(self, config: PeftConfig, modules: Sequence[Module]) -> PeftConfig:
        narrow = {m.name: _lokr(m).tucker for m in modules if _lokr(m).narrow[1]}
        config = with_cores(config, self.called, modules, narrow)
        for both in (False, True):
            for factor in _candidates(modules):
                if all(_is_cut(module, factor, both) for module in modules):
                    return config.replace(decompose_factor=factor, decompose_both=both)
        raise UnsupportedAdapterError(
            "is LoKr of blocks that PEFT does not make of these shapes with any one "
            "`decompose_factor`. Use `save_adapter` or `save_merged`."
        )


def _matrix(
    k: int, narrow: bool, outputs: tuple[int, ...], inputs: Groups, flat: tuple[int, ...], rank: int
) -> tuple[Factor, ...]:
    if not narrow:
        return (Factor(f"lokr_w{k}", f"w{k}", (outputs, *inputs)),)
    return (
        Factor(f"lokr_w{k}_a", f"b{k}", (outputs, (rank,))),
        Factor(f"lokr_w{k}_b", f"a{k}", ((rank,), flat)),
    )


def _matrices(shapes: Shapes, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of both matrices, (out, in, *window)."""
    matrices: list[tuple[int, ...]] = []
    for key in ("lokr_w1", "lokr_w2"):
        whole = shapes.get(key, ())
        a, b = shapes.get(f"{key}_a", ()), shapes.get(f"{key}_b", ())
        shape = whole if whole else (a[0], b[1]) if len(a) == len(b) == 2 else ()
        if key == "lokr_w2" and "lokr_t2" in shapes:
            core = shapes["lokr_t2"]
            shape = (a[1], b[1], *core[2:]) if len(a) == len(b) == 2 else ()
        if not 2 <= len(shape) <= 5:
            raise AdapterFileError(f"has no matrix `{key}` for `{module}`, whole or of low rank.")
        matrices.append(shape)
    return matrices[0], matrices[1]


def _candidates(modules: Sequence[Module]) -> Iterable[int]:
    blocks = {size for module in modules for size in _lokr(module).blocks}
    return [-1, *sorted(blocks)]


def _is_cut(module: Module, factor: int, both: bool) -> bool:
    """Whether PEFT, with these settings, gives a module matrices of the adapter's shapes."""
    weight, place = _lokr(module), module.place
    cut = [_cut(place.sizes[axis], factor) for axis in weight.split_axes]
    blocks, rest = zip(*cut, strict=True)
    narrow = (both and weight.rank < max(blocks) / 2, weight.rank < max(rest) / 2)
    return (blocks, narrow) == (weight.blocks, weight.narrow)


def _lokr(module: Module) -> Any:
    return module.weight


def _cut(size: int, factor: int) -> tuple[int, int]:
    """How PEFT splits an axis: the number of blocks and the size of each.

    The smaller is first, unless the factor divides the axis; LyCORIS puts it first there, too.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), size if factor < 0 else factor)
    count = max(k for k in range(1, most + 1) if size % k == 0)
    return count, size // count
