"""BehaviorBench's tasks: the published benchmark's records, asked in its own words.

`--tasks behaviorbench=DIR` is all of them, in the benchmark's directory (`befm_jax.data.
behaviorbench`); `behaviorbench/age=DIR` is one.  Prompts are those of the user's files.  Each
task's `published` says which of the leaderboard's 25 figures are of it, by which measure, and what
to multiply that with: docs/behaviorbench.md has the formulas and what is assumed.

The published figures are of one draw for each record (1,000 for a game that is simulated).  Here
they are the expectation of that: exact, from the probabilities of all answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jaxtyping import Bool

from befm_jax.data import behaviorbench
from befm_jax.data.behaviorbench import AGES, SCORES, Population, Record
from befm_jax.data.items import AnswerSet, Item
from befm_jax.data.responses import Exact, Sampled
from befm_jax.tasks import Published, Task, register
from befm_jax.tasks.wording import Wording

Items = Callable[[Record, Wording, np.random.Generator], Iterator[Item]]
# Units of the published figures: one hundredth of a scale's range.
_SCORE, _YEAR, _STEP = (SCORES[-1] - SCORES[0]) / 100, (AGES[-1] - AGES[0]) / 100, 4 / 100


def _population(definition: str) -> Callable[..., Iterator[Item]]:
    """The one item of a game; `definition` is for reports."""

    def items(row: Population, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
        yield Item(row.id, row.prompt, row.answers, row.counts.astype(float), row.labels)

    items.__doc__ = definition
    return items


def _record(definition: str) -> Items:
    """The one item of a record; `definition` is for reports."""

    def items(row: Record, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
        labels = {**row.labels, "person": row.person}
        if not isinstance(row.answers, AnswerSet):
            yield Item(row.id, row.prompt, row.answers, (str(row.answer),), labels)
            return
        notes = {"wins": wins(row.answers, row.others)} if row.others else {}
        target = row.answers.one(int(row.answer))
        yield Item(row.id, row.prompt, row.answers, target, labels, notes)

    items.__doc__ = definition
    return items


def wins(answers: AnswerSet, others: tuple[float, ...]) -> Bool[np.ndarray, " A"]:
    """Which guesses win: as near as anybody's to 2/3 of the average, the guess itself included."""
    guesses, theirs = np.array(answers.values), np.array(others)
    target = 2.0 / 3.0 * (guesses + theirs.sum()) / (1 + len(theirs))
    nearest = np.abs(theirs[:, None] - target).min(0)
    # Rounding must not decide between two that are equally near.
    return np.abs(guesses - target) <= nearest + 1e-9


def _mae(id: str, name: str, per: float = 1.0) -> Published:
    return Published(id, name, "MAE", "expected_error", per)


def _distance(id: str, name: str, per: float = 1.0) -> Published:
    return Published(id, name, "W Distance", "wasserstein", per)


def _task(
    name: str,
    items: Callable[..., Iterator[Item]],
    measures: tuple[str, ...],
    *published: Published,
    average: str = "",
    groups: tuple[str, ...] = (),
    how: Exact | Sampled = Exact(),  # noqa: B008 - frozen
) -> None:
    register(
        Task(
            f"behaviorbench/{name}",
            items,
            "records",
            measures,
            average,
            groups=groups,
            how=how,
            read=partial(behaviorbench.read, name=name),
            published=published,
        )
    )


_POPULATION = ("wasserstein", "energy", "crps", "log_score", "mean_difference", "variance_ratio")
_NUMBERS = ("wasserstein", "expected_error", "median_error", "crps", "log_score", "spearman")
_CARDS = ("expected_f1", "expected_accuracy", "macro_f1", "wasserstein", "log_score")
_ANSWERS = ("expected_accuracy", "wasserstein", "accuracy", "expected_error", "crps", "log_score")

