"""People: how many chose what in each game, read from a table and checked row by row.

Three layouts of CSV are told apart by their header:

- MobLab's: `UserID` and one column a game (`Game.reference`), empty where not played;
- tidy: `game,participant,choice`, one row a choice;
- histogram: `game,choice,count`, one row a bar.

A choice that cannot be used is left out, counted under a reason, and the first of each reason are
kept with their lines. Without a table of one's own there is the embedded reference.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from befm_jax import files
from befm_jax.data import games as library
from befm_jax.data.examples import Example
from befm_jax.data.games import Game
from befm_jax.errors import DataError, unknown

SPLITS = ("all", "train", "validation", "test")
REFERENCE_FILE = "moblab_first_choices.json"


@dataclass(frozen=True, eq=False)
class People:
    """How many people chose what.

    Attributes:
        source: what the counts were made from, for a reader.
        counts: game id -> int64 [A], people for each of the game's `values`; zeros where nobody
            played.
        excluded: reason -> how many cells or rows of the whole source were left out, in whatever
            split they would have been.
        examples_of_excluded: reason -> the first few, each with its line and content.
        split: which part of the people these are: one of `SPLITS`.
        fingerprint: SHA-256 of the source file.
    """

    source: str
    counts: Mapping[str, np.ndarray]
    excluded: Mapping[str, int] = field(default_factory=dict)
    examples_of_excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: str = "all"
    fingerprint: str = ""

    @property
    def games(self) -> list[str]:
        """The ids of the games that at least one of these people played."""
        return [game_id for game_id in self.counts if self.n(game_id) > 0]

    def n(self, game_id: str) -> int:
        """How many people's choices there are in a game; 0 for a game that was not asked for."""
        counts = self.counts.get(game_id)
        return 0 if counts is None else int(counts.sum())

    def draw_split(self, split: str, seed: int = 0) -> "People":
        """A part of people who are known as histograms only: a draw without replacement.

        80 % are for training, 10 % for validation, 10 % for the test (rounded to whole people).
        For one seed the three parts are disjoint and add up to the whole; a game's parts do not
        depend on which other games are there.

        Raises:
            DataError: an unknown split, or people who are a part already.
        """
        _check_split(split)
        if split == "all":
            return self
        if self.split != "all":
            raise DataError(f"{self.source}: these people are the {self.split} split already")
        counts = {
            game_id: _frozen(_draw(whole, split, seed, game_id))
            for game_id, whole in self.counts.items()
        }
        return replace(self, counts=counts, split=split)

    def describe(self) -> str:
        """What was read and what was left out, in lines for a reader."""
        total = sum(self.n(game_id) for game_id in self.counts)
        of = "" if self.split == "all" else f" ({self.split} split)"
        lines = [f"{total:,} choices in {len(self.games)} games{of} from {self.source}"]
        for reason, number in self.excluded.items():
            shown = "; ".join(self.examples_of_excluded.get(reason, ()))
            lines.append(f"left out, {reason}: {number:,}" + (f" ({shown})" if shown else ""))
        return "\n".join(lines)


def load(path: str | Path, games: Sequence[Game], split: str = "all", seed: int = 0) -> People:
    """People of a table, or of the embedded reference where the path is "".

    The parts of one source are disjoint. Those of the reference and those of the table that it
    was made from are not the same people: train and test on one source.

    Raises:
        DataError: see `read_people`; or nobody is left in this split of the reference.
    """
    if str(path) != "":
        return read_people(path, games, split, seed)
    return _somebody(reference(games).draw_split(split, seed))


def read_people(
    path: str | Path, games: Sequence[Game], split: str = "all", seed: int = 0
) -> People:
    """People of a CSV table in one of the module's three layouts.

    Participants are split by `assign`, a histogram by `People.draw_split`. Choices of registered
    games that are not among `games` are passed over without being counted as left out.

    Args:
        path: the table.
        games: the games that are wanted. In MobLab's layout each that has a `reference` must
            have its column.
        split: one of `SPLITS`.
        seed: which of the possible splits.

    Raises:
        DataError: no games, an absent, empty or binary file, another header, a missing column,
            or no choice that can be used.
    """
    _check_split(split)
    if not games:
        raise DataError(f"{path}: no games asked for")
    content = files.read_bytes(path)
    tally = count(path, content, games, lambda who: split in ("all", assign(who, seed)))
    by_participant = tally.layout != "histogram"
    people = People(
        source=f"{Path(path).name} ({tally.layout} layout)",
        counts={game_id: _frozen(counts) for game_id, counts in tally.counts.items()},
        excluded=dict(tally.excluded),
        examples_of_excluded={reason: tuple(shown) for reason, shown in tally.shown.items()},
        split=split if by_participant else "all",
        fingerprint=hashlib.sha256(content).hexdigest(),
    )
    return _somebody(people if by_participant else people.draw_split(split, seed))


