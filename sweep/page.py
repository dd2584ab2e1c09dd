"""The table of the sweep in docs/frameworks/pytorch.md, and a line for each model."""

import collections
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from .finding import Finding

PAGE = Path("docs", "frameworks", "pytorch.md")
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
_PACKAGES = ("torch", "torchax", "transformers", "diffusers", "peft", "jax")
CLOSE = 1e-4  # of PEFT's outputs; what is farther away is named


def summary(finding: Finding) -> str:
    """One line for the terminal."""
    if finding.fault:
        return f"✗ {finding.title}: {finding.fault}"
    return (
        f"✓ {finding.title}: forward {_error(finding.forward)}, factored {finding.factored} of "
        f"{finding.weights}, merged {_error(finding.merged)}, PEFT "
        f"{finding.no_peft or _error(finding.peft)}"
        f"{f', axes unlike: {finding.unlike}' if finding.unlike else ''} ({finding.seconds} s)"
    )


def record(findings: Mapping[str, Finding]) -> None:
    """Writes what was found between the two marks in the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{_section(findings)}\n\n{END}{after}")


def _section(findings: Mapping[str, Finding]) -> str:
    ran = [finding for finding in findings.values() if not finding.fault]
    built_by_torch = [f for f in findings.values() if not _is_of_torch(f)]
    weights, factored = sum(f.weights for f in ran), sum(f.factored for f in ran)
    compared = [finding for finding in ran if finding.peft is not None]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    lines = [
        f"Versions: {versions}.",
        "",
        f"PyTorch runs {len(built_by_torch)} models at a tiny size, and {len(ran)} of them run in "
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
        for reason in finding.built.values():
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
        if finding.no_peft:
            reasons[finding.no_peft].append(finding.title)
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
    """The modules that are left out for each reason, those of all layers as one."""
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for name, why in left_out.items():
        name = re.sub(r"\.[0-9]+\.", ".*.", name)
        found[why][f"`{name}`"] = None
    return {why: list(names) for why, names in found.items()}


def _is_of_torch(finding: Finding) -> bool:
    """Whether the model did not even run in PyTorch."""
    return finding.fault.startswith(("build:", "torch:"))


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _clean(text: str) -> str:
    """One line, without the places in files, which differ between machines."""
    text = re.sub(r" at /\S*( \([^)]*\))?", "", " ".join(text.split()))
    return text[:220].replace("|", "\\|").replace("<", "&lt;")
