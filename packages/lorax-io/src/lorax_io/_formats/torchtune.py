"""Files with torchtune's names, as in its checkpoints: `layers.0.attn.q_proj.lora_a.weight`.

torchtune pickles these tensors, and also writes a PEFT folder. Alpha is not in the file.
"""

import re
from typing import Any

from .._disk.files import file_in
from .._disk.tensors import is_number, read_json
from .._errors import AdapterFileError, UnsupportedAdapterError, about, warn
from .._torch_names import MAGNITUDE
from .format import Content, Format
from .peft.config import CONFIG_NAME
from .peft.tuners import FACTOR
from .self_described import self_described
from .source import Source, Stored, plain_keys, stored

_KEYS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": MAGNITUDE}
_KEY = re.compile(rf"\.({'|'.join(map(re.escape, _KEYS))})$")
_MARK = re.compile(r"\.lora_[ab]\.weight$")
_ROTATED = (".q_proj", ".k_proj")


def _recognizes(content: Content) -> bool:
    return any(map(_MARK.search, content.file.entries))


def _read(content: Content) -> Source:
    tensors: dict[str, Stored] = {}
    for name, tensor in plain_keys(stored(content.file), "").items():
        match = _KEY.search(name)
        if match is None:
            raise AdapterFileError(f"has `{name}`, which is not a factor of torchtune's LoRA.")
        tensors[f"{name[: match.start()]}.{_KEYS[match[1]]}"] = tensor
    modules = {key[: match.start()] for key in tensors if (match := FACTOR.search(key))}
    source = self_described(tensors)
    alpha = _alpha(content)
    config = source.config
    with_alpha = config.replace(lora_alpha=alpha, alpha_pattern={})
    if rotated := sorted(module for module in modules if module.endswith(_ROTATED)):
        warn(
            f"has the rows of `{rotated[0]}` in torchtune's order. For most models transformers "
            "has another order there. For a base of transformers, take the PEFT folder that "
            "torchtune also writes."
        )
    return source._replace(config=with_alpha)


def _alpha(content: Content) -> float:
    if content.alpha is not None:
        return content.alpha
    if content.folder is None:
        raise UnsupportedAdapterError(
            "has the names of torchtune, and torchtune's alpha is not in such a file. Give it: "
            "`alpha=` in Python, `--alpha` in the command."
        )
    path = file_in(content.folder, CONFIG_NAME)
    with about(path):
        config = read_json(path)
        alpha: Any = config.get("lora_alpha") if isinstance(config, dict) else None
        if not is_number(alpha):
            raise AdapterFileError("has no number `lora_alpha`.")
        return float(alpha)


FORMAT = Format(
    "torchtune",
    "a file with torchtune's names",
    _recognizes,
    _read,
    "lorax_io.load_any(path, params, names, alpha=alpha)",
    takes_alpha=True,
)