for _name, _definition, _published in (
    (
        "games",
        "How people choose in an economic game.",
        _distance("ml_game", "Game Behav. Sim."),
    ),
    (
        "push_pull",
        "How people choose between Push and Pull.",
        _distance("ho_pushpull", "Game Behav. Sim. (Push/Pull)"),
    ),
):
    register(
        Task(
            f"behaviorbench/{_name}",
            _population(_definition),
            "populations",
            _POPULATION,
            "game",
            cluster="",
            read=partial(behaviorbench.read_populations, name=_name),
            published=(_published,),
        )
    )
_task(
    "across",
    _record("A person's choice in a game, from their choices in others."),
    _NUMBERS,
    _mae("ml_acrossgame_mae", "Across-Ctx Pred."),
    _distance("ml_acrossgame", "Across-Ctx Pred."),
    average="game",
)
_task(
    "across_push_pull",
    _record("A person's choice between Push and Pull, from their choices in other games."),
    _CARDS,
    Published("ho_pp_acrossgame_f1", "Across-Ctx Pred. (Push/Pull)", "F1", "expected_f1"),
    _distance("ho_pp_acrossgame_wd", "Across-Ctx Pred. (Push/Pull)"),
)
_task(
    "rounds",
    _record("A person's choice in a game, from the rounds before."),
    _NUMBERS,
    _mae("ml_multiround_mae", "Multi-Round Pred."),
    _distance("ml_multiround", "Multi-Round Pred."),
    average="game",
)
_task(
    "rounds_push_pull",
    _record("A person's choice between Push and Pull, from the rounds before."),
    _CARDS,
    Published("ho_pp_multiround_f1", "Multi-Round Pred. (Push/Pull)", "F1", "expected_f1"),
    _distance("ho_pp_multiround_wd", "Multi-Round Pred. (Push/Pull)"),
)
_task(
    "guessing",
    _record("A guess of 2/3 of the average, against the people who played together."),
    ("win_rate", "wasserstein", "expected_error", "crps", "log_score"),
    Published("sg_winrate", "Strategic Game Play", "Win Rate %", "win_rate"),
)
_task(
    "traits",
    _record("A Big Five score, from demographics."),
    _NUMBERS,
    _mae("bf_pers_score", "Demo. To Pers.", _SCORE),
    _distance("bf_pers_score_wdist", "Demo. To Pers.", _SCORE),
    average="trait",
)
_task(
    "other_traits",
    _record("A Big Five score, from the four others."),
    _NUMBERS,
    _mae("bf_acrossdim", "Across-Dim Pers. Pred.", _SCORE),
    _distance("bf_acrossdim_wdist", "Across-Dim Pers. Pred.", _SCORE),
    average="trait",
)
for _name, _definition, _id, _title in (
    ("answer", "An answer to a statement, from demographics.", "bf_singleq", "Demo. To Resp."),
    ("masked", "An answer, from the 49 others.", "bf_missing", "Masked Resp. Pred."),
    ("next", "An answer, from those before it.", "bf_sequential", "Seq. Resp. Pred."),
):
    _task(
        _name,
        _record(_definition),
        _ANSWERS,
        Published(f"{_id}_acc", _title, "Accuracy", "expected_accuracy"),
        _distance(f"{_id}_wdist", _title, _STEP),
        average="statement",
    )
_task(
    "age",
    _record("The age, from Big Five scores."),
    _NUMBERS,
    _mae("bf_age", "Pers. To Demo.", _YEAR),
    _distance("bf_age_wdist", "Pers. To Demo.", _YEAR),
)
_task(
    "contest",
    _record("Multiple choice in economics, with one or several right letters."),
    ("expected_accuracy", "accuracy", "expected_f1", "log_score"),
    Published("ho_ieo", "Economics Contest", "Accuracy %", "expected_accuracy", 100.0),
)
_task(
    "workflow",
    _record("A step of a paper's workflow, from what is given of the paper."),
    ("rouge1", "bleurt", "rougeL"),
    Published("wf_bleurt", "Sci. Workflow Pred.", "BLEURT", "bleurt"),
    average="step",
    groups=("journal",),
    how=Sampled(1),
)
