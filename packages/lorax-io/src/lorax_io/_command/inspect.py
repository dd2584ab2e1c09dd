"""`lorax inspect`."""

import argparse
import json
import math
import re
from collections import Counter
from typing import Any

from rich.table import Column, Table

from lorax import Adapter

from .._formats.native import user_metadata
from .._formats.opening import OpenedAdapter
from .._formats.signature import written_by
from .._formats.table import FORMATS
from .._summary import Line, summarize
from .options import ADAPTER, SAME, add_naming, console, opened, printable, renamed, renaming

HELP = "show what an adapter contains"
# The last part of a parameter's path, after its module.
_LEAVES = frozenset(("kernel", "embedding", "weight", "w"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_naming(parser)


def run(args: argparse.Namespace) -> int:
    """Prints an adapter's format, and the rank, alpha, shapes and norm for each parameter."""
    adapter = renamed(opened(args.adapter, args), renaming(args))
    lines = summarize(adapter.rows)
    about = _about(adapter, lines)
    if args.json:
        print(json.dumps({**about, "parameters": [line._asdict() for line in lines]}, indent=1))
        return SAME
    out = console()
    for key, value in about.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        out.print(printable(f"{key}: {text}"), soft_wrap=True)
    table = Table(
        Column("path", overflow="fold"),
        "kind",
        *_right("rank", "alpha", "scale"),
        "shapes",
        "dtype",
        *_right("norm"),
    )
    for line in lines:
        table.add_row(
            printable(line.path),
            line.kind,
            *(_text(value) for value in (line.rank, line.alpha, line.scale)),
            " · ".join("×".join(map(str, shape)) or "()" for shape in line.shapes),
            line.dtype,
            f"{line.norm:.4g}",
        )
    out.print(table)
    return SAME


def _about(adapter: OpenedAdapter, lines: list[Line]) -> dict[str, Any]:
    """A summary of the adapter; keys without a value are left out."""
    config = adapter.config
    about: dict[str, Any] = {
        "format": adapter.format,
        "description": FORMATS[adapter.format].description,
        "written by": _writer(adapter),
        "parameters trained": sum(math.prod(s) for line in lines for s in line.shapes),
        "kinds": _counted([line.kind for line in lines]),
        "rank": _values([line.rank for line in lines]),
        "alpha": _values([line.alpha for line in lines]),
        "scale": _values([line.scale for line in lines]),
        "part": adapter.part,
        "targets": _targets(adapter),
    }
    if config is not None:
        about |= {
            "saved in full": sorted(config.modules_to_save or []),
            "base": config.base_model_name_or_path,
            "task": config.task_type,
        }
    about["needs its base"] = adapter.needs_base
    about["to load it"] = FORMATS[adapter.format].loads
    if adapter.format == "native":
        about |= user_metadata(adapter.metadata)
    return {key: value for key, value in about.items() if value not in (None, [], "")}


def _writer(adapter: OpenedAdapter) -> str | None:
    """The program that wrote the file; None if the file does not tell."""
    metadata, config = adapter.metadata, adapter.config
    if (ours := written_by(metadata)) is not None:
        return ours
    if adapter.format == "native" or "lorax" in metadata:  # by a release that left its version out
        return "lorax-io"
    if config is not None and config.peft_version is not None:
        return f"PEFT {config.peft_version}"
    if any(key.startswith("ss_") for key in metadata):
        return f"kohya's sd-scripts {metadata.get('ss_sd_scripts_commit_hash', '')[:8]}".strip()
    return metadata.get("software") or metadata.get("modelspec.implementation")


def _targets(adapter: OpenedAdapter) -> str | list[str]:
    """The config's `target_modules`, or else the ends of the names of adapted modules."""
    config = adapter.config
    if config is not None and config.is_given:
        targets = config.target_modules
        return targets if isinstance(targets, str) else sorted(targets or [])
    adapted = [path for path, row in adapter.rows.items() if isinstance(row, Adapter)]
    names = [adapter.names[p].module if p in adapter.names else p for p in adapted]
    return sorted({_end(name) for name in names})


def _end(name: str) -> str:
    """The end of a module's name: `to_q`, `to_out.0`, or what follows kohya's last number."""
    parts = re.split(r"[./]", name)
    if len(parts) == 1:
        return re.split(r"_\d+_", name)[-1]
    if parts[-1] in _LEAVES:
        parts.pop()
    last = next((k for k in reversed(range(len(parts))) if not parts[k].isdecimal()), 0)
    return ".".join(parts[last:])


def _counted(values: list[str]) -> list[str]:
    return [f"{count} {value}" for value, count in Counter(values).most_common()]


def _values(values: list[Any]) -> list[Any]:
    """Each value once."""
    return sorted({value for value in values if value is not None})


def _right(*names: str) -> list[Any]:
    return [Column(name, justify="right") for name in names]


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}"
