"""Tasks with their rows of people (or papers): the data that a run is trained and scored on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from befm_jax import tasks
from befm_jax.data import (
    bomb_risk,
    builders,
    choices,
    contexts,
    effects,
    gambles,
    guesses,
    knowledge,
    literature,
    logs,
    matrix_games,
    questionnaires,
    rounds,
)
from befm_jax.data import games as library
from befm_jax.data.games import Game
from befm_jax.data.items import Example, Item, examples_of
from befm_jax.data.mixture import Family, one_by_one
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of
from befm_jax.errors import DataError
from befm_jax.tasks import Task, repeated
from befm_jax.tasks.games import GAMES, PERSON
from befm_jax.tasks.play import Episode, seeded
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
        table: the path of the table, or of a data set on disk; "" for the embedded reference.
        games: the games, for tasks of games.
        wording: the texts in which the task asks.
    """

    task: Task
    rows: Rows[Any]
    table: str = ""
    games: tuple[Game, ...] = ()
    wording: Wording = DEFAULT

    def part(self, split: str, seed: int = 0) -> Source:
        """The rows of a split.

        Raises:
            DataError: see `Rows.part` and `choices.part`.
        """
        part = _PARTS.get(self.task.needs, Rows.part)
        return replace(self, rows=part(self.rows, split, seed))

    def limited(self, number: int) -> Source:
        """At most so many persons (or papers), the first of the rows; 0: all of them.

        A task about a population keeps everybody: it costs as much with fewer.
        """
        if not number or self.task.needs in _POPULATIONS:
            return self
        return replace(self, rows=replace(self.rows, rows=self.rows.rows[:number]))

    def items(
        self, seed: int = 0, most: int | None = None, per_row: int | None = None
    ) -> list[Item]:
        """The task's items: the first `per_row` of each row, and the first `most` of all."""

        def of_row(number: int, row: Any) -> Iterator[Item]:
            rng = np.random.default_rng((seed, number))
            return itertools.islice(self.task.items(row, self.wording, rng), per_row)

        every = (item for at, row in enumerate(self._counted().rows) for item in of_row(at, row))
        return list(itertools.islice(every, most))

    def episodes(self, seed: int = 0) -> list[Episode]:
        """The games of a task that is played; a row's depend on its person and the seed alone."""
        assert self.task.episodes is not None
        return [
            episode
            for row in self.rows.rows
            for episode in self.task.episodes(row, self.wording, seeded(seed, row.person))
        ]

    @property
    def has_persons(self) -> bool:
        """Whether it is known who answered what."""
        return bool(self.rows.rows) and hasattr(self.rows.rows[0], "person")

    def _counted(self) -> Rows[Any]:
        """The rows; for a task about populations, one a population."""
        if self.task.needs == "histograms":
            return choices.counted(self.rows, self.games)
        if self.task.needs == "contexts":
            return contexts.counted(self.rows)
        return questionnaires.counted(self.rows) if self.task.needs == "cells" else self.rows

    def family(self, apart: bool = False) -> Family:
        """The rows as training data: one per person where persons are known.

        `apart`: every answer is an example of its own, also where one conversation has several.

        Raises:
            DataError: a task that is played.
        """
        task, rows = self.task, self._counted()
        if task.episodes is not None:
            raise DataError(f"data.tasks: {task.name} is played; there is nothing to learn in it")
        if task is GAMES and choices.has_persons(self.rows):
            task, rows = PERSON, self.rows
        examples = partial(_examples, task, self.wording, apart)
        return Family(self.task.name, rows.rows, examples, rows.fingerprint)

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


def select(spec: str, games: Sequence[Game], humans: str = "", wording: str = "") -> list[Source]:
    """The tasks of a spec, with all their rows.

    Args:
        spec: comma-separated entries: a task's name or a `.py` file of tasks, followed by `=` and
            the path of a table, or of a data set made of it (`befm_jax.data.builders`), where the
            task reads one: "games,commute.py=trips.csv".
        games: the games for tasks of games.
        humans: the table of people's choices in games; "": the embedded reference.
        wording: a file of the texts in which tasks ask (`Wording.read`); "": the package's.

    Raises:
        DataError: an unknown task, a task without the table it reads, or a table that can't be
            read.
    """
    texts = Wording.read(wording) if wording else DEFAULT
    selected = []
    tables: dict[tuple[str, str], Rows[Any]] = {}  # each is read once
    for entry in filter(None, (entry.strip() for entry in spec.split(","))):
        name, _, table = entry.partition("=")
        for task in tasks.select(name):
            source = _source(task, table, games, humans, tables)
            selected.append(replace(source, wording=texts))
    return selected


def everything(trained_on: Mapping[str, Any]) -> str:
    """The spec of every task that has data in the package, and of those that a model learnt.

    The latter read the tables that the model was trained on; `trained_on` is that of
    `models.write_run`, {} where nothing is known.
    """
    tables = {entry["task"]: entry["table"] for entry in trained_on.get("sources", [])}
    in_package = ("histograms", "games", *_REFERENCES)
    names = [name for name in tasks.names() if tasks.get(name).needs in in_package]
    entries = {name: tables.get(name, "") for name in names} | tables
    return ",".join(f"{name}={table}" if table else name for name, table in entries.items())


