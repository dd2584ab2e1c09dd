"""The names of each architecture's modules: one row for each model type.

Names are the ends of PyTorch's module names. A module that matches `attention` is not matched with
`mlp`, so `output.dense` does not include `attention.output.dense`.
"""

import dataclasses

Ends = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The modules of an architecture.

    Attributes:
        attention: the linear layers of its attention.
        mlp: the linear layers of its feed-forward network.
        default: the modules that PEFT adapts by default; if PEFT has no default for the model, the
            queries and values, as for similar models.
        kernel: the axes of a `kernel` with two axes: "linear" is (in, out), and "conv1d" is
            (out, in), as in `FlaxConv1D`.
        grouped: convolutions with several groups, which PEFT's format does not support.
        bare: parameters that are lookup tables, although they are not called `embedding`.
    """

    attention: Ends
    mlp: Ends
    default: Ends
    kernel: str = "linear"
    grouped: Ends = ()
    bare: Ends = ()


_QUERY_VALUE = ("query", "value")
_Q_V_PROJ = ("q_proj", "v_proj")

_BERT = Preset(
    attention=("query", "key", "value", "attention.output.dense"),
    mlp=("intermediate.dense", "output.dense"),
    default=_QUERY_VALUE,
)
_BART = Preset(
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlp=("fc1", "fc2"),
    default=_Q_V_PROJ,
)
_LLAMA = Preset(
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    default=_Q_V_PROJ,
)
_T5 = Preset(
    attention=("q", "k", "v", "o"),
    mlp=("wi", "wi_0", "wi_1", "wo"),
    default=("q", "v"),
)
_GPT2 = Preset(
    attention=("c_attn", "q_attn", "attn.c_proj", "crossattention.c_proj"),
    mlp=("c_fc", "mlp.c_proj"),
    default=("c_attn",),
    kernel="conv1d",
)
_RESNET = Preset(attention=(), mlp=(), default=("convolution",))

PRESETS: dict[str, Preset] = {
    "albert": Preset(
        attention=("query", "key", "value", "attention.dense"),
        mlp=("ffn", "ffn_output"),
        default=_QUERY_VALUE,
    ),
    "bart": _BART,
    "beit": dataclasses.replace(_BERT, bare=("relative_position_bias_table",)),
    "bert": _BERT,
    "big_bird": _BERT,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "bloom": Preset(
        attention=("query_key_value", "self_attention.dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        default=("query_key_value",),
    ),
    "clip": _BART,
    "dinov2": dataclasses.replace(_BERT, mlp=("fc1", "fc2", "weights_in", "weights_out")),
    "distilbert": Preset(
        attention=("q_lin", "k_lin", "v_lin", "out_lin"),
        mlp=("lin1", "lin2"),
        default=("q_lin", "v_lin"),
    ),
    "electra": _BERT,
    "gemma": _LLAMA,
    "gpt-sw3": _GPT2,
    "gpt2": _GPT2,
    "gpt_neo": dataclasses.replace(_BART, mlp=("c_fc", "c_proj")),
    "gptj": dataclasses.replace(_BART, mlp=("fc_in", "fc_out")),
    "llama": _LLAMA,
    "longt5": _T5,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _LLAMA,
    "mt5": _T5,
    "opt": _BART,
    "pegasus": _BART,
    # Without the grouped convolutions, which PEFT's format does not support.
    "regnet": dataclasses.replace(
        _RESNET,
        default=("layer.0.convolution", "layer.2.convolution", "layer.3.convolution"),
        grouped=("layer.1.convolution",),
    ),
    "resnet": _RESNET,
    "roberta": _BERT,
    "roberta-prelayernorm": _BERT,
    "roformer": _BERT,
    "t5": _T5,
    "vit": _BERT,
    "wav2vec2": dataclasses.replace(
        _BART, mlp=("intermediate_dense", "output_dense"), grouped=("pos_conv_embed.conv",)
    ),
    "whisper": _BART,
    "xglm": _BART,
    "xlm-roberta": _BERT,
}

# Composite models: for each part, its key in the tree, and the attribute with its config.
COMPOSITES: dict[str, dict[str, str]] = {
    "encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "speech-encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "vision-encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "vision-text-dual-encoder": {"vision_model": "vision_config", "text_model": "text_config"},
}
