"""Baselines: respondents without a model, with which every figure is compared.

Each is fitted on items of training people.  Items with the same label `Task.average` ask the same
question.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from befm_jax.data.items import AnswerSet, FreeText, Item
from befm_jax.data.responses import How, Response, Sampled
from befm_jax.errors import DataError, unknown
from befm_jax.respondents import risky, strategic

Shares = Float64[np.ndarray, " A"]
Floats = NDArray[np.float64]
# How many people all training people count as, beside those of a group.
_OF_EVERYBODY = 10.0
# Of each variance, added to it.
_RIDGE, _ROUNDING = 0.01, 1e-9

DEFINITIONS: Mapping[str, str] = {
    "uniform": "Every answer is equally likely.",
    "median": "Everybody gives the answer of the median training person: the smallest that half of "
    "them do not exceed.",
    "mode": "Everybody gives the training people's most frequent answer, the first where several "
    "are.",
    "pooled": "The training people's answers to all questions together, each put at the same share "
    "of the scale and moved to the question's nearest answer: a model that does not notice what it "
    "is asked.",
    "equilibrium": "Everybody gives the textbook equilibrium choice of self-interested players; "
    "where it is mixed, its shares.",
    "quantal_response": "The logit quantal response equilibrium of a 2x2 game, its precision "
    "fitted to the training people by maximum likelihood.",
    "level_1": "The logit response to an opponent who chooses at random in a 2x2 game, its "
    "precision fitted likewise.",
    "level_2": "The logit response to an opponent who is at level 1, its precision fitted "
    "likewise.",
    "expected_value": "The logit response to the means of what two gambles pay, its precision "
    "fitted to the training people by maximum likelihood.",
    "expected_utility": "The same with a power of what is paid, fitted likewise.",
    "prospect_theory": "The same with the values of cumulative prospect theory, its power, loss "
    "aversion and weighting of probabilities fitted likewise.",
    "training_people": "The training people's own answers to the same question.",
    "same_group": "The answers to the same question of training people of the same sex and age "
    "band (or the task's other groups); those of all training people count as ten more of them.",
    "other_answers": "The normal distribution of an answer given the person's other answers, with "
    "means and covariances of training people (ridge regression on what is known), in shares of "
    "the answers.",
    "previous_choice": "The person's own previous choice, with a probability that is fitted to the "
    "training people at the same question (one who kept theirs and one who did not are added); "
    "else an answer of theirs, or of one who answers uniformly. These alone where nothing came "
    "before.",
    "another_person": "Another training person, drawn for each item, in the place of the one who "
    "is predicted: their answer to the same question.",
    "given_text": "The text that the question gives last, repeated as the answer.",
}
# Baselines that know the compared people where those are the training people: not these.
_NOT_FITTED = ("uniform", "equilibrium", "another_person", "given_text")
FITTED = tuple(name for name in DEFINITIONS if name not in _NOT_FITTED)


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

        Free text is answered by `another_person` and `given_text` alone.

        Raises:
            DataError: an item that the baseline has no answer to, such as one without answers of
                training people.
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


def fit(name: str, training: Sequence[Item], question: str, groups: Sequence[str] = ()) -> Baseline:
    """A baseline fitted on training people.

    Args:
        name: one of `DEFINITIONS`.
        training: items with targets, of one person each or of many; uniform and equilibrium need
            none.
        question: the label shared by items of the same question ("game", "statement"); "" where
            all items ask the same question.  An item without the label is a question of its own.
        groups: the labels whose values make a person's group, for `same_group`.

    Raises:
        DataError: an unknown name, or items of one question with different answers.
    """
    if name not in DEFINITIONS:
        raise unknown("baseline", name, DEFINITIONS)
    answers_of = _Training(training, question, groups)
    if name == "another_person":
        return Baseline(name, answers_of.another_person)
    if name == "given_text":
        return Baseline(name, lambda item, how: _one_text(item, str(_note(item, "given"))))
    shares: dict[str, Callable[[Item, AnswerSet], Shares]] = {
        "uniform": lambda item, answers: np.full(len(answers), 1.0 / len(answers)),
        "median": answers_of.median,
        "mode": lambda item, answers: answers.one(int(answers_of.counts(item, answers).argmax())),
        "pooled": answers_of.pooled,
        "equilibrium": _equilibrium,
        "training_people": lambda item, answers: _normalised(answers_of.counts(item, answers)),
        "same_group": answers_of.same_group,
        "other_answers": answers_of.from_other_answers,
        "previous_choice": answers_of.previous_choice,
        **{
            name: strategic.Fitted(model, training).shares
            for name, model in strategic.MODELS.items()
        },
        **{name: risky.Fitted(model, training).shares for name, model in risky.MODELS.items()},
    }

    def exact(item: Item, how: How) -> Response:
        return Response.from_mass(item.id, shares[name](item, _closed(item)))

    return Baseline(name, exact)


class _Training:
    """The answers of training people, by question."""

    def __init__(self, items: Sequence[Item], question: str, groups: Sequence[str]) -> None:
        self.question, self.groups = question, groups
        self.answers: dict[str, AnswerSet] = {}
        self.totals: dict[str, Shares] = {}
        # By question and person, shares or a text; empty for items that count many people.
        self.persons: dict[str, dict[str, Any]] = {}
        self._persons_in_order: dict[str, list[str]] = {}
        self._pooled: dict[tuple[float, ...], Shares] = {}
        # By question, what was chosen and what was chosen before.
        self._repeated: dict[str, list[tuple[int, int]]] = {}
        self._repeating: dict[str, float] = {}
        # By question and group.
        self._groups: dict[tuple[str, ...], Shares] = {}
        for item in items:
            if item.target is None:
                continue
            key = self.key(item)
            if isinstance(item.answers, FreeText):
                if "person" in item.labels and len(item.target):
                    text = str(item.target[0])
                    self.persons.setdefault(key, {}).setdefault(item.labels["person"], text)
                continue
            answers = item.answers
            if self.answers.setdefault(key, answers) != answers:
                raise DataError(f"item {item.id}: its answers are not those of others of {key!r}")
            target = np.asarray(item.target, np.float64)
            self.totals[key] = self.totals[key] + target if key in self.totals else target
            if (group := self._group(item)) is not None:
                self._groups[group] = self._groups.get(group, 0.0) + target
            if item.notes.get("previous") is not None:
                choice = int(target.argmax()), int(item.notes["previous"])
                self._repeated.setdefault(key, []).append(choice)
            if "person" in item.labels:
                self.persons.setdefault(key, {}).setdefault(item.labels["person"], target)

    def key(self, item: Item) -> str:
        """The question of an item; letters mean the same only among questions with as many."""
        key = item.labels.get(self.question, item.id) if self.question else ""
        if isinstance(item.answers, AnswerSet) and item.answers.kind == "letters":
            return f"{key} {item.answers.in_words}"
        return key

    def counts(self, item: Item, answers: AnswerSet) -> Shares:
        """The number `[A]` of training people who gave each answer to the item's question."""
        key = self.key(item)
        total = self.totals.get(key)
        if total is None or not total.any():
            raise DataError(f"item {item.id}: no training people answered {key!r}")
        if self.answers[key] != answers:
            raise DataError(f"item {item.id}: its answers are not those of the training people")
        return total

    def _group(self, item: Item) -> tuple[str, ...] | None:
        """The question and group of an item; None without groups, or where one is not known."""
        values = tuple(item.labels.get(label, "") for label in self.groups)
        return (self.key(item), *values) if values and all(values) else None

    def same_group(self, item: Item, answers: AnswerSet) -> Shares:
        """The shares of the item's group; everybody counts as `_OF_EVERYBODY` people more."""
        group = self._group(item)
        if group is None:
            raise DataError(f"item {item.id}: the group of its person is not known")
        everybody = _normalised(self.counts(item, answers))
        return _normalised(self._groups.get(group, 0.0) + _OF_EVERYBODY * everybody)

    def from_other_answers(self, item: Item, answers: AnswerSet) -> Shares:
        """The normal distribution of the answer given those of `notes["known"]`, by question."""
        known = item.notes.get("known")
        if not known or answers.values is None:
            raise DataError(f"item {item.id}: no other answers of the person are known")
        self.counts(item, answers)
        places, mean, covariance = self._moments
        given = [(places[key], value) for key, value in known.items() if key in places]
        if not given:
            raise DataError(f"item {item.id}: what is known of the person is no answer")
        asked = places[self.key(item)]
        at = [place for place, _ in given]
        solved = np.linalg.solve(covariance[np.ix_(at, at)], covariance[at, asked])
        expected = mean[asked] + solved @ (np.array([value for _, value in given]) - mean[at])
        spread = np.sqrt(max(covariance[asked, asked] - solved @ covariance[at, asked], _ROUNDING))
        values = np.array(answers.values)
        borders = (values[:-1] + values[1:]) / 2
        cumulated = ndtr((borders - expected) / spread)
        return np.diff(cumulated, prepend=0.0, append=1.0)

    @cached_property
    def _moments(self) -> tuple[dict[str, int], Floats, Floats]:
        """Place of each question, `[Q]` means and `[Q, Q]` covariances of the training people.

        Where people left out questions, the covariance of two is smaller by how few answered both
        (`n_ij / sqrt(n_i n_j)`): so it belongs to a distribution, whoever answered what.
        """
        keys = [key for key, of in self.answers.items() if key in self.persons and of.values]
        people = {
            person: row
            for row, person in enumerate(
                dict.fromkeys(person for key in keys for person in self.persons[key])
            )
        }
        table = np.full((len(people), len(keys)), np.nan)
        for place, key in enumerate(keys):
            values = np.array(self.answers[key].values)
            for person, target in self.persons[key].items():
                table[people[person], place] = values[int(target.argmax())]
        mean = np.nanmean(table, 0)
        centred = np.nan_to_num(table - mean)
        number = np.sqrt(np.isfinite(table).sum(0))
        covariance = (centred.T @ centred) / np.outer(number, number)
        # Scales differ between questions; to one of them everybody may give the same answer.
        ridge = _RIDGE * np.diag(np.maximum(np.diag(covariance), _ROUNDING))
        return {key: place for place, key in enumerate(keys)}, mean, covariance + ridge

    def previous_choice(self, item: Item, answers: AnswerSet) -> Shares:
        """A mixture of the choice before, `notes["previous"]`, and training people's answers."""
        if "previous" not in item.notes:
            raise DataError(f"item {item.id}: what the person chose before is not known")
        everybody = _normalised(self.counts(item, answers) + 1.0 / len(answers))
        previous, key = item.notes["previous"], self.key(item)
        if previous is None or key not in self._repeated:
            return everybody
        if key not in self._repeating:
            chosen, before = np.array(self._repeated[key]).T
            self._repeating[key] = _share_kept(chosen == before, everybody[chosen])
        share = self._repeating[key]
        return share * answers.one(previous) + (1.0 - share) * everybody

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
        answer = persons[ids[drawn] if ids[drawn] != own else ids[-1]]
        if isinstance(item.answers, FreeText):
            return _one_text(item, answer)
        return Response.from_counts(item.id, answer)

    def _ids(self, key: str) -> list[str]:
        if key not in self._persons_in_order:
            self._persons_in_order[key] = list(self.persons.get(key, ()))
        return self._persons_in_order[key]


