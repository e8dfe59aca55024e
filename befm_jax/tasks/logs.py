"""The tasks of logs: a person's answers in order, each given all that came before.

- `logs/choice`: the answers that were one of several options;
- `logs/text`: those in words of the person's own.

Both need "logs" (`befm_jax.data.logs`).  A person's log is one conversation, and all of it is given
in both tasks.  The question that items have in common is the record's, else the set of options.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.logs import Log
from befm_jax.data.responses import Sampled
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording


def choice(row: Log, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every answer of a person that was one of several options."""
    return (item for item in _asked(row, wording) if isinstance(item.answers, AnswerSet))


def text(row: Log, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every answer of a person in words of their own."""
    return (item for item in _asked(row, wording) if isinstance(item.answers, FreeText))


def _asked(row: Log, wording: Wording) -> Iterator[Item]:
    conversation: tuple[Message, ...] = (Message("system", row.system),) if row.system else ()
    for number, event in enumerate(row.events):
        answers, answer = event.answers, event.answer
        request = "" if answers is None else answers.request
        target: np.ndarray | tuple[str, ...] = (answer,)
        # As the question asks for it, also where it is not learnt.
        position = None if answers is None else answers.parse_cell(answer).position
        if answers is not None and position is not None:
            target, answer = answers.one(position), answers.written[position]
        conversation += wording("logs/next", prompt=event.prompt, request=request)
        if event.is_learnt:
            possible = "free text" if answers is None else answers.in_words
            labels = {
                **row.labels,
                "person": row.person,
                "question": event.question or possible,
            }
            asked = FreeText() if answers is None else answers
            yield Item(f"{row.person}/{number + 1}", conversation, asked, target, labels)
        conversation = (*conversation, Message("assistant", answer))


register(
    Task(
        "logs/choice",
        choice,
        needs="logs",
        measures=("log_score", "accuracy", "expected_accuracy"),
        average="question",
        serves=lambda row: any(event.options and event.is_learnt for event in row.events),
    )
)
register(
    Task(
        "logs/text",
        text,
        needs="logs",
        measures=("rouge1", "rougeL", "chrf"),
        average="question",
        how=Sampled(1),
        serves=lambda row: any(event.is_learnt and not event.options for event in row.events),
    )
)
