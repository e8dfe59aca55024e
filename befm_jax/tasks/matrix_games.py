"""The task of one-shot games: `games/matrix`, a person's action in a table of payoffs.

Each choice stands apart.  The games are played once, nobody learns an outcome in between, and the
theories that figures are compared with know nothing of a person's other choices; in a conversation
the choices in games that are held out would be missing, too.  What is the same in all prompts comes
first, so that it is shared all the same.

Needs "matrix_games" (`befm_jax.data.matrix_games`): people and games are both held out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from befm_jax.data.items import AnswerSet, Item
from befm_jax.data.matrix_games import Player
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording

_OWN, _OTHERS = AnswerSet.labels("Circle", "Square"), ("Star", "Moon")


def matrix(row: Player, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item a choice.

    Which action has which name and which outcome is told first are drawn for each, so that neither
    means anything.  `notes["payoffs"]` are `own` and `other`, by the position of the answer and the
    other's action; `notes["equilibrium"]` are the shares of the answers.
    """
    for trial in row.trials:
        swapped, others_swapped, second_first, column_first = map(bool, rng.integers(2, size=4))
        game = trial.game.arranged(swapped, others_swapped)
        outcomes = [
            {
                "own": _OWN.names[mine],
                "other": _OTHERS[theirs],
                "pays": game.own[mine][theirs],
                "pays_other": game.other[mine][theirs],
            }
            for mine in (range(2) if not second_first else (1, 0))
            for theirs in (range(2) if not column_first else (1, 0))
        ]
        prompt = wording(
            "games/matrix",
            own=_OWN.names,
            other=_OTHERS,
            outcomes=outcomes,
            request=_OWN.request,
        )
        notes = {
            "payoffs": {"own": game.own, "other": game.other},
            "equilibrium": trial.game.equilibrium[:: -1 if swapped else 1],
        }
        target = _OWN.one(trial.choice ^ swapped)
        labels = {"person": row.person, "kind": trial.game.kind}
        yield Item(f"{row.person}/{trial.id}", prompt, _OWN, target, labels, notes)


register(
    Task(
        "games/matrix",
        matrix,
        needs="matrix_games",
        measures=("log_score", "brier", "accuracy", "expected_accuracy"),
        groups=("kind",),
    )
)
