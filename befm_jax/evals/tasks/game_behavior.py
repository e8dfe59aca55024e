"""Do the model's answers in economic games spread as people's do?  Game by game, and on average.

The model's population in each game is held against people's, with every metric's interval,
floor, ceiling and skill, and with answerers that know nothing of the model beside it.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from befm_jax.data import games
from befm_jax.data.choices import People
from befm_jax.data.games import Game
from befm_jax.errors import DataError
from befm_jax.evals import baselines, resampling
from befm_jax.evals.answers import Answers
from befm_jax.evals.measures import METRICS, Metric, Pair
from befm_jax.evals.resampling import Resampled

DEFINITIONS: Mapping[str, str] = {
    **{name: metric.definition for name, metric in METRICS.items()},
    "ci95": "95 % bootstrap interval: people (and a sampled model's answers) drawn again from "
    "their own histograms, game by game; percentiles moved by the bootstrap's own bias, since "
    "resamples are noisier than the sample, and cut at the figure's own range.",
    "floor": "What a perfect model, whose distribution is the people's own, is expected to score "
    "against as many people; a sampled model is imitated by as many draws.",
    "ceiling": "Other people in the model's place: two samples of as many people each, drawn from "
    "the people's histogram; mean.",
    "skill": "(uniform - model) / (uniform - floor): 0 no better than answering at random, 1 as "
    "good as a perfect model; of the means over games for the mean.",
    "outside_mass": "Probability (or share of sampled answers) outside the game's answer set; the "
    "metrics compare what is inside.",
    "ends_after_answer": "How often the model's turn ends right there, once it has written an "
    "answer of the set: a probability, or a share of sampled answers. Where it goes on instead, "
    "what it says is no answer of the set, or is read out of a longer text. Unknown where answers "
    "come from a file.",
    "mean over games": "Every game counts alike; intervals from resamples of all games at once.",
    **{f"baseline {name}": text for name, text in baselines.DEFINITIONS.items()},
}


def evaluate(
    answers: Mapping[str, Answers], people: People, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Hold a model's answers against people's, in every game that both have.

    Args:
        answers: each game's answers of the model.
        people: each game's counts of people.
        resamples: bootstrap resamples for intervals, floors and ceilings.
        seed: of the resamples; a game's figures do not depend on which other games are there.

    Returns:
        What stands at `tasks.game_behavior` in results.json (`befm_jax.evals.report` lists it):
        plain Python values, undefined figures None.

    Raises:
        DataError: no game in common.
        ValueError: answers that do not fit their game, a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed: {seed}; must not be negative")
    skipped = _skipped(answers, people)
    shared = [name for name in people.counts if name in answers and name not in skipped]
    if not shared:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in answers)
        raise DataError(f"no game with both people and answers to compare ({reasons})")
    tables = [
        (games.get(name).values, counts)
        for name, counts in people.counts.items()
        if counts.sum() > 0
    ]

    def compared_with_people(name: str) -> dict[str, Resampled]:
        return compare(games.get(name), answers[name], people.counts[name], resamples, seed)

    # Side by side: NumPy draws and computes without holding Python's lock.  Those with many choices
    # first, so that the last to be begun is not waited for alone.
    longest_first = sorted(shared, key=lambda name: -np.count_nonzero(people.counts[name]))
    with ThreadPoolExecutor(os.cpu_count(), "bootstrap") as threads:
        found = threads.map(compared_with_people, longest_first)
        compared = dict(zip(longest_first, found, strict=True))
    beside: dict[str, dict[str, dict[str, float]]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name in shared:
        game, answer, counts = games.get(name), answers[name], people.counts[name]
        beside[name] = _baselines(game, counts, tables)
        groups[name] = _group(game, answer, counts, compared[name], beside[name])
    outside = [answers[name].outside for name in shared]
    ends = [ended for name in shared if (ended := answers[name].ends_after_answer) is not None]
    return {
        "metrics": {
            name: _figure(
                metric,
                resampling.mean([compared[game][name] for game in shared]),
                {
                    answerer: float(np.mean([beside[game][answerer][name] for game in shared]))
                    for answerer in baselines.DEFINITIONS
                },
            )
            for name, metric in METRICS.items()
        },
        "outside_mass": {"value": float(np.mean(outside)), "max": float(np.max(outside))},
        "ends_after_answer": {
            "value": float(np.mean(ends)) if ends else None,
            "min": float(np.min(ends)) if ends else None,
        },
        "groups": groups,
        "skipped": skipped,
        "resamples": resamples,
        "seed": seed,
        "definitions": dict(DEFINITIONS),
    }


def compare(
    game: Game, answer: Answers, counts: NDArray, resamples: int, seed: int
) -> dict[str, Resampled]:
    """Every metric of one game, its answers against `counts` `[A]` of people.

    The resamples are those of the game and the seed, whatever else is compared: two models that
    meet the same people meet the same resamples of them.

    Raises:
        ValueError: answers or counts that do not fit the game.
    """
    if len(answer.weights) != len(game.values) or len(counts) != len(game.values):
        raise ValueError(
            f"{game.id}: has {len(game.values)} choices, but the answers have "
            f"{len(answer.weights)} weights and the people {len(counts)} counts"
        )
    return resampling.compare(
        game.values,
        answer.weights,
        counts,
        exact=answer.exact,
        resamples=resamples,
        rng=np.random.default_rng([seed, zlib.crc32(game.id.encode())]),
    )


def _skipped(answers: Mapping[str, Answers], people: People) -> dict[str, str]:
    """Games that only one side has, or that can't be compared, each with the reason."""
    reasons = {}
    for name in dict.fromkeys([*people.counts, *answers]):
        if name not in people.counts or not people.counts[name].sum() > 0:
            reasons[name] = "no people to compare with"
        elif name not in answers:
            reasons[name] = "no answers of the model"
        elif answers[name].empty:
            reasons[name] = _nothing_inside(answers[name])
    return reasons