def reference(games: Sequence[Game] | None = None) -> People:
    """The embedded human choices: MobLab, first choices in seven games.

    Args:
        games: which games to count; all registered ones by default. Games without a `reference`
            have zeros.

    Raises:
        DataError: a game that refers to human data has other answers than they have.
    """
    file = resources.files("befm_jax.data.reference").joinpath(REFERENCE_FILE)
    content = json.loads(file.read_text(encoding="utf-8"))
    counts = {}
    for game in _registered() if games is None else games:
        counts[game.id] = np.zeros(len(game.values), np.int64)
        if game.reference in content["histograms"]:
            histogram = content["histograms"][game.reference]
            low, high = histogram["values"]
            if not np.array_equal(game.values, np.arange(low, high + 1)):
                raise DataError(
                    f"game {game.id}: its answers are {game.answers.range_in_words}, but those of "
                    f"its human reference, {game.reference!r}, are {low} to {high}"
                )
            counts[game.id] = np.asarray(histogram["counts"], np.int64)
    return People(
        source=content["source"],
        counts={game_id: _frozen(histogram) for game_id, histogram in counts.items()},
        excluded=content["excluded"],
        fingerprint=content["sha256"],
    )


def examples(people: People, games: Sequence[Game] | None = None) -> list[Example]:
    """One example for each choice that somebody made, weighted by how many did.

    Args:
        people: whose choices.
        games: the games as they are to be put to the reader; by default, those registered under
            the ids in `people.counts`.

    Raises:
        DataError: a game that is not registered, or whose answers are not those counted.
    """
    chosen = [library.get(game_id) for game_id in people.counts] if games is None else games
    made = []
    for game in chosen:
        counts = people.counts.get(game.id, np.zeros(len(game.values), np.int64))
        if len(counts) != len(game.values):
            raise DataError(
                f"game {game.id}: {len(game.values)} answers, but the people of {people.source} "
                f"were counted over {len(counts)}"
            )
        made += [
            game.example(int(value), weight=float(count))
            for value, count in zip(game.values, counts, strict=True)
            if count > 0
        ]
    return made


def assign(participant: str, seed: int = 0) -> str:
    """The split of a participant: "train" (80 %), "validation" (10 %) or "test" (10 %).

    A function of the id and the seed alone, so that a person is in one split whatever table,
    game or row they are found in.
    """
    digest = hashlib.sha256(f"{seed}:{participant}".encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def _draw(whole: np.ndarray, split: str, seed: int, game_id: str) -> np.ndarray:
    """The split's part of one histogram, int64 [A]."""
    name = int.from_bytes(hashlib.sha256(game_id.encode()).digest()[:8], "big")
    generator = np.random.default_rng([seed, name])
    tenth = (int(whole.sum()) + 5) // 10
    test = generator.multivariate_hypergeometric(whole, tenth)
    # Of the few people that there may be, the test takes its tenth first.
    validation = generator.multivariate_hypergeometric(
        whole - test, min(tenth, int(whole.sum()) - tenth)
    )
    return {"test": test, "validation": validation, "train": whole - test - validation}[split]


def _somebody(people: People) -> People:
    if not people.games:
        of = "" if people.split == "all" else f" in the {people.split} split"
        raise DataError(
            f"no choice of {', '.join(people.counts)} can be used{of}: {people.describe()}"
        )
    return people


def _registered() -> list[Game]:
    return [library.get(game_id) for game_id in library.ids()]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def _frozen(counts: np.ndarray) -> np.ndarray:
    counts.setflags(write=False)
    return counts


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
    """Count a CSV table in one of the three layouts that `befm_jax.data.choices` describes.

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
