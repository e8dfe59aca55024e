"""The tasks of games: what a population does, and what each person does.

- `games`: the answers of everybody who played a game;
- `games/person`: a person's answer to each game;
- `games/across`: a person's answer to each game, given their answers to all others;
- `games/joint`: a person's answer to each game, given their answer to one other: whether choices in
  two games go together in the model as they do in people;
- `games/bomb_risk`: how many boxes somebody of whom age, sex and country are known opens, of few
  boxes or many, at the usual stakes, low ones or high ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from befm_jax.data import games as library
from befm_jax.data.bomb_risk import Opened
from befm_jax.data.choices import Histogram, Plays
from befm_jax.data.games import Game
from befm_jax.data.items import Item
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording


def item_of(
    game: str | Game,
    target: Float64[np.ndarray, " A"] | None = None,
    id: str = "",
    labels: Mapping[str, str] | None = None,
) -> Item:
    """The item of a game.

    Args:
        game: the game, or the id of a registered one.
        target: `[A]` the number of people who gave each answer; None without people.
        id: the item's id; by default the game's.
        labels: labels in addition to "game".

    Returns:
        An item whose `notes` are the game's `title`, `unit`, `role`, `parameters` and the position
        of its `equilibrium` in the answer set.

    Raises:
        DataError: an unknown game, or a target that does not fit its answers.
    """
    game = library.get(game) if isinstance(game, str) else game
    return Item(
        id=id or game.id,
        prompt=game.prompt(),
        answers=game.answers,
        target=target,
        labels={**(labels or {}), "game": game.id},
        notes={
            "title": game.title,
            "unit": game.answers.unit,
            "role": game.role,
            "parameters": dict(game.parameters),
            "equilibrium": game.answers.position(game.equilibrium),
        },
    )


def population(row: Histogram, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item for a game, with the answers of everybody who played it."""
    yield item_of(row.game, row.counts.astype(np.float64))


def person(row: Plays, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item for each game that one person played: its plain question, whoever is asked.

    So answers that were recorded for the game, `notes["recorded_as"]`, are answers to it.
    """
    for game, position in row.choices.items():
        labels = {**row.labels, "person": row.person}
        target = library.get(game).answers.one(position)
        item = item_of(game, target, f"{row.person}/{game}", labels)
        yield replace(item, notes={**item.notes, "recorded_as": game})


def across(row: Plays, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item for each game that a person played, with their choices in the others.

    These come last, in one random order a person, and in a line each: a game is then one text for
    everybody who is asked about it, of which only the last lines differ.  As earlier turns of a
    conversation, each with its whole game, they make ten times as many distinct tokens.
    `notes["known"]` are the values of the others, by the id of the game.
    """
    played = [library.get(str(game)) for game in rng.permutation(list(row.choices))]
    for asked in played:
        item = _after(row, asked, [game for game in played if game is not asked], wording)
        yield replace(item, id=f"{row.person}/{asked.id}")


def joint(row: Plays, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item for each of a person's games and each other one, whose answer is given.

    So every first answer that people gave is put into the second prompt, in both orders, and the
    distribution of the second answer is read exactly.  First answers are people's own, a model's
    are measured by `games`: where the model is right of the second given the first, the two go
    together as they do in people.  The games' text and the form are those of `games/across`.

    `notes["known"]` is the value of the first, by the label "pair" of the question that asks it.
    """
    for first, second in itertools.permutations(map(library.get, row.choices), 2):
        item = _after(row, second, [first], wording)
        pair, back = f"{second.id} given {first.id}", f"{first.id} given {second.id}"
        # No label "game": recorded answers to a game don't say what was answered before.
        labels = {**row.labels, "person": row.person, "pair": pair}
        known = {back: item.notes["known"][first.id]}
        id = f"{row.person}/{first.id}/{second.id}"
        yield replace(item, id=id, labels=labels, notes={**item.notes, "known": known})


def _after(row: Plays, asked: Game, others: Sequence[Game], wording: Wording) -> Item:
    """The item of a game that comes after a person's choices in others."""
    prompt = wording(
        "games/across",
        game=asked.user,
        others=[
            (game.title, game.answers.names[row.choices[game.id]], game.answers.in_words)
            for game in others
        ],
    )
    target = asked.answers.one(row.choices[asked.id])
    item = item_of(asked, target, "", {**row.labels, "person": row.person})
    known = {game.id: float(game.values[row.choices[game.id]]) for game in others}
    notes = {**item.notes, "known": known}
    return replace(item, prompt=(*asked.prompt()[:-1], *prompt), notes=notes)


def bomb_risk(row: Opened, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item a person.  What is known of them comes last: the game is one text for everybody."""
    known = {"country": row.labels.get("country"), "sex": row.labels.get("sex"), "age": row.age}
    prompt = wording(
        "games/bomb_risk",
        game=row.game.user,
        stakes=row.labels.get("stakes"),
        about={name.capitalize(): value for name, value in known.items() if value is not None},
    )
    stakes = f"{row.boxes} boxes, {row.labels.get('stakes', 'usual')} stakes"
    labels = {**row.labels, "person": row.person, "question": stakes}
    item = item_of(row.game, row.game.answers.one(row.choice), row.person, labels)
    yield replace(item, prompt=(*row.game.prompt()[:-1], *prompt))


# How two things go together in the model and in people.
TOGETHER = (
    *("correlation_gap", "correlation_difference", "model_correlation", "people_correlation"),
    *("slope_difference", "variance_kept", "crps"),
)
GAMES = register(
    Task(
        "games",
        population,
        needs="histograms",
        measures=(
            *("wasserstein", "energy", "crps", "log_score", "total_variation", "jensen_shannon"),
            *("ks", "mean_difference", "variance_ratio"),
        ),
        average="game",
        cluster="",
    )
)
PERSON = register(
    Task(
        "games/person",
        person,
        needs="plays",
        measures=("crps", "log_score", "expected_error", "median_error", "accuracy"),
        average="game",
        cluster="person",
    )
)
ACROSS = register(
    replace(
        PERSON,
        name="games/across",
        items=across,
        measures=(*PERSON.measures, "variance_kept"),
        serves=lambda row: len(row.choices) > 1,
    )
)
BOMB_RISK = register(
    replace(
        PERSON,
        name="games/bomb_risk",
        items=bomb_risk,
        needs="bomb_risk",
        average="question",
        groups=("sex", "age_band", "country"),
    )
)
JOINT = register(
    replace(ACROSS, name="games/joint", items=joint, measures=TOGETHER, average="pair", least=20)
)
