"""Play: games in which later questions depend on the answers to earlier ones.

`Task.items` are questions of one row that can be asked in any order, all at once; a repeated game
has no such list before it has been played.  So a task that is played has `Task.episodes`, and
`play` asks the questions of all episodes that are still going on, round by round, in one
`respond()` a respondent, so that an engine answers them together.

What becomes of an answer is drawn here, from the respondent's distribution, by a generator of the
seed and the item's id: an episode is the same whatever else is played beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from befm_jax import files
from befm_jax.data.items import FreeText, Item
from befm_jax.data.responses import How, Respondent, Response, Sampled, how_as_dict
from befm_jax.errors import DataError, unknown

# The name of whom a task is about, among those who play.
RESPONDENT = "respondent"
SCHEMA = "befm_jax.trajectories/1"


class Question(NamedTuple):
    """A question to one of those who play, and the name of who answers it."""

    who: str
    item: Item


class Episode(Protocol):
    """A game that is played to its end: a repeated game, an adaptive survey.

    `item.notes` of its questions hold what strategies go by, and, where answers are more or less
    cooperative, `cooperation`: `[A]` from 0 to 1.
    """

    @property
    def id(self) -> str:
        """Unique among the episodes of a task."""

    @property
    def labels(self) -> Mapping[str, str]:
        """What figures are grouped by: opponent, setting."""

    def questions(self) -> Sequence[Question]:
        """The questions of the round, of closed answers; none where the game is over."""

    def take(self, answers: Sequence[int]) -> Sequence[float]:
        """Goes on with the positions of the answers to `questions()`; returns their rewards."""


@dataclass(frozen=True)
class Move:
    """One answer in an episode.

    Attributes:
        round: from 1.
        item: the id of the question.
        who: the name of who answered.
        asked: the last message before the answer.
        answer: as it is written.
        reward: of the round.
        cooperation: from 0 to 1; None where an answer is neither more nor less of it.
        outside: probability, or share of draws, outside the answer set.
        unread: draws in which no answer could be read.
    """

    round: int
    item: str
    who: str
    asked: str
    answer: str
    reward: float
    cooperation: float | None
    outside: float
    unread: int = 0


@dataclass(frozen=True)
class Trajectory:
    """An episode as it was played."""

    episode: str
    labels: Mapping[str, str]
    moves: tuple[Move, ...]


def seeded(seed: int, name: str) -> np.random.Generator:
    """The generator of a name: what is drawn for it depends on nothing else."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def play(
    who: Mapping[str, Respondent], episodes: Sequence[Episode], how: How, seed: int = 0
) -> list[Trajectory]:
    """Plays all episodes to their ends.

    Args:
        who: respondents by the names that the questions have.
        episodes: games that have not begun.
        how: exact: an answer is drawn from the respondent's shares.  Sampled: it is one draw of the
            respondent's.  Where nothing answered is in the set, all answers are equally likely.
        seed: seed of the draws.

    Returns:
        The trajectories, in the order of the episodes.

    Raises:
        DataError: two episodes of one id, a question to somebody unknown, one of free text, or as
            `Respondent.respond`.
    """
    moves: dict[str, list[Move]] = {episode.id: [] for episode in episodes}
    if len(moves) < len(episodes):
        raise DataError("play: two episodes have the same id")
    if isinstance(how, Sampled):
        how = replace(how, n=1)
    number = 0
    while going := [(one, asked) for one in episodes if (asked := one.questions())]:
        number += 1
        asked_of: dict[str, list[Item]] = {}
        for _, questions in going:
            for question in questions:
                asked_of.setdefault(question.who, []).append(question.item)
        responses: dict[str, Response] = {}
        for name, items in asked_of.items():
            if name not in who:
                raise unknown("player", name, who)
            responses |= {one.item: one for one in who[name].respond(items, how)}
        for episode, questions in going:
            answers = [_drawn(item, responses[item.id], seed) for _, item in questions]
            rewards = episode.take(answers)
            for (name, item), answer, reward in zip(questions, answers, rewards, strict=True):
                cooperation = item.notes.get("cooperation")
                moves[episode.id].append(
                    Move(
                        number,
                        item.id,
                        name,
                        item.prompt[-1].text,
                        item.answers.written[answer],  # type: ignore[union-attr]
                        float(reward),
                        None if cooperation is None else float(cooperation[answer]),
                        responses[item.id].outside,
                        responses[item.id].unread,
                    )
                )
    return [Trajectory(one.id, dict(one.labels), tuple(moves[one.id])) for one in episodes]


def _drawn(item: Item, response: Response, seed: int) -> int:
    """The position of an answer that is drawn from a response."""
    if isinstance(item.answers, FreeText):
        raise DataError(f"item {item.id}: free text can't be played")
    number = len(item.answers)
    shares = np.full(number, 1.0 / number) if response.empty else response.shares
    if shares.max() == 1.0:  # most strategies'
        return int(shares.argmax())
    return int(seeded(seed, item.id).choice(number, p=shares))


def write(
    path: str | Path, trajectories: Iterable[Trajectory], respondent: Mapping[str, Any], how: How
) -> None:
    """Writes trajectories as JSON Lines: who played and how, then an episode a line."""
    head = {"schema": SCHEMA, "respondent": dict(respondent), "how": how_as_dict(how)}
    lines = [json.dumps(head), *(json.dumps(asdict(one)) for one in trajectories)]
    files.write(Path(path), ("\n".join(lines) + "\n").encode())


def read(path: str | Path) -> tuple[dict[str, Any], list[Trajectory]]:
    """The first line of a file that `write` wrote, and its trajectories.

    Raises:
        DataError: no such file, or a damaged one, with the line.
    """
    records = files.json_records(path)
    _, head = next(records)
    if head.get("schema") != SCHEMA:
        raise DataError(f"{path}:1: schema is {head.get('schema')!r}; it must be {SCHEMA!r}")
    trajectories = []
    for line, record in records:
        try:
            moves = tuple(Move(**move) for move in record.pop("moves"))
            trajectories.append(Trajectory(**record, moves=moves))
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}:{line}: not a trajectory ({error})") from None
    return head, trajectories
