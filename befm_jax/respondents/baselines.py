"""Baselines: respondents that know nothing of a model, which every figure is compared with.

Each is fitted on items of training people.  Which items ask the same question is said by a label:
that of `Task.average`.
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


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline; `fit` makes one.

    Attributes:
        name: one of `DEFINITIONS`.
        answer: from an item and how it is asked to the response; raises DataError where there is
            none.
    """

    name: str
    answer: Callable[[Item, How], Response]

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to each item, in their order: exact, but of `another_person` one draw.

        Raises:
            DataError: an item of free text, or one that the training people say nothing of.
        """
        for item in items:
            yield self.answer(item, how)

    def serves(self, item: Item) -> bool:
        """Whether there is a response to an item."""
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
        question: the label that items which ask the same question share ("game", "statement"); ""
            where all items ask the same.  An item without the label asks a question of its own.

    Raises:
        DataError: an unknown name, or items of one question with different answers.
    """
    if name not in DEFINITIONS:
        raise unknown("baseline", name, DEFINITIONS)
    known = _Training(training, question)
    if name == "another_person":
        return Baseline(name, known.another_person)
    shares: dict[str, Callable[[Item, AnswerSet], Shares]] = {
        "uniform": lambda item, answers: np.full(len(answers), 1.0 / len(answers)),
        "median": known.median,
        "mode": lambda item, answers: answers.one(int(known.counts(item, answers).argmax())),
        "pooled": known.pooled,
        "equilibrium": _equilibrium,
        "training_people": lambda item, answers: _normalised(known.counts(item, answers)),
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
        # By question and person; of items that count many people there is none.
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
        """Which question an item asks."""
        return item.labels.get(self.question, item.id) if self.question else ""

    def counts(self, item: Item, answers: AnswerSet) -> Shares:
        """`[A]` how many training people gave each answer to the item's question."""
        key = self.key(item)
        total = self.totals.get(key)
        if total is None or not total.any():
            raise DataError(f"item {item.id}: no training people answered {key!r}")
        if self.answers[key] != answers:
            raise DataError(f"item {item.id}: its answers are not those of the training people")
        return total

    def median(self, item: Item, answers: AnswerSet) -> Shares:
        """All at the smallest answer that half of the training people do not exceed."""
        if answers.values is None:
            raise DataError(f"item {item.id}: its answers have no order, so there is no median")
        cumulated = np.cumsum(self.counts(item, answers))
        return answers.one(int(np.searchsorted(2 * cumulated, cumulated[-1])))

    def pooled(self, item: Item, answers: AnswerSet) -> Shares:
        """The training people of all questions with an order, moved to the item's answers.

        Every answer counts once, so a question that more people answered weighs more.  Halfway
        between two answers it goes to the lower one.
        """
        if answers.values is None:
            raise DataError(f"item {item.id}: its answers have no order, so nothing is moved there")
        if answers.values not in self._pooled:
            target = np.asarray(answers.values)
            total = np.zeros(len(target))
            for key, counts in self.totals.items():
                places = self.answers[key].values
                if places is None:
                    continue
                source = np.asarray(places)
                # Shares of the two ranges, cross-multiplied: of whole numbers, ties are ties.
                wanted = (source - source[0])[:, None] * (target[-1] - target[0])
                offered = (target - target[0])[None, :] * (source[-1] - source[0])
                nearest = np.abs(wanted - offered).argmin(1)
                total += np.bincount(nearest, weights=counts, minlength=len(target))
            if not total.any():
                raise DataError(f"item {item.id}: no training people answered on a scale")
            self._pooled[answers.values] = _normalised(total)
        return self._pooled[answers.values]

    def another_person(self, item: Item, how: How) -> Response:
        """One draw: the answer of a training person other than the item's.

        The draw depends on the seed of `how` (0 where all answers are asked for) and the item's id.
        """
        _closed(item)
        if "person" not in item.labels:
            raise DataError(f"item {item.id}: it is of no person, so there is no other one")
        persons = self.persons.get(self.key(item), {})
        ids = self._ids(self.key(item))
        own = item.labels["person"]
        others = len(ids) - (own in persons)
        if others < 1:
            raise DataError(f"item {item.id}: no other training person answered {self.key(item)!r}")
        seed = how.seed if isinstance(how, Sampled) else 0
        drawn = np.random.default_rng([seed, zlib.crc32(item.id.encode())]).integers(others)
        # Whoever is asked stands in the last one's place: every other person is as likely.
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
