"""One-shot games of two actions each, and what people chose in them.

The table has one line a choice, CSV, in gzip or Parquet: `participant`, `trial`, the payoffs
`AC_you, AC_other, AD_you, ... BD_other` (the person chooses A or B, the other one C or D) and
`choice`, A or B.  In a split are the choices that its people made in its games: a game that is
tested is in no training, whoever played it, however its rows, columns and players are arranged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from befm_jax.data.rows import (
    LeftOut,
    Rows,
    fingerprint_of,
    normal_id,
    of_person,
    sketch_of,
    split_of,
    usable,
)
from befm_jax.errors import DataError

# By one's own action, and the other's.
Payoffs = tuple[tuple[float, float], tuple[float, float]]
_ACTIONS = ("A", "B")
_CELLS = tuple(
    tuple(tuple(f"{own}{other}_{whose}" for other in "CD") for own in "AB")
    for whose in ("you", "other")
)
_COLUMNS = ("participant", "trial", *(name for side in _CELLS for row in side for name in row))


@dataclass(frozen=True)
class Game:
    """The payoffs of a game: `own[i][j]` and `other[i][j]` for one's action i and the other's j."""

    own: Payoffs
    other: Payoffs

    def arranged(self, rows: bool, columns: bool) -> Game:
        """The same game with one's own actions, or the other's, in the other order."""
        row, column = (-1 if rows else 1), (-1 if columns else 1)
        own, other = (
            _payoffs(one[::column] for one in side[::row]) for side in (self.own, self.other)
        )
        return Game(own, other)

    def other_side(self) -> Game:
        """The game as the other player sees it."""
        own, other = (_payoffs(zip(*side, strict=True)) for side in (self.other, self.own))
        return Game(own, other)

    @cached_property
    def id(self) -> str:
        """One text for all arrangements of the game, and for both players."""
        flips = (False, True)
        return min(
            repr((one.own, one.other))
            for side in (self, self.other_side())
            for rows in flips
            for columns in flips
            for one in (side.arranged(rows, columns),)
        )

    @cached_property
    def pure_equilibria(self) -> list[tuple[int, int]]:
        """The pairs of actions of which neither player gains by leaving theirs alone."""
        own, other = np.array(self.own), np.array(self.other)
        best = (own == own.max(0)) & (other == other.max(1, keepdims=True))
        return [(int(row), int(column)) for row, column in np.argwhere(best)]

    @cached_property
    def equilibrium(self) -> tuple[float, float]:
        """The shares of one's own actions in the Nash equilibrium.

        The only pure one; where there are none or several, the mixed one, which does not choose
        among them; where ties leave no such mixture, the pure one that pays both the most together.
        """
        pure = self.pure_equilibria
        mixed = None if len(pure) == 1 else self._mixed()
        if mixed is not None:
            return mixed, 1.0 - mixed
        row, _ = max(pure, key=lambda at: self.own[at[0]][at[1]] + self.other[at[0]][at[1]])
        return (0.0, 1.0) if row else (1.0, 0.0)

    def _mixed(self) -> float | None:
        """The share of the first action where both players mix; None where they can't."""
        first = _indifference(self.other_side().own)
        return None if first is None or _indifference(self.own) is None else first

    @cached_property
    def kind(self) -> str:
        """What it takes to solve the game, for figures by kind."""
        if _dominates(self.own):
            return "a dominant action"
        if _dominates(self.other_side().own):
            return "the other has a dominant action"
        number = len(self.pure_equilibria)
        return {0: "no pure equilibrium", 1: "one pure equilibrium"}.get(
            number, "several equilibria"
        )


@dataclass(frozen=True)
class Trial:
    """One choice: the position of an action in a game."""

    id: str
    game: Game
    choice: int


@dataclass(frozen=True)
class Player:
    """The choices of one person, of which each was made once and without knowing any outcome."""

    person: str
    trials: tuple[Trial, ...]


def is_table(header: Iterable[str]) -> bool:
    """Whether a table with these columns is one of 2x2 games."""
    return {*_COLUMNS, "choice"} <= set(header)


def read(path: str | Path) -> Rows[Player]:
    """Everybody's choices in a table; what can't be used is counted by reason.

    Raises:
        DataError: as `rows.usable`; or there is no choice.
    """
    left_out = LeftOut()
    people: dict[str, dict[str, Trial]] = {}
    games: dict[Game, Game] = {}  # one object a game, which keeps what follows from it
    for line, cells in usable(path, (*_COLUMNS, "choice"), left_out):
        place, person = f"line {line}", normal_id(cells["participant"])
        trial, choice = normal_id(cells["trial"]), cells["choice"].upper()
        game = _game(cells)
        if not person or not trial:
            left_out.add("row: no participant or trial", place, "")
        elif game is None:
            left_out.add("row: a payoff is not a finite number", place, "")
        elif choice not in _ACTIONS:
            left_out.add("row: choice is not A or B", place, repr(cells["choice"]))
        elif trial in people.get(person, {}):
            left_out.add("row: second choice in a trial", place, f"{person}, {trial}")
        else:
            made = Trial(trial, games.setdefault(game, game), _ACTIONS.index(choice))
            people.setdefault(person, {})[trial] = made
    if not people:
        raise DataError(f"{path}: no choice; {'; '.join(left_out.lines()) or 'no rows'}")
    rows = [Player(person, tuple(trials.values())) for person, trials in people.items()]
    facts = [repr((row.person, one.game, one.choice)) for row in rows for one in row.trials]
    source = f"{Path(path).name} (2x2 games)"
    return Rows(rows, source, fingerprint_of(facts), sketch_of(facts), left_out, within=in_split)


def in_split(row: Player, split: str, seed: int) -> Player | None:
    """The choices of a person of the split in its games; None where there are none."""
    if of_person(row, split, seed) is None:
        return None
    trials = tuple(one for one in row.trials if split_of(one.game.id, seed) == split)
    return replace(row, trials=trials) if trials else None


def _game(cells: dict[str, str]) -> Game | None:
    try:
        own, other = (
            _payoffs([float(cells[name]) for name in row] for row in side) for side in _CELLS
        )
    except ValueError:
        return None
    if not all(math.isfinite(number) for side in (own, other) for row in side for number in row):
        return None
    return Game(own, other)


def _payoffs(rows: Iterable[Iterable[float]]) -> Payoffs:
    (a, b), (c, d) = rows
    return (a, b), (c, d)


def _dominates(own: Payoffs) -> bool:
    """Whether one action is better than the other whatever the other player does."""
    first, second = np.array(own)
    return bool((first > second).all() or (first < second).all())


def _indifference(own: Payoffs) -> float | None:
    """The share of the other's first action at which both own actions pay alike, inside 0 to 1."""
    on_first, on_second = (own[0][column] - own[1][column] for column in (0, 1))
    if on_first * on_second >= 0:
        return None
    return on_second / (on_second - on_first)
