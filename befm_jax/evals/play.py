"""Figures of games that were played, and of people's cooperation in the same rounds.

Every move of the respondent is an item of `evals.evaluate`: measures are means over moves of what
its notes hold, the bootstrap draws whole episodes again, and every opponent has equal weight.
Strategies in the respondent's place stand beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.responses import Response
from befm_jax.evals import evaluate as persons
from befm_jax.evals.results import Evaluation, Figure
from befm_jax.tasks import Task
from befm_jax.tasks.play import RESPONDENT, Move, Trajectory
from befm_jax.tasks.repeated import RECORDED, Observed, band

# `evaluate` compares answers of a set; of a move, only the notes are measured.
_MADE = AnswerSet.labels("Made", "Another")
_SIMULATIONS = 200
_Where = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class People:
    """People's cooperation by setting and band of rounds; nothing where nobody is known.

    `by_cell` has an array a person, of the person's choices there.
    """

    by_cell: Mapping[tuple[str, str], Sequence[NDArray[np.float64]]] = field(default_factory=dict)

    @classmethod
    def of(cls, observed: Iterable[Observed]) -> People:
        """The cooperation that was observed, person by person."""
        cells: dict[tuple[str, str], dict[str, list[float]]] = {}
        for one in observed:
            persons = cells.setdefault((one.setting, band(one.round)), {})
            persons.setdefault(one.person, []).append(one.cooperation)
        return cls({cell: list(map(np.array, of.values())) for cell, of in cells.items()})

    def mean(self, cell: tuple[str, str]) -> float:
        """Mean cooperation in a setting and band, over choices; NaN where it is not known."""
        return float(np.concatenate(self.by_cell[cell]).mean()) if cell in self.by_cell else np.nan

    def floor(self, cells: Sequence[tuple[str, str]], rng: np.random.Generator) -> float:
        """The expected `cooperation_distance` of other people who make the moves of these cells.

        Each move is one choice of somebody else; the people are drawn again, each with all of
        their choices.
        """
        total = np.zeros(_SIMULATIONS)
        for cell, number in Counter(cells).items():
            if cell not in self.by_cell:
                return np.nan
            persons = self.by_cell[cell]
            levels = np.concatenate(persons)
            others = rng.choice(levels, (_SIMULATIONS, number)).mean(1)
            sums = np.array([(own.sum(), len(own)) for own in persons])
            drawn = rng.choice(sums, (_SIMULATIONS, len(persons))).sum(1)
            total += number * np.abs(others - drawn[:, 0] / drawn[:, 1])
        return float(total.mean() / len(cells))


def evaluate(
    task: Task,
    played: Sequence[Trajectory],
    *,
    respondent: str,
    people: People,
    beside: Mapping[str, Sequence[Trajectory]] | None = None,
    sampled: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """The figures of a respondent that has played.

    Args:
        task: the measures; figures are of the task, by opponent, and by opponent and round.
        played: what was played.
        respondent: its name.
        people: whose cooperation is compared.
        beside: the same episodes with others in the respondent's place, by name; their figures have
            no intervals.
        sampled: whether each answer was one draw of the respondent's.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Raises:
        DataError: as `befm_jax.evals.evaluate.evaluate`.
    """
    items, made = _moves(played, people)
    evaluation = _evaluated(task, items, made, respondent, resamples, seed)
    others = {name: _values(task, *_moves(of, people)) for name, of in (beside or {}).items()}
    as_people = [
        replace(
            one,
            notes={**one.notes, "cooperation": one.notes["people"], "payoff": one.notes["share"]},
        )
        for one in items
    ]
    ceilings = _values(task, as_people, made)
    floors = _floors(task, items, people, np.random.default_rng(seed))
    figures = []
    for figure in evaluation.figures:
        where = tuple(figure.where.items())
        known = figure.measure, where
        figures.append(
            replace(
                figure,
                floor=floors.get(where) if figure.measure == "cooperation_distance" else None,
                ceiling=ceilings[known]
                if figure.measure in ("cooperation", "rounds_won")
                else None,
                beside={name: values.get(known) for name, values in others.items()},
                draws=figure.items if sampled else 0,
            )
        )
    return replace(evaluation, figures=figures, distributions=[])


def _moves(played: Sequence[Trajectory], people: People) -> tuple[list[Item], list[Move]]:
    """The respondent's moves, as items and as they were made."""
    items, made = [], []
    for one in played:
        players = Counter(move.round for move in one.moves)
        for move in one.moves:
            if move.who != RESPONDENT:
                continue
            opponent, cell = one.labels["opponent"], (one.labels["setting"], band(move.round))
            labels = {
                "episode": one.episode,
                "opponent": opponent,
                "round": f"{opponent}, round {cell[1]}",
            }
            notes = {
                "payoff": move.reward,
                "round": move.round,
                "cooperation": move.cooperation,
                "cell": cell,
                "people": people.mean(cell),
                # Of the rounds that are won, by symmetry, where people play with people.
                "share": 1.0 / players[move.round] if opponent == RECORDED else np.nan,
            }
            prompt = (Message("user", move.asked),)
            items.append(Item(move.item, prompt, _MADE, _MADE.one(0), labels, notes))
            made.append(move)
    return items, made


def _evaluated(
    task: Task,
    items: Sequence[Item],
    made: Sequence[Move],
    respondent: str,
    resamples: int,
    seed: int,
) -> Evaluation:
    responses = {
        one.id: Response(one.id, _MADE.one(0), True, move.outside, unread=move.unread)
        for one, move in zip(items, made, strict=True)
    }
    evaluation = persons.evaluate(
        task, items, responses, respondent=respondent, resamples=resamples, seed=seed
    )
    note = "undefined: a round is no whole game"
    figures = [
        replace(one, value=None, ci95=None, note=note)
        if one.measure == "total_payoff" and "round" in one.where
        else one
        for one in evaluation.figures
    ]
    return replace(evaluation, figures=figures)


def _values(task: Task, items: Sequence[Item], made: Sequence[Move]) -> dict[_Where, float | None]:
    """The value of each measure and part."""
    figures: Sequence[Figure] = _evaluated(task, items, made, "", 2, 0).figures
    return {(one.measure, tuple(one.where.items())): one.value for one in figures}


def _floors(
    task: Task, items: Sequence[Item], people: People, rng: np.random.Generator
) -> dict[tuple[tuple[str, str], ...], float]:
    """The floor of `cooperation_distance` in each part where people are known."""
    cells: dict[tuple[tuple[str, str], ...], list[tuple[str, str]]] = {}
    for one in items:
        for label in (task.average, *task.groups):
            cells.setdefault(((label, one.labels[label]),), []).append(one.notes["cell"])
    floors = {part: people.floor(of, rng) for part, of in cells.items()} if people.by_cell else {}
    of_opponents = [floor for ((label, _),), floor in floors.items() if label == task.average]
    every = {**floors, (): float(np.mean(of_opponents))} if of_opponents else floors
    return {part: floor for part, floor in every.items() if np.isfinite(floor)}
