"""Distances between a model's answers and people's on one game's ordered values.

Every metric is a function of a `Pair` and is vectorised over leading axes, so that ten thousand
resamples are one array operation.  Letters: `A` values of the game, `...` any leading axes.

Distances along the scale are rescaled so that the game's range is 100 points: figures of games
with different units can be averaged.  With `F` and `G` the two cumulative distributions and `w`
the gaps between neighbouring values, all of them are sums over the gaps:

    E|X - Y|  = sum w (F (1 - G) + G (1 - F))        E|X - X'| = 2 sum w F (1 - F)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Side:
    """One side of a comparison: a distribution over a game's values, or a sample's counts.

    What is computed of it is kept, so that a side that meets several others pays once.

    Args:
        name: what messages call it.
        values: `[A]` the game's possible choices, ascending, at least two.
        weights: `[..., A]` the shares, or counts of answers.
        exact: whether `weights` is the whole distribution.  If not, it holds counts, and what has
            an unbiased form is corrected for their finite number.

    Raises:
        ValueError: shapes that do not fit, values that do not ascend, negative or non-finite
            weights, or a histogram with nothing in it.
    """

    def __init__(self, name: str, values: ArrayLike, weights: ArrayLike, *, exact: bool) -> None:
        self.values = np.asarray(values, np.float64)
        if self.values.ndim != 1 or len(self.values) < 2 or np.any(np.diff(self.values) <= 0):
            raise ValueError("values must be one ascending list of at least two choices")
        self._weights, self._number = _checked(name, weights, len(self.values))
        self._exact = exact

    @cached_property
    def shares(self) -> Floats:
        """`[..., A]` summing to 1."""
        return self._weights / self._number[..., None]

    @cached_property
    def cdf(self) -> Floats:
        """`[..., A-1]` the cumulative shares; the last, always 1, is left out."""
        return np.cumsum(self.shares[..., :-1], axis=-1)

    @cached_property
    def points(self) -> Floats:
        """`[A]` the values on the scale from 0 to 100."""
        return (self.values - self.values[0]) * (100.0 / (self.values[-1] - self.values[0]))

    @cached_property
    def gaps(self) -> Floats:
        """`[A-1]` the distances between neighbouring points."""
        return np.diff(self.points)

    @cached_property
    def plain_spread(self) -> Floats:
        """`[...]` the integral of `F (1 - F)`, of these answers taken as the whole."""
        return (self.cdf * (1.0 - self.cdf)) @ self.gaps

    @cached_property
    def spread(self) -> Floats:
        """`[...]` the integral of `F (1 - F)`: half of E|X - X'|, unbiased."""
        return self.plain_spread if self._exact else self.plain_spread * self._correction

    @cached_property
    def mean(self) -> Floats:
        """`[...]` in points."""
        return self.shares @ self.points

    @cached_property
    def variance(self) -> Floats:
        """`[...]` in squared points; a sample's is divided by n - 1."""
        variance = self.shares @ np.square(self.points) - np.square(self.mean)
        return variance if self._exact else variance * self._correction

    @cached_property
    def entropy(self) -> Floats:
        """`[...]` in bits."""
        return _entropy(self.shares)

    @property
    def _correction(self) -> Floats:
        """`[...]` n / (n - 1), NaN for a sample of one, whose spread is unknown."""
        unknown = np.full(np.shape(self._number), np.nan)
        return np.divide(self._number, self._number - 1.0, where=self._number > 1.0, out=unknown)


