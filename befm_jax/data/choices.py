"""Choices: who chose what in each game, read from a table and checked cell by cell.

Three layouts of a table, CSV or Parquet, are told apart by their header:

- MobLab's: `UserID` and one column a game (`Game.reference`), empty where not played;
- tidy: `game,participant,choice`, one row a choice;
- histogram: `game,choice,count`, one row a bar.

The first two give `Plays`, one row a person; the third, and the embedded reference that serves
where there is no table, give `Histogram`, one row a game.  A choice is its value or its name; upper
and lower case are the same.  One that cannot be used is left out, counted under a reason, and the
first of each reason are kept with their lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TypeGuard

import numpy as np
from jaxtyping import Int64

from befm_jax import files
from befm_jax.data import games as library
from befm_jax.data.games import Game
from befm_jax.data.rows import (
    SPLITS,
    LeftOut,
    Rows,
    drawn_part,
    fingerprint_of,
    normal_id,
    sketch_of,
    weights_in,
)
from befm_jax.errors import DataError, listed, unknown

REFERENCE_FILE = "moblab_first_choices.json"
# NumPy draws without replacement from fewer than this many.
_MOST_PEOPLE = 10**9
# Labels that items have of their own.
_TAKEN = ("person", "game")


@dataclass(frozen=True)
class Plays:
    """What one person chose.

    Attributes:
        person: the id, as `rows.normal_id` writes it.
        choices: game id -> position in the game's answer set, for each game that they played.
        labels: what else the table says of the person: sex, country.
    """

    person: str
    choices: Mapping[str, int]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many people gave each answer of one game: `counts` is int64 `[A]`, read-only."""

    game: str
    counts: Int64[np.ndarray, " A"]

    def __post_init__(self) -> None:
        counts = np.array(self.counts, np.int64)  # a copy: the caller's array stays theirs
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)


Choices = Rows[Plays] | Rows[Histogram]


def read(path: str | Path, games: Sequence[Game]) -> Choices:
    """Everybody's choices in a table, or those of the embedded reference where the path is "".

    Choices in registered games that are not among `games` are passed over without being counted as
    left out.  Further columns are labels of a person where they have one value a person.

    Args:
        path: the table.
        games: the games that are wanted.  In MobLab's layout each that has a `reference` must have
            its column.

    Raises:
        DataError: no games, an absent, empty or binary file, another header, a missing column, or
            no choice that can be used.
    """
    if not games:
        raise DataError(f"{path or 'the reference'}: no games asked for")
    if str(path) == "":
        return _somebody(read_reference(games), games)
    reader = _Reader(path, games)
    return _somebody(reader.read(), games)


def read_reference(games: Sequence[Game]) -> Rows[Histogram]:
    """The embedded human choices: MobLab, first choices in seven games.

    Of games without a `reference` it has no row.

    Raises:
        DataError: a game that refers to human data has other answers than they have.
    """
    file = resources.files("befm_jax.data.reference").joinpath(REFERENCE_FILE)
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for game in games:
        if game.reference not in content["histograms"]:
            continue
        histogram = content["histograms"][game.reference]
        low, high = histogram["values"]
        if not np.array_equal(game.values, np.arange(low, high + 1)):
            raise DataError(
                f"game {game.id}: its answers are {game.answers.in_words}, but those of its human "
                f"reference, {game.reference!r}, are {low} to {high}"
            )
        rows.append(Histogram(game.id, histogram["counts"]))
    left_out = LeftOut({name: int(number) for name, number in content["excluded"].items()})
    return Rows(rows, content["source"], content["fingerprint"], left_out=left_out)


def part(choices: Choices, split: str, seed: int = 0) -> Choices:
    """A split of people: by person where persons are known, else drawn without replacement.

    80 % are for training, 10 % for validation, 10 % for the test.  For one seed the parts of one
    source are disjoint and add up to the whole; a drawn game's parts do not depend on which other
    games are there.  The parts of the reference and those of the table that it was made from are
    not the same people: train and test on one source.

    Raises:
        DataError: an unknown split, people who are a part already, persons who were `counted`
            before, or nobody in the split.
    """
    if has_persons(choices):
        return choices.part(split, seed)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if split == "all":
        return choices
    if choices.split != "all":
        raise DataError(f"{choices.source}: these people are the {choices.split} split already")
    if choices.sketch:
        # Drawn from a histogram, people would be in another split than their own.
        raise DataError(f"{choices.source}: counted already; its persons are split before that")
    drawn = [
        Histogram(row.game, drawn_part(row.counts, split, seed, row.game))
        for row in choices.rows
        if isinstance(row, Histogram)
    ]
    if not any(row.counts.any() for row in drawn):
        raise DataError(f"{choices.source}: nobody is in the {split} split of seed {seed}")
    return Rows(
        drawn,
        choices.source,
        choices.fingerprint,
        left_out=choices.left_out,
        split=split,
        split_seed=seed,
    )


