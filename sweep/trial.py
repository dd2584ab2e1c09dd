"""Runs one model through lorax_hf and PEFT."""

import copy
import re
import tempfile
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import lorax
import lorax_hf
from lorax import testing

from .finding import Finding
from .models import build

RANK = 2


def try_model(title: str) -> Finding:
    """Runs all stages. The first one that fails is recorded as the fault."""
    finding, started = Finding(title), time.perf_counter()
    stage = ["build"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _try(title, finding, stage)
    except Exception as error:
        text = " ".join(str(error).split())
        finding.fault = f"{stage[-1]}: {type(error).__name__}: {text}"[:400]
    finding.seconds = round(time.perf_counter() - started, 1)
    return finding


def _try(title: str, finding: Finding, stage: list[str]) -> None:
    module, inputs = build(title)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}

    stage.append("torch")
    no_cache = {"use_cache": False} if _takes_cache(module) else {}
    with torch.no_grad():
        expected = main_output(module(**tensors, **no_cache)).float().numpy()

    stage.append("from_torch")
    fn, params = lorax_hf.from_torch(module)

    def run(params: Any, **arrays: Any) -> Any:
        return main_output(fn(params, **arrays))

    base = jax.jit(run)(params, **arrays)
    finding.forward = relative_error(base, expected)

    stage.append("infer_spec")
    spec = lorax.infer_spec(run, params, rank=RANK, skip_small=False, **arrays)
    finding.weights = sum(isinstance(leaf, lorax.LoraSpec) for leaf in spec.values())

    stage.append("axes")
    hf_spec = lorax_hf.spec(module, rank=1, targets=lambda name: True, inputs=arrays)
    for path, leaf in hf_spec.items():
        inferred = spec[path]
        if isinstance(leaf, lorax.LoraSpec) and isinstance(inferred, lorax.LoraSpec):
            # An axis of size one can have any role.
            shape = params[path].shape
            ours, traced = _axes(leaf, shape), _axes(inferred, shape)
            if ours != traced:
                finding.axes_differ[path] = f"{ours} in the spec, {traced} in the trace"

    stage.append("lora")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = randomized(tunable)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = jax.jit(lorax.lora(run))((frozen, tunable), **arrays)
    materialized = [w for w in caught if issubclass(w.category, lorax.MaterializeWarning)]
    finding.materialized = {
        str(w.message).split("`")[1]: str(w.message).splitlines()[0][:300] for w in materialized
    }
    finding.factored = finding.weights - len(finding.materialized)
    merged = jax.jit(run)(lorax.merge_params(frozen, tunable), **arrays)
    finding.merged = relative_error(adapted, merged)

    stage.append("peft")
    _peft(module, tensors, no_cache, run, params, arrays, finding)


# In the types that it converts, PEFT 0.21 treats these names as the parts of experts in
# transformers 4, regardless of their module, and then adapts a different weight.
_TREATED_AS_EXPERTS = re.compile(r"(^|\.)(gate|gate_proj|up_proj|down_proj|w[123])$")


def _peft(
    module: Any, tensors: Any, no_cache: Any, run: Any, params: Any, arrays: Any, finding: Finding
) -> None:
    from peft import PeftModel

    import lorax_io

    linear = _spec(module, "all-linear") or {}
    unused = [
        n for n in _not_called(module, tensors, no_cache) if linear.get(f"{n}.weight", 0) != 0
    ]
    finding.left_out = dict.fromkeys(unused, _NOT_CALLED)
    for _ in range(2):
        converted = _is_converted_by_peft(module)

        def exclude(name: str, converted: bool = converted) -> bool:
            as_expert = converted and _TREATED_AS_EXPERTS.search(name) is not None
            return as_expert or name in finding.left_out

        specs = [_spec(module, "experts"), _spec(module, "all-linear", exclude)]
        present = [spec for spec in specs if spec is not None]
        if not present:
            finding.not_in_peft = "no linear layer"
            return
        spec = {name: next((s[name] for s in present if s[name] != 0), 0) for name in params}
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
        tunable = randomized(tunable)
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            lorax_io.save_peft(folder, tunable, lorax_hf.peft_names(module))
            try:
                peft_model = PeftModel.from_pretrained(copy.deepcopy(module), folder).eval()
                with torch.no_grad():
                    expected = main_output(peft_model(**tensors, **no_cache)).float().numpy()
            except Exception as error:
                text = " ".join(str(error).split())
                finding.not_in_peft = f"{type(error).__name__} in PEFT: {text}"[:200]
                return
        missing = {name for w in caught for name in _MISSING_KEY.findall(str(w.message))} - {
            *finding.left_out
        }
        if not missing:
            break
        finding.left_out |= dict.fromkeys(sorted(missing), _NOT_LOADED)
    adapted = lorax.lora(run, on_materialize="allow", on_unused="allow")
    ours = jax.jit(adapted)((frozen, tunable), **arrays)
    finding.peft = relative_error(ours, expected)


_NOT_CALLED = (
    "the model reads the weight without calling the module, so PEFT's adapter has no effect "
    "until it is merged"
)
_NOT_LOADED = "PEFT does not find the factors in the folder"
# A key in PEFT's warning of missing keys.
_MISSING_KEY = re.compile(r"'base_model\.model\.([^']+?)\.lora_[AB]\.default\.weight'")


def _not_called(module: Any, tensors: Any, no_cache: Any) -> list[str]:
    """The linear layers that the forward pass of a module does not call."""
    uncalled = {name for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)}
    hooks = [
        each.register_forward_hook(lambda *_, name=name: uncalled.discard(name))
        for name, each in module.named_modules()
    ]
    with torch.no_grad():
        module(**tensors, **no_cache)
    for hook in hooks:
        hook.remove()
    return sorted(uncalled)


def _is_converted_by_peft(module: Any) -> bool:
    from peft.utils import transformers_weight_conversion as conversion

    kind = getattr(getattr(module, "config", None), "model_type", None)
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    return pattern in conversion._MOE_TARGET_MODULE_MAPPING


def _spec(module: Any, targets: str, exclude: Any = None) -> Any:
    """The spec for the given targets, or None if the module does not have them."""
    try:
        return lorax_hf.spec(module, rank=RANK, alpha=3, targets=targets, exclude=exclude)
    except lorax.SpecError:
        if exclude is None:
            return None
        # No module has an excluded name.
        return _spec(module, targets)


def randomized(tunable: Any) -> Any:
    """Random factors, small enough to keep outputs bounded."""
    random = testing.random_factors(tunable, jax.random.key(1))
    return jax.tree.map(lambda leaf: 0.1 * leaf, random)


def main_output(output: Any) -> Any:
    """The logits of a model's output, or its first array."""
    if hasattr(output, "shape"):
        return output
    for name in ("logits", "logits_per_image"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    leaves = list(output.values()) if hasattr(output, "values") else list(output)
    return leaves[0]


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    assert np.isfinite(expected).all(), "the outputs of torch are not finite"
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def _axes(leaf: lorax.LoraSpec, shape: tuple[int, ...]) -> tuple[Any, ...]:
    groups = (leaf.in_axes or (), leaf.out_axes or (), leaf.shared_axes)
    return tuple(tuple(axis for axis in group if shape[axis] > 1) for group in groups)


def _takes_cache(module: Any) -> bool:
    return bool(getattr(getattr(module, "config", None), "use_cache", False))
