"""Answerers that know nothing of the model: what a figure must be held against.

Each is an exact distribution over one game's values, scored as a model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from befm_jax.evals.answers import Answers

DEFINITIONS: Mapping[str, str] = {
    "uniform": "Every choice equally likely.",
    "median": "Everybody makes the choice of the median person of the same people.",
    "equilibrium": "Everybody makes the textbook equilibrium choice of self-interested players.",
    "pooled": "The same people's choices of all games together on the scale 0-100, each moved to "
    "the game's nearest choice: a model that does not notice which game it plays.",
}


def uniform(values: NDArray) -> Answers:
    """Every one of the `[A]` values equally likely."""
    return Answers.from_distribution(np.full(len(values), 1.0 / len(values)))


def median(values: NDArray, counts: NDArray) -> Answers:
    """Everybody at the people's median: the smallest value that half of them do not exceed."""
    cumulated = np.cumsum(counts)
    return _point(len(values), int(np.searchsorted(2 * cumulated, cumulated[-1])))


def equilibrium(values: NDArray, choice: int) -> Answers:
    """Everybody at the equilibrium choice.

    Raises:
        ValueError: the choice is not one of the values.
    """
    found = np.flatnonzero(np.asarray(values) == choice)
    if len(found) != 1:
        raise ValueError(f"equilibrium: {choice} is not one of the game's {len(values)} choices")
    return _point(len(values), int(found[0]))


def pooled(values: NDArray, games: Sequence[tuple[NDArray, NDArray]]) -> Answers:
    """The people of all `games`, pairs of values and counts, moved to this game's `[A]` values.

    Every person counts once, so a game that more people played weighs more.  A choice is put at
    the same share of the range; halfway between two values it goes to the lower one.
    """
    target = np.asarray(values, np.int64)
    total = np.zeros(len(target))
    for game_values, counts in games:
        source = np.asarray(game_values, np.int64)
        # Shares of the two ranges, cross-multiplied: whole numbers, so that ties are ties.
        wanted = (source - source[0])[:, None] * (target[-1] - target[0])
        offered = (target - target[0])[None, :] * (source[-1] - source[0])
        nearest = np.abs(wanted - offered).argmin(1)
        total += np.bincount(nearest, weights=counts, minlength=len(target))
    return Answers.from_distribution(total / total.sum())


def _point(length: int, position: int) -> Answers:
    weights = np.zeros(length)
    weights[position] = 1.0
    return Answers.from_distribution(weights)
