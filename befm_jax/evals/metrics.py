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


class Pair:
    """A model's answers beside people's, on the same values.

    Args:
        values: `[A]` the game's possible choices, ascending, at least two.
        model: `[..., A]` the model's answers: a distribution, or counts of draws.
        people: `[..., A]` counts of people; leading axes broadcast against the model's.
        exact: whether `model` is the model's whole distribution.  If not, it holds counts of
            draws, and the metrics with an unbiased form correct for their finite number.

    Raises:
        ValueError: shapes that do not fit, values that do not ascend, negative or non-finite
            weights, or a histogram with nothing in it.
    """

    def __init__(
        self, values: ArrayLike, model: ArrayLike, people: ArrayLike, *, exact: bool = True
    ) -> None:
        self.values = np.asarray(values, np.float64)
        if self.values.ndim != 1 or len(self.values) < 2 or np.any(np.diff(self.values) <= 0):
            raise ValueError("values must be one ascending list of at least two choices")
        self._model_weights = _checked("model", model, len(self.values))
        self._people_weights = _checked("people", people, len(self.values))
        self._exact = exact

    @cached_property
    def model(self) -> Floats:
        """`[..., A]` the model's shares."""
        return self._model_weights / self._model_weights.sum(-1, keepdims=True)

    @cached_property
    def people(self) -> Floats:
        """`[..., A]` the people's shares."""
        return self._people_weights / self._people_weights.sum(-1, keepdims=True)

    @cached_property
    def model_cdf(self) -> Floats:
        """`[..., A-1]` the model's cumulative shares; the last, always 1, is left out."""
        return np.cumsum(self.model[..., :-1], axis=-1)

    @cached_property
    def people_cdf(self) -> Floats:
        """`[..., A-1]` the people's cumulative shares; the last, always 1, is left out."""
        return np.cumsum(self.people[..., :-1], axis=-1)

    @cached_property
    def cdf_difference(self) -> Floats:
        """`[..., A-1]` the model's cumulative shares less the people's."""
        return self.model_cdf - self.people_cdf

    @cached_property
    def squared_cdf_distance(self) -> Floats:
        """`[...]` the integral of the squared difference of the cumulative shares."""
        return np.square(self.cdf_difference) @ self.gaps

    @cached_property
    def points(self) -> Floats:
        """`[A]` the values on the scale from 0 to 100."""
        return (self.values - self.values[0]) * (100.0 / (self.values[-1] - self.values[0]))

    @cached_property
    def gaps(self) -> Floats:
        """`[A-1]` the distances between neighbouring points."""
        return np.diff(self.points)

    @cached_property
    def model_spread(self) -> Floats:
        """`[...]` the integral of `F (1 - F)`: half of the model's E|X - X'|, unbiased."""
        spread = (self.model_cdf * (1.0 - self.model_cdf)) @ self.gaps
        return spread if self._exact else spread * _sample_correction(self._model_weights)

    @cached_property
    def people_spread(self) -> Floats:
        """`[...]` half of the people's E|Y - Y'|, unbiased."""
        plain = self.people_plain_spread
        return plain * _sample_correction(self._people_weights)

    @cached_property
    def people_plain_spread(self) -> Floats:
        """`[...]` the integral of `G (1 - G)`, of these people taken as the whole."""
        return (self.people_cdf * (1.0 - self.people_cdf)) @ self.gaps

    @cached_property
    def model_plain_spread(self) -> Floats:
        """`[...]` the integral of `F (1 - F)`, of these answers taken as the whole."""
        return (self.model_cdf * (1.0 - self.model_cdf)) @ self.gaps

    def variances(self) -> tuple[Floats, Floats]:
        """`[...]` of model and people in squared points; samples are divided by n - 1."""
        squares = np.square(self.points)
        model = self.model @ squares - np.square(self.model @ self.points)
        people = self.people @ squares - np.square(self.people @ self.points)
        if not self._exact:
            model = model * _sample_correction(self._model_weights)
        return model, people * _sample_correction(self._people_weights)


