"""Tasks: the items of a row, their measures, and the registry of tasks.

A task is one declaration in one file.  The same items are trained on and scored.  A user's own
tasks, with their own tables, are in a Python file that `load_file("my_tasks.py")` runs:

    from dataclasses import dataclass

    from befm_jax.data.items import AnswerSet, Item, Message
    from befm_jax.data.rows import Rows
    from befm_jax.tasks import Task, register

    WAYS = AnswerSet.labels("Bus", "Bike", "Car")

    @dataclass(frozen=True)
    class Commuter:
        person: str
        way: int
        city: str


    def commuter(cells):
        return Commuter(cells["id"], WAYS.read_cell(cells["way"]), cells["city"])


    def read(path):
        return Rows.read(path, ("id", "way", "city"), commuter)


    def items(row, wording, rng):
        question = f"You live in {row.city}. How do you travel to work? {WAYS.request}"
        prompt, labels = (Message("user", question),), {"person": row.person, "city": row.city}
        yield Item(row.person, prompt, WAYS, WAYS.one(row.way), labels)


    register(Task("commute", items, "commuters", ("log_score", "accuracy"), read=read))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from befm_jax.data import games as game_registry
from befm_jax.data import user_files
from befm_jax.data.items import Item
from befm_jax.data.responses import Exact, How
from befm_jax.data.rows import Rows
from befm_jax.errors import DataError, unknown
from befm_jax.tasks.play import Episode
from befm_jax.tasks.wording import Wording


class Published(NamedTuple):
    """A figure of a published leaderboard.

    Attributes:
        id: its name in the leaderboard's data.
        name: what the leaderboard calls it.
        metric: what the leaderboard calls its measure: "MAE", "W Distance".
        measure: the task's measure of that formula.
        per: what the measure is multiplied by, to be in the leaderboard's unit.
    """

    id: str
    name: str
    metric: str
    measure: str
    per: float = 1.0


@dataclass(frozen=True)
class Task:
    """One kind of question, asked of rows of one kind.

    Attributes:
        name: "games", "survey/masked".
        items: the items of ONE row, so that they are used in training too; randomness comes from
            the generator alone.
        needs: the kind of rows: "plays", "histograms", "questionnaires", "cells", "questions",
            "workflows", "abstracts", "rounds", "matrix_games", "bomb_risk", "gambles", "logs",
            "contexts", "effects", "records", "populations", "games", "guesses",
            "dilemma_sessions", "public_goods_sessions".
        measures: names of `befm_jax.evals.measures`, the headline measure first.
        average: the label whose values have equal weight in the mean: "game", "statement"; "" for
            items.
        least: a value of `average` with fewer people than this is left out.
        cluster: the label that the bootstrap resamples; "" where an item's target counts many
            people, who are then resampled within it.
        groups: labels whose values are reported separately: "sex", "age_band".
        how: how respondents are asked by default.
        read: reads the rows of a table, for rows that only this task reads; None for the reader of
            what it `needs`.
        serves: whether a row has items; rows that have none are counted as left out.
        published: figures of a published leaderboard that are measured by this task.
        episodes: the games of one row, for a task whose later questions depend on the answers to
            the earlier ones (`befm_jax.tasks.play`).  `items` are then the opening questions, and
            the measures are of what was played.
    """

    name: str
    items: Callable[[Any, Wording, np.random.Generator], Iterator[Item]]
    needs: str
    measures: tuple[str, ...]
    average: str = ""
    least: int = 1
    cluster: str = "person"
    groups: tuple[str, ...] = ()
    how: How = field(default_factory=Exact)
    read: Callable[[str | Path], Rows[Any]] | None = None
    serves: Callable[[Any], bool] = lambda row: True
    published: tuple[Published, ...] = ()
    episodes: Callable[[Any, Wording, np.random.Generator], Iterator[Episode]] | None = None


_REGISTRY: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Registers a task under its name, and returns it.

    Raises:
        DataError: another task has this name.
    """
    known = _REGISTRY.get(task.name)
    # A file that is run twice declares the same task with new function objects.
    if known is not None and known.items.__module__ != task.items.__module__:
        raise DataError(f"task {task.name!r} is already registered: choose another name")
    _REGISTRY[task.name] = task
    return task


def get(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: there is none; suggests similar names.
    """
    if name not in _REGISTRY:
        raise unknown("task", name, _REGISTRY)
    return _REGISTRY[name]


def names() -> list[str]:
    """The names of all registered tasks, in the order of their registration."""
    return list(_REGISTRY)


def load_file(path: str | Path) -> list[Task]:
    """Runs a user's Python file, registers the tasks that it declares and returns them.

    The file may declare games too.  See `befm_jax.data.user_files.load`.

    Raises:
        DataError: no such file, an error in it (with its line), no task in it, or a name of another
            task.  The registries of tasks and games are then unchanged.
    """
    return user_files.load(path, Task, _REGISTRY, register, (game_registry._REGISTRY,))


def select(spec: str | Sequence[str]) -> list[Task]:
    """The tasks of a spec, without duplicates, in its order.

    Args:
        spec: a comma-separated string or a sequence of entries: a name, what the names of several
            begin with ("behaviorbench" for "behaviorbench/age" and the others), or the path of a
            `.py` file of the user's tasks (see `load_file`).

    Raises:
        DataError: an unknown name, a file that does not load, or no entries.
    """
    entries = spec.split(",") if isinstance(spec, str) else spec
    selected: dict[str, Task] = {}
    for entry in filter(None, (entry.strip() for entry in entries)):
        family = [] if entry in _REGISTRY else _family(entry)
        for task in load_file(entry) if entry.endswith(".py") else family or [get(entry)]:
            selected[task.name] = task
    if not selected:
        raise DataError(f"no tasks selected; there are: {', '.join(_REGISTRY)}")
    return list(selected.values())


def _family(name: str) -> list[Task]:
    return [task for known, task in _REGISTRY.items() if known.startswith(f"{name}/")]


# Last, because the module's tasks use the names above.
from befm_jax.tasks import (  # noqa: E402, F401
    behaviorbench,
    contexts,
    games,
    knowledge,
    literature,
    logs,
    matrix_games,
    repeated,
    risky,
    rounds,
    sensitivity,
    surveys,
    workflows,
)
