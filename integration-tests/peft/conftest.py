"""Fixtures of the tests with PEFT: tiny torch models, each also as a tree of JAX arrays.

The tests need torch and transformers, and run in the nox session `peft`.
"""

import copy
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.pytorch_utils import Conv1D as TorchConv1D

import lorax
import lorax_io
from lorax_io import load_peft, save_peft

torch.set_num_threads(1)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _restore_jax_config():
    """The command changes JAX's settings for its process."""
    settings = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_platforms")}
    yield
    for name, value in settings.items():
        jax.config.update(name, value)


# For each class of adapted modules: the class of its name, and the axes of torch's weight in the
# order of JAX libraries. All other tensors are `Tensor`.
KINDS: dict[type[nn.Module], tuple[Any, tuple[int, ...]]] = {
    nn.Linear: (lorax_io.Linear, (1, 0)),
    TorchConv1D: (lorax_io.Conv1D, (0, 1)),
    nn.Embedding: (lorax_io.Embedding, (0, 1)),
    nn.Conv1d: (lorax_io.Conv, (2, 1, 0)),
    nn.Conv2d: (lorax_io.Conv, (2, 3, 1, 0)),
    nn.Conv3d: (lorax_io.Conv, (2, 3, 4, 1, 0)),
}


def torch_name_of(name, module, parameter, ndim):
    """The name of a parameter, and torch's axes in JAX's order."""
    if isinstance(module, GptOssExperts) and ndim == 3:
        order = ("gate_up_proj", "down_proj").index(parameter)
        # transformers 4 does not have `is_transposed`, which tells PEFT the order of axes.
        options = {"parameter": parameter, "order": order, "swapped": True}
        return lorax_io.Experts(name, shared_axes=(0,), **options), (0, 1, 2)
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None or parameter != "weight":
        return lorax_io.Tensor(name, parameter=parameter), tuple(range(ndim))
    torch_name, order = KINDS[kind]
    return torch_name(name), order