def _equilibrium(item: Item, answers: AnswerSet) -> Shares:
    predicted = _note(item, "equilibrium")
    return answers.one(predicted) if isinstance(predicted, int) else np.array(predicted)


def _note(item: Item, name: str) -> Any:
    if name not in item.notes:
        raise DataError(f"item {item.id}: no {name} in its notes")
    return item.notes[name]


def _closed(item: Item) -> AnswerSet:
    if isinstance(item.answers, FreeText):
        raise DataError(f"item {item.id}: it asks for free text, which has no distribution")
    return item.answers


def _one_text(item: Item, text: str) -> Response:
    if not isinstance(item.answers, FreeText):
        raise DataError(f"item {item.id}: it has closed answers, so no text is one")
    return Response(item.id, None, exact=False, draws=1, texts=(text,))


def _normalised(counts: Shares) -> Shares:
    total: Shares = counts / counts.sum()
    return total


def _share_kept(kept: NDArray[np.bool_], by_chance: Floats) -> float:
    """The share of people who keep their choice, one more keeping and one more changing theirs.

    `kept` says who gave the answer that they gave before, `by_chance` how likely everybody's answer
    is for people who don't keep theirs; both are `[I]`.
    """

    def loss(share: float) -> float:
        likelihood = share * kept + (1.0 - share) * by_chance
        return -float(np.log(likelihood).sum() + np.log(share) + np.log1p(-share))

    return float(minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded").x)
