"""Counting a table of choices: what can be used, and what is left out and why."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from befm_jax.data import files
from befm_jax.data import games as library
from befm_jax.data.errors import DataError
from befm_jax.data.games import Game

_EXAMPLES_PER_REASON = 5
# NumPy draws without replacement from fewer than this many.
_MOST_PEOPLE = 10**9


class Tally:
    """Counts of the choices that can be used, and of what is left out.

    Attributes:
        layout: which layout the table has: "MobLab", "tidy" or "histogram".
        counts: game id -> int64 [A], the people who are counted.
        excluded: reason -> cells or rows left out of the whole table.
        shown: reason -> the first few of them, each with its line.
    """

    def __init__(self, games: Sequence[Game], counted: Callable[[str], bool]) -> None:
        self.layout = ""
        self.games = {game.id: game for game in games}
        self.counts = {game.id: np.zeros(len(game.values), np.int64) for game in games}
        self.excluded: Counter[str] = Counter()
        self.shown: dict[str, list[str]] = {}
        self._counted = counted
        self._answers = {game.id: game.answers for game in games}
        self._place = {
            game_id: {value: place for place, value in enumerate(answers.values)}
            for game_id, answers in self._answers.items()
        }
        self._known = set(library.ids())
        self._seen: set[tuple[str, str]] = set()

    def exclude(self, reason: str, line: int, what: str) -> None:
        """Count something under the reason for which it is left out."""
        self.excluded[reason] += 1
        shown = self.shown.setdefault(reason, [])
        if len(shown) < _EXAMPLES_PER_REASON:
            shown.append(f"line {line}: {what if len(what) <= 60 else what[:57] + '...'}")

    def whole_row(self, line: int, cells: list[str], header: list[str]) -> bool:
        """Whether a row has a cell for each column; counted if not."""
        if len(cells) == len(header):
            return True
        self.exclude(
            "row: wrong number of cells", line, f"{len(cells)} where the header has {len(header)}"
        )
        return False

    def is_asked_for(self, game_id: str, line: int) -> bool:
        """Whether a row's game is wanted; counted if there is no such game at all."""
        if game_id not in self.games and game_id not in self._known:
            self.exclude("row: unknown game", line, repr(game_id))
        return game_id in self.games

    def place(self, game_id: str, cell: str, line: int) -> int | None:
        """The place of a choice among the game's values; None, and counted, if it has none."""
        answers = self._answers[game_id]
        if cell.casefold() in (labels := [label.casefold() for label in answers.labels]):
            return labels.index(cell.casefold())
        number = _number(cell)
        if cell == "":
            reason = "no choice"
        elif number is None:
            reason = "not a number"
        elif not math.isfinite(number):
            reason = "not finite"
        elif not number.is_integer():
            reason = "not a whole number"
        elif (place := self._place[game_id].get(int(number))) is None:
            reason = f"outside {answers.range_in_words}"
        else:
            return place
        self.exclude(f"{game_id}: {reason}", line, repr(cell))
        return None

    def choice(self, game_id: str, participant: str, cell: str, line: int) -> None:
        """Count one participant's choice in one game, or why it cannot be."""
        place = self.place(game_id, cell, line)
        if place is None:
            return
        if (game_id, participant) in self._seen:
            reason = f"{game_id}: second choice of the same participant"
            self.exclude(reason, line, f"participant {participant!r}")
            return
        self._seen.add((game_id, participant))
        if self._counted(participant):
            self.counts[game_id][place] += 1