def has_persons(choices: Choices) -> TypeGuard[Rows[Plays]]:
    """Whether it is known who chose what; not so in histograms and the reference."""
    return len(choices.rows) > 0 and isinstance(choices.rows[0], Plays)


def by_person(choices: Choices) -> Rows[Plays]:
    """The choices as they are, for tasks about persons.

    Raises:
        DataError: histograms, which do not say who chose what.
    """
    if has_persons(choices):
        return choices
    raise DataError(
        f"{choices.source}: counts of people, which do not say who chose what; this needs a table "
        "with UserID and a column a game, or with game, participant, choice"
    )


def of_games(choices: Rows[Plays], games: Sequence[Game]) -> Rows[Plays]:
    """What people chose in some games; who played none of them is not among the rows.

    Raises:
        DataError: nobody played any.
    """
    ids = {game.id for game in games}
    rows = []
    for row in choices.rows:
        if kept := {game: position for game, position in row.choices.items() if game in ids}:
            rows.append(replace(row, choices=kept))
    if not rows:
        raise DataError(f"{choices.source}: no choice of {', '.join(ids) or 'no games'}")
    return replace(choices, rows=rows)


def histograms(choices: Choices, games: Sequence[Game]) -> dict[str, Int64[np.ndarray, " A"]]:
    """Game id -> int64 `[A]`, people for each answer; zeros where nobody played.

    Raises:
        DataError: a game with other answers than those counted.
    """
    counts = {game.id: np.zeros(len(game.answers), np.int64) for game in games}
    for row in choices.rows:
        if isinstance(row, Histogram):
            if row.game in counts:
                if len(row.counts) != len(counts[row.game]):
                    raise _other_answers(row.game, len(counts[row.game]), choices.source)
                counts[row.game] += row.counts
            continue
        for game, position in row.choices.items():
            if game in counts:
                if position >= len(counts[game]):
                    raise _other_answers(game, len(counts[game]), choices.source)
                counts[game][position] += 1
    for histogram in counts.values():
        histogram.setflags(write=False)
    return counts


def counted(choices: Choices, games: Sequence[Game]) -> Rows[Histogram]:
    """One row a game that somebody played, for tasks about populations.

    Raises:
        DataError: as `histograms`.
    """
    rows = [Histogram(game, n) for game, n in histograms(choices, games).items() if n.any()]
    return Rows(
        rows,
        choices.source,
        choices.fingerprint,
        choices.sketch,
        choices.left_out,
        choices.split,
        choices.split_seed,
    )


def describe(choices: Choices) -> str:
    """What was read and what was left out, in lines for a reader."""
    played: dict[str, int] = {}
    for row in choices.rows:
        if isinstance(row, Histogram):
            played[row.game] = played.get(row.game, 0) + int(row.counts.sum())
        else:
            for game in row.choices:
                played[game] = played.get(game, 0) + 1
    people = f" of {len(choices.rows):,} people" if has_persons(choices) else ""
    of = "" if choices.split == "all" else f" ({choices.split} split)"
    games = sum(number > 0 for number in played.values())
    head = f"{sum(played.values()):,} choices{people} in {games} games{of} from {choices.source}"
    return "\n".join([head, *choices.left_out.lines()])


def _other_answers(game: str, answers: int, source: str) -> DataError:
    return DataError(f"game {game}: {answers} answers, but the people of {source} had others")


def _somebody(choices: Choices, games: Sequence[Game]) -> Choices:
    if not any(isinstance(row, Plays) or row.counts.any() for row in choices.rows):
        found = describe(choices).replace("\n", "; ")
        names = ", ".join(game.id for game in games)
        raise DataError(f"no choice of {names} can be used: {found}")
    return choices