def configured(games: str, humans: str, further: str, wording: str = "") -> list[Source]:
    """The sources of a config: the task of games, and further tasks.

    Args:
        games: comma-separated ids, "all" or `.py` files; "" for no games.
        humans: the table of people's choices in them; "": the embedded reference.
        further: the spec of the others (see `select`).
        wording: see `select`.
    """
    selected = library.select(games) if games else []
    spec = f"games,{further}" if selected else further
    return select(spec, selected, humans, wording)


def families(
    learnt: Iterable[Source],
    rows_per_step: int,
    by_observation: bool,
    shares: Container[str] = (),
) -> list[Family]:
    """The training data of sources, for `Mixture`.

    Counts of a population have no persons.  With a share of the loss (`shares` are the names of
    the tasks that have one) all of them are in every step; else each answer is a row, unless every
    step has everything (`rows_per_step` is 0).  `by_observation`: each answer is a row everywhere.

    Raises:
        DataError: a task of which nobody's answers are known.
    """
    training = []
    for source in learnt:
        if source.task.needs == "effects" or "follows_change" in source.task.measures:
            raise DataError(f"task {source.task.name}: nobody's answers are known to learn from")
        counted = source.task.needs in _POPULATIONS and not source.has_persons
        every_step = counted and source.task.name in shares and not by_observation
        apart = rows_per_step > 0 and (by_observation or counted) and not every_step
        family = replace(source.family(apart=apart), every_step=every_step)
        training.append(one_by_one(family) if apart else family)
    return training


# What reads the rows of a kind from a table, and what there is without one.
_READERS: Mapping[str, Callable[[str], Rows[Any]]] = {
    "questionnaires": questionnaires.read,
    "cells": questionnaires.read,
    "questions": knowledge.read,
    "workflows": literature.read_workflows,
    "abstracts": literature.read_abstracts,
    "bomb_risk": bomb_risk.read,
    "matrix_games": matrix_games.read,
    "gambles": gambles.read,
    "logs": logs.read,
    "rounds": rounds.read,
    "contexts": contexts.read,
    "effects": effects.read,
    "guesses": guesses.read,
}
_REFERENCES: Mapping[str, Callable[[], Rows[Any]]] = {
    "cells": questionnaires.read_reference,
    "questions": knowledge.read_reference,
    "dilemma_sessions": repeated.dilemmas,
    "public_goods_sessions": repeated.groups,
    "guesses": guesses.sessions,
}
# Kinds whose rows are those of another one before they are counted.
_COUNTED = {"cells": ("questionnaires",), "contexts": ("rounds", "matrix_games")}
# Kinds whose rows are not split by `Rows.part`, and those of tasks about populations.
_PARTS: Mapping[str, Callable[..., Rows[Any]]] = {
    "histograms": choices.part,
    "plays": choices.part,
    "cells": questionnaires.part,
    "games": lambda rows, split, seed: rows,
}
_POPULATIONS = ("histograms", "cells", "contexts", "effects", "populations")


def _source(
    task: Task,
    table: str,
    games: Sequence[Game],
    humans: str,
    tables: dict[tuple[str, str], Rows[Any]],
) -> Source:
    read = task.read or _READERS.get(task.needs)
    if not table and task.needs in _REFERENCES:
        return Source(task, _REFERENCES[task.needs]())
    if task.needs in _REFERENCES and read is None:
        raise DataError(f"task {task.name}: it reads no table; play/people does")
    if read is not None:
        if not table:
            raise DataError(f"task {task.name}: it reads a table; give {task.name}=PATH")
        key = (task.name if task.read else task.needs, table)
        if key not in tables:
            stored = not task.read and builders.is_data_set(table)
            kinds = _COUNTED.get(task.needs, (task.needs,))
            tables[key] = builders.read(table, *kinds) if stored else read(table)
        return Source(task, _served(tables[key], task), table)
    if task.needs == "games":
        return Source(task, _of_games(games), games=tuple(games))
    if task.needs not in ("histograms", "plays"):
        raise DataError(f"task {task.name}: needs is {task.needs}, for which `read` is required")
    path = table or humans
    found: choices.Choices
    if path and builders.is_data_set(path):
        found = choices.of_games(builders.read(path, "plays"), games)
    else:
        found = choices.read(path, games)
    rows = choices.by_person(found) if task.needs == "plays" else found
    return Source(task, _served(rows, task), path, tuple(games))


def _of_games(games: Sequence[Game]) -> Rows[Game]:
    """The games themselves, which nobody's answers are compared in: all are in every split."""
    texts = [f"{game.id}: {game.user}" for game in games]
    return Rows(list(games), "the games as they are told", fingerprint_of(texts))


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