class Pair:
    """A model's answers beside people's, on the same values.

    Leading axes of the two sides broadcast.

    Raises:
        ValueError: the sides are of different values.
    """

    def __init__(self, model: Side, people: Side) -> None:
        if not np.array_equal(model.values, people.values):
            raise ValueError("the two sides of a comparison must be of the same values")
        self.model, self.people = model, people

    @classmethod
    def of(
        cls, values: ArrayLike, model: ArrayLike, people: ArrayLike, *, exact: bool = True
    ) -> Pair:
        """Of a game's `values` `[A]` and both sides' weights `[..., A]`.

        `exact` says that the model's are its whole distribution, not counts of draws.  Raises as
        `Side` does.
        """
        return cls(
            Side("model", values, model, exact=exact),
            Side("people", values, people, exact=False),
        )

    @cached_property
    def cdf_difference(self) -> Floats:
        """`[..., A-1]` the model's cumulative shares less the people's."""
        return self.model.cdf - self.people.cdf

    @cached_property
    def squared_cdf_distance(self) -> Floats:
        """`[...]` the integral of the squared difference of the cumulative shares."""
        return np.square(self.cdf_difference) @ self.gaps

    @property
    def gaps(self) -> Floats:
        """`[A-1]` the distances between neighbouring points."""
        return self.people.gaps


def _checked(side: str, weights: ArrayLike, count: int) -> tuple[Floats, Floats]:
    """`[..., A]` the weights, and `[...]` their sums."""
    array = np.asarray(weights, np.float64)
    if array.ndim == 0 or array.shape[-1] != count:
        raise ValueError(f"{side}: {array.shape} does not end in {count}, the number of values")
    # NaN fails both comparisons, and a sum tells infinity: one pass instead of isfinite's two.
    sums = array.sum(-1)
    if not array.min(initial=0.0) >= 0.0 or not np.isfinite(sums).all():
        raise ValueError(f"{side}: weights must be finite and not negative")
    if not sums.min(initial=np.inf) > 0.0:
        raise ValueError(f"{side}: a histogram with nothing in it can't be compared")
    return array, sums


def wasserstein(pair: Pair) -> Floats:
    """`[...]` Wasserstein-1 (earth mover's) distance, in points.

    It equals `scipy.stats.wasserstein_distance` x 100 / (largest - smallest value).
    """
    return np.abs(pair.cdf_difference) @ pair.gaps


def energy(pair: Pair) -> Floats:
    """`[...]` unbiased energy distance 2E|X-Y| - E|X-X'| - E|Y-Y'|, in points.

    A side that is a sample of n takes its own term over the n(n - 1) pairs of different members
    (a U-statistic), an exact side over its distribution.  So a perfect model has expectation 0
    whatever the number of people, and a value may be below 0.  NaN where a sample is one.
    Szekely and Rizzo (2013), "Energy statistics", J. Stat. Plan. Inference 143.
    """
    # 2E|X-Y| = 2 (squared distance + spread of X + spread of Y), each spread taken as the whole.
    between = pair.squared_cdf_distance + pair.model.plain_spread + pair.people.plain_spread
    return 2.0 * (between - pair.model.spread - pair.people.spread)


def crps(pair: Pair) -> Floats:
    """`[...]` continuous ranked probability score, mean over people, in points.

    E|X - y| - E|X - X'|/2 for the model's X and each person's choice y.  Proper: the lowest
    expected score is the true distribution's.  Draws of a model take E|X - X'| over different
    draws, so that their score estimates that of the distribution behind them (the fair score;
    NaN for one draw).  Gneiting and Raftery (2007), JASA 102; Ferro (2014), QJRMS 140.
    """
    toward_people = pair.squared_cdf_distance + pair.model.plain_spread + pair.people.plain_spread
    return toward_people - pair.model.spread


def log_score(pair: Pair) -> Floats:
    """`[...]` mean over people of -ln p(choice), in nats.

    NaN where the model gives a person's choice no probability: the score is infinite there, and
    for a sampled model that says more about the number of draws than about the model.
    """
    model, people = pair.model.shares, pair.people.shares
    possible = model > 0.0
    score = _inner(people, -np.log(_positive(model)))
    missed = _inner(people, np.where(possible, 0.0, 1.0))
    return np.where(missed > 0.0, np.nan, score)


def _inner(rows: Floats, columns: Floats) -> Floats:
    """`[...]` sum of products over the last axis; a matrix product where one side is shared."""
    return rows @ columns if columns.ndim == 1 else np.einsum("...a,...a->...", rows, columns)


def total_variation(pair: Pair) -> Floats:
    """`[...]` half the summed absolute differences of shares: 0 equal, 1 nothing in common."""
    return 0.5 * np.abs(pair.model.shares - pair.people.shares).sum(-1)