class _Reader:
    """Reads one table of choices; `left_out` fills while it does."""

    def __init__(self, path: str | Path, games: Sequence[Game]) -> None:
        self.path = path
        self.left_out = LeftOut()
        self.header, self.lines = files.table(path)
        # By small letters: spreadsheets and people write "Game" and "USERID".
        self.columns: dict[str, int] = {}
        for place, name in enumerate(self.header):
            other = self.columns.setdefault(name.casefold(), place)
            if name and other != place:
                raise DataError(f"{path}:1: column named twice: {self.header[other]!r}, {name!r}")
        self.asked = {game.id: game for game in games}
        # The fingerprint is of every game in the table, whichever are asked for.
        self.known = {id: library.get(id) for id in library.ids()} | self.asked
        self._names: dict[tuple[str, str], str] = {}

    def read(self) -> Choices:
        """The rows of whichever layout the table has."""
        if "userid" in self.columns:
            return self._people("MobLab", self._wide())
        if {"game", "participant", "choice"} <= set(self.columns):
            return self._people("tidy", self._tidy())
        if {"game", "choice", "count"} <= set(self.columns):
            return self._histograms()
        raise DataError(
            f"{self.path}:1: the header has {listed(map(repr, self.header))}; it should have "
            "'UserID' and a column for each game, or 'game', 'participant', 'choice', or 'game', "
            "'choice', 'count'"
        )

    def _people(self, layout: str, choices: Iterator[tuple[int, str, str, str]]) -> Rows[Plays]:
        """One row a person of (line, person, game, cell); empty cells are not among them."""
        played: dict[str, dict[str, int]] = {}
        facts = set()
        self._labels: dict[str, dict[str, str]] = {}
        self._differing: dict[str, str] = {}
        for line, person, id, cell in choices:
            facts.add(f"{person}\t{self._source(id)}\t{self._name(id, cell)}")
            if (position := self._position(id, cell, line)) is None:
                continue
            theirs = played.setdefault(person, {})
            if id in theirs:
                reason = f"{id}: second choice of the same participant"
                self.left_out.add(reason, f"line {line}", f"participant {person!r}")
            else:
                theirs[id] = position
        for column, place in self._differing.items():
            reason = f"column {column!r}: values differ within a person, so it is no label"
            self.left_out.add(reason, place, "the first that differs")
        labels = {
            person: {name: value for name, value in found.items() if name not in self._differing}
            for person, found in self._labels.items()
        }
        rows = [Plays(person, found, labels.get(person, {})) for person, found in played.items()]
        source = f"{Path(self.path).name} ({layout} layout)"
        return Rows(rows, source, fingerprint_of(facts), sketch_of(facts), self.left_out)

    def _wide(self) -> Iterator[tuple[int, str, str, str]]:
        referring = {id: game.reference for id, game in self.asked.items() if game.reference}
        expected = ", ".join(f"{column!r} ({game_id})" for game_id, column in referring.items())
        missing = [name for name in referring.values() if name.casefold() not in self.columns]
        if len(missing) == len(referring):
            raise DataError(
                f"{self.path}:1: no column of a game that is asked for: found "
                f"{listed(map(repr, self.header))}; expected "
                f"{expected or 'none, for these games'}"
            )
        if missing:
            raise DataError(
                f"{self.path}:1: missing column {', '.join(map(repr, missing))}; expected "
                f"{expected}. For a table without them, ask only for the games that it has"
            )
        where = [
            (id, self.columns[game.reference.casefold()])
            for id, game in self.known.items()
            if game.reference and game.reference.casefold() in self.columns
        ]
        who = self.columns["userid"]
        labels = self._label_columns({who, *(column for _, column in where)})
        for line, cells in self._whole_lines():
            person = normal_id(cells[who])
            if not person:
                self.left_out.add("row: no participant", f"line {line}", "UserID is empty")
                continue
            self._keep_labels(person, line, cells, labels)
            for game_id, column in where:
                if cell := cells[column].strip():  # empty: this person did not play this game
                    yield line, person, game_id, cell

    def _tidy(self) -> Iterator[tuple[int, str, str, str]]:
        places = [self.columns[name] for name in ("game", "participant", "choice")]
        labels = self._label_columns(set(places))
        for line, cells in self._whole_lines():
            game, participant, choice = (cells[place].strip() for place in places)
            game_id, person = self._game_id(game, line), normal_id(participant)
            if game_id is None:
                continue
            if not person:
                self.left_out.add("row: no participant", f"line {line}", f"{game_id}, {choice!r}")
                continue
            self._keep_labels(person, line, cells, labels)
            yield line, person, game_id, choice

    def _histograms(self) -> Rows[Histogram]:
        places = [self.columns[name] for name in ("game", "choice", "count")]
        self._label_columns(set(places), of_people=False)
        counts = {id: np.zeros(len(game.answers), np.int64) for id, game in self.asked.items()}
        seen, facts = set(), set()
        for line, cells in self._whole_lines():
            game, choice, cell = (cells[place].strip() for place in places)
            if (id := self._game_id(game, line)) is None:
                continue
            facts.add(f"{self._source(id)}\t{self._name(id, choice)}\t{normal_id(cell)}")
            if (position := self._position(id, choice, line)) is None:
                continue
            number = _whole(cell)
            if number is None or not 0 <= number < _MOST_PEOPLE:
                reason = f"{id}: count is not a whole number of people"
                self.left_out.add(reason, f"line {line}", repr(cell))
            elif (id, position) in seen:
                self.left_out.add(f"{id}: choice listed before", f"line {line}", repr(choice))
            else:
                seen.add((id, position))
                counts[id][position] = number
        for id, histogram in counts.items():
            if histogram.sum() >= _MOST_PEOPLE:
                raise DataError(
                    f"{self.path}: {id} has {histogram.sum():,} people; they must be fewer than "
                    f"{_MOST_PEOPLE:,}"
                )
        rows = [Histogram(id, found) for id, found in counts.items() if found.any()]
        source = f"{Path(self.path).name} (histogram layout)"
        return Rows(rows, source, fingerprint_of(facts), left_out=self.left_out)

    def _whole_lines(self) -> Iterator[tuple[int, list[str]]]:
        """Rows with a cell for each column; the others are counted."""
        for line, cells in self.lines:
            if len(cells) == len(self.header):
                yield line, cells
                continue
            what = f"{len(cells)} where the header has {len(self.header)}"
            self.left_out.add("row: wrong number of cells", f"line {line}", what)

    def _game_id(self, name: str, line: int) -> str | None:
        """The id of the game that a row names; None, and counted, if there is no such game."""
        if name in self.known:
            return name
        near = [id for id in self.known if id.casefold() == name.casefold()]
        if len(near) != 1:
            self.left_out.add("row: unknown game", f"line {line}", repr(name))
        return near[0] if len(near) == 1 else None

    def _position(self, id: str, cell: str, line: int) -> int | None:
        """The position of a choice in the answer set of a game that is asked for, else None.

        What has none is counted.
        """
        if id not in self.asked:
            return None
        position, reason = self.asked[id].answers.parse_cell(cell)
        if position is None:
            self.left_out.add(f"{id}: {reason}", f"line {line}", repr(cell))
        return position

    def _source(self, id: str) -> str:
        """What a game is called in every layout: games of one reference share their people."""
        return self.known[id].reference or id

    def _name(self, id: str, cell: str) -> str:
        """One writing of a cell that has several: "50", "50.0" and "[50]"."""
        if (id, cell) not in self._names:
            answers = self.known[id].answers
            position, _ = answers.parse_cell(cell)
            raw = normal_id(cell.strip("[] ").casefold())
            self._names[id, cell] = raw if position is None else answers.names[position]
        return self._names[id, cell]

    def _label_columns(self, used: set[int], of_people: bool = True) -> dict[str, int]:
        """The columns that say more of a person; weights are none, and that is noted."""
        labels = {}
        weights = set(weights_in(self.header))
        for place, name in enumerate(self.header):
            if place in used or not name:
                continue
            if name in weights:
                self.left_out.add_weights(name)
            elif of_people and name in _TAKEN:
                reason = f"column {name!r}: no label, because items have one of this name"
                self.left_out.add(reason, "line 1", repr(name))
            elif of_people:
                labels[name] = place
        return labels

    def _keep_labels(
        self, person: str, line: int, cells: list[str], columns: Mapping[str, int]
    ) -> None:
        for name, place in columns.items():
            if value := cells[place].strip():
                theirs = self._labels.setdefault(person, {})
                if theirs.setdefault(name, value) != value:
                    self._differing.setdefault(name, f"line {line}")


def _whole(cell: str) -> int | None:
    """The whole number in a cell, also as `5.0`; None where it holds something else."""
    text = normal_id(cell)
    short = len(text) <= len(str(_MOST_PEOPLE))
    return int(text) if short and text.isascii() and text.lstrip("-").isdigit() else None
