"""`load_torch`: reads a checkpoint's tensors onto devices, without a copy in PyTorch."""

import copy
import functools
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from .._errors import CheckpointError, CheckpointNotFoundError, ModuleWarning, QuantizedModuleError
from ._arrays import numpy_of
from ._files import Files, aligned
from ._function import ModuleFunction
from ._place import Placement, placed, sharding_of
from ._quantized import INSTEAD, refuse_quantized
from ._rows import of_config
from ._state import state_of, tied_names
from ._wrappers import unwrapped


class Read(NamedTuple):
    """How to read one tensor."""

    placed: Callable[[Any], jax.Array]  # from a sharding to the array on its devices
    part: Callable[[Any], np.ndarray[Any, Any]]  # from an index to a part of the tensor


def load(
    folder: str | os.PathLike[str],
    sharding: Placement,
    dtype: Any,
    train: bool,
    module: torch.nn.Module | None,
    scan_layers: bool | Collection[str],
) -> tuple[ModuleFunction, dict[str, jax.Array]]:
    """The function and the parameters of the model in a folder."""
    files = Files(folder)
    module = _module_of(files.folder) if module is None else unwrapped(module)
    refuse_quantized(module)
    reads = _reads(module, files)
    _fill_buffers(module, reads, files.folder)
    _check_attributes(module, files.folder)
    fn = ModuleFunction(module, train=train, dtype=dtype, scan_layers=scan_layers)
    tensors = state_of(module).parameters
    params: dict[str, jax.Array] = {}
    for name, parts in fn.members.items():
        tensor = tensors[parts[0]]
        stacked = parts != (name,)
        shape = ((len(parts),) if stacked else ()) + tuple(tensor.shape)
        wanted = sharding_of(sharding, name, shape)
        if stacked:
            array = _stacked([reads[part] for part in parts], shape, wanted)
        else:
            array = reads[name].placed(wanted)
        if dtype is not None and tensor.is_floating_point():
            array = jax.device_put(array.astype(dtype), wanted)
        # JAX copies asynchronously: without waiting, several tensors would be in host memory.
        params[name] = jax.block_until_ready(array)
    return fn, params


