"""The tasks of knowledge: multiple-choice questions with one or several right options.

- `knowledge/choice`: the options in the order of the file, as published figures have them;
- `knowledge/shuffled`: the options in an order that is drawn, so that their places tell nothing:
  for training, and to see whether a model goes by the place.  A question stays as it is where an
  option speaks of another's place ("both A and B").

Both need "questions" (`befm_jax.data.knowledge`), of which the package has some.  Where a file has
questions with several right options, every set of letters is an answer to each of its questions,
and an answer is right if it is exactly the right set.  Subjects have equal weight in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from befm_jax.data.items import LETTERS, AnswerSet, Item
from befm_jax.data.knowledge import Question
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording


def choice(row: Question, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The question as it is in the file."""
    yield asked_in_order(row, wording, range(len(row.options)))


def shuffled(row: Question, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The question with its options in random order."""
    order = rng.permutation(len(row.options)).tolist()
    yield asked_in_order(row, wording, order if row.in_any_order else range(len(row.options)))


def asked_in_order(row: Question, wording: Wording, order: Sequence[int]) -> Item:
    """The item; `order` has the position of each option in the file, in the order of asking."""
    answers = AnswerSet.letters(len(order), row.several)
    options = {LETTERS[place]: row.options[at] for place, at in enumerate(order)}
    right = "".join(LETTERS[place] for place, at in enumerate(order) if at in row.right)
    prompt = wording(
        "knowledge/choice", question=row.question, options=options, request=answers.request
    )
    target = answers.one(answers.read_cell(right))
    return Item(row.id, prompt, answers, target, {"subject": row.subject})


_CHOICE = partial(
    Task,
    needs="questions",
    measures=("accuracy", "macro_f1", "log_score", "brier"),
    average="subject",
)
register(_CHOICE("knowledge/choice", choice))
register(_CHOICE("knowledge/shuffled", shuffled))
