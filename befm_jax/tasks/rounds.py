"""The tasks of games in rounds.

- `rounds/next`: every choice of a person in order, with what happened before in the conversation;
- `rounds/first`: the first choice in public goods, in designs that nobody was trained on.

Both need "rounds" (`befm_jax.data.rounds`).  The question that items have in common is their
`situation`: the setting (a treatment, or what may be put in and how it is told) and how far the
game has gone.  Figures by what happened `before` say whether somebody who was let down, or whose
bomb went off, is predicted as well as others.  What is resampled are groups that played together,
where those are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from befm_jax.data.items import Item, Message
from befm_jax.data.rounds import Decision, Played
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording

# The first round of each band.
_BANDS = (1, 2, 3, 6, 11, 21)


def next_choice(row: Played, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every choice of a person, in one growing conversation.

    `notes["previous"]` is the position of the choice before, None for the first.
    """
    conversation: tuple[Message, ...] = ()
    before: Decision | None = None
    chosen: dict[str, int] = {}
    for decision in row.decisions:
        name = f"rounds/{row.game}" if before is None else f"rounds/{row.game}/next"
        conversation += wording(
            name,
            design=row.design,
            decision=decision,
            before=before,
            answers=row.answers,
        )
        previous = chosen.get(decision.asked)
        happened = "a match begins"
        if before is not None and before.match == decision.match:
            happened = _happened(row, before, previous)
        yield _item(row, decision, conversation, previous, happened)
        chosen[decision.asked] = decision.choice
        answer = row.answers.written[decision.choice]
        conversation, before = (*conversation, Message("assistant", answer)), decision


def first_choice(row: Played, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """The first choice of a person in public goods."""
    # A coin in the fund brings its owner this much, whatever the others do.
    brings = row.design["multiplier"] / row.design["group_size"]
    notes = {"equilibrium": 0 if brings < 1 else len(row.answers) - 1}
    yield replace(next(next_choice(row, wording, rng)), notes=notes)


def band(number: int) -> str:
    """The band of a round: "1", "2", "3-5", ... "21+"."""
    start = max(first for first in _BANDS if first <= number)
    later = [first for first in _BANDS if first > start]
    if not later:
        return f"{start}+"
    return str(start) if later[0] == start + 1 else f"{start}-{later[0] - 1}"


def _happened(row: Played, before: Decision, previous: int | None) -> str:
    """What happened in the round before, in a few kinds."""
    if row.game == "dilemma":
        told = (f"{who} {row.answers.names[choice]}" for who, choice in before.after.items())
        return ", ".join(told) or "nothing told"
    if row.game == "bomb":
        return "no bomb" if before.after["safe"] else "the bomb"
    if previous is None:
        return "another choice"
    ends = {0: "chose the least", len(row.answers) - 1: "chose the most"}
    return ends.get(previous, "chose between")


def _item(
    row: Played,
    decision: Decision,
    prompt: tuple[Message, ...],
    previous: int | None,
    happened: str,
) -> Item:
    setting = f"{row.setting}, {decision.asked}" if decision.asked else row.setting
    labels = {
        **row.labels,
        "person": row.person,
        "group": row.group,
        "game": row.game,
        "setting": setting,
        "round": band(decision.round),
        "situation": f"{setting}, round {band(decision.round)}",
        "before": happened,
    }
    where = (row.person, str(decision.match), str(decision.round), decision.asked)
    target = row.answers.one(decision.choice)
    id = "/".join(filter(None, where))
    return Item(id, prompt, row.answers, target, labels, {"previous": previous})


_MEASURES = ("log_score", "crps", "accuracy", "expected_error", "median_error")
register(
    Task(
        "rounds/next",
        next_choice,
        needs="rounds",
        measures=_MEASURES,
        average="situation",
        cluster="group",
        groups=("round", "before"),
    )
)
register(
    Task(
        "rounds/first",
        first_choice,
        needs="rounds",
        measures=_MEASURES,
        average="setting",
        cluster="group",
        groups=("framing", "chat", "punishment", "reward"),
        serves=lambda row: row.game == "public_goods" and row.decisions[0].round == 1,
    )
)
