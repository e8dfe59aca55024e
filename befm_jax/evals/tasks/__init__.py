"""The evaluation tasks, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from befm_jax.errors import unknown
from befm_jax.evals.tasks import game_behavior

_TASKS: Mapping[str, Callable[..., dict[str, Any]]] = MappingProxyType(
    {"game_behavior": game_behavior.evaluate}
)


def names() -> tuple[str, ...]:
    """The names of the tasks."""
    return tuple(_TASKS)


def get(name: str) -> Callable[..., dict[str, Any]]:
    """The `evaluate` function of a task.

    Raises:
        DataError: no task of that name; the message names the near ones.
    """
    if name not in _TASKS:
        raise unknown("task", name, names())
    return _TASKS[name]
