"""Bootstrap intervals, floors and ceilings of figures.

Where persons are known, the bootstrap resamples *clusters* (persons) with all their answers: one
weight per cluster applies to every item, measure, respondent and group (`draw_clusters`).  An item
that is a histogram of anonymous people is resampled within itself (`compare`):

- *interval*: people are drawn from their own histogram (multinomial of size n); so are a sampled
  model's draws.  A resample is noisier than the sample, which biases every distance upwards, so the
  percentiles are shifted by the bootstrap's own bias:
  `percentiles(replicates - mean(replicates)) + estimate`, clipped to the measure's range.
- *floor*: the expected score of a perfect model: the people's own histogram as the model, against n
  people drawn from it; mean.  For a sampled model the perfect one is sampled as often.  Where
  persons are known: the model, against answers drawn from its own predictions for each person.
- *ceiling*: the score of other people: two independent draws of n people; mean.  Of contexts that
  are inferred: half of each context's people as the model of its other half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Float64, Int
from numpy.typing import NDArray

from befm_jax.evals.measures import Answered, Floats, Measure, Pair, Side

# Resamples per chunk: larger arrays do not fit a core's cache; with smaller ones threads wait for
# the GIL.
_CHUNK = 1000
# Entries in one block of cluster weights.
_BLOCK = 8_000_000
# Simulations behind a floor or a ceiling where persons are known: 200 give a mean within 5 %.
_SIMULATIONS = 200
# How often people are halved; and how many people everybody counts as, beside those of a half.
_HALVINGS, _OF_EVERYBODY = 10, 10.0
# An interval needs so many clusters, and so large a share of the resamples to be defined.
ENOUGH_CLUSTERS, ENOUGH_KNOWN = 5, 0.95
# Cells of a histogram with fewer expected draws than this are drawn member by member.
_SELDOM = 30


@dataclass(frozen=True, eq=False)
class Resampled:
    """One measure's estimate with its `[R]` bootstrap replicates, floor and ceiling (NaN: none)."""

    value: float
    replicates: Floats
    floor: float
    ceiling: float


def resample(rng: np.random.Generator, counts: NDArray, size: int, rows: int) -> NDArray:
    """Resampled histograms `[rows, A]` int64, each of `size` draws with replacement from `counts`.

    `counts` `[A]` are whole numbers, not all 0.
    """
    counts = counts.astype(np.int64)
    # Likely cells first: NumPy's multinomial stops a row when its draws are used up.
    filled = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    seldom_drawn = counts[filled] * size < _SELDOM * counts.sum()
    often, seldom = filled[~seldom_drawn], filled[seldom_drawn]
    # A binomial draw costs as much as some thirty draws of a member of the histogram: rare cells
    # are first drawn as one, and then their members one by one.
    weights = counts[often]
    if len(seldom):
        weights = np.append(weights, counts[seldom].sum())
    numbers = rng.multinomial(size, weights / counts.sum(), size=rows)
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
    measures: Iterable[Measure],
) -> dict[str, Resampled]:
    """Measures of one histogram by name, with their replicates, floor and ceiling.

    Args:
        values: `[A]` the answers' values.
        model: `[A]` the model's distribution (`exact`) or counts of its draws.
        people: `[A]` counts of people.
        exact: whether `model` is a distribution.
        resamples: `R`, at least 2.
        rng: source of the resamples.
        measures: what to compute; those without a kernel are left out.

    Raises:
        ValueError: fewer than two resamples, or histograms that `Pair` refuses.
    """
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; it must be at least 2")
    estimate = Pair.of(values, model, people, exact=exact)
    number = int(people.sum())
    people_again = resample(rng, people, number, resamples)
    if exact:
        the_model, a_perfect = estimate.model, Side("people", values, people, exact=True)
    else:
        draws = int(model.sum())
        model_again = resample(rng, model, draws, resamples)
        perfect = resample(rng, people, draws, resamples)
    kernels = {one.name: one.kernel for one in measures if one.kernel is not None}
    replicates = {name: np.empty(resamples) for name in kernels}
    floors = {name: np.empty(resamples) for name in kernels}
    ceilings = {name: np.empty(resamples) for name in kernels}
    for start in range(0, resamples, _CHUNK):
        rows = slice(start, min(start + _CHUNK, resamples))
        drawn = Side("people", values, people_again[rows], exact=False)
        # Each resample with its neighbour: two independent draws without further sampling.
        neighbours = people_again[np.arange(rows.start, rows.stop) - 1]
        others = Pair(Side("people", values, neighbours, exact=False), drawn)
        if not exact:
            the_model = Side("model", values, model_again[rows], exact=False)
            a_perfect = Side("people", values, perfect[rows], exact=False)
        again, ideal = Pair(the_model, drawn), Pair(a_perfect, drawn)
        for name, kernel in kernels.items():
            replicates[name][rows] = kernel(again)
            floors[name][rows] = kernel(ideal)
            ceilings[name][rows] = kernel(others)
    return {
        name: Resampled(
            value=float(kernel(estimate)),
            replicates=replicates[name],
            floor=float(floors[name].mean()),
            ceiling=float(ceilings[name].mean()),
        )
        for name, kernel in kernels.items()
    }


