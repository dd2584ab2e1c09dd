"""Known defects of the Flax models in the installed libraries, and what to do about each."""

from .._defects import Defect, Finding
from ._clip import clip_refuses_a_max

DEFECTS = (
    Defect(
        Finding(
            ("t5", "mt5", "longt5"),
            "the model calls `jnp.clip(a_max=…)`, which this JAX version does not accept",
            "create and call the model inside `with lorax_hf.clip_mended():`",
        ),
        clip_refuses_a_max,
        lambda config: True,
    ),
    Defect(
        Finding(
            ("llama",),
            "FlaxLlama uses a rotary base of 10,000, whatever the config says",
            "use a checkpoint with `rope_theta` 10,000, or another implementation of the model",
        ),
        lambda: True,
        lambda config: getattr(config, "rope_theta", 10_000.0) != 10_000.0,
    ),
    Defect(
        Finding(
            ("llama",),
            "FlaxLlamaForCausalLM leaves its head random if the config ties it to the embedding",
            'set params["lm_head"]["kernel"] to the transposed params["model"]["embed_tokens"]'
            '["embedding"] after loading',
        ),
        lambda: True,
        lambda config: bool(getattr(config, "tie_word_embeddings", False)),
    ),
    Defect(
        Finding(
            ("resnet",),
            'the blocks of FlaxResNet with layer_type="basic" have their own names, so '
            "`from_pt=True` loads none of them, without a warning",
            "rename `layer/layer_0` to `layer/0` when you convert the weights, and compare the "
            "outputs",
        ),
        lambda: True,
        lambda config: getattr(config, "layer_type", None) == "basic",
    ),
    Defect(
        Finding(
            ("electra",),
            "FlaxElectra uses ones for `token_type_ids` if none are given; PyTorch uses zeros",
            "pass `token_type_ids=jnp.zeros_like(input_ids)`",
        ),
        lambda: True,
        lambda config: True,
    ),
)
