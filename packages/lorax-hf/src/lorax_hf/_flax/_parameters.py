"""A Flax model's parameters, with their names and modules in PyTorch."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import transformers
from transformers.models.auto.modeling_flax_auto import FLAX_MODEL_MAPPING_NAMES

from lorax import ArgumentError, SpecError, path_string

from .._rows import ends_in
from ._presets import COMPOSITES, PRESETS, Preset

# Flax's names of parameters, and PyTorch's if they differ.
_TORCH_NAMES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    # Weight normalization, which PyTorch has as a parametrization.
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
_COLLECTIONS = ("params", "batch_stats")


class Parameter(NamedTuple):
    """One parameter of a model."""

    path: str
    module: str  # in PyTorch
    name: str  # in Flax: kernel, embedding, scale, bias, …
    leaf: Any
    preset: Preset

    @property
    def tensor_name(self) -> str:
        """Its name in its PyTorch module."""
        return _TORCH_NAMES.get(self.name, self.name)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Its input and output axes; None if it is neither a kernel nor an embedding."""
        ndim = len(self.leaf.shape)
        if self.name == "kernel" and ndim >= 2:
            return ((1,), (0,)) if self.is_conv1d else (tuple(range(ndim - 1)), (ndim - 1,))
        if self.name == "embedding" or self.name in self.preset.bare:
            return (0,), (1,)
        return None

    @property
    def is_conv1d(self) -> bool:
        """Whether it is the kernel (out, in) of a `FlaxConv1D`."""
        conv1d = self.preset.kernel == "conv1d" and self.name == "kernel"
        return conv1d and ends_in((*self.preset.attention, *self.preset.mlp), self.module)


def parameters_of(model: Any, params: Any = None) -> tuple[list[Parameter], Any]:
    """The parameters of a model or config, and the parameter tree."""
    config = config_of(model)
    if params is None:
        params = _params_of(model)
    rows: list[Parameter] = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_string(key_path)
        parts = path.split("/")
        if parts[0] in _COLLECTIONS:
            parts = parts[1:]
        preset = _preset(config, parts[0])
        rows.append(Parameter(path, _module(parts[:-1]), parts[-1], leaf, preset))
    return rows, params


def _module(parts: list[str]) -> str:
    # Only ResNet's basic layers have their index in their names: `layer_0` is PyTorch's `0`.
    return ".".join(re.sub(r"^layer_(\d+)$", r"\1", part) for part in parts)


def config_of(model: Any) -> transformers.PretrainedConfig:
    """The config of a model, or the config itself."""
    if isinstance(model, transformers.PretrainedConfig):
        return model
    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PretrainedConfig):
        raise ArgumentError(
            f"expected a Flax model of transformers or its config, not {type(model).__name__}."
        )
    return config


def _params_of(model: Any) -> Any:
    if isinstance(model, transformers.PretrainedConfig):
        # Not `_do_init=False`, which composite models (encoder-decoder) refuse.
        return jax.eval_shape(lambda: _class_of(model)(model).params)
    try:
        return model.params
    except ValueError:  # made with `_do_init=False`
        return model.params_shape_tree


def _class_of(config: transformers.PretrainedConfig) -> Any:
    names = [f"Flax{name}" for name in config.architectures or ()]
    base_classes: dict[str, str] = dict(FLAX_MODEL_MAPPING_NAMES.items())
    names += [base_classes.get(config.model_type, "")]
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise SpecError(
        f"transformers has no Flax model of the type {config.model_type!r}; give `params` as well."
    )


def _preset(config: transformers.PretrainedConfig, first: str) -> Preset:
    """The preset of a model; for a composite model, that of the part that `first` names."""
    kind = config.model_type
    parts: Mapping[str, str] = COMPOSITES.get(kind, {})
    if parts:
        # A parameter outside of all parts, such as a projection between two, has no preset.
        part = getattr(config, parts[first], None) if first in parts else None
        return Preset((), (), ()) if part is None else _preset(part, "")
    known = kind.removesuffix("_text_model").removesuffix("_vision_model")
    if known not in PRESETS:
        raise SpecError(
            f"there is no preset for the model type {kind!r}; the presets are: "
            f"{', '.join(PRESETS)}. `lorax.infer_spec` takes any model."
        )
    return PRESETS[known]