def jensen_shannon(pair: Pair) -> Floats:
    """`[...]` Jensen-Shannon divergence in bits: 0 equal, 1 nothing in common.

    The square of `scipy.spatial.distance.jensenshannon(..., base=2)`.  Lin (1991), IEEE Trans.
    Inf. Theory 37.
    """
    middle = 0.5 * (pair.model.shares + pair.people.shares)
    divergence = _entropy(middle) - 0.5 * (pair.model.entropy + pair.people.entropy)
    return np.clip(divergence, 0.0, 1.0)  # rounding may leave -1e-17


def _entropy(shares: Floats) -> Floats:
    return -np.einsum("...a,...a->...", shares, np.log2(_positive(shares)))


def _positive(shares: Floats) -> Floats:
    """The shares, for a logarithm that is multiplied by 0 where they are 0.

    A mask in its place (`where=`) would have NumPy take them one at a time.
    """
    return np.maximum(shares, np.finfo(shares.dtype).tiny)


def ks(pair: Pair) -> Floats:
    """`[...]` Kolmogorov-Smirnov statistic: the largest difference of cumulative shares."""
    return np.abs(pair.cdf_difference).max(-1)


def mean_difference(pair: Pair) -> Floats:
    """`[...]` the model's mean less the people's, in points; positive: the model gives more."""
    return pair.model.mean - pair.people.mean


def variance_ratio(pair: Pair) -> Floats:
    """`[...]` the model's variance over the people's; below 1: a narrower population.

    Samples are divided by n - 1.  NaN where the people all agree, or a sample is one.
    """
    model, people = np.broadcast_arrays(pair.model.variance, pair.people.variance)
    varied = people > 1e-12
    return np.divide(model, people, where=varied, out=np.full(people.shape, np.nan))


@dataclass(frozen=True)
class Metric:
    """A metric with what a reader and the bootstrap must know of it.

    `lower` and `upper` are the ends of the estimate's own range, where its interval is cut;
    `has_skill` says that less is better, so that a skill makes sense.
    """

    compute: Callable[[Pair], Floats]
    unit: str
    definition: str
    lower: float = 0.0
    upper: float = np.inf
    has_skill: bool = True


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "wasserstein": Metric(
            wasserstein,
            "points",
            "Wasserstein-1 distance: how far, on average, an answer must be moved to turn the "
            "model's population into the people's, with the game's range rescaled to 100.",
            upper=100.0,
        ),
        "energy": Metric(
            energy,
            "points",
            "Unbiased energy distance, 2E|X-Y| - E|X-X'| - E|Y-Y'|, U-statistics for samples: "
            "expected value 0 for a perfect model however few the people; can be below 0.",
            lower=-np.inf,
            upper=200.0,
        ),
        "crps": Metric(
            crps,
            "points",
            "Continuous ranked probability score of the model's distribution against each "
            "person's choice, mean over people; proper: the true distribution scores lowest.",
            upper=100.0,
        ),
        "log_score": Metric(
            log_score,
            "nats",
            "Mean of -ln(probability that the model gives to a person's choice); undefined "
            "where a choice that a person made has no probability.",
        ),
        "total_variation": Metric(
            total_variation,
            "share",
            "Total variation: the share of answers that must change for the two to be equal.",
            upper=1.0,
        ),
        "jensen_shannon": Metric(
            jensen_shannon,
            "bits",
            "Jensen-Shannon divergence (not its square root), 0 to 1.",
            upper=1.0,
        ),
        "ks": Metric(
            ks,
            "share",
            "Kolmogorov-Smirnov: the largest difference of the two cumulative distributions.",
            upper=1.0,
        ),
        "mean_difference": Metric(
            mean_difference,
            "points",
            "The model's mean less the people's; 0 is right.",
            lower=-100.0,
            upper=100.0,
            has_skill=False,
        ),
        "variance_ratio": Metric(
            variance_ratio,
            "ratio",
            "The model's variance over the people's; 1 is right, less is a narrower population.",
            has_skill=False,
        ),
    }
)