def _stacked(reads: list[Read], shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """Tensors of equal layers as one array; each device reads only its own part."""
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def part(index: Any) -> np.ndarray[Any, Any]:
        layers, *inner = index
        first, *others = reads[layers]
        array = first.part(tuple(inner))
        whole = aligned((1 + len(others), *array.shape), array.dtype)
        whole[0] = array
        for k, read in enumerate(others, 1):
            whole[k] = read.part(tuple(inner))
        return whole

    return jax.make_array_from_callback(shape, sharding, part)


def _module_of(folder: Path) -> torch.nn.Module:
    import transformers

    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"{folder} has no config.json; pass `module=`, a module on the meta device."
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise QuantizedModuleError(
            f"{folder} holds quantized weights (its config has a quantization_config), which are "
            f"not supported. {INSTEAD}"
        )
    return of_config(config)


def _reads(module: Any, files: Files) -> dict[str, Read]:
    """How to read each parameter and persistent buffer; shapes are checked, and nothing is read."""
    state: Mapping[str, torch.Tensor] = module.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    first = {other: name for name, others in tied_names(module).items() for other in others}
    renamed = _renaming(module, wanted)
    reads: dict[str, Read] = {}
    unused: list[str] = []
    converters: dict[str, Any] = {}
    keys: dict[str, str] = {}
    ignored = re.compile("|".join(getattr(module, _IGNORED, None) or ["(?!)"]))
    for key in sorted(files.entries, key=_natural):
        name, pattern, converter = renamed(key)
        if name not in wanted:
            unused += [] if ignored.search(name) else [key]
        elif converter is None:
            if files.entries[key].shape != wanted[name]:
                raise CheckpointError(
                    f"`{key}` in {files.folder} has the shape {files.entries[key].shape}, and "
                    f"`{name}` of {type(module).__name__} has {wanted[name]}."
                )
            target = first.get(name, name)
            other = keys.setdefault(target, key)
            if other != key and not files.are_equal(key, other):
                raise CheckpointError(
                    f"`{key}` and `{other}` in {files.folder} have different values, but "
                    f"{type(module).__name__} ties them. If its config has `tie_word_embeddings`, "
                    "set it to false."
                )
            reads[target] = Read(
                functools.partial(files.placed, key), functools.partial(files.part, key)
            )
        else:
            own = converters.setdefault(name, copy.deepcopy(converter))
            own.add_tensor(name, key, pattern, functools.partial(files.tensor, key))
    for name, converter in converters.items():
        # A converter may produce several parameters; `name` is that of the first.
        pattern, *others = converter.target_patterns
        for target in (name, *(name.replace(pattern, other) for other in others)):
            reads[first.get(target, target)] = _converted(module, name, target, converter)
    needed = {first.get(name, name) for name in wanted}
    if missing := sorted(needed - reads.keys()):
        raise CheckpointError(
            f"{files.folder} lacks {_some(missing)} of {type(module).__name__}. Load the class "
            "that was saved, or create the model with `from_pretrained`, which initializes new "
            "weights, and pass it to `from_torch`."
        )
    if unused:
        warnings.warn(
            f"{files.folder} has {_some(unused)}, which {type(module).__name__} does not have.",
            ModuleWarning,
            stacklevel=5,
        )
    return reads


# The patterns of names that older files of a model have, which transformers does not read either.
_IGNORED = "_keys_to_ignore_on_load_unexpected"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"`{names[0]}`{more}"


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _renaming(module: Any, wanted: Mapping[str, Any]) -> Callable[[str], tuple[str, Any, Any]]:
    """A function from a tensor's name in a file to its name in the module and its converter.

    transformers 5 renamed, split or merged parameters of some models; their older files are
    converted with transformers' own rules.
    """
    if not hasattr(module, "base_model_prefix"):
        return lambda key: (key, None, None)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    tensors = dict(wanted)
    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = module.base_model_prefix

    def renamed(key: str) -> tuple[str, Any, Any]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        return name, pattern, next((c for c in converters if pattern in c.source_patterns), None)

    return renamed


def _converted(module: Any, name: str, target: str, converter: Any) -> Read:
    """How to read a parameter that is converted from several tensors, such as stacked experts."""

    def whole() -> np.ndarray[Any, Any]:
        made = copy.deepcopy(converter).convert(name, model=module, config=module.config)
        tensor = made[target]
        return numpy_of(tensor[0] if isinstance(tensor, list) else tensor)

    return Read(lambda sharding: placed(whole(), sharding), lambda index: whole()[index])


def _check_attributes(module: torch.nn.Module, folder: Path) -> None:
    """Raises `CheckpointError` if a tensor that is not registered has no values."""
    for name, tensor in state_of(module).buffers.items():
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"`{name}` of {type(module).__name__} is a plain attribute, which is in no file "
                f"of {folder}, and is computed only when the model is created. Use "
                "`from_pretrained` and `from_torch`."
            )


def _fill_buffers(module: Any, reads: Mapping[str, Read], folder: Path) -> None:
    """Fills buffers on the meta device, from the files or with the model's `_init_weights`."""
    computed: list[tuple[str, torch.nn.Module, str]] = []
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            path = f"{prefix}.{name}" if prefix else name
            if buffer is None or buffer.device.type != "meta":
                continue
            if path in reads:
                value = torch.from_numpy(np.array(reads[path].part(...)))
                owner._buffers[name] = value.to(buffer.dtype)
            else:
                computed.append((path, owner, name))
    # A value that depends on what was there before was not computed by the model.
    once, again = (_computed(module, computed, fill) for fill in (0, 1))
    for path, *_ in computed:
        if not torch.equal(once[path], again[path]):
            raise CheckpointError(
                f"the buffer `{path}` of {type(module).__name__} is in no file of {folder}, and "
                "is computed only when the model is created. Use `from_pretrained` and "
                "`from_torch`."
            )


def _computed(
    module: Any, computed: list[tuple[str, torch.nn.Module, str]], fill: int
) -> dict[str, torch.Tensor]:
    for _, owner, name in computed:
        owner._buffers[name] = torch.full_like(owner.get_buffer(name), fill, device="cpu")
    models = {prefix: each for prefix, each in module.named_modules() if _initializes(each)}
    with torch.no_grad():
        for path, owner, _ in computed:
            inside = [prefix for prefix in models if not prefix or path.startswith(f"{prefix}.")]
            if inside:
                models[max(inside, key=len)]._init_weights(owner)
    return {path: owner.get_buffer(name).clone() for path, owner, name in computed}


def _initializes(module: torch.nn.Module) -> bool:
    return hasattr(module, "_init_weights")
