"""Contexts and what people did in them first: designs, treatments and tables of payoffs.

Read from the tables of games in rounds (`rounds`: public goods and repeated dilemmas) and of
one-shot 2x2 games (`matrix_games`), and split as those are.  `counted` then makes one row a
context, with the number of people for each answer, and chooses the distractors among which its
behaviour is looked for.

Only first choices are counted, one a person.  They are independent given the context, so that the
probability of what a whole group did is a product of answers to one question; a later choice
answers to what happened before, which every context would have to be asked about anew.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int64

from befm_jax import files
from befm_jax.data import matrix_games, rounds
from befm_jax.data.items import AnswerSet
from befm_jax.data.matrix_games import Game, Player, Trial
from befm_jax.data.rounds import Played
from befm_jax.data.rows import Rows

# A behaviour is looked for among at most so many contexts, so that chance is alike in all studies.
CANDIDATES = 10
SAME, OTHER = "of the same kind", "of other kinds"
_GAMES = ("public_goods", "dilemma")
# One's own two actions in a 2x2 game.
_ACTIONS = AnswerSet.labels("A", "B")


@dataclass(frozen=True, eq=False)
class Context:
    """A context, and what people did in it.

    Attributes:
        name: unique among the contexts of a table.
        kind: contexts of one kind are hard to tell apart: those of one study, or 2x2 games that it
            takes the same to solve.
        asked: a person's row whose first item asks the context's question.
        answers: the answers to it.
        counts: `[A]` int64, the people who gave each answer.
        distractors: names of other contexts with the same answers, by `SAME` and `OTHER`.
    """

    name: str
    kind: str
    asked: Played | Player
    answers: AnswerSet
    counts: Int64[np.ndarray, " A"]
    distractors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """What is resampled: the study, where a table has several, else the context."""
        study = isinstance(self.asked, Played) and self.asked.labels.get("study", "")
        return study or self.name


def read(path: str | Path) -> Rows[Any]:
    """The persons of a table; what can't be used is counted by reason.

    Raises:
        DataError: as `rounds.read`, or for 2x2 games as `matrix_games.read`.
    """
    header, _ = files.table(path)
    return matrix_games.read(path) if matrix_games.is_table(header) else rounds.read(path)


def serves(row: Played | Player) -> bool:
    """Whether a person's first choice in a context is known."""
    if isinstance(row, Player):
        return True
    return row.game in _GAMES and row.decisions[0].round == 1


def counted(rows: Rows[Any]) -> Rows[Context]:
    """One row a context, with what its people did first; those without distractors are left out.

    Which distractors a context has follows from the contexts' names alone.  Those of one kind are
    dealt into sets of at most `CANDIDATES`, and to each belong as many of other kinds.
    """
    found: dict[str, Context] = {}
    for row in rows.rows:
        for context, choice in _first_choices(row):
            found.setdefault(context.name, context).counts[choice] += 1
    by_answers: dict[AnswerSet, list[Context]] = {}
    for name in sorted(found, key=_digest):
        by_answers.setdefault(found[name].answers, []).append(found[name])
    distractors = {name: given for own in by_answers.values() for name, given in _dealt(own)}
    contexts = [replace(one, distractors=distractors[name]) for name, one in found.items()]
    return replace(cast(Rows[Context], rows), rows=[one for one in contexts if one.distractors])


def _first_choices(row: Played | Player) -> Iterator[tuple[Context, int]]:
    """Each context that a person was in, without counts, with the position of their choice."""
    if isinstance(row, Played):
        choice = row.decisions[0].choice
        kind = row.labels.get("study", "")
        yield _without_counts(row.labels["design"], kind, row, row.answers), choice
        return
    for trial in row.trials:
        game, flipped = _arranged(trial.game)
        asked = Player(row.person, (Trial(trial.id, game, 0),))
        yield _without_counts(_shown(game), game.kind, asked, _ACTIONS), trial.choice ^ flipped


@cache
def _arranged(game: Game) -> tuple[Game, bool]:
    """One arrangement for all of a game, whose order means nothing; whether its rows changed."""
    both = (False, True)
    arranged = [(game.arranged(rows, columns), rows) for rows in both for columns in both]
    return min(arranged, key=lambda one: (_shown(one[0]), one[1]))


def _shown(game: Game) -> str:
    """The payoffs, one's own before the other's, row by row."""
    sides = game.own, game.other
    return " | ".join(" ".join(f"{pays:.12g}" for row in side for pays in row) for side in sides)


def _without_counts(name: str, kind: str, asked: Played | Player, answers: AnswerSet) -> Context:
    return Context(name, kind, asked, answers, np.zeros(len(answers), np.int64))


def _dealt(contexts: Sequence[Context]) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """Contexts with the same answers, in the order of their digests, with their distractors."""
    by_kind: dict[str, list[str]] = {}
    for one in contexts:
        by_kind.setdefault(one.kind, []).append(one.name)
    same: dict[str, tuple[str, ...]] = {}
    for names in by_kind.values():
        number = math.ceil(len(names) / CANDIDATES)
        for members in (names[start::number] for start in range(number)):
            same |= {name: tuple(one for one in members if one != name) for name in members}
    for place, context in enumerate(contexts):
        following = itertools.chain(contexts[place + 1 :], contexts[:place])
        others = (one.name for one in following if one.kind != context.kind)
        other = tuple(itertools.islice(others, CANDIDATES - 1))
        given = {SAME: same[context.name], OTHER: other}
        yield context.name, {which: names for which, names in given.items() if names}


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
