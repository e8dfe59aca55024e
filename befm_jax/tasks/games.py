"""The tasks of games: a population's answers ("games"), and each person's ("games/person")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float64

from befm_jax.data import games as library
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
