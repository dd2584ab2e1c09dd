"""Checks that vLLM's reader of adapters accepts folders that `save_peft` writes.

`python check.py FOLDER`, where FOLDER contains vLLM's unpacked wheel. Only the files of the reader
are run, with stubs for their imports, so neither a GPU nor torch is needed.
"""

import ast
import dataclasses
import pathlib
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
from safetensors import safe_open

import lorax
from lorax import testing
from lorax_io import Linear, save_peft


@dataclasses.dataclass
class LoRAConfig:
    """A stub of vLLM's class, with the field that the reader uses and its default."""

    max_lora_rank: int = 16


class Logger:
    """A stub of a logger, which ignores all messages."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def add_stub(name, **values):
    """Adds a stub module with these values; returns its namespace."""
    stub = types.ModuleType(name)
    stub.__dict__.update(values)
    stub.__path__ = []
    sys.modules[name] = stub
    return stub.__dict__


def read_vllm(folder):
    """`PEFTHelper` and `parse_fine_tuned_lora_name` of an unpacked wheel."""
    source = folder / "vllm" / "lora"
    add_stub("vllm")
    add_stub("vllm.config")
    add_stub("vllm.config.lora", LoRAConfig=LoRAConfig)
    add_stub("vllm.logger", init_logger=lambda name: Logger())
    helper = add_stub("vllm.lora.peft_helper")
    exec(compile((source / "peft_helper.py").read_text(), "peft_helper.py", "exec"), helper)
    functions = ("parse_fine_tuned_lora_name", "is_base_embedding_weights")
    body = [
        node
        for node in ast.parse((source / "utils.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in functions
    ]
    utils = {"WeightsMapper": None}
    exec(compile(ast.Module(body, []), "utils.py", "exec"), utils)
    return helper["PEFTHelper"], utils["parse_fine_tuned_lora_name"]


ADAPTERS = {
    "uniform": ({}, {}),
    "rsLoRA": ({"alpha": 7, "scaling": "rslora"}, {}),
    "patterns": ({"alpha": 7}, {}),
    "suffixes": ({"alpha": 16}, {"target_modules": ["q_proj", "down_proj"]}),
    "folded": ({"alpha": 7}, {"fold_scale": True}),
}


def main(folder):
    """Writes each adapter, and reads it with vLLM."""
    helper_type, parse = read_vllm(folder)
    modules = [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    ]
    params = {name: jnp.zeros((16, 24)) for name in modules}
    names = {name: Linear(name) for name in modules}
    for title, (fields, options) in ADAPTERS.items():
        spec = {name: lorax.LoraSpec(4, **fields) for name in modules}
        if title == "patterns":
            spec[modules[1]] = lorax.LoraSpec(3, alpha=11)
        _, tunable = lorax.init_lora(params, spec, jax.random.key(0))
        tunable = testing.random_factors(tunable, jax.random.key(1))
        with tempfile.TemporaryDirectory() as out:
            save_peft(out, tunable, names, task_type="CAUSAL_LM", **options)
            helper = helper_type.from_local_dir(out, None)
            helper.validate_legal(LoRAConfig())
            with safe_open(f"{out}/adapter_model.safetensors", "numpy") as file:
                for key in file.keys():
                    name, is_a = parse(key)
                    rank, scale = helper.get_rank_and_scaling(name)
                    shape = file.get_slice(key).get_shape()
                    assert shape[0 if is_a else 1] == rank == tunable[name].rank, (key, rank)
                    expected = 1 if "fold_scale" in options else tunable[name].scale
                    assert abs(scale - expected) < 1e-9, (key, scale, expected)
        print(f"vLLM accepts: {title}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