def _checked(side: str, weights: ArrayLike, count: int) -> Floats:
    array = np.asarray(weights, np.float64)
    if array.ndim == 0 or array.shape[-1] != count:
        raise ValueError(f"{side}: {array.shape} does not end in {count}, the number of values")
    # NaN fails both comparisons, and a sum tells infinity: one pass instead of isfinite's two.
    if not array.min(initial=0.0) >= 0.0 or not np.isfinite(array.sum()):
        raise ValueError(f"{side}: weights must be finite and not negative")
    if not array.sum(-1).min(initial=np.inf) > 0.0:
        raise ValueError(f"{side}: a histogram with nothing in it can't be compared")
    return array


def _sample_correction(counts: Floats) -> Floats:
    """`[...]` n / (n - 1), NaN for a sample of one, whose spread is unknown."""
    number = counts.sum(-1)
    unknown = np.full(np.shape(number), np.nan)
    return np.divide(number, number - 1.0, where=number > 1.0, out=unknown)


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
    between = pair.squared_cdf_distance + pair.model_plain_spread + pair.people_plain_spread
    return 2.0 * (between - pair.model_spread - pair.people_spread)


def crps(pair: Pair) -> Floats:
    """`[...]` continuous ranked probability score, mean over people, in points.

    E|X - y| - E|X - X'|/2 for the model's X and each person's choice y.  Proper: the lowest
    expected score is the true distribution's.  Draws of a model take E|X - X'| over different
    draws, so that their score estimates that of the distribution behind them (the fair score;
    NaN for one draw).  Gneiting and Raftery (2007), JASA 102; Ferro (2014), QJRMS 140.
    """
    toward_people = pair.squared_cdf_distance + pair.model_plain_spread + pair.people_plain_spread
    return toward_people - pair.model_spread


def log_score(pair: Pair) -> Floats:
    """`[...]` mean over people of -ln p(choice), in nats.

    NaN where the model gives a person's choice no probability: the score is infinite there, and
    for a sampled model that says more about the number of draws than about the model.
    """
    possible = pair.model > 0.0
    surprise = -np.log(pair.model, where=possible, out=np.zeros_like(pair.model))
    score = _inner(pair.people, surprise)
    missed = _inner(pair.people, np.where(possible, 0.0, 1.0))
    return np.where(missed > 0.0, np.nan, score)


def _inner(rows: Floats, columns: Floats) -> Floats:
    """`[...]` sum of products over the last axis; a matrix product where one side is shared."""
    return rows @ columns if columns.ndim == 1 else np.einsum("...a,...a->...", rows, columns)


def total_variation(pair: Pair) -> Floats:
    """`[...]` half the summed absolute differences of shares: 0 equal, 1 nothing in common."""
    return 0.5 * np.abs(pair.model - pair.people).sum(-1)


def jensen_shannon(pair: Pair) -> Floats:
    """`[...]` Jensen-Shannon divergence in bits: 0 equal, 1 nothing in common.

    The square of `scipy.spatial.distance.jensenshannon(..., base=2)`.  Lin (1991), IEEE Trans.
    Inf. Theory 37.
    """
    middle = 0.5 * (pair.model + pair.people)
    divergence = _entropy(middle) - 0.5 * (_entropy(pair.model) + _entropy(pair.people))
    return np.clip(divergence, 0.0, 1.0)  # rounding may leave -1e-17


def _entropy(shares: Floats) -> Floats:
    logarithms = np.log2(shares, where=shares > 0.0, out=np.zeros_like(shares))
    return -np.einsum("...a,...a->...", shares, logarithms)


def ks(pair: Pair) -> Floats:
    """`[...]` Kolmogorov-Smirnov statistic: the largest difference of cumulative shares."""
    return np.abs(pair.cdf_difference).max(-1)


def mean_difference(pair: Pair) -> Floats:
    """`[...]` the model's mean less the people's, in points; positive: the model gives more."""
    return pair.model @ pair.points - pair.people @ pair.points


def variance_ratio(pair: Pair) -> Floats:
    """`[...]` the model's variance over the people's; below 1: a narrower population.

    Samples are divided by n - 1.  NaN where the people all agree, or a sample is one.
    """
    model, people = pair.variances()
    model, people = np.broadcast_arrays(model, people)
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
