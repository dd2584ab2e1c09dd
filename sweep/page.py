"""The section of the sweep in docs/frameworks/pytorch.md, and a summary line for each model."""

import collections
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from .finding import Finding

PAGE = Path("docs", "frameworks", "pytorch.md")
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
_PACKAGES = ("torch", "torchax", "transformers", "diffusers", "peft", "jax")
CLOSE = 1e-4  # larger differences from PEFT's outputs are listed


def summary(finding: Finding) -> str:
    """One line for the terminal."""
    if finding.fault:
        return f"✗ {finding.title}: {finding.fault}"
    differ = f", axes differ: {finding.axes_differ}" if finding.axes_differ else ""
    return (
        f"✓ {finding.title}: forward {_error(finding.forward)}, factored {finding.factored} of "
        f"{finding.weights}, merged {_error(finding.merged)}, PEFT "
        f"{finding.not_in_peft or _error(finding.peft)}"
        f"{differ} ({finding.seconds} s)"
    )


def record(findings: Mapping[str, Finding]) -> None:
    """Replaces the section between the two marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{_section(findings)}\n\n{END}{after}")


def _section(findings: Mapping[str, Finding]) -> str:
    ran = [finding for finding in findings.values() if not finding.fault]
    run_by_torch = [f for f in findings.values() if not _is_of_torch(f)]
    weights, factored = sum(f.weights for f in ran), sum(f.factored for f in ran)
    compared = [finding for finding in ran if finding.peft is not None]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    lines = [
        f"Versions: {versions}.",
        "",
        f"PyTorch runs {len(run_by_torch)} models at a tiny size, and {len(ran)} of them run in "
        f"JAX. {factored} of their {weights} weights stay factored. PEFT loads the adapters of "
        f"{len(compared)} models.",
        "",
        "| model | forward, error | factored | adapted, error | PEFT, error |",
        "|---|---|---|---|---|",
        *map(_row, ran),
        "",
        *_notes(findings),
    ]
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    peft = "–" if finding.peft is None else _error(finding.peft)
    return (
        f"| {finding.title} | {_error(finding.forward)} "
        f"| {finding.factored} of {finding.weights} | {_error(finding.merged)} | {peft} |"
    )


def _notes(findings: Mapping[str, Finding]) -> Iterator[str]:
    rows = list(findings.values())
    yield "**Materialized weights**, with the reason that the warning gives:"
    yield ""
    for finding in rows:
        for reason in finding.materialized.values():
            cause, *_ = _clean(reason).partition(", so the adapted weight")
            yield f"- {finding.title}: {cause}"
    yield ""
    yield "**Results that differ from PEFT's**, or that are not compared:"
    yield ""
    for finding in rows:
        if finding.peft is not None and finding.peft > CLOSE:
            yield f"- {finding.title}: differs by {_error(finding.peft)}"
    for finding in rows:
        for why, names in _by_reason(finding.left_out).items():
            yield f"- {finding.title}, compared without {', '.join(names)}: {why}"
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for finding in rows:
        if finding.not_in_peft:
            reasons[finding.not_in_peft].append(finding.title)
    for reason, titles in reasons.items():
        yield f"- {', '.join(titles)}: {_clean(reason)}"
    yield ""
    yield "**Models that run in PyTorch and not in JAX**, with the error:"
    yield ""
    for finding in rows:
        if finding.fault and not _is_of_torch(finding):
            yield f"- {finding.title}: {_clean(finding.fault)}"
    yield ""
    left = [finding.title for finding in rows if _is_of_torch(finding)]
    yield (
        f"**Not tried**: {len(left)} types whose config does not support the tiny sizes, or that "
        f"need inputs that the sweep does not make: {', '.join(left)}."
    )


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """The excluded modules for each reason; modules that differ in the layer number are one."""
    modules: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for name, why in left_out.items():
        name = re.sub(r"\.[0-9]+\.", ".*.", name)
        modules[why][f"`{name}`"] = None
    return {why: list(names) for why, names in modules.items()}


def _is_of_torch(finding: Finding) -> bool:
    """Whether the model failed already in PyTorch."""
    return finding.fault.startswith(("build:", "torch:"))


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _clean(text: str) -> str:
    """The text on one line, without file paths, which differ between machines."""
    text = re.sub(r" at /\S*( \([^)]*\))?", "", " ".join(text.split()))
    return text[:220].replace("|", "\\|").replace("<", "&lt;")