def draw_clusters(
    rng: np.random.Generator, clusters: int, resamples: int
) -> Iterator[tuple[slice, Float32[np.ndarray, "rows C"]]]:
    """Blocks of resamples: their rows, and the count of each cluster in each of them.

    A resample is `clusters` draws with replacement.  The resamples depend on the generator and the
    number of clusters alone.
    """
    size = max(1, min(500, _BLOCK // clusters))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = rng.integers(0, clusters, size=(rows, clusters), dtype=np.int32)
        drawn += (np.arange(rows, dtype=np.int32) * clusters)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters)
        yield slice(start, start + rows), counts.reshape(rows, clusters).astype(np.float32)


class ClusterSums:
    """Columns of items in several tables, summed by cluster, for products with cluster weights.

    Stored centred in single precision, which is enough for an interval.

    Args:
        clusters: for each table `[I]`, the index of each item's cluster.
        columns: for each table its blocks `[I, K]`.
    """

    def __init__(
        self, clusters: Sequence[Int[np.ndarray, " I"]], columns: Sequence[Sequence[Floats]]
    ) -> None:
        self._present = np.unique(np.concatenate([*clusters, np.empty(0, np.int64)]))
        self._widths = [[block.shape[1] for block in blocks] for blocks in columns]
        size = len(self._present), sum(map(sum, self._widths))
        self._centred, self._means = np.empty(size, np.float32), np.empty(size[1])
        start = 0
        for cluster, blocks in zip(clusters, columns, strict=True):
            order = np.argsort(cluster, kind="stable")
            own, starts = np.unique(cluster[order], return_index=True)
            for block in blocks:
                stop = start + block.shape[1]
                sums = np.zeros((len(self._present), block.shape[1]))
                sums[np.searchsorted(self._present, own)] = np.add.reduceat(block[order], starts)
                self._means[start:stop] = sums.mean(0)
                self._centred[:, start:stop] = sums - self._means[start:stop]
                start = stop

    def under(self, weights: Float32[np.ndarray, "rows C"]) -> list[list[Floats]]:
        """For each table and block the sums `[rows, K]` weighted by each row of cluster weights."""
        all_present = len(self._present) == weights.shape[1]
        own = weights if all_present else weights[:, self._present]
        number = own.sum(1, dtype=np.float64)[:, None]
        sums = own @ self._centred + number * self._means
        ends = np.cumsum([0, *itertools.chain.from_iterable(self._widths)])
        blocks = iter(sums[:, low:high] for low, high in itertools.pairwise(ends))
        return [[next(blocks) for _ in widths] for widths in self._widths]


def reference_points(
    rng: np.random.Generator, answered: Answered, measures: Iterable[Measure]
) -> dict[str, tuple[float, float]]:
    """Floor and ceiling of distribution-level measures, where clusters are known; by name.

    Floor: answers drawn from the model's prediction for each person (a Poisson-binomial histogram,
    narrower than a multinomial one), compared with the model.  Ceiling: two samples of as many
    people from their pooled histogram.
    """
    ceilings = _of_halves(rng, answered, [one for one in measures if one.halves])
    kernels: dict[str, Callable[[Pair], Floats]] = {}
    floors: dict[str, float] = {}
    for one in measures:
        if one.level == "distribution" and one.kernel is not None:
            kernels[one.name] = one.kernel
            if one.perfect is not None:
                floors[one.name] = one.perfect
    if not kernels:
        return ceilings
    values, length = answered.pair.model.values, answered.model.shape[1]
    repeats = answered.people.astype(np.int64)
    # Whole observations only: fractions of people can't be drawn.
    if not repeats.sum():
        return ceilings
    cdf = np.repeat(answered.pair.model.cdf, repeats, axis=0)
    people = np.empty((_SIMULATIONS, length))
    for simulation in people:
        answers = (rng.random((len(cdf), 1)) >= cdf).sum(1)
        simulation[:] = np.bincount(answers, minlength=length)
    model, observed = np.split(answered.histograms.sum(0), 2)
    a_perfect = Pair.of(values, model, people)
    drawn = rng.multinomial(len(cdf), observed / observed.sum(), size=(2, _SIMULATIONS))
    others = Pair.of(values, drawn[0], drawn[1], exact=False)
    return ceilings | {
        name: (
            floors[name] if name in floors else float(np.mean(kernel(a_perfect))),
            float(np.mean(kernel(others))),
        )
        for name, kernel in kernels.items()
    }


def _of_halves(
    rng: np.random.Generator, answered: Answered, measures: Sequence[Measure]
) -> dict[str, tuple[float, float]]:
    """Ceilings of measures: half of each item's people as the model of its other half; mean."""
    if not measures:
        return {}
    everyone = np.ones((1, len(answered.target)))
    scores = []
    for _ in range(_HALVINGS):
        shares, others = halves(rng, answered.target)
        halved = replace(answered, model=shares, target=others, exact=True)
        scores.append([float(one.compute(halved, everyone)[0]) for one in measures])
    means = np.mean(scores, 0).tolist()
    return {one.name: (np.nan, mean) for one, mean in zip(measures, means, strict=True)}


def halves(
    rng: np.random.Generator, counts: Float64[np.ndarray, "I A"]
) -> tuple[Float64[np.ndarray, "I A"], Float64[np.ndarray, "I A"]]:
    """Half of each histogram's people, drawn, as shares; and the counts of the other half.

    Everybody's answers in these halves count as ten people more of each: else an answer that none
    of a few gave would be impossible.
    """
    whole = counts.astype(np.int64)
    half = np.array([rng.multivariate_hypergeometric(row, row.sum() // 2) for row in whole])
    everybody = (half.sum(0) + 1.0 / half.shape[1]) / (half.sum() + 1.0)
    model = half + _OF_EVERYBODY * everybody
    return model / model.sum(1, keepdims=True), (whole - half).astype(np.float64)


def interval(
    value: float, replicates: Floats, measure: Measure, level: float = 0.95
) -> tuple[float, float] | None:
    """The bias-shifted percentile interval of a figure, clipped to the measure's range.

    It always contains the figure: where almost all replicates are equal, both percentiles are one
    value, and the shift would exclude the figure.  None where the figure is undefined, or more of
    the replicates than `1 - ENOUGH_KNOWN`; those that are left are passed over.
    """
    known = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or len(known) < ENOUGH_KNOWN * len(replicates):
        return None
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(known - known.mean(), [tail, 100.0 - tail]) + value
    low, high = min(low, value), max(high, value)
    return float(max(low, measure.low)), float(min(high, measure.high))
