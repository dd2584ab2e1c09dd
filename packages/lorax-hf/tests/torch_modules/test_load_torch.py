"""`load_torch` equals `from_torch` from files, without a second copy in memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_torch
import torch

import lorax_hf


def saved(kind, folder, **options):
    model = tiny_torch.causal(kind)
    model.save_pretrained(folder, **options)
    return model


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.mark.parametrize("kind", tiny_torch.CAUSAL)
def test_load_torch_equals_from_torch(kind, tmp_path):
    model = saved(kind, tmp_path)
    fn, params = lorax_hf.load_torch(tmp_path)
    other, expected = lorax_hf.from_torch(model)
    assert_same(params, expected)
    assert_same(fn.buffers, other.buffers)
    ids = jnp.asarray(tiny_torch.IDS)
    np.testing.assert_array_equal(fn(params, ids).logits, other(expected, ids).logits)
    assert lorax_hf.peft_names(fn.module) == lorax_hf.peft_names(model)


def test_experts_in_the_files_of_transformers_4_are_converted(tmp_path):
    saved("mixtral", tmp_path)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    assert any(name.endswith("experts.0.w1.weight") for name in names)


def test_sharded_files(tmp_path):
    model = saved("llama", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(lorax_hf.load_torch(tmp_path)[1], lorax_hf.from_torch(model)[1])


def test_shardings_and_dtypes(tmp_path):
    model = saved("mixtral", tmp_path)
    mesh = jax.make_mesh((1,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    _, params = lorax_hf.load_torch(tmp_path, sharding=split, dtype=jnp.bfloat16)
    assert all(array.sharding == split for array in params.values())
    assert_same(params, lorax_hf.from_torch(model, dtype=jnp.bfloat16)[1])


def test_bfloat16_files(tmp_path):
    model = tiny_torch.causal("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    _, params = lorax_hf.load_torch(tmp_path)
    assert_same(params, lorax_hf.from_torch(model)[1])


def test_custom_module(tmp_path):
    module = tiny_torch.randomized(
        torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    )
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    fn, params = lorax_hf.load_torch(tmp_path, module=empty)
    other, expected = lorax_hf.from_torch(module)
    assert_same(params, expected)
    assert_same(fn.buffers, other.buffers)
    with pytest.raises(FileNotFoundError, match="no config.json; pass `module=`"):
        lorax_hf.load_torch(tmp_path)


def test_damaged_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        lorax_hf.load_torch(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        lorax_hf.load_torch(tmp_path)
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    content = file.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"

    def changed(**more):
        tensors = {key: value for key, value in {**arrays, **more}.items() if value is not None}
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})

    changed(**{name: None})
    with pytest.raises(ValueError, match=f"lacks `{name}` of LlamaForCausalLM"):
        lorax_hf.load_torch(tmp_path)
    changed(**{name: np.ones((3, 4), np.float32)})
    with pytest.raises(ValueError, match=rf"`{name}` in .* has the shape \(3, 4\)"):
        lorax_hf.load_torch(tmp_path)
    changed(more=np.ones(3, np.float32))
    with pytest.warns(UserWarning, match="has `more`, which LlamaForCausalLM does not have"):
        lorax_hf.load_torch(tmp_path)
    file.write_bytes(content[:-100])
    with pytest.raises(Exception, match="(?i)header|incomplete|metadata"):
        lorax_hf.load_torch(tmp_path)


def test_tensor_in_two_files_raises(tmp_path):
    saved("llama", tmp_path, max_shard_size="40KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    arrays = [safetensors.numpy.load_file(file) for file in (first, second)]
    name = next(iter(arrays[0]))
    changed = {**arrays[1], name: arrays[0][name] + 1}
    safetensors.numpy.save_file(changed, second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`{name}` is in two files of .*{second.name} and"):
        lorax_hf.load_torch(tmp_path)


def test_different_tied_tensors_raise(tmp_path):
    saved("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    table = arrays["model.embed_tokens.weight"]
    for head in (table, table + 1):
        tensors = {**arrays, "lm_head.weight": head}
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        if head is table:
            _, params = lorax_hf.load_torch(tmp_path)
            np.testing.assert_array_equal(params["model.embed_tokens.weight"], table)
        else:
            with pytest.raises(
                ValueError, match="have different values, but Qwen3ForCausalLM ties"
            ):
                lorax_hf.load_torch(tmp_path)


def test_attributes_without_values_raise(tmp_path):
    class Plain(torch.nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            self.scale = torch.full((5,), 2.0)

    arrays = {name: tensor.numpy() for name, tensor in Plain().state_dict().items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = Plain()
    with pytest.raises(ValueError, match="`scale` of Plain is a plain attribute"):
        lorax_hf.load_torch(tmp_path, module=module)


def test_unknown_class_warns(tmp_path):
    saved("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    with pytest.warns(lorax_hf.ModuleWarning, match="no class Mine.*a Qwen3Model is built"):
        lorax_hf.load_torch(tmp_path)


def test_damaged_index_raises(tmp_path):
    saved("llama", tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not an index"):
        lorax_hf.load_torch(tmp_path)
    first = min(entries["weight_map"])
    for elsewhere in ("../outside.safetensors", "gone.safetensors"):
        entries["weight_map"][first] = elsewhere
        index.write_text(json.dumps(entries))
        with pytest.raises(FileNotFoundError, match="is not in the folder"):
            lorax_hf.load_torch(tmp_path)


def test_quantized_files_raise(tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lorax_hf.QuantizedModuleError, match="quantization_config.*load_base"):
        lorax_hf.load_torch(tmp_path)


MEMORY = """
import sys, threading, time
import jax
import lorax_hf

def anonymous():
    # Pages of a file that is read are the system's cache, and not counted.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

lorax_hf.load_torch(sys.argv[1])  # a small model, so that imports are not counted
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
fn, params = lorax_hf.load_torch(sys.argv[2])
jax.block_until_ready(params)
done.set(); thread.join()
sizes = [array.nbytes for array in params.values()]
print(peak[0] - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_weights_and_the_largest_tensor(tmp_path, capsys):
    options = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 8000}
    saved("llama", tmp_path / "small")
    tiny_torch.causal("llama", **options).save_pretrained(tmp_path / "large")
    folders = [str(tmp_path / name) for name in ("small", "large")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, weights, largest = map(int, run.stdout.split())
    with capsys.disabled():
        print(
            f"\nload_torch: {weights / 1e6:.0f} MB of weights, the largest tensor "
            f"{largest / 1e6:.0f} MB; at most {(peak - weights) / 1e6:.0f} MB above the weights"
        )
    assert peak - weights <= 1.1 * largest
