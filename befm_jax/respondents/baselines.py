"""Baselines: respondents without a model, with which every figure is compared.

Each is fitted on items of training people.  Items with the same label `Task.average` ask the same
question.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from befm_jax.data.items import AnswerSet, FreeText, Item
from befm_jax.data.responses import How, Response, Sampled
from befm_jax.errors import DataError, unknown

Shares = Float64[np.ndarray, " A"]

DEFINITIONS: Mapping[str, str] = {
    "uniform": "Every answer is equally likely.",
    "median": "Everybody gives the answer of the median training person: the smallest that half of "
    "them do not exceed.",
    "mode": "Everybody gives the training people's most frequent answer, the first where several "
    "are.",
    "pooled": "The training people's answers to all questions together, each put at the same share "
    "of the scale and moved to the question's nearest answer: a model that does not notice what it "
    "is asked.",
    "equilibrium": "Everybody gives the textbook equilibrium choice of self-interested players.",
    "training_people": "The training people's own answers to the same question.",
    "another_person": "Another training person, drawn for each item, in the place of the one who "
    "is predicted: their answer to the same question.",
}
# Baselines that know the compared people where those are the training people.
FITTED = ("median", "mode", "pooled", "training_people")


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline; `fit` makes one.

    Attributes:
        name: one of `DEFINITIONS`.
        answer: the response to an item and a `How`; raises DataError where there is none.
    """

    name: str
    answer: Callable[[Item, How], Response]

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to each item, in order: exact, except one draw for `another_person`.

        Raises:
            DataError: an item of free text, or one without answers of training people.
        """
        for item in items:
            yield self.answer(item, how)

    def serves(self, item: Item) -> bool:
        """Whether the baseline has a response to an item."""
        try:
            self.answer(item, Sampled(1))
        except DataError:
            return False
        return True

    def describe(self) -> dict[str, Any]:
        """The name and the definition."""
        return {"baseline": self.name, "definition": DEFINITIONS[self.name]}


def fit(name: str, training: Sequence[Item], question: str) -> Baseline:
    """A baseline fitted on training people.

    Args:
        name: one of `DEFINITIONS`.
        training: items with targets, of one person each or of many; uniform and equilibrium need
            none.
        question: the label shared by items of the same question ("game", "statement"); "" where
            all items ask the same question.  An item without the label is a question of its own.

    Raises:
        DataError: an unknown name, or items of one question with different answers.
    """
    if name not in DEFINITIONS:
        raise unknown("baseline", name, DEFINITIONS)
    answers_of = _Training(training, question)
    if name == "another_person":
        return Baseline(name, answers_of.another_person)
    shares: dict[str, Callable[[Item, AnswerSet], Shares]] = {
        "uniform": lambda item, answers: np.full(len(answers), 1.0 / len(answers)),
        "median": answers_of.median,
        "mode": lambda item, answers: answers.one(int(answers_of.counts(item, answers).argmax())),
        "pooled": answers_of.pooled,
        "equilibrium": _equilibrium,
        "training_people": lambda item, answers: _normalised(answers_of.counts(item, answers)),
    }

    def exact(item: Item, how: How) -> Response:
        return Response.from_mass(item.id, shares[name](item, _closed(item)))

    return Baseline(name, exact)


class _Training:
    """The answers of training people, by question."""

    def __init__(self, items: Sequence[Item], question: str) -> None:
        self.question = question
        self.answers: dict[str, AnswerSet] = {}
        self.totals: dict[str, Shares] = {}
        # By question and person; empty for items that count many people.
        self.persons: dict[str, dict[str, Shares]] = {}
        self._persons_in_order: dict[str, list[str]] = {}
        self._pooled: dict[tuple[float, ...], Shares] = {}
        for item in items:
            if item.target is None:
                continue
            answers, key = _closed(item), self.key(item)
            if self.answers.setdefault(key, answers) != answers:
                raise DataError(f"item {item.id}: its answers are not those of others of {key!r}")
            target = np.asarray(item.target, np.float64)
            self.totals[key] = self.totals[key] + target if key in self.totals else target
            if "person" in item.labels:
                self.persons.setdefault(key, {}).setdefault(item.labels["person"], target)

    def key(self, item: Item) -> str:
        """The question of an item."""
        return item.labels.get(self.question, item.id) if self.question else ""

    def counts(self, item: Item, answers: AnswerSet) -> Shares:
        """The number `[A]` of training people who gave each answer to the item's question."""
        key = self.key(item)
        total = self.totals.get(key)
        if total is None or not total.any():
            raise DataError(f"item {item.id}: no training people answered {key!r}")
        if self.answers[key] != answers:
            raise DataError(f"item {item.id}: its answers are not those of the training people")
        return total

    def median(self, item: Item, answers: AnswerSet) -> Shares:
        """All mass at the smallest answer that half of the training people do not exceed."""
        if answers.values is None:
            raise DataError(f"item {item.id}: its answers have no order, so there is no median")
        cumulated = np.cumsum(self.counts(item, answers))
        return answers.one(int(np.searchsorted(2 * cumulated, cumulated[-1])))

    def pooled(self, item: Item, answers: AnswerSet) -> Shares:
        """Training people's answers to all ordered questions, rescaled to the item's answers.

        Every answer counts once, so a question with more people weighs more.  An answer halfway
        between two goes to the lower one.
        """
        if answers.values is None:
            raise DataError(f"item {item.id}: its answers have no order, so none are pooled")
        if answers.values not in self._pooled:
            target = np.asarray(answers.values)
            total = np.zeros(len(target))
            for key, counts in self.totals.items():
                values = self.answers[key].values
                if values is None:
                    continue
                source = np.asarray(values)
                # Fractions of the two ranges, cross-multiplied: exact ties for whole numbers.
                source_share = (source - source[0])[:, None] * (target[-1] - target[0])
                target_share = (target - target[0])[None, :] * (source[-1] - source[0])
                nearest = np.abs(source_share - target_share).argmin(1)
                total += np.bincount(nearest, weights=counts, minlength=len(target))
            if not total.any():
                raise DataError(f"item {item.id}: no training people answered on a scale")
            self._pooled[answers.values] = _normalised(total)
        return self._pooled[answers.values]

    def another_person(self, item: Item, how: How) -> Response:
        """One draw: the answer of a training person other than the item's.

        The draw depends on the seed of `how` (0 for `Exact`) and the item's id.
        """
        _closed(item)
        if "person" not in item.labels:
            raise DataError(f"item {item.id}: it has no person, so there is no other one")
        persons = self.persons.get(self.key(item), {})
        ids = self._ids(self.key(item))
        own = item.labels["person"]
        others = len(ids) - (own in persons)
        if others < 1:
            raise DataError(f"item {item.id}: no other training person answered {self.key(item)!r}")
        seed = how.seed if isinstance(how, Sampled) else 0
        drawn = np.random.default_rng([seed, zlib.crc32(item.id.encode())]).integers(others)
        # The item's own person is replaced by the last: all other persons are equally likely.
        person = ids[drawn] if ids[drawn] != own else ids[-1]
        return Response.from_counts(item.id, persons[person])

    def _ids(self, key: str) -> list[str]:
        if key not in self._persons_in_order:
            self._persons_in_order[key] = list(self.persons.get(key, ()))
        return self._persons_in_order[key]


def _equilibrium(item: Item, answers: AnswerSet) -> Shares:
    if "equilibrium" not in item.notes:
        raise DataError(f"item {item.id}: no equilibrium in its notes")
    return answers.one(int(item.notes["equilibrium"]))


def _closed(item: Item) -> AnswerSet:
    if isinstance(item.answers, FreeText):
        raise DataError(f"item {item.id}: it asks for free text, which no baseline gives")
    return item.answers


def _normalised(counts: Shares) -> Shares:
    total: Shares = counts / counts.sum()
    return total
