"""The task of risky choice: `games/risky`, which of two gambles people take.

An item is a problem and a population: how many people took which gamble.  Problems are held out, so
that what is asked for are choices between gambles that nobody was trained on; problems, and not
people, are what is resampled.  Needs "gambles" (`befm_jax.data.gambles`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from befm_jax.data.gambles import Gamble, Problem
from befm_jax.data.items import AnswerSet, Item
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording

_NAMES = AnswerSet.labels("Red", "Blue")


def risky(row: Problem, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item a problem.

    Which gamble has which name, and which is told first, are drawn, so that neither means anything.
    `notes["gambles"]` are what is known of the gambles, by the position of the answer: hidden
    probabilities are equal ones.
    """
    swapped, second_first = map(bool, rng.integers(2, size=2))
    gambles, shares = [row.first, row.second], [1.0 - row.share, row.share]
    hidden = [False, row.is_hidden]
    if swapped:
        gambles, shares, hidden = gambles[::-1], shares[::-1], hidden[::-1]
    options = [
        {"name": _NAMES.names[at], "outcomes": gambles[at], "is_hidden": hidden[at]}
        for at in ((1, 0) if second_first else (0, 1))
    ]
    prompt = wording(
        "games/risky",
        names=_NAMES.names,
        options=options,
        linked=row.linked,
        has_feedback=row.has_feedback,
        request=_NAMES.request,
    )
    labels = {
        "problem": row.person,
        "feedback": "yes" if row.has_feedback else "no",
        "probabilities": "hidden" if row.is_hidden else "told",
    }
    known = tuple(map(_known, gambles, hidden))
    target = row.people * np.array(shares)
    yield Item(row.id, prompt, _NAMES, target, labels, {"gambles": known})


def _known(gamble: Gamble, is_hidden: bool) -> Gamble:
    if not is_hidden:
        return gamble
    return tuple((pays, 1.0 / len(gamble)) for pays, _ in gamble)


register(
    Task(
        "games/risky",
        risky,
        needs="gambles",
        measures=("log_score", "brier", "accuracy", "expected_accuracy"),
        cluster="problem",
        groups=("feedback", "probabilities"),
    )
)
