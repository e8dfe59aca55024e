"""The tasks of contexts: telling from what people did where they did it.

`contexts/retrieval` asks the question of each context (a public goods design, the payoffs and the
continuation probability of a repeated dilemma, the payoffs of a 2x2 game) once, as the tasks of
these games ask it.  The respondent's distribution of answers is the likelihood of a context: what
`n` people did there has the log-probability `sum of counts x log p` under each candidate.  So the
context is inferred from responses to ordinary items, by measures over a context's item and those
of its distractors; no respondent has to be asked to name a context, and responses that are recorded
serve as well as a model.

A context has two items, one for each kind of distractors, with the same question: contexts of the
same kind, which differ in few parameters, and contexts of other kinds.  The two are reported apart.
The uniform respondent scores exactly chance.

It can show whether a respondent's answers move with the parameters as people's do, in direction and
in size: a respondent that answers alike everywhere is at chance.  It can't show whether the answers
are right on the whole, since a mistake that is the same in all candidates is not seen, nor what
people do after the first round.

`contexts/effects` asks both arms of published contrasts (`befm_jax.data.effects`), and takes the
difference of the two means as the effect that the respondent predicts.  Which arm is called the
control is arbitrary, so that its measures do not depend on it: correlation and slope go through the
origin.  It can show whether a respondent knows what matters, which way and how much.  Published
effects may stand in the texts that a model was trained on: right signs are no proof that it
predicts effects that nobody has measured.  Arms are asked in the package's own words, at the middle
of the ranges that were pooled, of people of no country and without their history in the game: a
slope below 1 may come from that, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from befm_jax.data import contexts
from befm_jax.data.contexts import Context
from befm_jax.data.effects import Effect, Gift
from befm_jax.data.games import Game
from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.matrix_games import Player
from befm_jax.data.rounds import Played
from befm_jax.tasks import Task, register
from befm_jax.tasks.matrix_games import matrix
from befm_jax.tasks.rounds import next_choice
from befm_jax.tasks.wording import Wording


def retrieval(row: Context, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The question of a context, with the first choices of everybody who was in it.

    `notes["candidates"]` are the labels "context" of those among which it is looked for, its own
    first.
    """
    if isinstance(row.asked, Player):
        item = next(matrix(row.asked, wording, rng))
        counts = row.counts if item.target[0] else row.counts[::-1]  # type: ignore[index]
    else:
        item = replace(next(next_choice(row.asked, wording, rng)), notes={})
        counts = row.counts
    assert isinstance(item.answers, AnswerSet)
    for which, others in row.distractors.items():
        yield replace(
            item,
            id=f"{row.name}/{which}",
            target=counts.astype(np.float64),
            labels={
                "context": row.name,
                "experiment": row.experiment,
                "distractors": f"{which}, {row.answers.in_words}",
            },
            notes={**item.notes, "candidates": (row.name, *others)},
        )


def effects(row: Effect, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Both arms of a contrast.

    `notes["values"]` are what each answer counts for, and `notes["published"]` is what is known.
    """
    for which, arm in (("control", row.control), ("treatment", row.treatment)):
        before, question, after = _question(arm.asked, wording)
        yield Item(
            f"{row.id}/{which}",
            (*before, *wording("contexts/arm", game=question, arm=arm), *after),
            arm.asked.answers,
            labels={**row.labels, "effect": row.id, "arm": which},
            notes={"values": arm.values, "published": row.published},
        )


def _question(
    asked: Game | Gift | Played, wording: Wording
) -> tuple[tuple[Message, ...], str, tuple[Message, ...]]:
    """The text that explains a game, with the messages before and after it."""
    if isinstance(asked, Played):
        *_, last = next_choice(asked, wording, np.random.default_rng(0))
        prompt, at = last.prompt, 0
    elif isinstance(asked, Gift):
        prompt, at = wording("contexts/gift", gift=asked, request=asked.answers.request), 0
    else:
        prompt, at = asked.prompt(), -1
    at = range(len(prompt))[at]
    return prompt[:at], prompt[at].text, prompt[at + 1 :]


register(
    Task(
        "contexts/retrieval",
        retrieval,
        needs="contexts",
        measures=(
            *("retrieved_first", "retrieved_in_3", "reciprocal_rank"),
            *("posterior_log_loss", "posterior_ece"),
        ),
        average="distractors",
        cluster="experiment",
        serves=contexts.serves,
    )
)
register(
    Task(
        "contexts/effects",
        effects,
        needs="effects",
        measures=("effect_sign", "effect_correlation", "effect_slope", "effect_coverage"),
        cluster="source",
        groups=("kind", "assignment", "game"),
    )
)
