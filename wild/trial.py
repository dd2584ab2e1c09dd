"""Runs the trial of one model in its own process.

    python -m wild.trial "discretax: S5" FILE

Prints the name of each stage as it starts, and writes the results to FILE as JSON. If a model
crashes or hangs, the last printed name is the stage.
"""

import dataclasses
import gc
import json
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from lorax import testing

from .catalog import CATALOG, Model, Subject, load
from .finding import Finding
from .reach import reached

RANK = 2
RATE = 1e-3
# Some of these models amplify rounding errors ten thousand times more than a layer does. Other
# errors are much larger.
TOLERANCE = {False: 1e-10, True: 1e-4}  # in float64, and for models in float32
SECONDS = 60  # limit of processor time for one model
ROUNDS = 3  # of trace times; the median is reported


def main() -> None:
    """Runs the model whose title is on the command line."""
    title, file = sys.argv[1:]
    # Before the model is built, so that its arrays have this precision.
    model = _find(title)
    if not model.single:
        jax.config.update("jax_enable_x64", True)
    # These models are small and run only a few times, so compilation dominates.
    jax.config.update("jax_disable_most_optimizations", True)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    finding = Finding(title, model.version)
    try:
        try_model(model, finding)
    except Exception as error:
        first = " ".join(str(error).split())
        finding.fault = f"{STAGE[-1]}: {type(error).__name__}: {first}"[:600]
    Path(file).write_text(json.dumps(dataclasses.asdict(finding)))


STAGE = ["import"]


def _enter(stage: str) -> None:
    STAGE.append(stage)
    print(stage, flush=True)


def _find(title: str) -> Model:
    load(title.partition(":")[0])
    return CATALOG[title]


def try_model(model: Model, finding: Finding) -> None:
    """Runs all stages in order, and writes each result into `finding` immediately."""
    _enter("build")
    fn, params, args = _at_precision(model)
    paths, leaves = _named(params)
    matrices = {path for path, leaf in zip(paths, leaves, strict=True) if _is_matrix(leaf)}
    _enter("infer_spec")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = lorax.infer_spec(fn, params, *args, rank=RANK)
    adapted = {path for path, leaf in zip(*_named(spec), strict=True) if leaf != lorax.LORA_FREEZE}
    finding.left_out = _reasons([str(warning.message) for warning in caught], matrices - adapted)

    _enter("reach")
    multiplied = matrices & reached(fn, params, *args)
    finding.unreported = sorted(multiplied - adapted - set(finding.left_out))
    finding.weights = len(adapted | multiplied | set(finding.left_out))

    _enter("explain")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    rows = lorax.explain(fn, (frozen, tunable), *args).rows
    finding.factored = sum(row.status == "covered" for row in rows)

    _enter("lora")
    warning_lora = lorax.lora(fn, on_materialize="warn", on_unused="error")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(lambda tunable: warning_lora((frozen, tunable), *args), tunable)
    messages = [str(w.message) for w in caught if issubclass(w.category, lorax.MaterializeWarning)]
    finding.materialized = _reasons(messages, {r.path for r in rows if r.status == "materialized"})
    assert len(finding.materialized) == sum(row.status == "materialized" for row in rows), (
        "explain and the warnings of lora differ about what is materialized"
    )

    _enter("compare")
    silent_lora = lorax.lora(fn, on_materialize="allow")
    loaded = testing.random_factors(tunable, jax.random.key(1))
    adapted_results = _value_and_gradient(lambda tunable: silent_lora((frozen, tunable), *args))(
        loaded
    )
    merged = lorax.merge_params(frozen, loaded)
    merged_results = _value_and_gradient(lambda t: fn(lorax.merge_params(frozen, t), *args))(loaded)
    finding.error = _error(adapted_results, merged_results)

    _enter("trace")
    finding.trace = _trace_ratio(silent_lora, fn, (frozen, tunable), params, args)

    _enter("step")
    finding.unchanged = _step(silent_lora, frozen, tunable, args)

    _enter("merge")
    _check_merge(params, merged, loaded)

    _enter("check")
    testing.check(
        fn,
        params,
        spec,
        *args,
        tolerance=TOLERANCE[model.single],
        transforms=model.transforms,
        materializes=bool(finding.materialized),
    )


def _at_precision(model: Model) -> Subject:
    fn, params, args = model.make()
    wide = {jnp.dtype("float32"): jnp.float64, jnp.dtype("complex64"): jnp.complex128}

    def widened(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array) and leaf.dtype in wide
        return leaf.astype(wide[leaf.dtype]) if is_array else leaf

    if model.single:
        return Subject(fn, params, args)
    return Subject(fn, *jax.tree.map(widened, (params, args)))