@dataclasses.dataclass
class Twin:
    """A torch model, and its parameters as a tree of JAX arrays."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]

    @functools.cached_property
    def _torch_names(self):
        torch_names = {
            f"{name}.{parameter}": torch_name_of(name, module, parameter, tensor.ndim)
            for name, module in self.model.named_modules()
            for parameter, tensor in module.named_parameters(recurse=False)
            if name
        }
        # A shared tensor is one parameter. A parameter outside of any module is left out.
        paths = [path for path, _ in self.model.named_parameters() if "." in path]
        chosen = {path: torch_names[path] for path in paths}
        for path in torch_names.keys() - chosen.keys():
            shared = self.model.get_parameter(path)
            first = next(p for p, tensor in self.model.named_parameters() if tensor is shared)
            torch_name, order = chosen[first]
            tied_head = torch_name.tied or path == "lm_head.weight"
            chosen[first] = (dataclasses.replace(torch_name, tied=tied_head), order)
        return chosen

    @property
    def names(self):
        return {path: torch_name for path, (torch_name, _) in self._torch_names.items()}

    @property
    def params(self):
        tensors = dict(self.model.named_parameters())
        return {
            path: to_jax(tensors[path]).transpose(order)
            for path, (_, order) in self._torch_names.items()
        }

    def outputs(self, params=None, model=None):
        """The outputs of the model, of the model with other parameters, or of another model."""
        model = copy.deepcopy(self.model) if model is None else model
        for path, tensor in {} if params is None else params.items():
            array = np.asarray(tensor, np.float32).transpose(np.argsort(self._torch_names[path][1]))
            with torch.no_grad():
                model.get_parameter(path).copy_(torch.tensor(array))
        with torch.no_grad():
            output = model(**self.inputs)
        return (output if isinstance(output, torch.Tensor) else output[0]).float().numpy()

    def check_equal(self, params, model, tolerance=1e-5):
        """Asserts that a PEFT model and these parameters have equal outputs, unlike the base."""
        actual, expected, base = self.outputs(params), self.outputs(model=model), self.outputs()
        size = np.abs(base).max()
        assert np.abs(actual - base).max() > 1e-2 * size  # much larger than the tolerance
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)

    def stacked(self, torch_name, shape, order=None):
        """The same twin, with one parameter `stack` of this name in place of its parts.

        `shape` is the shape before the axes are transposed by `order`.
        """
        return Stacked(self.model, self.inputs, torch_name, shape, order or range(len(shape)))


@dataclasses.dataclass
class Stacked(Twin):
    """A twin in which some parameters are stacked."""

    torch_name: lorax_io.TorchName
    shape: tuple[int, ...]
    order: Sequence[int]

    @functools.cached_property
    def _parts(self):
        name = re.escape(f"{self.torch_name.module}.{self.torch_name.parameter}")
        return [path for path in super().names if re.fullmatch(name.replace(r"\{\}", r"\d+"), path)]

    @property
    def names(self):
        rest = {path: x for path, x in super().names.items() if path not in self._parts}
        return {**rest, "stack": self.torch_name}

    @property
    def params(self):
        params = super().params
        stack = jnp.stack([params.pop(path) for path in self._parts])
        return {**params, "stack": stack.reshape(self.shape).transpose(self.order)}

    def outputs(self, params=None, model=None):
        if params is not None:
            params = dict(params)
            stack = np.asarray(params.pop("stack")).transpose(np.argsort(self.order))
            base = super().params
            parts = stack.reshape(len(self._parts), *base[self._parts[0]].shape)
            params |= zip(self._parts, parts, strict=True)
        return super().outputs(params, model)


def to_jax(tensor):
    array = jnp.asarray(tensor.detach().float().numpy())
    return array.astype(str(tensor.dtype).removeprefix("torch."))


class Net(nn.Module):
    """Convolutions of each dimension, and dense layers of which one name is a suffix of another."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 5, 3, padding=1)
        self.two = nn.Conv2d(1, 7, (5, 3), stride=2)
        self.three = nn.Conv3d(7, 5, (1, 3, 2), padding=1)
        self.head = nn.Linear(5, 7)
        self.aux = nn.ModuleDict({"head": nn.Linear(7, 5)})

    def forward(self, x):
        x = self.one(x)[:, None]
        x = torch.tanh(self.two(x))[..., None]
        return self.aux["head"](self.head(self.three(x).flatten(2).mean(-1)))


IDS = {"input_ids": torch.tensor([[2, 3, 5, 7, 11, 13], [17, 19, 23, 29, 31, 37]])}
PIXELS = {"pixel_values": torch.sin(torch.arange(2.0 * 3 * 8 * 8)).reshape(2, 3, 8, 8)}
TEXT = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(TEXT, intermediate_size=24, num_key_value_heads=2)
VISION = dict(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2)
VISION |= dict(num_attention_heads=4, intermediate_size=24)
BERT = dict(TEXT, intermediate_size=24, num_labels=3)