def _nothing_inside(answer: Answers) -> str:
    if answer.exact:
        return "none of the model's probability is on the answer set"
    return (
        f"none of the model's {answer.total:,} answers is in the answer set "
        f"({answer.unparsed:,} unreadable, {answer.out_of_set:,} not allowed)"
    )


def _baselines(
    game: Game, counts: NDArray, tables: list[tuple[NDArray, NDArray]]
) -> dict[str, dict[str, float]]:
    """Each baseline's value of each metric."""
    answerers = {
        "uniform": baselines.uniform(game.values),
        "median": baselines.median(game.values, counts),
        "equilibrium": baselines.equilibrium(game.values, game.equilibrium),
        "pooled": baselines.pooled(game.values, tables),
    }
    pairs = {name: Pair.of(game.values, who.weights, counts) for name, who in answerers.items()}
    return {
        name: {metric: float(METRICS[metric].compute(pair)) for metric in METRICS}
        for name, pair in pairs.items()
    }


def _group(
    game: Game,
    answer: Answers,
    counts: NDArray,
    compared: Mapping[str, Resampled],
    beside: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    return {
        "title": game.title,
        "unit": game.answers.unit,
        "people": int(counts.sum()),
        "model": {
            "exact": answer.exact,
            "answers": answer.total,
            "unparsed": answer.unparsed,
            "out_of_set": answer.out_of_set,
            "outside_mass": answer.outside,
            "ends_after_answer": answer.ends_after_answer,
        },
        "metrics": {
            name: _figure(
                metric,
                compared[name],
                {answerer: figures[name] for answerer, figures in beside.items()},
            )
            for name, metric in METRICS.items()
        },
        "distribution": {
            "values": [int(value) for value in game.values],
            "people": [int(count) for count in counts],
            "model": [float(share) for share in answer.distribution],
        },
    }


def _figure(metric: Metric, figure: Resampled, beside: Mapping[str, float]) -> dict[str, Any]:
    """One metric as it stands in results.json; what is undefined is None, with a note."""
    ends = resampling.interval(figure.value, figure.replicates, metric)
    result: dict[str, Any] = {
        "value": _finite(figure.value),
        "ci95": list(ends) if ends else None,
        "floor": _finite(figure.floor),
        "ceiling": _finite(figure.ceiling),
        "skill": _skill(metric, figure, beside["uniform"]),
        "baselines": {name: _finite(value) for name, value in beside.items()},
        "unit": metric.unit,
    }
    if result["value"] is None:
        result["note"] = f"undefined for these answers: {metric.definition}"
    elif result["ci95"] is None:
        result["note"] = "the figure is undefined in some resamples, so it has no interval"
    return result


def _skill(metric: Metric, figure: Resampled, uniform: float) -> float | None:
    """(uniform - model) / (uniform - floor); None where the floor is no better than uniform."""
    if not metric.has_skill:
        return None
    room = uniform - figure.floor
    return _finite((uniform - figure.value) / room) if room > 1e-9 else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