def _named(tree: Any) -> tuple[list[str], list[Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "." for path, _ in leaves]
    return names, [leaf for _, leaf in leaves]


def _is_matrix(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array) and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def _reasons(messages: list[str], paths: set[str]) -> dict[str, str]:
    """The reason that the messages give for each path."""
    reasons: dict[str, str] = {}
    for message in messages:
        for line in message.splitlines():
            for path in sorted(paths & set(re.findall(r"`([^`]+)`", line))):
                reasons.setdefault(path, _clause(line, path))
    return reasons


def _clause(message: str, path: str) -> str:
    """The reason in a warning, without paths that depend on the installation."""
    match = re.search(
        r"used by (`\w+`) as an array of shape .*? at .*?, which (.*?), so the adapted", message
    )
    if match:
        return f"{match[1]} {match[2]}"
    reason = message.strip().removeprefix(f"`{path}`: ").replace(f"`{path}`", "it", 1)
    return re.sub(r" at \S+:\d+\S*( \([^)]*\))?", "", reason)[:200]


def _value_and_gradient(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loss(tunable: Any) -> Any:
        outs = [leaf for leaf in jax.tree.leaves(function(tunable)) if _is_inexact(leaf)]
        # Each entry has a different weight, so that gradients are not uniform.
        weights = [
            jnp.cos(jnp.arange(out.size) + k).reshape(out.shape) for k, out in enumerate(outs)
        ]
        total = sum(jnp.sum(w * jnp.real(out)) for w, out in zip(weights, outs, strict=True))
        return total, outs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _error(actual: Any, expected: Any) -> float:
    """The largest error of any array, relative to the array's largest entry."""
    worst = 0.0
    (_, outs), gradients = actual
    (_, expected_outs), expected_gradients = expected
    pairs = zip(
        jax.tree.leaves((outs, gradients)),
        jax.tree.leaves((expected_outs, expected_gradients)),
        strict=True,
    )
    for x, y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        assert np.isfinite(y).all(), "the merged model is not finite"
        largest = np.max(np.abs(y), initial=0.0)
        worst = max(worst, float(np.max(np.abs(x - y), initial=0.0) / (largest or 1.0)))
    return worst


def _trace_ratio(silent_lora: Any, fn: Any, pair: Any, params: Any, args: Any) -> float:
    """The ratio of trace times, in CPU time of this process, which depends less on other load."""

    def seconds(function: Any, first: Any) -> float:
        jax.clear_caches()
        gc.collect()
        start = time.process_time()
        jax.make_jaxpr(lambda first: function(first, *args))(first)
        return time.process_time() - start

    ratios = [seconds(silent_lora, pair) / seconds(fn, params) for _ in range(ROUNDS)]
    return statistics.median(ratios)


def _step(silent_lora: Any, frozen: Any, tunable: Any, args: Any) -> list[str]:
    """Runs a gradient step from initial factors; returns the adapters that it does not change."""

    def loss(tunable: Any) -> Any:
        outs = jax.tree.leaves(silent_lora((frozen, tunable), *args))
        return sum(jnp.sum(jnp.abs(out - 0.5) ** 2) for out in outs if _is_inexact(out))

    @jax.jit
    def step(tunable: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(tunable)
        return value, jax.tree.map(lambda old, g: old - RATE * jnp.conj(g), tunable, gradients)

    value, trained = step(tunable)
    assert np.isfinite(value), f"the loss is {value}"
    unchanged: list[str] = []
    for (key_path, old), (_, new) in zip(_adapters(tunable), _adapters(trained), strict=True):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        before, after = jax.tree.leaves(old), jax.tree.leaves(new)
        assert all(np.isfinite(leaf).all() for leaf in after), f"`{path}` is not finite"
        if all(map(np.array_equal, before, after)):
            unchanged.append(path)
    return sorted(unchanged)


def _adapters(tunable: Any) -> list[tuple[Any, Any]]:
    """The adapters of a tree with their paths, even if their factors are boxed."""
    is_adapter = lambda node: isinstance(node, lorax.LoraWeight)  # noqa: E731
    return jax.tree_util.tree_flatten_with_path(tunable, is_leaf=is_adapter)[0]


def _check_merge(params: Any, merged: Any, tunable: Any) -> None:
    """Checks that merged parameters match the model's, and that `unmerge` restores those."""
    assert jax.tree.structure(merged) == jax.tree.structure(params), (
        "merge_params changed the structure"
    )
    unmerged = lorax.unmerge(merged, tunable)
    rows = zip(*_named(params), jax.tree.leaves(merged), jax.tree.leaves(unmerged), strict=True)
    for path, before, after, restored in rows:
        if not _is_inexact(before):
            continue
        assert (after.shape, after.dtype) == (before.shape, before.dtype), f"`{path}` differs"
        scale = float(np.max(np.abs(after), initial=1.0))
        error = float(np.max(np.abs(np.asarray(restored) - np.asarray(before)), initial=0.0))
        allowed = 8 * float(jnp.finfo(after.dtype).eps) * scale
        assert error <= allowed, f"`{path}` is {error:.2g} from the base after `unmerge`"


if __name__ == "__main__":
    main()
