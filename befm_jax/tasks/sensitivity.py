"""Does a respondent read the question?  Each game, and the same with one thing changed.

`sensitivity` asks every game as it is, and again with a change after which the old answers are
wrong, whatever people would do:

- a parameter at a fifth (endowment, boxes, highest number, what was invested, the multiplier of a
  banker's money), where that leaves fewer answers: the others are impossible;
- a multiplier or rate of return of 0, where the answers stay: giving is then of use to nobody;
- "labels": in a game of two actions, each name stands for the other action's payoffs;
- "order": the same game with the other action named first throughout;
- "wording": what is left is asked for in the place of what is decided;
- "instruction": everybody is to give one certain answer, the last but one.

Both questions of a pair have the answer set of the unchanged one, so that a respondent that goes on
as before is seen to do so.  `notes` of a changed question say which answers are right there, or
where each old answer belongs; nobody's answers are compared with, and nothing is learnt from it.
`sensitivity/options` asks multiple-choice questions with the options in the reverse order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from befm_jax.data.games import Game
from befm_jax.data.items import LETTERS, AnswerSet, Item
from befm_jax.data.knowledge import Question
from befm_jax.errors import DataError
from befm_jax.tasks import Task, register
from befm_jax.tasks.games import item_of
from befm_jax.tasks.knowledge import asked_in_order
from befm_jax.tasks.wording import Wording

# At 0, whatever a player puts in is lost to everybody.
_WORTH = ("multiplier", "return_rate")
# What reports call a parameter, where that is not its name.
_CALLED = {
    "invested": "amount invested",
    "boxes": "number of boxes",
    "highest": "highest number",
    "order": "order of the actions",
}


def questions(row: Game, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """A game, and the same game with one thing changed, so that the old answers are wrong.

    Changed items have the labels "change" and "question", and `notes`: the item that they are
    `changed_from`; the positions that are `right`, or in `moved_to` the position to which each old
    answer belongs; and in `as_before` where it is found by a respondent that does not notice.
    """
    answers = row.answers
    numbers, same = range(len(answers)), tuple(range(len(answers)))
    mirrored = same[::-1]
    yield item_of(row)
    for name, value in row.parameters.items():
        small = value // 5 if isinstance(value, int) and value >= 5 else value / 5
        fewer = _with(row, **{name: small})
        if fewer is not None and set(fewer.answers.written) < set(answers.written):
            right = [at for at in numbers if answers.written[at] in fewer.answers.written]
            yield _changed(row, name, fewer.user, right=right)
        worthless = _with(row, **{name: 0}) if name in _WORTH else None
        if worthless is not None and worthless.answers == answers:
            right = [answers.position(worthless.equilibrium)]
            yield _changed(row, name, worthless.user, right=right)
    if answers.kind == "labels" and len(answers) == 2:
        exchanged = _exchanged(row)
        if exchanged is not None:
            text = _names_exchanged(exchanged.user, *answers.names)
            yield _changed(row, "labels", exchanged.user, moved_to=mirrored, as_before=same)
            yield _changed(row, "order", text, moved_to=same, as_before=mirrored)
    if answers.kind == "numbers" and row.values[0] == 0 and _is_symmetric(row.values):
        (*_, said) = wording("sensitivity/wording", game=row.user, top=answers.names[-1])
        yield _changed(row, "wording", said.text, moved_to=mirrored, as_before=same)
    told = len(answers) - 2
    (*_, said) = wording("sensitivity/instruction", game=row.user, answer=answers.written[told])
    yield _changed(row, "instruction", said.text, right=[told])


def options(row: Question, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """A multiple-choice question, and the same with its options in the reverse order."""
    as_it_is = range(len(row.options))
    original = replace(asked_in_order(row, wording, as_it_is), target=None)
    item = asked_in_order(row, wording, as_it_is[::-1])
    assert isinstance(item.answers, AnswerSet)
    letters = dict(zip(LETTERS[: len(as_it_is)], LETTERS[len(as_it_is) - 1 :: -1], strict=False))
    notes = {
        "changed_from": row.id,
        "moved_to": [
            item.answers.read_cell("".join(sorted(letters[letter] for letter in name)))
            for name in item.answers.names
        ],
        "as_before": range(len(item.answers)),
    }
    labels = {"change": "order of the options", "question": f"order, {row.id}"}
    yield original
    yield replace(item, id=f"{row.id}/order", target=None, labels=labels, notes=notes)


def _changed(row: Game, change: str, text: str, **notes: object) -> Item:
    """The item of a changed question.

    Not labelled by its game: recorded answers to a game are none to a changed one.
    """
    name = _CALLED.get(change, change.replace("_", " "))
    system, user = row.prompt()[:-1], row.prompt()[-1]
    return replace(
        item_of(row, id=f"{row.id}/{change}"),
        prompt=(*system, user._replace(text=text)),
        labels={"change": name, "question": f"{name}, {row.id}"},
        notes={"title": f"{row.title}, {name}", "changed_from": row.id, **notes},
    )


def _with(row: Game, **parameters: float) -> Game | None:
    """The game with other parameters; None where it cannot have them."""
    try:
        return row.with_parameters(**parameters)
    except DataError:
        return None


def _exchanged(row: Game) -> Game | None:
    """The game in which each of two actions has the other's payoffs.

    By the names of the parameters: `both_push` and `both_pull`.  None where they don't say so.
    """
    first, second = (name.casefold() for name in row.answers.names)
    partners = {name: _names_exchanged(name, first, second) for name in row.parameters}
    if set(partners.values()) != set(partners) or all(a == b for a, b in partners.items()):
        return None
    return _with(row, **{name: row.parameters[other] for name, other in partners.items()})


def _names_exchanged(text: str, first: str, second: str) -> str:
    """The text with each of two words in the place of the other; `_` parts words."""
    words = rf"(?<![^\W_])({re.escape(first)}|{re.escape(second)})(?![^\W_])"
    return re.sub(words, lambda found: second if found[0] == first else first, text)


def _is_symmetric(values: np.ndarray) -> bool:
    return bool(np.array_equal(values, values[-1] - values[::-1]))


register(
    Task(
        "sensitivity",
        questions,
        needs="games",
        measures=("follows_change",),
        average="change",
        groups=("question",),
        cluster="question",
    )
)
register(
    Task(
        "sensitivity/options",
        options,
        needs="questions",
        measures=("follows_change",),
        average="change",
        groups=("question",),
        cluster="question",
        serves=lambda row: row.in_any_order,
    )
)