def count(
    path: str | Path, content: bytes, games: Sequence[Game], counted: Callable[[str], bool]
) -> Tally:
    """Count a CSV table in one of the three layouts that `befm_jax.data.people` describes.

    Args:
        path: the table's name, for messages.
        content: the table.
        games: the games that are wanted.
        counted: of a participant's id, whether that person is counted; everyone is checked. A
            histogram has no ids and is counted whole.

    Raises:
        DataError: binary content, another header, a missing column, broken quoting.
    """
    header, rows = files.read_table(files.decode(content, path), path)
    tally = Tally(games, counted)
    if "UserID" in header:
        tally.layout = "MobLab"
        _read_moblab(path, header, rows, tally)
    elif {"game", "participant", "choice"} <= set(header):
        tally.layout = "tidy"
        _read_tidy(header, rows, tally)
    elif {"game", "choice", "count"} <= set(header):
        tally.layout = "histogram"
        _read_histogram(path, header, rows, tally)
    else:
        cut = any(mark in name for name in header for mark in ";\t")
        raise DataError(
            f"{path}:1: the header has {', '.join(map(repr, header))}; it should have 'UserID' and "
            "a column for each game, or 'game', 'participant', 'choice', or 'game', 'choice', "
            f"'count'{', separated by commas' if cut else ''}"
        )
    return tally


def _read_moblab(
    path: str | Path, header: list[str], rows: Iterable[tuple[int, list[str]]], tally: Tally
) -> None:
    columns = {game.id: game.reference for game in tally.games.values() if game.reference}
    expected = ", ".join(f"{column!r} ({game_id})" for game_id, column in columns.items())
    missing = [column for column in columns.values() if column not in header]
    if len(missing) == len(columns):
        raise DataError(
            f"{path}:1: no column of a game that is asked for: found "
            f"{', '.join(map(repr, header))}; expected {expected or 'none, for these games'}"
        )
    if missing:
        raise DataError(
            f"{path}:1: missing column {', '.join(map(repr, missing))}; expected {expected}. For a "
            "table without them, ask only for the games that it has"
        )
    who = header.index("UserID")
    where = [(game_id, header.index(column)) for game_id, column in columns.items()]
    for line, cells in rows:
        if not tally.whole_row(line, cells, header):
            continue
        participant = cells[who].strip()
        if not participant:
            tally.exclude("row: no participant", line, "UserID is empty")
            continue
        for game_id, column in where:
            if cell := cells[column].strip():  # empty: this person did not play this game
                tally.choice(game_id, participant, cell, line)


def _read_tidy(header: list[str], rows: Iterable[tuple[int, list[str]]], tally: Tally) -> None:
    columns = [header.index(name) for name in ("game", "participant", "choice")]
    for line, cells in rows:
        if not tally.whole_row(line, cells, header):
            continue
        game_id, participant, choice = (cells[column].strip() for column in columns)
        if not tally.is_asked_for(game_id, line):
            continue
        if not participant:
            tally.exclude("row: no participant", line, f"{game_id}, {choice!r}")
            continue
        tally.choice(game_id, participant, choice, line)


def _read_histogram(
    path: str | Path, header: list[str], rows: Iterable[tuple[int, list[str]]], tally: Tally
) -> None:
    columns = [header.index(name) for name in ("game", "choice", "count")]
    seen = set()
    for line, cells in rows:
        if not tally.whole_row(line, cells, header):
            continue
        game_id, choice, cell = (cells[column].strip() for column in columns)
        if not tally.is_asked_for(game_id, line):
            continue
        place = tally.place(game_id, choice, line)
        if place is None:
            continue
        number = _number(cell)
        if number is None or not number.is_integer() or not 0 <= number < _MOST_PEOPLE:
            tally.exclude(f"{game_id}: count is not a whole number of people", line, repr(cell))
        elif (game_id, place) in seen:
            tally.exclude(f"{game_id}: choice listed before", line, repr(choice))
        else:
            seen.add((game_id, place))
            tally.counts[game_id][place] = int(number)
    for game_id, counts in tally.counts.items():
        if counts.sum() >= _MOST_PEOPLE:
            raise DataError(f"{path}: {game_id}: {counts.sum():,} people; {_MOST_PEOPLE:,} or more")


def _number(cell: str) -> float | None:
    """The number in a cell; None where it holds something else."""
    # float() reads "1_000" and other scripts' digits as well, which no table means as a number.
    if "_" in cell or not cell.isascii():
        return None
    try:
        return float(cell)
    except ValueError:
        return None
