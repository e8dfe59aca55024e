"""What every benchmark reports: both sides run by run, a ratio, and the goals that it holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """How many times better than the peer: higher is better for befm_jax."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, ours: Sequence[float], peer: Sequence[float]) -> Ratio:
        """Of seconds, run by run: each of ours against the peer's of the same round."""
        each = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
        return cls(statistics.median(each), min(each), max(each))


@dataclass(frozen=True)
class Goal:
    """A figure and the bound that it is held to."""

    name: str
    figure: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is within the bound."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "ok" if self.holds else "MISSED"
        return (
            f"{self.name}: {_number(self.figure)}{self.unit and ' ' + self.unit} "
            f"(goal {sign} {_number(self.bound)}) {verdict}"
        )


@dataclass(frozen=True)
class Bench:
    """One benchmark's figures.

    `runs` holds both sides' figures, one dictionary a run; `ratio` one `Ratio` a condition.
    """

    name: str
    settings: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]
    ratio: dict[str, Ratio]
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every goal is met."""
        return all(goal.holds for goal in self.goals)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self) | {
            "goals": [asdict(goal) | {"holds": goal.holds} for goal in self.goals]
        }

    def table(self) -> str:
        """Everything, for a reader."""
        lines = [self.name, ", ".join(f"{key} {value}" for key, value in self.settings.items()), ""]
        columns = list(next(iter(self.runs.values()))[0])
        rows = [["", *columns]]
        for side, runs in self.runs.items():
            for number, run in enumerate(runs, 1):
                rows.append([f"{side} {number}", *(_cell(run.get(name)) for name in columns)])
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        lines.append("")
        for condition, ratio in self.ratio.items():
            lines.append(
                f"{condition}: {ratio.median:.2f} times the peer "
                f"({ratio.min:.2f} to {ratio.max:.2f})"
            )
        return "\n".join([*lines, *map(str, self.goals), *self.notes])


def _number(value: float) -> str:
    """Two digits behind the point, or for what is tiny its power of ten."""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.2f}"


def _cell(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if value else "–"
