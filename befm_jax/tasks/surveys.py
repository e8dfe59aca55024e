"""The tasks of questionnaires: what people answer, and what kind of people they are.

- `survey/next`: every answer of a person, one after the other in a random order, each with the
  answers before it in the conversation;
- `survey/masked`: one answer, with all others of the person in the conversation;
- `survey/answer`: an answer of somebody of whom only the characteristics are known;
- `survey/groups`: how the people of one sex and age band answer;
- `survey/traits`: the score of each trait from the characteristics alone;
- `survey/other_traits`: the score of one trait from those of the others;
- `survey/age`: the age from the scores;
- `survey/joint`: the score of each trait from that of one other, or from the age: whether traits go
  together, and change with age, in the model as they do in people.

All need a table of questionnaires (`befm_jax.data.questionnaires`) but `survey/groups`, for which
the package has counts of its own.  Persons are what is resampled, and figures by sex and age band
stand beside those of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from befm_jax.data import questionnaires
from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.questionnaires import Cell, Form, Questionnaire
from befm_jax.tasks import Task, register
from befm_jax.tasks.games import TOGETHER
from befm_jax.tasks.wording import Wording

# Statements asked of a person whose other answers are not given.
_STATEMENTS_APART = 5
_AGES = AnswerSet.numbers(questionnaires.AGES, "years")


def next_answers(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every answer of a person in a random order, with those before it."""
    for code, before, known in _in_random_order(row, wording, rng):
        yield _answer(row, code, before, known)


