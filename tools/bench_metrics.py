"""The bootstrap of the seven games' figures: befm_jax against loops over resamples with scipy.

befm_jax gives every figure of the task "games" with its interval, floor and ceiling, from
`--resamples` resamples of all 65,596 choices of the embedded reference, against a model whose
distributions are random.  Beside it stand three loops, from what is written first to what is
written when that is too slow:

- *people*: the choices are drawn again person by person and given to
  `scipy.stats.wasserstein_distance`, which is one figure of nine, without floor and ceiling;
- *figures*: histograms are drawn again, and all nine figures come from scipy and NumPy, for the
  interval, the floor and the ceiling: what befm_jax gives;
- *histograms*: histograms are drawn again, and the Wasserstein distance alone is taken.

A loop runs over `--loop` resamples; `whole` is the time of all, in proportion.  The loops' point
estimates of every figure must be befm_jax's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import bench_data
import numpy as np
from bench_report import Bench, Goal, Ratio
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon

from befm_jax.data import choices
from befm_jax.data.games import Game
from befm_jax.data.responses import Response
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.results import Evaluation
from befm_jax.tasks.games import GAMES, item_of

GOAL, SECONDS, EQUAL = 100.0, 1.0, 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--loop", type=int, default=20, help="resamples that loops really take")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")


def run(arguments: argparse.Namespace) -> Bench:
    """Lets befm_jax and the loops take turns, and compares."""
    seven = bench_data.seven_games()
    counts = choices.histograms(choices.read("", seven), seven)
    items = [item_of(game, counts[game.id]) for game in seven]
    random = np.random.default_rng(0)
    responses = {
        game.id: Response.from_mass(game.id, random.dirichlet(np.ones(len(game.values))))
        for game in seven
    }
    games = [(game, responses[game.id].shares, counts[game.id]) for game in seven]

    def ours(resamples: int) -> Evaluation:
        return evaluate(GAMES, items, responses, respondent="random", resamples=resamples)

    loops: dict[str, Callable[[np.random.Generator], Any]] = {
        "people": lambda random: [_of_people(random, *one) for one in games],
        "figures": lambda random: [_of_figures(random, *one) for one in games],
        "histograms": lambda random: [_of_histograms(random, *one) for one in games],
    }
    ours(100)  # what is imported and cached once
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{name: [] for name in loops}}
    for _ in range(arguments.rounds):
        since = time.perf_counter()
        found = ours(arguments.resamples)
        seconds = time.perf_counter() - since
        runs["ours"].append(
            {"resamples": arguments.resamples, "seconds": seconds, "whole": seconds}
        )
        for name, loop in loops.items():
            since = time.perf_counter()
            for _ in range(arguments.loop):
                loop(random)
            seconds = time.perf_counter() - since
            whole = seconds * arguments.resamples / arguments.loop
            runs[name].append({"resamples": arguments.loop, "seconds": seconds, "whole": whole})
    seconds_of_ours = [one["whole"] for one in runs["ours"]]
    ratio = {
        name: Ratio.of(seconds_of_ours, [one["whole"] for one in runs[name]]) for name in loops
    }
    difference = max(_differences(found, games))
    return Bench(
        "metrics: the bootstrap of seven games against loops with scipy",
        {
            "choices": f"{sum(int(people.sum()) for _, _, people in games):,}",
            "resamples": f"{arguments.resamples:,}",
            "rounds": arguments.rounds,
        },
        runs,
        ratio,
        [
            Goal(
                "against scipy over people drawn again",
                ratio["people"].median,
                GOAL,
                "times",
                at_least=True,
            ),
            Goal("seconds", statistics.median(seconds_of_ours), SECONDS, "s"),
            Goal("largest difference of a point estimate", difference, EQUAL, ""),
        ],
        [
            "ours gives nine figures with interval, floor and ceiling; so does the loop of "
            "figures; the other two give the Wasserstein distance alone",
            f"loops ran over {arguments.loop} resamples; `whole` is their time in proportion",
        ],
    )


def _of_people(random: np.random.Generator, game: Game, model: NDArray, counts: NDArray) -> float:
    """One resample's Wasserstein distance, from everybody's choices drawn again."""
    everybody = np.repeat(game.values, counts)
    again = random.choice(everybody, len(everybody))
    return float(stats.wasserstein_distance(game.values, again, model) * 100 / game.span)


def _of_histograms(
    random: np.random.Generator, game: Game, model: NDArray, counts: NDArray
) -> float:
    """The same from a histogram drawn again."""
    again = random.multinomial(counts.sum(), counts / counts.sum())
    return float(
        stats.wasserstein_distance(game.values, game.values, model, again) * 100 / game.span
    )


def _of_figures(
    random: np.random.Generator, game: Game, model: NDArray, counts: NDArray
) -> list[dict[str, float]]:
    """All figures of one resample: of the model, of a perfect one, and of other people."""
    number = int(counts.sum())
    again, others = random.multinomial(number, counts / number, size=2)
    return [
        figures(game, model, again),
        figures(game, counts / number, again),
        figures(game, others / number, again, draws=number),
    ]


def figures(
    game: Game, model: NDArray, counts: NDArray, draws: int | None = None
) -> dict[str, float]:
    """Every figure of the task "games", by scipy where it has it and by definition where not.

    `model` are shares, exact ones or those of so many `draws`.
    """
    points = (game.values - game.values[0]) * (100.0 / game.span)
    number = int(counts.sum())
    shares = counts / number
    apart = np.abs(points[:, None] - points)
    people_again = shares @ apart @ shares * number / (number - 1)
    unbiased = 1.0 if draws is None else draws / (draws - 1)
    model_again = model @ apart @ model * unbiased
    between = model @ apart @ shares
    possible = model > 0
    missed = bool(shares[~possible].any())
    mean, people_mean = model @ points, shares @ points
    variance = model @ (points - mean) ** 2 * unbiased
    people_variance = shares @ (points - people_mean) ** 2 * number / (number - 1)
    return {
        "wasserstein": stats.wasserstein_distance(points, points, model, shares),
        "energy": 2 * between - model_again - people_again,
        "crps": between - model_again / 2,
        "log_score": np.nan if missed else -(shares[possible] @ np.log(model[possible])),
        "total_variation": np.abs(model - shares).sum() / 2,
        "jensen_shannon": jensenshannon(model, shares, base=2) ** 2,
        "ks": np.abs(np.cumsum(model - shares)).max(),
        "mean_difference": mean - people_mean,
        "variance_ratio": variance / people_variance,
    }


def _differences(found: Evaluation, games: list[tuple[Game, NDArray, NDArray]]) -> Iterator[float]:
    """How far befm_jax's point estimates are from those by scipy, game by game."""
    ours = {(one.where.get("game"), one.measure): one.value for one in found.figures}
    for game, model, counts in games:
        for name, figure in figures(game, model, counts).items():
            value = ours[game.id, name]
            yield abs((np.nan if value is None else value) - float(figure))
