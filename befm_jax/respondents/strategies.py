"""Fixed strategies: respondents without a model that play repeated games.

They go by the notes of a question (`befm_jax.tasks.play.Episode`): where answers are more or less
cooperative, `cooperation` (`[A]`, from 0 to 1) and `others`, the mean cooperation of the others in
the round before (None in the first), and `forgives`, how often a generous player of a dilemma does;
in the guessing game `averages` by round and the `fraction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from befm_jax.data.items import Item
from befm_jax.data.responses import How, Response
from befm_jax.errors import DataError

Shares = Float64[np.ndarray, " A"]
# How often a generous player forgives where a game has no bound of its own, `forgives`.
_FORGIVES = 1.0 / 3.0


def _nearest(item: Item, level: float) -> Shares:
    """The answer whose cooperation is nearest to a level, the lesser of two."""
    levels = item.notes["cooperation"]
    ranked = [(round(abs(of - level), 9), of, position) for position, of in enumerate(levels)]
    return _at(item, min(ranked)[-1])


def _at(item: Item, position: int) -> Shares:
    return np.eye(len(item.answers))[position]  # type: ignore[arg-type]


def _uniform(item: Item) -> Shares:
    return np.full(len(item.answers), 1.0 / len(item.answers))  # type: ignore[arg-type]


def _tit_for_tat(item: Item) -> Shares:
    others = item.notes["others"]
    return _nearest(item, 1.0 if others is None else others)


def _generous_tit_for_tat(item: Item) -> Shares:
    forgives = item.notes.get("forgives", _FORGIVES)
    return (1.0 - forgives) * _tit_for_tat(item) + forgives * _nearest(item, 1.0)


def _equilibrium(item: Item) -> Shares:
    if "cooperation" in item.notes:
        return _nearest(item, item.notes["equilibrium"])
    return _at(item, item.notes["equilibrium"])


def _level(steps: int) -> Callable[[Item], Shares]:
    def shares(item: Item) -> Shares:
        values = np.array(item.answers.values)  # type: ignore[union-attr]
        middle = (values[0] + values[-1]) / 2
        expected = (middle, *item.notes["averages"])[-1]
        guess = item.notes["fraction"] ** steps * expected
        return _at(item, int(np.abs(values - guess).argmin()))

    return shares


_STRATEGIES: Mapping[str, tuple[str, Callable[[Item], Shares]]] = {
    "always_cooperate": ("Cooperates fully in every round.", lambda item: _nearest(item, 1.0)),
    "always_defect": ("Does not cooperate in any round.", lambda item: _nearest(item, 0.0)),
    "tit_for_tat": (
        "Cooperates fully in the first round, and then as much as the others did in the round "
        "before, on average.",
        _tit_for_tat,
    ),
    "generous_tit_for_tat": (
        "As tit for tat, but it sometimes cooperates fully whatever the others did: in a dilemma "
        "with the highest probability that others can't exploit, else 1/3.",
        _generous_tit_for_tat,
    ),
    "level_1": (
        "Expects the average of the round before once more, in the first round the middle of the "
        "scale, and chooses the fraction of it.",
        _level(1),
    ),
    "level_2": ("Expects the others to be at level 1, and chooses the fraction of it.", _level(2)),
    "equilibrium": (
        "An equilibrium of the repeated game: that of the game played once, in every round; in a "
        "dilemma that goes on with a high enough probability, cooperation until anybody defects.",
        _equilibrium,
    ),
    "uniform": ("Every answer is equally likely in every round.", _uniform),
    "recorded": (
        "What people did in the recorded match, round by round, whatever the others do.",
        lambda item: _at(item, item.notes["recorded"]),
    ),
}
DEFINITIONS: Mapping[str, str] = {name: text for name, (text, _) in _STRATEGIES.items()}


@dataclass(frozen=True)
class Strategy:
    """A strategy by its name in `DEFINITIONS` (a `data.responses.Respondent`)."""

    name: str

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """The shares with which the strategy gives each answer, whatever the way of asking.

        Raises:
            DataError: a question of a game that the strategy is not for.
        """
        for item in items:
            if not self.serves(item):
                raise DataError(f"item {item.id}: {self.name} is no strategy in this game")
            yield Response.from_mass(item.id, _STRATEGIES[self.name][1](item))

    def serves(self, item: Item) -> bool:
        """Whether the strategy is one for the game of a question."""
        if self.name == "recorded":
            return item.notes.get("recorded") is not None
        if self.name.startswith("level_"):
            return "averages" in item.notes
        return "cooperation" in item.notes or self.name in ("equilibrium", "uniform")

    def describe(self) -> dict[str, Any]:
        """The name and the definition."""
        return {"strategy": self.name, "definition": DEFINITIONS[self.name]}


ALL: Mapping[str, Strategy] = {name: Strategy(name) for name in DEFINITIONS}
