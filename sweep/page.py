"""The table of the sweep in docs/frameworks/pytorch.md, and a line for each model."""

from .finding import Finding


def summary(finding: Finding) -> str:
    """One line for the terminal."""
    if finding.fault:
        return f"✗ {finding.title}: {finding.fault}"
    return (
        f"✓ {finding.title}: forward {finding.forward:.0e}, factored {finding.factored} of "
        f"{finding.weights}, merged {finding.merged:.0e}, PEFT "
        f"{finding.no_peft if finding.peft is None else format(finding.peft, '.0e')}"
        f"{f', axes unlike: {finding.unlike}' if finding.unlike else ''} ({finding.seconds} s)"
    )


def record(findings: dict[str, Finding]) -> None:
    """Writes the table between its two marks in the page."""
