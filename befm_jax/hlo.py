"""What a compiled program sends between chips, read from its text.

XLA's own cost analysis counts the body of a loop once.  Here everything is multiplied by how often
it runs: the compiler writes a loop's number of turns beside it (`known_trip_count`).  A loop
without that number, whose turns depend on data, is counted once and reported.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)="
    r"\{?([^,}\s]+(?:, ?%[^,}\s]+)*)"
)
_TURNS = re.compile(r'known_trip_count\\?":?\s*\{\\?"?n\\?"?:\s*\\?"(\d+)')
_ARRAY = re.compile(r"\b(pred|[suf]\d+(?:e\d+m\d+\w*)?|bf16|c\d+)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_BITS = {"pred": 8, "bf16": 16}
# Collective -> bytes that each chip sends, as a share of the larger of what goes in and comes out,
# where `n` chips take part and pass it round in a ring.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclass(frozen=True)
class Traffic:
    """What each chip sends in one run of a program.

    `sent`: bytes by collective and number of chips that take part.  `unknown_loops`: loops whose
    turns depend on data, counted as one turn.
    """

    sent: dict[tuple[str, int], float]
    unknown_loops: int

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.sent.values())


def traffic(text: str, devices: int) -> Traffic:
    """Reads the text of a compiled module (`compiled.as_text()`) for so many devices."""
    entry, computations = _computations(text)
    times: dict[str, float] = defaultdict(float)
    unknown = 0
    # Callees stand before their callers in the text: walked backwards, callers come first.
    times[entry] = 1.0
    for name in reversed(list(computations)):
        if not times[name]:
            continue
        for line in computations[name]:
            turns = 1.0
            if " while(" in line:
                found = _TURNS.search(line)
                turns = float(found.group(1)) if found else 1.0
                unknown += not found
            for called in _CALLED.findall(line):
                for callee in called.replace("%", "").split(","):
                    times[callee.strip()] += times[name] * turns
    sent: dict[tuple[str, int], float] = defaultdict(float)
    for name, lines in computations.items():
        for line in lines if times[name] else []:
            instruction = _INSTRUCTION.match(line)
            if not instruction:
                continue
            kind = instruction.group(3).removesuffix("-start")
            if kind not in _SENT:
                continue
            taking_part = _taking_part(line, devices)
            largest = max(map(_bytes, _ARRAY.findall(line.split(", metadata=")[0])), default=0.0)
            sent[kind, taking_part] += times[name] * largest * _SENT[kind](taking_part)
    return Traffic(dict(sent), unknown)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, found, current = "", {}, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = found.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, found


def _taking_part(line: str, devices: int) -> int:
    found = _GROUPS.search(line)
    if not found:
        return devices
    if found.group(2):
        return int(found.group(2))
    return len(found.group(3).split(",")) if found.group(3) else devices


def _bytes(array: tuple[str, str]) -> float:
    kind, shape = array
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8