def masked(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One answer of a person, drawn, with all of their others before it."""
    *_, (code, before, known) = _in_random_order(row, wording, rng)
    yield _answer(row, code, before, known)


def answers(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Some answers of a person, drawn, each without the others."""
    form = questionnaires.get(row.form)
    for code in rng.permutation(list(row.answers))[:_STATEMENTS_APART]:
        yield _answer(row, str(code), _opening(row, form, wording, str(code)), {})


def groups(row: Cell, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every statement, asked of the people of one sex and age band."""
    form = questionnaires.get(row.form)
    for code, counts in row.counts.items():
        prompt = wording(
            "survey/answer",
            about={"Sex": row.labels["sex"], "Age": row.labels["age_band"]},
            scale=form.scale,
            request=form.answers.request,
            statement=form.statements[code].text,
        )
        labels = {**row.labels, "statement": code}
        yield Item(f"{row.name}/{code}", prompt, form.answers, counts.astype(float), labels)


def traits(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The score of each trait, from the characteristics."""
    for trait in row.scores():
        yield _score(row, trait, wording, "survey/traits", {})


def other_traits(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The score of each trait, from the characteristics and the scores of the others."""
    scores = row.scores()
    for trait in scores if len(scores) > 1 else ():
        known = {name: float(score) for name, score in scores.items() if name != trait}
        yield _score(row, trait, wording, "survey/other_traits", known)


def age(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The age, from the scores and what else is known."""
    scores = row.scores()
    if row.age is None or not scores:
        return
    prompt = wording(
        "survey/age",
        about=_about(row, without=("age",)),
        form=questionnaires.get(row.form),
        scores=scores,
        request=_AGES.request,
    )
    target = _AGES.one(_AGES.position(row.age))
    yield Item(f"{row.person}/age", prompt, _AGES, target, _labels(row))


def joint(row: Questionnaire, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The score of each trait, from the characteristics and one other trait, or from these alone.

    `notes["known"]` is what the score is compared with: the other trait, by the label "pair" of the
    question that asks it, or the age.  As in `games/joint`, it is the person's own.
    """
    scores = row.scores()
    for trait, other in itertools.permutations(scores, 2):
        item = _score(row, trait, wording, "survey/other_traits", {other: float(scores[other])})
        known = {f"{other} given {trait}": float(scores[other])}
        yield _paired(item, f"{trait} given {other}", known)
    for trait in scores if row.age is not None else ():
        item = _score(row, trait, wording, "survey/traits", {})
        yield _paired(item, f"{trait} given age", {"age": float(row.age or 0)})


def _paired(item: Item, pair: str, known: Mapping[str, float]) -> Item:
    labels = {**item.labels, "pair": pair}
    id = f"{item.labels['person']}/{pair}"
    return replace(item, id=id, labels=labels, notes={"known": known})


def _in_random_order(
    row: Questionnaire, wording: Wording, rng: np.random.Generator
) -> Iterator[tuple[str, tuple[Message, ...], dict[str, float]]]:
    """Each statement that was answered, with the conversation up to it and the answers in that."""
    form = questionnaires.get(row.form)
    conversation: tuple[Message, ...] = ()
    known: dict[str, float] = {}
    for code in map(str, rng.permutation(list(row.answers))):
        if conversation:
            asked = wording("survey/following", statement=form.statements[code].text)
            conversation += asked
        else:
            conversation = _opening(row, form, wording, code)
        yield code, conversation, dict(known)
        answered = form.answers.written[row.answers[code]]
        conversation = (*conversation, Message("assistant", answered))
        known[code] = float(form.answers.names[row.answers[code]])


def _opening(row: Questionnaire, form: Form, wording: Wording, code: str) -> tuple[Message, ...]:
    return wording(
        "survey/answer",
        about=_about(row),
        scale=form.scale,
        request=form.answers.request,
        statement=form.statements[code].text,
    )


def _answer(
    row: Questionnaire, code: str, prompt: tuple[Message, ...], known: Mapping[str, float]
) -> Item:
    scale = questionnaires.get(row.form).answers
    target, labels = scale.one(row.answers[code]), _labels(row, statement=code)
    return Item(f"{row.person}/{code}", prompt, scale, target, labels, {"known": known})


def _score(
    row: Questionnaire, trait: str, wording: Wording, name: str, known: Mapping[str, float]
) -> Item:
    form = questionnaires.get(row.form)
    answers, score = form.scores(trait), row.scores()[trait]
    prompt = wording(
        name,
        about=_about(row),
        form=form,
        trait=trait,
        scores=known,
        request=answers.request,
    )
    target, labels = answers.one(answers.position(score)), _labels(row, trait=trait)
    return Item(f"{row.person}/{trait}", prompt, answers, target, labels, {"known": known})


def _about(row: Questionnaire, without: tuple[str, ...] = ()) -> dict[str, str]:
    """What is known of a person: the age in years in the place of its band."""
    known = {} if row.age is None else {"age": str(row.age)}
    known |= {name: value for name, value in row.labels.items() if name != "age_band"}
    return {
        name.replace("_", " ").capitalize().replace("english", "English"): value
        for name, value in known.items()
        if name not in without
    }


def _labels(row: Questionnaire, **more: str) -> Mapping[str, str]:
    return {**row.labels, **more, "person": row.person}


register(
    Task(
        "survey/groups",
        groups,
        needs="cells",
        measures=("wasserstein", "energy", "crps", "log_score", "total_variation"),
        average="statement",
        cluster="",
        groups=questionnaires.CELLS,
    )
)
_SURVEY = partial(Task, needs="questionnaires", groups=("sex", "age_band"))
_ANSWERS = ("crps", "log_score", "accuracy", "expected_error", "median_error", "wasserstein")
_SCORES = ("crps", "log_score", "expected_error", "median_error", "mean_error", "wasserstein")
for _name, _items, _average, _measures in (
    ("survey/next", next_answers, "statement", _ANSWERS),
    ("survey/masked", masked, "statement", _ANSWERS),
    ("survey/answer", answers, "statement", _ANSWERS),
    ("survey/traits", traits, "trait", _SCORES),
    ("survey/other_traits", other_traits, "trait", (*_SCORES, "variance_kept")),
    ("survey/age", age, "", _SCORES),
):
    register(_SURVEY(name=_name, items=_items, average=_average, measures=_measures))
register(
    Task(
        "survey/joint",
        joint,
        needs="questionnaires",
        measures=TOGETHER,
        average="pair",
        least=20,
        serves=lambda row: len(row.scores()) > 1,
    )
)
