"""Choices between two gambles: what each may pay, and how many people took which.

The table has one line a problem, CSV, in gzip or Parquet, as in choices13k (Peterson et al.,
Science 372, 2021): `Problem`, `Feedback` (True or False), `n` people, and `bRate`, the mean share
of their five choices that was B.  Gamble A pays `Ha` with probability `pHa`, else `La`; B pays a
lottery of mean `Hb` with probability `pHb`, else `Lb`.  The lottery has `LotNumB` outcomes and
`LotShapeB` 0 (one outcome), 1 (symmetric), 2 (skewed to the right) or 3 (to the left), as in Erev
et al. (Psychological Review 124, 2017).  `Amb`: the probabilities of B are hidden; `Corr`: 1 where
both gambles are drawn together, -1 where they are drawn against each other, else 0.

A row is a line.  Lines with the same two gambles are in one split, however they are asked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from befm_jax.data.rows import (
    LeftOut,
    Rows,
    fingerprint_of,
    normal_id,
    number_or_none,
    sketch_of,
    usable,
)
from befm_jax.errors import DataError

# What may be paid and with what probability, the best first; probabilities are above 0.
Gamble = tuple[tuple[float, float], ...]
_NUMBERS = ("n", "Ha", "pHa", "La", "Hb", "pHb", "Lb", "LotNumB", "bRate")
_COLUMNS = ("Problem", "Feedback", *_NUMBERS, "LotShapeB", "Amb", "Corr")
_YES = {"true": True, "false": False}
_LINKS = {"-1": -1, "0": 0, "1": 1}
_SHAPES = ("0", "1", "2", "3")
_MOST_OUTCOMES = 16


@dataclass(frozen=True)
class Problem:
    """Two gambles, and how many people chose the second.

    Attributes:
        id: the number of the problem, with "/feedback" where there was feedback.
        first: gamble A.
        second: gamble B.
        is_hidden: whether the probabilities of the second are not told.
        linked: 1: drawn together, -1: against each other, 0: by themselves.
        has_feedback: whether people saw after each choice what both gambles paid.
        people: how many chose.
        share: of the second gamble in their choices, 0 to 1.
    """

    id: str
    first: Gamble
    second: Gamble
    is_hidden: bool
    linked: int
    has_feedback: bool
    people: int
    share: float

    @property
    def person(self) -> str:
        """What splits go by: the two gambles, in either order."""
        both = repr(sorted((self.first, self.second)))
        return hashlib.sha256(both.encode()).hexdigest()[:16]


def read(path: str | Path) -> Rows[Problem]:
    """The problems of a table; what can't be used is counted by reason.

    Raises:
        DataError: as `rows.usable`; or there is no problem.
    """
    left_out = LeftOut()
    rows: dict[str, Problem] = {}
    for line, cells in usable(path, _COLUMNS, left_out):
        place, id = f"line {line}", normal_id(cells["Problem"])
        numbers = {name: number_or_none(cells[name]) for name in _NUMBERS}
        feedback, hidden = (_YES.get(cells[name].casefold()) for name in ("Feedback", "Amb"))
        linked, shape = _LINKS.get(normal_id(cells["Corr"])), normal_id(cells["LotShapeB"])
        if feedback:
            id += "/feedback"
        if None in numbers.values():
            name = next(name for name, number in numbers.items() if number is None)
            left_out.add("row: a number is missing or not finite", place, name)
            continue
        known = {name: number for name, number in numbers.items() if number is not None}
        outcomes, people = int(known["LotNumB"]), int(known["n"])
        if feedback is None or hidden is None or linked is None:
            left_out.add("row: Feedback, Amb or Corr is not one of theirs", place, id)
        elif any(not 0 <= known[name] <= 1 for name in ("pHa", "pHb", "bRate")):
            left_out.add("row: a probability or a rate is not 0 to 1", place, id)
        elif people != known["n"] or people < 1:
            left_out.add("row: n is not a whole number of people", place, cells["n"])
        elif (
            shape not in _SHAPES
            or outcomes != known["LotNumB"]
            or not 1 <= outcomes <= _MOST_OUTCOMES
        ):
            what = f"shape {shape}, {cells['LotNumB']} outcomes"
            left_out.add("row: a lottery that can't be", place, what)
        elif id in rows:
            left_out.add("row: second line of a problem", place, id)
        else:
            first = _gamble([(known["Ha"], known["pHa"]), (known["La"], 1 - known["pHa"])])
            lottery = _lottery(known["Hb"], int(shape), outcomes)
            second = _gamble(
                [
                    *((pays, known["pHb"] * chance) for pays, chance in lottery),
                    (known["Lb"], 1 - known["pHb"]),
                ]
            )
            rows[id] = Problem(id, first, second, hidden, linked, feedback, people, known["bRate"])
    if not rows:
        raise DataError(f"{path}: no problem; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = {repr(row) for row in rows.values()}
    source = f"{Path(path).name} (gambles)"
    return Rows(list(rows.values()), source, fingerprint_of(facts), sketch_of(facts), left_out)


def _lottery(mean: float, shape: int, outcomes: int) -> list[tuple[float, float]]:
    """The outcomes of a lottery with their probabilities."""
    if shape == 0:
        return [(mean, 1.0)]
    if shape == 1:
        steps = outcomes - 1
        return [(mean - steps / 2 + at, math.comb(steps, at) / 2**steps) for at in range(outcomes)]
    sign = 1 if shape == 2 else -1
    # The last two are equally likely.
    return [
        (mean + sign * (2**at - outcomes - 1), 1 / 2 ** min(at, outcomes - 1))
        for at in range(1, outcomes + 1)
    ]


def _gamble(outcomes: Iterable[tuple[float, float]]) -> Gamble:
    """The outcomes, each once; probabilities are rounded, since 1 - .95 is no .05."""
    chances: dict[float, float] = {}
    for pays, chance in outcomes:
        chances[pays] = chances.get(pays, 0.0) + chance
    kept = {pays: round(chance, 12) for pays, chance in chances.items()}
    return tuple(sorted(((p, c) for p, c in kept.items() if c > 0), reverse=True))
