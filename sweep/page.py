"""The results of the sweep in docs/pytorch-models.md, and a summary line for each model."""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from .finding import Finding

PAGE = Path("docs", "pytorch-models.md")
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
_PACKAGES = ("torch", "torchax", "transformers", "diffusers", "peft", "jax")
CLOSE = 1e-4  # larger differences from PEFT's outputs are listed
_LONGEST = 200  # characters of a reason; longer ones are cut


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
    yield from _listed(
        "**Materialized weights**, by the reason that the warning gives:", _materialized(rows)
    )
    yield from _listed("**Outputs that differ from PEFT's**:", _differing(rows))
    yield from _listed(
        "**Modules without an adapter in the comparison with PEFT**, by reason:", _left_out(rows)
    )
    yield from _listed("**Not compared with PEFT**, by reason:", _not_in_peft(rows))
    yield from _listed(
        "**Models that run in PyTorch but not in JAX**, with the error:",
        [f"- {f.title}: {_clean(f.fault)}" for f in rows if f.fault and not _is_of_torch(f)],
    )
    left = [finding.title for finding in rows if _is_of_torch(finding)]
    yield (
        f"**Not tried**: {len(left)} types whose config does not support the tiny sizes, or that "
        f"need inputs that the sweep does not make: {', '.join(left)}."
    )


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from (title, "", *lines, "")


def _materialized(rows: Sequence[Finding]) -> list[str]:
    weights: dict[str, list[str]] = collections.defaultdict(list)
    for finding in rows:
        for name, reason in finding.materialized.items():
            cause, *_ = _clean(reason).partition(", so the ")
            cause = cause.removeprefix(f"`{name}` ")
            weights[cause].append(f"{finding.title} (`{name}`)")
    return [f"- It {cause}: {', '.join(names)}." for cause, names in weights.items()]


def _differing(rows: Sequence[Finding]) -> list[str]:
    return [
        f"- {finding.title}: by {_error(finding.peft)}"
        for finding in rows
        if finding.peft is not None and finding.peft > CLOSE
    ]


def _left_out(rows: Sequence[Finding]) -> list[str]:
    """One line for each reason and set of modules."""
    titles: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    for finding in rows:
        for why, names in _by_reason(finding.left_out).items():
            titles[why].setdefault(", ".join(names), []).append(finding.title)
    lines: list[str] = []
    for why, models in titles.items():
        lines.append(f"- {why[0].upper()}{why[1:]}:")
        lines += [f"    - {', '.join(titles)}: {names}" for names, titles in models.items()]
    return lines


def _not_in_peft(rows: Sequence[Finding]) -> list[str]:
    titles: dict[str, list[str]] = collections.defaultdict(list)
    for finding in rows:
        if finding.not_in_peft:
            titles[_clean(finding.not_in_peft)].append(finding.title)
    return [f"- {reason}: {', '.join(names)}" for reason, names in titles.items()]


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
    text = text if len(text) < _LONGEST else f"{text[:_LONGEST].rpartition(' ')[0]} …"
    return text.replace("|", "\\|").replace("<", "&lt;")
