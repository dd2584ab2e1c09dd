"""The models of the sweep: their titles, and how each is made."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from .configs import tiny_config

IDS = np.array([[3, 5, 7, 11, 13, 17, 19], [23, 29, 31, 37, 41, 43, 47]])

GROUPS: dict[str, tuple[str, Any]] = {
    "causal": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "image": ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "speech": ("AutoModelForCTC", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    "dictation": ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "image and text": (
        "AutoModelForZeroShotImageClassification",
        auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}


class Subject(NamedTuple):
    """A model with random weights, and inputs by name."""

    module: Any
    inputs: dict[str, np.ndarray[Any, Any]]


def titles() -> list[str]:
    """Titles such as `causal: llama`. A type is listed only in the first of its groups."""
    by_kind: dict[str, str] = {}
    for group, (_, types) in GROUPS.items():
        for kind in sorted(types):
            by_kind.setdefault(kind, f"{group}: {kind}")
    return [
        *by_kind.values(),
        *(f"diffusers: {name}" for name in DIFFUSERS),
        *(f"timm: {name}" for name in TIMM),
    ]


def build(title: str) -> Subject:
    """Makes the model of a title. Errors of transformers are passed on."""
    group, _, kind = title.partition(": ")
    torch.manual_seed(0)
    if group == "diffusers":
        subject = DIFFUSERS[kind]()
    elif group == "timm":
        subject = _timm(kind)
    else:
        cls = getattr(transformers, GROUPS[group][0])
        module = cls.from_config(tiny_config(kind))
        subject = Subject(module, dict(_inputs(module)))
    module = subject.module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Biases of zero and gains of one would hide errors.
            parameter.add_(0.02 * torch.randn_like(parameter))
    return subject


def _inputs(module: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    accepted = inspect.signature(module.forward).parameters
    config = module.config
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None) or 32
    side = side if isinstance(side, int) else side[0]
    channels = getattr(vision, "num_channels", 3)
    waves = {
        "pixel_values": (1, channels, side, side),
        "input_values": (1, 160),
        "input_features": (1, getattr(config, "num_mel_bins", 8), 32),
    }
    main = module.main_input_name
    both = {"input_ids", "pixel_values"} <= set(accepted) and hasattr(config, "text_config")
    if "input_ids" in accepted and (main == "input_ids" or both):
        yield "input_ids", IDS[:1] if both else IDS
    if main in waves or both:
        name = "pixel_values" if both else main
        yield name, _wave(waves[name])
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        yield "decoder_input_ids", IDS[: 1 if main in waves else 2, :4]


def _wave(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.sin(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def _unet() -> Subject:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    inputs = {
        "sample": _wave((1, 4, 8, 8)),
        "timestep": np.array([7]),
        "encoder_hidden_states": _wave((1, 5, 12)),
    }
    return Subject(module, inputs)


def _dit() -> Subject:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=11,
    )
    inputs = {
        "hidden_states": _wave((1, 4, 8, 8)),
        "timestep": np.array([7]),
        "class_labels": np.array([3]),
    }
    return Subject(module, inputs)


def _flux() -> Subject:
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": _wave((1, 9, 4)),
        "encoder_hidden_states": _wave((1, 5, 12)),
        "pooled_projections": _wave((1, 10)),
        "timestep": np.array([0.7], np.float32),
        "img_ids": np.zeros((9, 3), np.float32),
        "txt_ids": np.zeros((5, 3), np.float32),
    }
    return Subject(module, inputs)


DIFFUSERS: dict[str, Callable[[], Subject]] = {
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
}

# timm's models at tiny sizes.
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 32, "window_size": 4, "embed_dim": 24},
        **{"depths": (1, 1), "num_heads": (2, 4)},
    },
}


def _timm(kind: str) -> Subject:
    # timm has its own folder, so that transformers does not import it in the other processes.
    sys.path.append(os.environ["TIMM"])
    # timm imports torchvision for its data. The wheel on PyPI has only CUDA operators, and can be
    # imported if two of them are defined. The models do not call them.
    torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        torchvision.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    module = timm.create_model(kind, num_classes=7, **TIMM[kind])
    return Subject(module, {"x": _wave((1, 3, 32, 32))})
