"""One model through lorax_hf and PEFT, in this process."""

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
    """All stages; the first that fails is the fault."""
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
    quiet = {"use_cache": False} if _takes_cache(module) else {}
    with torch.no_grad():
        expected = main_output(module(**tensors, **quiet)).float().numpy()

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
    said = lorax_hf.spec(module, rank=1, targets=lambda name: True, inputs=arrays)
    for path, leaf in said.items():
        found = spec[path]
        if isinstance(leaf, lorax.LoraSpec) and isinstance(found, lorax.LoraSpec):
            # An axis of one entry may have any role.
            shape = params[path].shape
            ours, traced = _axes(leaf, shape), _axes(found, shape)
            if ours != traced:
                finding.unlike[path] = f"{ours} here, {traced} by the trace"

    stage.append("lora")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = loaded(tunable)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = jax.jit(lorax.lora(run))((frozen, tunable), **arrays)
    built = [w for w in told if issubclass(w.category, lorax.MaterializeWarning)]
    finding.built = {
        str(w.message).split("`")[1]: str(w.message).splitlines()[0][:300] for w in built
    }
    finding.factored = finding.weights - len(finding.built)
    merged = jax.jit(run)(lorax.merge_params(frozen, tunable), **arrays)
    finding.merged = relative_error(adapted, merged)

    stage.append("peft")
    _peft(module, tensors, quiet, run, params, arrays, finding)


# PEFT 0.21 takes these, in the types that it converts, for the names that transformers 4 gave to
# parts of experts, whatever module has them, and then adapts something else.
_TAKEN_FOR_EXPERTS = re.compile(r"(^|\.)(gate|gate_proj|up_proj|down_proj|w[123])$")


def _peft(
    module: Any, tensors: Any, quiet: Any, run: Any, params: Any, arrays: Any, finding: Finding
) -> None:
    from peft import PeftModel

    import lorax_io

    linear = _spec(module, "all-linear") or {}
    unused = [n for n in _not_called(module, tensors, quiet) if linear.get(f"{n}.weight", 0) != 0]
    finding.left_out = dict.fromkeys(unused, _NOT_CALLED)
    for _ in range(2):
        converted = _is_converted_by_peft(module)

        def exclude(name: str, converted: bool = converted) -> bool:
            taken = converted and _TAKEN_FOR_EXPERTS.search(name) is not None
            return taken or name in finding.left_out

        specs = [_spec(module, "experts"), _spec(module, "all-linear", exclude)]
        known = [spec for spec in specs if spec is not None]
        if not known:
            finding.no_peft = "no linear layer"
            return
        spec = {name: next((s[name] for s in known if s[name] != 0), 0) for name in params}
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
        tunable = loaded(tunable)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            lorax_io.save_peft(folder, tunable, lorax_hf.peft_names(module))
            try:
                theirs = PeftModel.from_pretrained(copy.deepcopy(module), folder).eval()
                with torch.no_grad():
                    expected = main_output(theirs(**tensors, **quiet)).float().numpy()
            except Exception as error:
                text = " ".join(str(error).split())
                finding.no_peft = f"{type(error).__name__} in PEFT: {text}"[:200]
                return
        lost = {name for w in told for name in _LOST.findall(str(w.message))} - {*finding.left_out}
        if not lost:
            break
        finding.left_out |= dict.fromkeys(sorted(lost), _NOT_LOADED)
    adapted = lorax.lora(run, on_materialize="allow", on_unused="allow")
    ours = jax.jit(adapted)((frozen, tunable), **arrays)
    finding.peft = relative_error(ours, expected)


_NOT_CALLED = (
    "the model reads the weight and does not call the module, so that PEFT's adapter has no effect "
    "until it is merged"
)
_NOT_LOADED = "PEFT does not find the factors in the folder"
# In PEFT's warning of keys that it misses.
_LOST = re.compile(r"'base_model\.model\.([^']+?)\.lora_[AB]\.default\.weight'")


def _not_called(module: Any, tensors: Any, quiet: Any) -> list[str]:
    """The linear layers of a module that its forward pass does not call."""
    rest = {name for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)}
    hooks = [
        each.register_forward_hook(lambda *_, name=name: rest.discard(name))
        for name, each in module.named_modules()
    ]
    with torch.no_grad():
        module(**tensors, **quiet)
    for hook in hooks:
        hook.remove()
    return sorted(rest)


def _is_converted_by_peft(module: Any) -> bool:
    from peft.utils import transformers_weight_conversion as conversion

    kind = getattr(getattr(module, "config", None), "model_type", None)
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    return pattern in conversion._MOE_TARGET_MODULE_MAPPING


def _spec(module: Any, targets: str, exclude: Any = None) -> Any:
    """The spec for a kind of modules, or None where there are none."""
    try:
        return lorax_hf.spec(module, rank=RANK, alpha=3, targets=targets, exclude=exclude)
    except lorax.SpecError:
        if exclude is None:
            return None
        # Nothing has a name that is to be excluded.
        return _spec(module, targets)


def loaded(tunable: Any) -> Any:
    """Random factors that move the outputs and do not blow them up."""
    random = testing.random_factors(tunable, jax.random.key(1))
    return jax.tree.map(lambda leaf: 0.1 * leaf, random)


def main_output(found: Any) -> Any:
    """The logits, or the first floating array that a model returns."""
    if hasattr(found, "shape"):
        return found
    for name in ("logits", "logits_per_image"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    leaves = list(found.values()) if hasattr(found, "values") else list(found)
    return leaves[0]


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    assert np.isfinite(expected).all(), "the outputs of torch are not finite"
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def _axes(leaf: lorax.LoraSpec, shape: tuple[int, ...]) -> tuple[Any, ...]:
    groups = (leaf.in_axes or (), leaf.out_axes or (), leaf.shared_axes)
    return tuple(tuple(axis for axis in group if shape[axis] > 1) for group in groups)


def _takes_cache(module: Any) -> bool:
    return bool(getattr(getattr(module, "config", None), "use_cache", False))
