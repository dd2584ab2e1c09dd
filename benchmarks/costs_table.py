"""The rows of `costs.py`, as text and as JSON."""

from typing import Any, NamedTuple

from counts import Counts

MARK = "▲"  # follows a ratio above its goal

HEADER = f"""\
Ours / hand-written; {MARK} is above the goal of 1.00 (trace: 1.50).

                                   FLOPs              temp bytes         HLO instructions   trace
model                         hand-written    ratio  hand-writ.   ratio  hand-writ.   ratio   ratio
--------------------------------   ----------------   ----------------   ----------------   -----"""


class Row(NamedTuple):
    """The counts of one program, ours and hand-written."""

    model: str
    program: str
    ours: Counts
    hand_written: Counts
    trace: float

    @property
    def ratios(self) -> Counts:
        """Ours over hand-written, for each count."""
        return Counts(*(x / max(y, 1) for x, y in zip(self.ours, self.hand_written, strict=True)))

    @property
    def above(self) -> dict[str, bool]:
        """Which goals the row misses. The number of instructions does not have a goal."""
        return {
            "FLOPs": self.ours.flops > self.hand_written.flops,
            "temp bytes": self.ours.temp_bytes > self.hand_written.temp_bytes,
            "trace time": self.trace > 1.5,
        }


def line(row: Row) -> str:
    """A row as text."""
    flops, temp, trace = (MARK if above else " " for above in row.above.values())
    cells = [
        f"{short(getattr(row.hand_written, count)):>7} {getattr(row.ratios, count):7.3f}{mark}"
        for count, mark in (("flops", flops), ("temp_bytes", temp), ("instructions", " "))
    ]
    name = f"{row.model}, {row.program}"
    return f"{name:34} {'   '.join(cells)}   {row.trace:4.2f}{trace}"


def short(number: float) -> str:
    """The number with four digits and a unit."""
    for unit in ("", " k", " M"):
        if number < 10_000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} G"


def summary(rows: list[Row]) -> str:
    """How many programs meet each goal."""
    parts = []
    for goal in rows[0].above:
        missed = [f"{row.model} {row.program}" for row in rows if row.above[goal]]
        parts.append(f"{goal} {len(rows) - len(missed)}/{len(rows)}")
    return f"\nGoals met: {', '.join(parts)}."


def as_dict(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    counts = {
        name: {"ours": ours, "hand_written": hand_written, "ratio": ratio}
        for name, ours, hand_written, ratio in zip(
            Counts._fields, row.ours, row.hand_written, row.ratios, strict=True
        )
    }
    return {
        "model": row.model,
        "program": row.program,
        **counts,
        "trace_ratio": row.trace,
        "above_goal": [goal for goal, above in row.above.items() if above],
    }
