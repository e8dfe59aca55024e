"""The tasks of games: what a population does, and what each person does.

- `games`: the answers of everybody who played a game;
- `games/person`: a person's answer to each game;
- `games/across`: a person's answer to each game, given their answers to all others;
- `games/bomb_risk`: how many boxes somebody of whom age, sex and country are known opens, of few
  boxes or many, at the usual stakes, low ones or high ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """One item for each game that one person played."""
    for game, position in row.choices.items():
        labels = {**row.labels, "person": row.person}
        target = library.get(game).answers.one(position)
        yield item_of(game, target, f"{row.person}/{game}", labels)


def across(row: Plays, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """One item for each game that a person played, with their choices in the others.

    These come last, in one random order a person, and in a line each: a game is then one text for
    everybody who is asked about it, of which only the last lines differ.  As earlier turns of a
    conversation, each with its whole game, they make ten times as many distinct tokens.
    `notes["known"]` are the values of the others, by the id of the game.
    """
    played = [library.get(str(game)) for game in rng.permutation(list(row.choices))]
    for asked in played:
        others = {game: row.choices[game.id] for game in played if game is not asked}
        prompt = wording(
            "games/across",
            game=asked.user,
            others=[
                (game.title, game.answers.names[position], game.answers.in_words)
                for game, position in others.items()
            ],
        )
        target = asked.answers.one(row.choices[asked.id])
        labels = {**row.labels, "person": row.person}
        item = item_of(asked, target, f"{row.person}/{asked.id}", labels)
        known = {game.id: float(game.values[position]) for game, position in others.items()}
        notes = {**item.notes, "known": known}
        yield replace(item, prompt=(*asked.prompt()[:-1], *prompt), notes=notes)


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
    replace(PERSON, name="games/across", items=across, serves=lambda row: len(row.choices) > 1)
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
