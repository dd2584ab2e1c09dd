"""Parameters that are trained in full, as PEFT's tensors: `modules_to_save` and biases."""

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax import Adapter

from .._disk.arrays import to_host
from .._errors import AdapterMismatchError, UnsupportedAdapterError
from .._places import Array, Place, pack
from .._torch_names import Tensor, TorchNames
from .._tree import is_array, param_leaves
from .peft.config import HEADS, PeftConfig
from .peft.patterns import prefixes
from .peft.tuners import Module, Tuner
from .stored import Stored

# The dtypes that PEFT reads.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_full(
    tensors: dict[str, Array],
    rows: Mapping[str, Any],
    names: TorchNames,
    params: Any,
    task_type: str | None,
    modules: Sequence[Module],
) -> tuple[list[str] | None, str]:
    """Adds the parameters that are trained in full; returns `modules_to_save` and `bias`.

    PEFT saves the whole module of such a parameter. The exceptions are the bias of an adapted
    module, which is saved alone, with the factors, and a bias whose module has no other parameters
    in `names`, as in an adapter that was itself saved with `bias="all"`.
    """
    in_head = PeftConfig(modules_to_save=HEADS.get(task_type, ())).saves
    others = {torch_name.module for torch_name in names.values() if torch_name.parameter != "bias"}
    adapted = {module.name for module in modules}
    saved: dict[str, set[str]] = collections.defaultdict(set)  # by the module in `names`
    bias = "none"
    for path, leaf in rows.items():
        if isinstance(leaf, Adapter):
            continue
        for name, parameter, tensor in whole_tensors(names[path].at(path, leaf.shape), leaf):
            if not name:
                raise UnsupportedAdapterError(
                    f"`{path}` is trained in full and is in no module, and PEFT saves modules. Use "
                    "`save_adapter` or `save_merged`.",
                )
            module = names[path].module
            if parameter == "bias" and module not in others and not in_head(module):
                bias = "all"
                add(tensors, f"{name}.{parameter}", tensor)
            elif name in adapted and parameter == "bias":
                bias = "lora_only" if bias == "none" else bias
                add(tensors, f"{name}.base_layer.bias", tensor)
            elif name in adapted:
                raise UnsupportedAdapterError(
                    f"`{path}` is trained in full in the module `{name}`, which also has factors; "
                    "PEFT cannot store both. Use `save_adapter` or `save_merged`.",
                )
            else:
                saved[module].add(name)
                add(tensors, f"{name}.{parameter}", tensor)
    heads = HEADS.get(task_type, ())
    _add_rest(tensors, rows, names, params, saved, heads)
    # Of nested modules, PEFT lists only the outermost.
    outer = {
        name
        for module, entries in saved.items()
        if not in_head(module) and saved.keys().isdisjoint(prefixes(module)[:-1])
        for name in entries
    }
    head_modules = [
        torch_name.module for torch_name in names.values() if in_head(torch_name.module)
    ]
    outer |= {h for h in heads if any(map(PeftConfig(modules_to_save=[h]).saves, head_modules))}
    return sorted(outer) or None, bias


def _add_rest(
    tensors: dict[str, Array],
    rows: Mapping[str, Any],
    names: TorchNames,
    params: Any,
    saved: Collection[str],
    heads: Sequence[str],
) -> None:
    """Adds the frozen parameters of modules that are saved whole."""
    leaves = {} if params is None else param_leaves(params)[0]
    config, in_head = (PeftConfig(modules_to_save=m) for m in ([*saved, *heads], heads))
    for path, torch_name in names.items():
        module, row = torch_name.module, rows.get(path)
        if not config.saves(module) or (row is not None and not isinstance(row, Adapter)):
            continue
        if not in_head.saves(module) and not any(outer in saved for outer in prefixes(module)):
            caught = next(m for m in saved if PeftConfig(modules_to_save=[m]).saves(module))
            raise UnsupportedAdapterError(
                f"PEFT would save `{module}` with `{caught}`, since it compares the ends of names "
                "only. Use `save_adapter` or `save_merged`.",
            )
        if row is not None:
            raise UnsupportedAdapterError(
                f"`{path}` has factors, and PEFT saves `{module}` whole: for another parameter in "
                "it, or for `task_type`. Use `save_adapter` or `save_merged`.",
            )
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(
                f"PEFT saves the module `{module}` whole, and `{path}` in it is frozen. Give "
                "`params=`, the base's parameters, or train it in full as well.",
            )
        for name, parameter, tensor in whole_tensors(
            torch_name.at(path, leaves[path].shape), leaves[path]
        ):
            add(tensors, f"{name}.{parameter}", tensor)


def whole_tensors(place: Place, leaf: Any) -> list[tuple[str, str, Array]]:
    """A parameter's tensors in PyTorch: (module, name in the module, tensor) for each module."""
    rest = [d for d in range(len(place.shape)) if d not in place.stack]
    array = to_host(leaf).transpose([*place.stack, *rest])
    return [
        (module, place.torch_name.parameter, pack(array[index], rest, place.whole))
        for index, module in place.modules.items()
    ]


def without_changed(
    rows: Mapping[str, Any],
    names: TorchNames,
    bases: Mapping[str, Any],
    tensors: Mapping[str, Array],
    config: PeftConfig,
    tuner: Tuner,
) -> dict[str, Any]:
    """The rows without biases that PEFT itself changes, after checking that they equal PEFT's.

    Raises:
        UnsupportedAdapterError: if such a bias is frozen, or is not what PEFT computes from the
            base's.
    """
    stored = {key: Stored.of(key, tensor) for key, tensor in tensors.items()}
    kept = dict(rows)
    for path, torch_name in names.items():
        if not (isinstance(torch_name, Tensor) and torch_name.parameter == "bias"):
            continue
        change = tuner.bias(stored, config, torch_name.first_module)
        if change is None:
            continue
        base, row = bases.get(path), kept.pop(path, None)
        if row is None or base is None or not has_numbers(base):
            given = (
                "is frozen" if row is None else "has to be compared with the base: give `params=`"
            )
            raise UnsupportedAdapterError(
                f"PEFT scales the bias `{path}` with the outputs of `{torch_name.module}`, and "
                f"here it {given}. Train it in full as what PEFT makes of it, or use "
                "`save_adapter` or `save_merged`."
            )
        for (module, _, old), (_, _, new) in zip(
            whole_tensors(torch_name.at(path, base.shape), base),
            whole_tensors(torch_name.at(path, row.shape), row),
            strict=True,
        ):
            change = tuner.bias(stored, config, module)
            wanted = old if change is None else change(old.astype(np.float64)).astype(new.dtype)
            if not np.allclose(new, wanted, rtol=1e-5, atol=0):
                raise UnsupportedAdapterError(
                    f"the bias `{path}` is not what PEFT makes of that of `{module}`: the base's, "
                    "times the gains of the outputs. Use `save_adapter` or `save_merged`."
                )
    return kept


def add(tensors: dict[str, Array], name: str, tensor: Array) -> None:
    if name in tensors:
        raise AdapterMismatchError(f"`names` gives two parameters the tensor `{name}`.")
    if tensor.dtype.name not in DTYPES:
        raise UnsupportedAdapterError(
            f"`{name}` is {tensor.dtype}; PEFT reads {', '.join(DTYPES)}. Cast the tree."
        )
    # A copy, so that the array it was gathered from can be freed.
    tensors[name] = np.asarray(tensor, order="C")


def has_numbers(leaf: Any) -> bool:
    return is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