# The class, the values of its config, and the inputs.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=61, n_embd=16, n_layer=2, n_head=4), IDS),
    "llama": ("LlamaForCausalLM", LLAMA, IDS),
    "bert": ("BertForSequenceClassification", BERT, IDS),
    "roberta": ("RobertaForSequenceClassification", BERT, IDS),
    "t5": (
        "T5ForConditionalGeneration",
        dict(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
        IDS | {"decoder_input_ids": torch.tensor([[0, 3, 5], [0, 7, 11]])},
    ),
    "opt": (
        "OPTForCausalLM",
        dict(TEXT, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
        IDS,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        dict(vocab_size=61, num_mel_bins=8, d_model=16, max_source_positions=10)
        | dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
        | dict(decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24)
        | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        {
            "input_features": torch.sin(torch.arange(2.0 * 8 * 20)).reshape(2, 8, 20),
            "decoder_input_ids": torch.tensor([[1, 3, 5], [1, 7, 11]]),
        },
    ),
    "vit": ("ViTForImageClassification", dict(VISION, num_labels=3), PIXELS),
    "clip": (
        "CLIPModel",
        dict(vision_config=VISION, projection_dim=12)
        | dict(text_config=dict(TEXT, intermediate_size=24, eos_token_id=2)),
        IDS | PIXELS,
    ),
    "bloom": ("BloomForCausalLM", dict(vocab_size=61, hidden_size=16, n_layer=2, n_head=4), IDS),
    "mixtral": ("MixtralForCausalLM", dict(LLAMA, num_local_experts=3), IDS),
    "gptoss": (
        "GptOssForCausalLM",
        dict(LLAMA, num_local_experts=3, num_experts_per_tok=2, head_dim=4),
        IDS,
    ),
}


@functools.cache
def _twin(name: str, **changes: Any) -> Twin:
    torch.manual_seed(0)
    if name == "net":
        model, inputs = Net(), {"x": torch.sin(torch.arange(2.0 * 3 * 11)).reshape(2, 3, 11)}
    else:
        kind, values, inputs = MODELS[name]
        kind = getattr(transformers, kind)
        model = kind(kind.config_class(**{**values, **changes}))
    with torch.no_grad():
        # Parameters of zero or one would hide misplaced values.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Twin(model.eval(), inputs)


@pytest.fixture
def twin():
    """`twin(name, **changes)`: a model of `MODELS` with changes in its config."""
    return _twin


@pytest.fixture
def to_peft(tmp_path):
    """`to_peft(twin, spec, **kwargs)`: saves random factors, and checks PEFT's outputs with them.

    `spec` has leaves for some of the parameters; the others are frozen. PEFT warns about missing
    tensors, which is an error here, but ignores unexpected tensors silently.
    """

    def to_peft(twin, spec, *, change=lambda tunable: tunable, merged=False, **kwargs):
        full = {path: spec.get(path, lorax.LORA_FREEZE) for path in twin.names}
        frozen, tunable = lorax.init_lora(
            twin.params, full, jax.random.key(0), a_init="gaussian", b_init="gaussian"
        )
        tunable = change(tunable)
        folder = tmp_path / "ours"
        save_peft(folder, tunable, twin.names, **kwargs)
        adapted = PeftModel.from_pretrained(copy.deepcopy(twin.model), folder)
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        assert_same(loaded, tensors_in(folder))
        model = adapted.merge_and_unload() if merged else adapted
        twin.check_equal(lorax.merge_params(frozen, tunable), model)
        return adapted

    return to_peft


@pytest.fixture
def from_peft(tmp_path):
    """`from_peft(twin, config)`: loads random factors that PEFT saved, and checks the outputs.

    Then saves them again and compares the files. `change` edits PEFT's model before it is saved.
    """

    def from_peft(
        twin,
        config,
        *,
        change=lambda model: None,
        merged=False,
        resave=True,
        name="default",
        tolerance=1e-5,
        **kwargs,
    ):
        base = copy.deepcopy(twin.model)
        adapted = get_peft_model(base, config, adapter_name=name, **kwargs)
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
            change(adapted)
        folder = tmp_path / "theirs"
        save_pretrained(adapted.eval(), folder)
        folder = folder if name == "default" else folder / name
        frozen, tunable = load_peft(folder, twin.params, twin.names)
        model = adapted.merge_and_unload() if merged else adapted
        twin.check_equal(lorax.merge_params(frozen, tunable), model, tolerance)
        if resave:
            save_peft(tmp_path / "ours", tunable, twin.names, params=twin.params)
            assert_same(tensors_in(tmp_path / "ours"), tensors_in(folder))
        return frozen, tunable

    return from_peft


def save_pretrained(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        # PEFT warns that it also saves the weights of an adapted embedding or head.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(folder)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, without those that PEFT copies from the base."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".base_layer.weight")
        and ".original_module." not in name
        and ".modules_to_save." not in name
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts equal names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
