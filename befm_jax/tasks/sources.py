"""Tasks with their rows of people (or papers): the data that a run is trained and scored on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from befm_jax import tasks
from befm_jax.data import choices
from befm_jax.data import games as library
from befm_jax.data.games import Game
from befm_jax.data.items import Example, Item
from befm_jax.data.mixture import Family, one_by_one
from befm_jax.data.rows import Rows
from befm_jax.errors import DataError
from befm_jax.tasks import Task
from befm_jax.tasks.games import GAMES, PERSON
from befm_jax.tasks.wording import DEFAULT, Wording

# Fields of `Source.record` that decide which people are held out.
_RECORDED = {
    "fingerprint": (str, ".+"), "sketch": (str, "([0-9a-f]{2})*"), "split_seed": (int, "[0-9]+"),
}  # fmt: skip


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

    def items(self, wording: Wording = DEFAULT, seed: int = 0) -> list[Item]:
        """The task's items of all rows."""
        rows = self.rows
        if self.task.needs == "histograms":
            rows = choices.counted(rows, self.games)
        return [
            item
            for number, row in enumerate(rows.rows)
            for item in self.task.items(row, wording, np.random.default_rng((seed, number)))
        ]

    def family(self, wording: Wording = DEFAULT) -> Family:
        """The rows as training data: one per person where persons are known."""
        task = self.task
        if task is GAMES and choices.has_persons(self.rows):
            task = PERSON
        examples = partial(_examples, task, wording)
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

    def may_be_of(self, trained_on: Mapping[str, Any]) -> str:
        """The table of a model's `trained_on` whose people may be these without a sign of it.

        Counts do not say who was counted, so that a table of counts that shares people with
        another table is not recognised.  "" where both say who chose what, or there is no table.
        """
        kind = self.task.name.split("/")[0]
        for entry in trained_on.get("sources", ()):
            both_known = entry["sketch"] and self.rows.sketch
            same_kind = str(entry.get("task", "")).split("/")[0] == kind
            if self.table and entry.get("table") and same_kind and not both_known:
                return str(entry["table"])
        return ""

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


def trained_on(origin: Mapping[str, Any], path: object) -> Mapping[str, Any]:
    """What a respondent was trained on (see `models.write_run`), by its origin; {} if unknown.

    Raises:
        DataError: not what a run writes; names the field, and `path`, where it is from.
    """
    found = origin.get("trained_on", {})
    entries = found.get("sources", []) if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path}: trained_on is {found!r:.40}; it must have a list of sources")
    for number, entry in enumerate(entries):
        for name, (kind, form) in _RECORDED.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not kind or not re.fullmatch(form, str(value)):
                raise DataError(
                    f"{path}: trained_on.sources[{number}].{name} is {value!r:.40}; it must be the "
                    f"{kind.__name__} that a run writes"
                )
    return dict(found)


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
    for entry in filter(None, (entry.strip() for entry in spec.split(","))):
        name, _, table = entry.partition("=")
        for task in tasks.select(name):
            selected.append(_source(task, table, games, humans))
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
        family = source.family()
        counted = source.task.needs == "histograms" and not choices.has_persons(source.rows)
        training.append(
            one_by_one(family) if rows_per_step and (by_observation or counted) else family
        )
    return training


def _source(task: Task, table: str, games: Sequence[Game], humans: str) -> Source:
    if task.read is not None:
        if not table:
            raise DataError(f"task {task.name}: it reads a table; give {task.name}=PATH")
        return Source(task, task.read(table), table)
    if task.needs not in ("histograms", "plays"):
        raise DataError(f"task {task.name}: needs is {task.needs}, for which `read` is required")
    read = choices.read(table or humans, games)
    rows = choices.by_person(read) if task.needs == "plays" else read
    return Source(task, rows, table or humans, tuple(games))


def _examples(
    task: Task, wording: Wording, row: Any, rng: np.random.Generator
) -> Iterator[Example]:
    for item in task.items(row, wording, rng):
        yield from item.examples(task.name)


def texts(families: Iterable[Family], rows: int) -> Iterator[str]:
    """Every message's text of the first `rows` rows of each family."""
    for family in families:
        for number in range(min(rows, len(family.rows))):
            for example in family.examples(family.rows[number], np.random.default_rng((0, number))):
                yield from (message.text for message in example.messages)
