"""How sure a figure is, and how good it could be: intervals, floors and ceilings by resampling.

For one game, with `n` people and `R` resamples:

- *interval*: people are drawn again from their own histogram (multinomial, n at a time); a
  sampled model's draws are drawn again likewise.  A resample is noisier than the sample, which
  pushes every distance up, so the percentiles are moved by the bootstrap's own bias before they
  are read: `percentiles(replicates - mean(replicates)) + estimate`, cut at the metric's range.
- *floor*: what a perfect model scores against so many people: the people's own histogram as the
  model, against n people drawn from it; mean.  A sampled model is imitated by as many draws.
- *ceiling*: other people in the model's place: two independent draws of n people; mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from befm_jax.evals.measures import METRICS, Floats, Metric, Pair, Side

# Rows of resamples that are worked on at once: with more, their arrays leave a core's cache; with
# fewer, threads wait for one another to leave Python.
_CHUNK = 1000
# Cells of a histogram that meet fewer draws than this in the mean are drawn member by member.
_SELDOM = 30


@dataclass(frozen=True, eq=False)
class Resampled:
    """One metric's estimate with its `[R]` bootstrap replicates, floor and ceiling (NaN: none)."""

    value: float
    replicates: Floats
    floor: float
    ceiling: float


def resample(rng: np.random.Generator, counts: NDArray, size: int, rows: int) -> NDArray:
    """`[rows, A]` int64: `size` draws with replacement from the histogram `counts` `[A]`, a row.

    `counts` are whole numbers, of which at least one is not 0.
    """
    counts = counts.astype(np.int64)
    # Likely cells first: the sampler stops a row as soon as its draws are used up.
    filled = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    seldom_drawn = counts[filled] * size < _SELDOM * counts.sum()
    often, seldom = filled[~seldom_drawn], filled[seldom_drawn]
    # A binomial number costs as much as some thirty draws of a member of the histogram: cells that
    # few draws meet are first drawn as one, and then their members one by one.
    together = counts[often]
    if len(seldom):
        together = np.append(together, counts[seldom].sum())
    numbers = rng.multinomial(size, together / counts.sum(), size=rows)
    drawn = np.zeros((rows, len(counts)), np.int64)
    drawn[:, often] = numbers[:, : len(often)]
    if not len(seldom):
        return drawn
    cell_of = np.repeat(seldom, counts[seldom])
    for start in range(0, rows, _CHUNK):
        chunk = drawn[start : start + _CHUNK]
        members = numbers[start : start + _CHUNK, -1]
        cells = cell_of[rng.integers(len(cell_of), size=members.sum())]
        cells += np.repeat(np.arange(len(chunk)) * len(counts), members)
        chunk += np.bincount(cells, minlength=chunk.size).reshape(chunk.shape)
    return drawn


def compare(
    values: NDArray,
    model: NDArray,
    people: NDArray,
    *,
    exact: bool,
    resamples: int,
    rng: np.random.Generator,
    metrics: Mapping[str, Metric] = METRICS,
) -> dict[str, Resampled]:
    """Every metric of one game, with its replicates, floor and ceiling.

    Args:
        values: `[A]` the game's values.
        model: `[A]` the model's distribution (`exact`) or counts of its draws.
        people: `[A]` counts of people.
        exact: whether `model` is a distribution.
        resamples: `R`, at least 2.
        rng: source of the resamples.
        metrics: what to compute.

    Raises:
        ValueError: fewer than two resamples, or histograms that `Pair` refuses.
    """
    if resamples < 2:
        raise ValueError(f"resamples: {resamples}; an interval needs at least 2")
    estimate = Pair.of(values, model, people, exact=exact)
    number = int(people.sum())
    people_again = resample(rng, people, number, resamples)
    if exact:
        the_model, a_perfect = estimate.model, Side("people", values, people, exact=True)
    else:
        draws = int(model.sum())
        model_again = resample(rng, model, draws, resamples)
        perfect = resample(rng, people, draws, resamples)
    replicates = {name: np.empty(resamples) for name in metrics}
    floors = {name: np.empty(resamples) for name in metrics}
    ceilings = {name: np.empty(resamples) for name in metrics}
    for start in range(0, resamples, _CHUNK):
        rows = slice(start, min(start + _CHUNK, resamples))
        drawn = Side("people", values, people_again[rows], exact=False)
        # Each resample beside its neighbour: two independent draws, at no further sampling.
        neighbours = people_again[np.arange(rows.start, rows.stop) - 1]
        others = Pair(Side("people", values, neighbours, exact=False), drawn)
        if not exact:
            the_model = Side("model", values, model_again[rows], exact=False)
            a_perfect = Side("people", values, perfect[rows], exact=False)
        again, ideal = Pair(the_model, drawn), Pair(a_perfect, drawn)
        for name, metric in metrics.items():
            replicates[name][rows] = metric.compute(again)
            floors[name][rows] = metric.compute(ideal)
            ceilings[name][rows] = metric.compute(others)
    return {
        name: Resampled(
            value=float(metric.compute(estimate)),
            replicates=replicates[name],
            floor=float(floors[name].mean()),
            ceiling=float(ceilings[name].mean()),
        )
        for name, metric in metrics.items()
    }


def mean(figures: Sequence[Resampled]) -> Resampled:
    """One metric's mean over games, every game alike; resample by resample, all games at once."""
    return Resampled(
        value=float(np.mean([figure.value for figure in figures])),
        replicates=np.mean([figure.replicates for figure in figures], axis=0),
        floor=float(np.mean([figure.floor for figure in figures])),
        ceiling=float(np.mean([figure.ceiling for figure in figures])),
    )


def interval(
    value: float, replicates: Floats, metric: Metric, level: float = 0.95
) -> tuple[float, float] | None:
    """The bias-shifted percentile interval of a figure, cut at the metric's own range.

    The figure itself is always in it: where fewer replicates than a tail holds differ from the
    others, both percentiles are one value, and shifting by the mean would leave the figure out.
    None where the figure or any replicate is undefined.
    """
    if not np.isfinite(value) or not np.isfinite(replicates).all():
        return None
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(replicates - replicates.mean(), [tail, 100.0 - tail]) + value
    low, high = min(low, value), max(high, value)
    return float(max(low, metric.lower)), float(min(high, metric.upper))
