"""The table of results, for the terminal and for docs/wild.md."""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

from rich import box
from rich.markup import escape
from rich.table import Table

from .finding import Finding

COLUMNS = ("model", "factored", "materialized", "left out", "error", "trace")


def table(findings: Sequence[Finding]) -> Table:
    """The table for a terminal."""
    rendered = Table(title="Models from other packages", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        rendered.add_column(column, overflow="fold")
    for package, rows in _packages(findings).items():
        rendered.add_row(f"[bold]{escape(package)}[/]")
        for finding in rows:
            cells = [escape(cell) for cell in _cells(finding)]
            if finding.fault:
                cells[0] = f"[red]✗[/] {cells[0]}"
            rendered.add_row(*cells)
    return rendered


PAGE = """\
# Models from other packages

We test Lorax on models that were not written for it, at tiny sizes. They are imported from
packages on PyPI, without changes. We run {models} models of {packages} packages; {built} of their
{weights} weights are materialized.

`nox -s wild` takes each model through `infer_spec`, `init_lora`, `lora`, `explain`,
`testing.check`, a step of gradient descent and `merge_params`. It fails if a result differs from
[`wild/expected.json`](../wild/expected.json). `nox -s wild -- --record` updates that file and this
page, which was made with JAX {jax}.

- **factored**: adapted weights that are never materialized, out of all weights. A weight is a
  parameter with two or more axes that reaches a product, a convolution or a lookup; these are
  found without Lorax. Biases, gains and position embeddings that are only added do not count.
- **materialized**: adapted weights that are materialized.
- **left out**: weights without an adapter. "Not named" are those that `infer_spec` does not
  report.
- **error**: the largest error of values and gradients relative to the merged model, in float64.
  Models marked (32) only run in float32.
- **trace**: processor time to trace the adapted model, divided by that of the plain model, with
  empty caches. It depends on the machine and is not tested.

{table}

## What is materialized or left out, and why

{reasons}
"""


def page(findings: Sequence[Finding], single: set[str]) -> str:
    """The text of docs/wild.md. `single` contains the titles of the models that run in float32."""
    packages = _packages(findings)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for package, rows in packages.items():
        for finding in rows:
            name, *cells = _cells(finding)
            cells[3] += " (32)" if finding.title in single else ""
            lines.append(f"| {package}: {name} | {' | '.join(cells)} |")
    return PAGE.format(
        jax=version("jax"),
        models=len(findings),
        packages=len(packages),
        built=sum(len(finding.materialized) for finding in findings),
        weights=sum(finding.weights for finding in findings),
        table="\n".join(lines),
        reasons="\n".join(_reasons(findings)),
    )


def _packages(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    by_package: dict[str, list[Finding]] = collections.defaultdict(list)
    for finding in findings:
        by_package[finding.version].append(finding)
    return dict(sorted(by_package.items()))


def _cells(finding: Finding) -> list[str]:
    left_out = [f"{len(finding.left_out)}"] if finding.left_out else []
    left_out += [f"{len(finding.unreported)} not named"] if finding.unreported else []
    return [
        finding.title.partition(": ")[2],
        f"{finding.factored} of {finding.weights}",
        f"{len(finding.materialized)}" if finding.materialized else "",
        ", ".join(left_out),
        "–" if finding.error is None else f"{finding.error:.0e}",
        "–" if finding.trace is None else f"{finding.trace:.1f} ×",
    ]


def _reasons(findings: Sequence[Finding]) -> Iterator[str]:
    for package, rows in _packages(findings).items():
        for finding in rows:
            lines = [*_grouped("materialized", finding.materialized)]
            lines += _grouped("left out", finding.left_out)
            lines += _grouped("not named", dict.fromkeys(finding.unreported, ""))
            lines += _grouped(
                "zero gradient at initialization", dict.fromkeys(finding.unchanged, "")
            )
            lines += [f"**fault**: {_code_safe(finding.fault)}"] if finding.fault else []
            if lines:
                yield f"- {package}, {finding.title.partition(': ')[2]}:"
                yield from (f"  - {line}" for line in lines)


def _grouped(status: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """One line for paths with the same reason, and one name for paths that differ in numbers."""
    paths: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for path, reason in reasons.items():
        paths[re.sub(r"\d+", "…", path), reason].append(path)
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for (pattern, reason), members in paths.items():
        by_reason[reason].append(f"`{members[0] if len(members) == 1 else pattern}`")
    for reason, names in by_reason.items():
        yield ": ".join(part for part in (", ".join(names), status, reason) if part)


def _code_safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
