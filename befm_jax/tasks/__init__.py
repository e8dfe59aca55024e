"""Tasks: what is asked of a row, how it is measured, and the registry of those that are known.

A task is one declaration in one file.  The same items are trained on and scored.  A user's own, of
a table of their own, is in a Python file that `load_file("my_tasks.py")` runs:

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
from typing import Any

import numpy as np

from befm_jax.data import games as game_registry
from befm_jax.data import user_files
from befm_jax.data.items import Item
from befm_jax.data.responses import Exact, How
from befm_jax.data.rows import Rows
from befm_jax.errors import DataError, unknown
from befm_jax.tasks.wording import Wording


@dataclass(frozen=True)
class Task:
    """One kind of question, asked of rows of one kind.

    Attributes:
        name: "games", "survey/masked".
        items: the items of ONE row, so that they serve training, too; draws come from the
            generator alone.
        needs: which kind of rows: "plays", "histograms", "questionnaires", "papers", "questions".
        measures: names of `befm_jax.evals.measures`, the first one the headline.
        average: the label whose values count alike in the mean: "game", "statement"; "" for items.
        cluster: the label that the bootstrap draws again; "" where an item's target counts many
            people, who are then drawn again within it.
        groups: labels whose values are reported apart: "sex", "age_band".
        how: how respondents are asked unless somebody says otherwise.
        read: from the path of a table to its rows, for rows that only this task reads; None for
            the reader of what it `needs`.
    """

    name: str
    items: Callable[[Any, Wording, np.random.Generator], Iterator[Item]]
    needs: str
    measures: tuple[str, ...]
    average: str = ""
    cluster: str = "person"
    groups: tuple[str, ...] = ()
    how: How = field(default_factory=Exact)
    read: Callable[[str | Path], Rows[Any]] | None = None


_REGISTRY: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Makes a task known under its name, and returns it.

    Raises:
        DataError: another task has this name.
    """
    known = _REGISTRY.get(task.name)
    # A file that is run twice declares the same again: its functions are new objects.
    if known is not None and known.items.__module__ != task.items.__module__:
        raise DataError(f"task {task.name!r} exists already and is another: choose another name")
    _REGISTRY[task.name] = task
    return task


def get(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: there is none; names the near ones.
    """
    if name not in _REGISTRY:
        raise unknown("task", name, _REGISTRY)
    return _REGISTRY[name]


def names() -> list[str]:
    """The names of all registered tasks, in the order in which they were declared."""
    return list(_REGISTRY)


def load_file(path: str | Path) -> list[Task]:
    """Runs a user's own Python file and returns the tasks that it declares, registered.

    The file may declare games, too.  See `befm_jax.data.user_files.load`.

    Raises:
        DataError: no such file, an error in it (with its line), no task in it, or a name taken by
            another task.  The registries of tasks and games are then as they were.
    """
    return user_files.load(path, Task, _REGISTRY, register, (game_registry._REGISTRY,))


def select(spec: str | Sequence[str]) -> list[Task]:
    """The tasks that a person asked for, each once, in their order.

    Args:
        spec: entries in one string with commas, or as a sequence: a name, or the path of a `.py`
            file of the user's tasks (see `load_file`).

    Raises:
        DataError: an unknown name, a file that does not load, or nothing asked for.
    """
    entries = spec.split(",") if isinstance(spec, str) else spec
    chosen: dict[str, Task] = {}
    for entry in filter(None, (entry.strip() for entry in entries)):
        for task in load_file(entry) if entry.endswith(".py") else [get(entry)]:
            chosen[task.name] = task
    if not chosen:
        raise DataError(f"no tasks asked for; there are: {', '.join(_REGISTRY)}")
    return list(chosen.values())


# Last, because the families are declared with what stands above.
from befm_jax.tasks import games  # noqa: E402, F401
