"""PEFT's `adapter_config.json`: its settings, and what they mean for a module."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from ..._errors import AdapterError
from .patterns import Patterns, listed, match, prefixes, suffixes

CONFIG_NAME = "adapter_config.json"
# The formats that have such a config, and the names of their weights, of today and of earlier.
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "peft": ("adapter_model.safetensors", "adapter_model.bin"),
    "mlx": ("adapters.safetensors", "adapters.npz"),
}

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

# The heads that PEFT trains in full for some task types, even if the config does not list them.
HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings that affect an adapter's values, with PEFT's defaults."""

    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool | None = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    target_modules: Sequence[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    feedforward_modules: Sequence[str] | str | None = None
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    projection_prng_key: int = 0
    save_projection: bool = True
    oft_block_size: int = 0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    coft: bool | None = False
    eps: float | None = 6e-5
    gralora_k: int = 2
    use_bdlora: Mapping[str, Any] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    token_indices: Sequence[int] = ()
    lora_bias: bool = False
    peft_version: str | None = None
    is_given: bool = True  # whether the file has a config; otherwise it was inferred from tensors
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def replace(self, **values: Any) -> "PeftConfig":
        """The config with other values."""
        return dataclasses.replace(self, **values)

    def rank(self, name: str) -> int:
        """The rank of a module."""
        return self._ranks.find(name, self.r)

    def alpha(self, name: str) -> float:
        """The alpha of a module."""
        return self._alphas.find(name, self.lora_alpha)

    def standard_alpha(self, name: str) -> float:
        """The alpha of a module for readers whose scale is always `alpha / rank`."""
        rank = self.rank(name)
        return self.alpha(name) * (math.sqrt(rank) if self.use_rslora else 1)

    def scale(self, name: str) -> float:
        """The scale of a module's delta, by its rank and alpha."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, name: str) -> bool | None:
        """Whether PEFT adapts a module; None if that depends on more than its name."""
        if self.target_modules is None or _is_all_linear(self.target_modules):
            return None
        if self._excludes(name) or not self._includes(name):
            return False
        # PEFT compares the layers of modules that are listed by the ends of their names only.
        if isinstance(self.target_modules, str) or name in self._full_names:
            return True
        return self.layers_to_transform is None or self._is_in_layers(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter of a module of experts."""
        return not self._parameters.isdisjoint(suffixes(name))

    def saves(self, name: str) -> bool:
        """Whether a module, or one that contains it, is trained in full (`modules_to_save`).

        PEFT compares the ends of names without regard to dots.
        """
        outer = prefixes(name) if self._saved else []
        return any(module[k:] in self._saved for module in outer for k in range(len(module) + 1))

    def reading(self) -> "PeftConfig":
        """The config with the heads that PEFT trains for its task; PEFT 0.10 does not list them."""
        saved = {*(self.modules_to_save or ()), *HEADS.get(self.task_type, ())}
        return self.replace(modules_to_save=sorted(saved) or None)

    def tokens(self, name: str) -> Sequence[int] | None:
        """The rows of an embedding that are trained in addition to LoRA, or None."""
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            return next((indices[end] for end in suffixes(name) if end in indices), None)
        return indices or None

    def _is_in_layers(self, name: str) -> bool:
        matches = (match(pattern, name) for pattern in self._layers_patterns)
        first = next((each for each in matches if each), None)
        # The pattern is untrusted: it may shadow the group, or match something else as `index`.
        index = (first.groupdict().get("index") if first else None) or ""
        return index.isdecimal() and int(index) in self._layers

    # Compiled forms of the lists and patterns, cached: a file may have very many of them.

    @functools.cached_property
    def _ranks(self) -> "Patterns":
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> "Patterns":
        return Patterns(self.alpha_pattern)

    @functools.cached_property
    def _includes(self) -> Callable[[str], bool]:
        return listed(self.target_modules)

    @functools.cached_property
    def _full_names(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @functools.cached_property
    def _excludes(self) -> Callable[[str], bool]:
        return listed(self.exclude_modules)

    def is_feedforward(self, name: str) -> bool:
        """Whether IA³ scales the inputs of a module rather than its outputs."""
        modules = self.feedforward_modules
        if isinstance(modules, str):
            return listed(modules)(name)
        return any(map(name.endswith, modules or ()))  # with or without a dot, as in PEFT

    @functools.cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.target_parameters or ())

    @functools.cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save or ())

    @functools.cached_property
    def _layers(self) -> frozenset[int]:
        layers = self.layers_to_transform
        return frozenset([layers] if isinstance(layers, int) else layers or ())

    @functools.cached_property
    def _layers_patterns(self) -> list[Any]:
        pattern = self.layers_pattern
        patterns = [pattern] if isinstance(pattern, str) else pattern or []
        texts = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns]
        return list(map(regex.compile, texts or [r".*?\.[^.]*\.(?P<index>\d+)\."]))

    def scaling_text(self) -> str:
        """The settings that determine the rank and scale of every module, as JSON."""
        keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        return json.dumps({key: getattr(self, key) for key in keys}, sort_keys=True)


def check_free(folder: Path, format: str) -> None:
    """Rejects a folder whose config is that of an adapter in another format.

    Writing there would replace the config, and the other adapter could not be read again.
    """
    others = [name for key, names in WEIGHTS.items() if key != format for name in names]
    found = next((name for name in others if (folder / name).exists()), None)
    if found is not None and (folder / CONFIG_NAME).exists():
        raise AdapterError(
            f"has `{found}`, an adapter in another format, and its `{CONFIG_NAME}` would be "
            "replaced. Give another folder."
        )


def _is_all_linear(target: Sequence[str] | str) -> bool:
    return isinstance(target, str) and target.lower() == "all-linear"
