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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from befm_jax.data import files
from befm_jax.data import games as library
from befm_jax.data.errors import DataError, unknown
from befm_jax.data.examples import Example
from befm_jax.data.games import Game
from befm_jax.data.tally import count

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
