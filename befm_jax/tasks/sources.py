"""Tasks with their rows of people (or papers): the data that a run is trained and scored on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from befm_jax import tasks
from befm_jax.data import bomb_risk, choices, matrix_games, questionnaires, rounds
from befm_jax.data import games as library
from befm_jax.data.games import Game
from befm_jax.data.items import Example, Item, examples_of
from befm_jax.data.mixture import Family, one_by_one
from befm_jax.data.rows import LeftOut, Rows
from befm_jax.errors import DataError
from befm_jax.tasks import Task
from befm_jax.tasks.games import GAMES, PERSON
from befm_jax.tasks.wording import DEFAULT, Wording


@dataclass(frozen=True)
class Source:
    """A task and its rows.

    Attributes:
        task: the task.
        rows: all rows of a table, or a split of them.
        table: the path of the table; "" for the embedded reference.
        games: the games, for tasks of games.
    """

    task: Task
    rows: Rows[Any]
    table: str = ""
    games: tuple[Game, ...] = ()

    def part(self, split: str, seed: int = 0) -> Source:
        """The rows of a split.

        Raises:
            DataError: see `Rows.part` and `choices.part`.
        """
        of_games = self.task.needs in ("histograms", "plays")
        rows = choices.part(self.rows, split, seed) if of_games else self.rows.part(split, seed)
        return replace(self, rows=rows)

    def limited(self, number: int) -> Source:
        """At most so many persons (or papers), the first of the rows; 0: all of them.

        A task about a population keeps everybody: it costs as much with fewer.
        """
        if not number or self.task.needs == "histograms":
            return self
        return replace(self, rows=replace(self.rows, rows=self.rows.rows[:number]))

    def items(self, wording: Wording = DEFAULT, seed: int = 0) -> Iterator[Item]:
        """The task's items of all rows."""
        rows = self.rows
        if self.task.needs == "histograms":
            rows = choices.counted(rows, self.games)
        for number, row in enumerate(rows.rows):
            yield from self.task.items(row, wording, np.random.default_rng((seed, number)))

    def family(self, wording: Wording = DEFAULT, apart: bool = False) -> Family:
        """The rows as training data: one per person where persons are known.

        `apart`: every answer is an example of its own, also where one conversation has several.
        """
        task = self.task
        if task is GAMES and choices.has_persons(self.rows):
            task = PERSON
        examples = partial(_examples, task, wording, apart)
        return Family(self.task.name, self.rows.rows, examples, self.rows.fingerprint)

    def seen_by(self, trained_on: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The entry of a model's `trained_on` that shares people with these rows, or None.

        `trained_on` is that of `models.write_run`.
        """
        for entry in trained_on.get("sources", ()):
            same = entry["fingerprint"] == self.rows.fingerprint
            if same or self.rows.shares_people(entry["sketch"]):
                return dict(entry)
        return None

    def record(self) -> dict[str, Any]:
        """The entry of a run's `trained_on`: see `models.write_run`."""
        return {
            "task": self.task.name,
            "table": self.table,
            "source": self.rows.source,
            "fingerprint": self.rows.fingerprint,
            "sketch": self.rows.sketch,
            "split": self.rows.split,
            "split_seed": self.rows.split_seed,
        }

    def describe(self) -> str:
        """A text of what was read and what was left out."""
        if self.task.needs in ("histograms", "plays"):
            return choices.describe(self.rows)
        split = "" if self.rows.split == "all" else f" ({self.rows.split} split)"
        head = f"{self.task.name}: {len(self.rows.rows):,} rows{split} from {self.rows.source}"
        return "\n".join([head, *self.rows.left_out.lines()])


def select(spec: str, games: Sequence[Game], humans: str = "") -> list[Source]:
    """The tasks of a spec, with all their rows.

    Args:
        spec: comma-separated entries: a task's name or a `.py` file of tasks, followed by `=` and
            the path of a table where the task reads one: "games,commute.py=trips.csv".
        games: the games for tasks of games.
        humans: the table of people's choices in games; "": the embedded reference.

    Raises:
        DataError: an unknown task, a task without the table it reads, or a table that can't be
            read.
    """
    selected = []
    tables: dict[tuple[str, str], Rows[Any]] = {}  # each is read once
    for entry in filter(None, (entry.strip() for entry in spec.split(","))):
        name, _, table = entry.partition("=")
        for task in tasks.select(name):
            selected.append(_source(task, table, games, humans, tables))
    return selected


def configured(games: str, humans: str, own: str) -> list[Source]:
    """The sources of a config: the task of games, and the user's own tasks.

    Args:
        games: comma-separated ids, "all" or `.py` files; "" for no games.
        humans: the table of people's choices in them; "": the embedded reference.
        own: the spec of the user's tasks (see `select`).
    """
    selected = library.select(games) if games else []
    return (select("games", selected, humans) if selected else []) + select(own, selected, humans)


def families(learnt: Iterable[Source], rows_per_step: int, by_observation: bool) -> list[Family]:
    """The training data of sources, for `Mixture`.

    A histogram has no persons: each answer is a row, unless every step has all of them
    (`rows_per_step` is 0).  `by_observation`: each answer is a row everywhere.
    """
    training = []
    for source in learnt:
        counted = source.task.needs == "histograms" and not choices.has_persons(source.rows)
        apart = rows_per_step > 0 and (by_observation or counted)
        family = source.family(apart=apart)
        training.append(one_by_one(family) if apart else family)
    return training


# What reads the rows of a kind.
_READERS: Mapping[str, Callable[[str], Rows[Any]]] = {
    "questionnaires": questionnaires.read,
    "bomb_risk": bomb_risk.read,
    "matrix_games": matrix_games.read,
    "rounds": rounds.read,
}


def _source(
    task: Task,
    table: str,
    games: Sequence[Game],
    humans: str,
    tables: dict[tuple[str, str], Rows[Any]],
) -> Source:
    read = task.read or _READERS.get(task.needs)
    if read is not None:
        if not table:
            raise DataError(f"task {task.name}: it reads a table; give {task.name}=PATH")
        key = (task.name if task.read else task.needs, table)
        if key not in tables:
            tables[key] = read(table)
        return Source(task, _served(tables[key], task), table)
    if task.needs not in ("histograms", "plays"):
        raise DataError(f"task {task.name}: needs is {task.needs}, for which `read` is required")
    found = choices.read(table or humans, games)
    rows = choices.by_person(found) if task.needs == "plays" else found
    return Source(task, _served(rows, task), table or humans, tuple(games))


def _served(rows: Rows[Any], task: Task) -> Rows[Any]:
    """The rows that a task has items of; the others are counted as left out."""
    kept = [row for row in rows.rows if task.serves(row)]
    if not kept:
        raise DataError(f"{rows.source}: no row that {task.name} has a question for")
    if len(kept) == len(rows.rows):
        return rows
    reason, without = f"row: no question of {task.name}", len(rows.rows) - len(kept)
    counts = {**rows.left_out.counts, reason: without}
    return replace(rows, rows=kept, left_out=LeftOut(counts, rows.left_out.examples))


def _examples(
    task: Task, wording: Wording, apart: bool, row: Any, rng: np.random.Generator
) -> Iterator[Example]:
    items = task.items(row, wording, rng)
    if not apart:
        yield from examples_of(items, task.name)
        return
    for item in items:
        yield from item.examples(task.name)


def texts(families: Iterable[Family], rows: int) -> Iterator[str]:
    """Every message's text of the first `rows` rows of each family."""
    for family in families:
        for number in range(min(rows, len(family.rows))):
            for example in family.examples(family.rows[number], np.random.default_rng((0, number))):
                yield from (message.text for message in example.messages)
