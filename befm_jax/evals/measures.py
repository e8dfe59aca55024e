"""Measures of a model's answers against people's, as declarations.

A measure is computed from an `Answered`: items with one answer set, joined with responses.  Most
are functions of a `Pair`, a model's and people's answers on one answer set, vectorised over leading
axes.  Adaptors extend them to many items:

- `per_item(f)`: `f` item by item, then the mean over people;
- `pooled(f)`: all items become one histogram of the model and one of people, then `f`;
- a function of all items at once: whatever weighted sums of columns determine (Spearman, F1).

Each returns `Sums`: columns to be summed over items with weights, and a function of the sums.  So
`R` resamples are one matrix product, without an array `[R, I, A]`.  Letters: `I` items, `A`
answers, `R` resamples, `K` columns, `...` any leading axes.

Distances along the scale are rescaled so that the range of an answer set is 100 points: figures
with different units can be averaged.  With `F` and `G` the two cumulative distributions and `w`
the gaps between neighbouring values, all of them are sums over the gaps:

    E|X - Y|  = sum w (F (1 - G) + G (1 - F))        E|X - X'| = 2 sum w F (1 - F)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from befm_jax.data.items import Item
from befm_jax.errors import unknown
from befm_jax.evals import text_measures

Floats = NDArray[np.float64]
_ROUNDING = 1e-12


class Side:
    """One side of a comparison: a distribution over a game's values, or a sample's counts.

    Properties are cached, so that a side in several pairs is computed once.

    Args:
        name: its name in messages.
        values: `[A]` the game's possible choices, ascending, at least two.
        weights: `[..., A]` the shares, or counts of answers.
        exact: whether `weights` are a distribution.  If not, they are counts, and statistics with
            an unbiased form are corrected for the finite sample.

    Raises:
        ValueError: shapes that do not fit, values that do not ascend, negative or non-finite
            weights, or an empty histogram.
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
        """`[..., A-1]` the cumulative shares, without the last, which is 1."""
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
        """`[...]` the integral of `F (1 - F)`, without a sample correction."""
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

    @cached_property
    def likeliest(self) -> Floats:
        """`[..., A]` 1 at the likeliest answer, shared among ties."""
        top = self.shares >= self.shares.max(-1, keepdims=True) - _ROUNDING
        return top / top.sum(-1, keepdims=True)

    @cached_property
    def agreement(self) -> Floats:
        """`[...]` the probability that two answers are the same, unbiased: the sum of p^2."""
        same = np.square(self.shares).sum(-1)
        return same if self._exact else 1.0 - (1.0 - same) * self._correction

    @property
    def _correction(self) -> Floats:
        """`[...]` n / (n - 1), NaN for a sample of one, whose spread is unknown."""
        unknown = np.full(np.shape(self._number), np.nan)
        return np.divide(self._number, self._number - 1.0, where=self._number > 1.0, out=unknown)


class Pair:
    """A model's and people's answers on the same values.

    Leading axes of the two sides broadcast.

    Raises:
        ValueError: the sides have different values.
    """

    def __init__(self, model: Side, people: Side) -> None:
        if not np.array_equal(model.values, people.values):
            raise ValueError("the two sides of a comparison must have the same values")
        self.model, self.people = model, people

    @classmethod
    def of(
        cls, values: ArrayLike, model: ArrayLike, people: ArrayLike, *, exact: bool = True
    ) -> Pair:
        """The pair of a game's `values` `[A]` and both sides' weights `[..., A]`.

        `exact`: whether the model's are its distribution, not counts of draws.  Raises as `Side`
        does.
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
    # NaN fails both comparisons, and a sum detects infinity: one pass instead of isfinite's two.
    sums = array.sum(-1)
    if not array.min(initial=0.0) >= 0.0 or not np.isfinite(sums).all():
        raise ValueError(f"{side}: weights must be finite and not negative")
    if not sums.min(initial=np.inf) > 0.0:
        raise ValueError(f"{side}: an empty histogram can't be compared")
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
    # 2E|X-Y| = 2 (squared distance + spread of X + spread of Y), each spread uncorrected.
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

    A mask instead (`where=`) would disable NumPy's vectorisation.
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


def expected_error(pair: Pair) -> Floats:
    """`[...]` E|X - y|: the absolute error of one draw of the model, mean over people, in points.

    Not proper: "always the median" scores lower than the true distribution.
    """
    return pair.squared_cdf_distance + pair.model.plain_spread + pair.people.plain_spread


def median_error(pair: Pair) -> Floats:
    """`[...]` |m - y| for the model's median m, the least value with F >= 1/2, in points."""
    position = (pair.model.cdf < 0.5 - _ROUNDING).sum(-1)
    return _error_of(pair, pair.model.points[position])


def mean_error(pair: Pair) -> Floats:
    """`[...]` |E X - y|, mean over people, in points."""
    return _error_of(pair, pair.model.mean)


def _error_of(pair: Pair, guess: Floats) -> Floats:
    errors = np.abs(pair.model.points - np.asarray(guess)[..., None])
    return np.einsum("...a,...a->...", errors, pair.people.shares)


def accuracy(pair: Pair) -> Floats:
    """`[...]` share of people whose answer is the model's likeliest; ties share the hit."""
    model, people = np.broadcast_arrays(pair.model.likeliest, pair.people.shares)
    return np.einsum("...a,...a->...", model, people)


def expected_accuracy(pair: Pair) -> Floats:
    """`[...]` p(y), the probability of a person's answer, mean over people."""
    return np.einsum("...a,...a->...", pair.model.shares, pair.people.shares)


def brier(pair: Pair) -> Floats:
    """`[...]` sum of (p - 1[y])^2 over the answers, mean over people: 0 to 2.

    Of draws, the sum of p^2 is over different draws, so that the score estimates that of the
    distribution behind them; NaN for one draw.  Brier (1950), Monthly Weather Review 78.
    """
    return pair.model.agreement - 2.0 * expected_accuracy(pair) + 1.0


@dataclass(frozen=True, eq=False)
class Answered:
    """Items with one answer set, joined with a respondent's answers.

    Attributes:
        values: `[A]` the answers' values, ascending; None where they have no order.
        model: `[I, A]` shares (`exact`) or counts of draws.
        target: `[I, A]` observations.
        exact: whether `model` holds distributions.
        items: the items, for measures that need their labels or notes (payoffs, equilibrium).
        texts: for free text, the texts of each item; then `A` is 0.
        references: for free text, the reference texts of each item.
    """

    values: Float64[np.ndarray, " A"] | None
    model: Float64[np.ndarray, "I A"]
    target: Float64[np.ndarray, "I A"]
    exact: bool = True
    items: tuple[Item, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    references: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def people(self) -> Floats:
        """`[I]` observations of each item; 1 for free text."""
        return np.ones(len(self.texts)) if self.texts else self.target.sum(1)

    @cached_property
    def pair(self) -> Pair:
        """Both sides, `[I, A]`; answers without an order are 0, 1, 2, ..."""
        places = np.arange(self.model.shape[1]) if self.values is None else self.values
        return Pair.of(places, self.model, self.target, exact=self.exact)

    @cached_property
    def histograms(self) -> Floats:
        """`[I, 2A]` columns that sum to the pooled model's people and to the pooled people."""
        return np.concatenate([self.pair.model.shares * self.people[:, None], self.target], 1)


@dataclass(frozen=True, eq=False)
class Sums:
    """A measure as weighted sums over items.

    Attributes:
        columns: `[I, K]`.
        finish: from the sums `[..., K]` and the summed people `[...]` to the figure `[...]`.
    """

    columns: Floats
    finish: Callable[[Floats, Floats], Floats]


Summed = Callable[[Answered], Sums]


def scored(score: Callable[[Answered], Floats]) -> Summed:
    """The mean over people of a score `[I]`."""

    def sums(answered: Answered) -> Sums:
        return Sums((score(answered) * answered.people)[:, None], lambda s, n: _ratio(s[..., 0], n))

    return sums


def per_item(kernel: Callable[[Pair], Floats]) -> Summed:
    """A function of a pair, item by item; mean over people."""
    return scored(lambda answered: kernel(answered.pair))


def pooled(kernel: Callable[[Pair], Floats]) -> Summed:
    """A function of a pair: all items' people as one histogram, and all their models as one.

    An item's model is weighted by its number of people.
    """

    def sums(answered: Answered) -> Sums:
        values = answered.pair.model.values

        def finish(histograms: Floats, people: Floats) -> Floats:
            # A resample may have nobody of a small group; single precision leaves -1e-7 for 0.
            present = people > 0.5
            usable = np.where(present[..., None], np.maximum(histograms, 0.0), 1.0)
            pair = Pair.of(values, usable[..., : len(values)], usable[..., len(values) :])
            return np.where(present, kernel(pair), np.nan)

        return Sums(answered.histograms, finish)

    return sums


def _mixture_energy(answered: Answered) -> Sums:
    """The energy distance of a mixture of items' distributions from their people, unbiased.

    With d_i = F_i - 1[y_i <= v], `2n/(n-1) (integral of mean(d)^2 - mean CRPS / n)`: pairs of
    different people only, in all three terms, since the same people are on both sides.  It equals
    `energy` where all items have one distribution.
    """
    pair, people = answered.pair, answered.people
    crps_of_item = pair.squared_cdf_distance + pair.people.plain_spread
    columns = np.concatenate([pair.cdf_difference, crps_of_item[:, None]], 1) * people[:, None]

    def finish(sums: Floats, number: Floats) -> Floats:
        means = _ratio(sums, number[..., None])
        squared = np.square(means[..., :-1]) @ pair.gaps
        several = np.where(number > 1.5, number, np.nan)
        return 2.0 * several / (several - 1.0) * (squared - means[..., -1] / several)

    return Sums(columns, finish)


def _spearman(answered: Answered) -> Sums:
    """Spearman's rho of the predicted mean with the answer, and its influence function.

    Ranks are not recomputed in a resample: Fisher's z is shifted by its mean influence.
    """
    predicted, observed = answered.pair.model.mean, answered.pair.people.mean
    number = len(predicted)
    first, second = (_midrank(side) for side in (predicted, observed))
    xy, xx, yy = (
        (one * other).mean() - 0.25
        for one, other in ((first, second), (first, first), (second, second))
    )
    if min(xx, yy) < _ROUNDING:
        return Sums(np.full((number, 1), np.nan), lambda s, _: s[..., 0])
    pulls = (
        first * second + _later(predicted, second) + _later(observed, first),
        first * first + 2.0 * _later(predicted, first),
        second * second + 2.0 * _later(observed, second),
    )
    dxy, dxx, dyy = (pull - pull.mean() for pull in pulls)
    rho = float(np.clip(xy / np.sqrt(xx * yy), _ROUNDING - 1.0, 1.0 - _ROUNDING))
    influence = dxy / np.sqrt(xx * yy) - rho / 2.0 * (dxx / xx + dyy / yy)
    scale = answered.people.sum() / number / (1.0 - rho**2)

    def finish(sums: Floats, people: Floats) -> Floats:
        return np.tanh(np.arctanh(rho) + _ratio(sums[..., 0], people) * scale)

    return Sums(influence[:, None], finish)


def _midrank(numbers: Floats) -> Floats:
    """`[I]` mid-ranks in (0, 1)."""
    return (rankdata(numbers) - 0.5) / len(numbers)


def _later(numbers: Floats, columns: Floats) -> Floats:
    """`[I]` the mean over j of (1[x_i < x_j] + 1[x_i = x_j]/2) g_j, for every i."""
    order = np.argsort(numbers, kind="stable")
    cumulated = np.concatenate([[0.0], np.cumsum(columns[order])])
    low, high = (np.searchsorted(numbers[order], numbers, side) for side in ("left", "right"))
    return (cumulated[-1] - 0.5 * (cumulated[low] + cumulated[high])) / len(numbers)


def _macro_f1(answered: Answered) -> Sums:
    """F1 of the likeliest answer, mean over the answers that are predicted or observed."""
    likeliest = answered.pair.model.likeliest
    columns = (likeliest * answered.target, likeliest * answered.people[:, None], answered.target)

    def finish(sums: Floats, _: Floats) -> Floats:
        hits, predicted, observed = np.split(sums, 3, -1)
        present = predicted + observed > 1e-3
        f1 = np.divide(2.0 * hits, predicted + observed, where=present, out=np.zeros(present.shape))
        return _ratio(f1.sum(-1), present.sum(-1))

    return Sums(np.concatenate(columns, 1), finish)


def _noted(name: str) -> Summed:
    """The mean of a note of the items, of moves in games that were played (`evals.play`)."""
    return scored(lambda answered: np.array([one.notes[name] for one in answered.items]))


def _total_payoff(answered: Answered) -> Sums:
    """The sum of payoffs a player: by the moves of first rounds, of which each player has one."""
    columns = [[one.notes["payoff"], float(one.notes["round"] == 1)] for one in answered.items]
    return Sums(np.array(columns), lambda sums, _: _ratio(sums[..., 0], sums[..., 1]))


def _cooperation_distance(answered: Answered) -> Sums:
    """The distance of mean cooperation from people's, over settings and rounds, by their moves."""
    cells = [one.notes["cell"] for one in answered.items]
    place = {cell: at for at, cell in enumerate(dict.fromkeys(cells))}
    columns = np.zeros((len(cells), len(place)))
    for row, (one, cell) in enumerate(zip(answered.items, cells, strict=True)):
        columns[row, place[cell]] = one.notes["cooperation"] - one.notes["people"]
    return Sums(columns, lambda sums, people: _ratio(np.abs(sums).sum(-1), people))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient that is NaN where the denominator is 0."""
    defined = np.asarray(denominator) > _ROUNDING
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


@dataclass(frozen=True)
class Measure:
    """A measure with the metadata for reports and the bootstrap.

    Attributes:
        name: its name in tasks.
        definition: one sentence, with the formula.
        unit: "points" (the range of an answer set is 100), "nats", "bits", "share", "ratio".
        level: "individual": of each person's answer; "distribution": of a population's.
        sums: the measure of many items.
        kernel: the measure of one histogram; None where persons must be known.
        low: the lower end of the figure's range, to which its interval is clipped.
        high: the upper end.
        better: "low", "high", "0" or "1": the best figures; "" where none is.
        skill: whether skill is defined: less is better, and the true distribution is best.
        ordered: whether answers must have values on a scale.
        perfect: a perfect model's score, where that is known without simulation.
    """

    name: str
    definition: str
    unit: str
    level: Literal["individual", "distribution"]
    sums: Summed
    kernel: Callable[[Pair], Floats] | None = None
    low: float = 0.0
    high: float = np.inf
    better: Literal["low", "high", "0", "1", ""] = "low"
    skill: bool = False
    ordered: bool = True
    perfect: float | None = None

    def compute(self, answered: Answered, weights: Float64[np.ndarray, "R I"]) -> Floats:
        """The measure `[R]` for each row of item weights."""
        sums = self.sums(answered)
        return sums.finish(weights @ sums.columns, weights @ answered.people)


def _distance(kernel: Callable[[Pair], Floats], unit: str, definition: str, **more: Any) -> Measure:
    return Measure(
        kernel.__name__, definition, unit, "distribution", pooled(kernel), kernel, **more
    )


def _individual(
    kernel: Callable[[Pair], Floats], unit: str, definition: str, **more: Any
) -> Measure:
    return Measure(
        kernel.__name__, definition, unit, "individual", per_item(kernel), kernel, **more
    )


def _text(name: str, unit: str, high: float, definition: str) -> Measure:
    def score(answered: Answered) -> Floats:
        return text_measures.scores(name, answered.texts, answered.references)

    return Measure(
        name, definition, unit, "individual", scored(score),
        high=high, better="high", ordered=False,
    )  # fmt: skip


_PLAYED = (
    Measure(
        "cooperation",
        "Mean cooperation of the respondent's choices, 0 to 1: the share of cooperative ones, or "
        "of what can be put into a fund. Other people: people in the same setting and round, "
        "where the respondent plays in people's place.",
        "share",
        "distribution",
        _noted("cooperation"),
        high=1.0,
        better="",
        ordered=False,
    ),
    Measure(
        "cooperation_distance",
        "Absolute difference between the mean cooperation of the respondent and of people in the "
        "same setting and round, mean over settings and rounds by the respondent's choices there. "
        "The interval takes people's means as they are; the floor does not.",
        "share",
        "distribution",
        _cooperation_distance,
        high=1.0,
        ordered=False,
    ),
    Measure(
        "payoff",
        "Mean payoff a round, in the units of the game.",
        "units of the game",
        "individual",
        _noted("payoff"),
        low=-np.inf,
        better="high",
        ordered=False,
    ),
    Measure(
        "total_payoff",
        "Mean payoff of a whole game, in its units; undefined for later rounds by themselves.",
        "units of the game",
        "individual",
        _total_payoff,
        low=-np.inf,
        better="high",
        ordered=False,
    ),
    Measure(
        "win_rate",
        "Share of rounds that are won; a round that several win counts in equal parts for them.",
        "share",
        "individual",
        _noted("payoff"),
        high=1.0,
        better="high",
        ordered=False,
    ),
)

_DECLARED = (
    _distance(
        wasserstein,
        "points",
        "Wasserstein-1 distance: how far, on average, an answer must be moved to turn the "
        "model's population into the people's, with the game's range rescaled to 100.",
        high=100.0,
        skill=True,
    ),
    Measure(
        "energy",
        "Unbiased energy distance, 2E|X-Y| - E|X-X'| - E|Y-Y'|, U-statistics for samples: "
        "expected value 0 for a perfect model however few the people; can be below 0.",
        "points",
        "distribution",
        _mixture_energy,
        energy,
        low=-np.inf,
        high=200.0,
        skill=True,
        perfect=0.0,
    ),
    _individual(
        crps,
        "points",
        "Continuous ranked probability score of the model's distribution against each "
        "person's choice, mean over people; proper: the true distribution scores lowest.",
        high=100.0,
        skill=True,
    ),
    _individual(
        log_score,
        "nats",
        "Mean of -ln(probability that the model gives to a person's choice); undefined "
        "where a choice that a person made has no probability.",
        skill=True,
        ordered=False,
    ),
    _distance(
        total_variation,
        "share",
        "Total variation: the share of answers that must change for the two to be equal.",
        high=1.0,
        skill=True,
        ordered=False,
    ),
    _distance(
        jensen_shannon,
        "bits",
        "Jensen-Shannon divergence (not its square root), 0 to 1.",
        high=1.0,
        skill=True,
        ordered=False,
    ),
    _distance(
        ks,
        "share",
        "Kolmogorov-Smirnov: the largest difference of the two cumulative distributions.",
        high=1.0,
        skill=True,
    ),
    _distance(
        mean_difference,
        "points",
        "The model's mean less the people's; 0 is right.",
        low=-100.0,
        high=100.0,
        better="0",
    ),
    _distance(
        variance_ratio,
        "ratio",
        "The model's variance over the people's; 1 is right, less is a narrower population.",
        better="1",
    ),
    _individual(
        expected_error,
        "points",
        "E|X - y|, the absolute error of one draw of the model, mean over people; not proper: "
        '"always the median" scores lower than the true distribution.',
        high=100.0,
    ),
    _individual(
        median_error,
        "points",
        "|m - y|, the absolute error of the model's median m, mean over people.",
        high=100.0,
    ),
    _individual(
        mean_error,
        "points",
        "|E X - y|, the absolute error of the model's mean, mean over people.",
        high=100.0,
    ),
    _individual(
        accuracy,
        "share",
        "Share of people whose answer is the model's likeliest one; ties share the hit.",
        high=1.0,
        better="high",
        ordered=False,
    ),
    _individual(
        expected_accuracy,
        "share",
        "p(y), the probability that one draw of the model is the person's answer, mean over "
        "people.",
        high=1.0,
        better="high",
        ordered=False,
    ),
    _individual(
        brier,
        "score",
        "Brier score, the sum over answers of (p - 1[y])^2, mean over people; proper, 0 to 2.",
        low=-np.inf,  # fair to draws, it can be below 0
        high=2.0,
        skill=True,
        ordered=False,
    ),
    Measure(
        "spearman",
        "Spearman's rank correlation of the model's mean with the person's answer, ties at their "
        "middle rank, over the people of one question.",
        "correlation",
        "individual",
        _spearman,
        low=-1.0,
        high=1.0,
        better="high",
    ),
    Measure(
        "macro_f1",
        "F1 = 2 hits / (predicted + observed) of the model's likeliest answer, mean over the "
        "answers that are predicted or observed; ties share the prediction.",
        "share",
        "individual",
        _macro_f1,
        high=1.0,
        better="high",
        ordered=False,
    ),
    _text(
        "rouge1",
        "share",
        1.0,
        "ROUGE-1 F: shared words, stemmed, against the nearest reference; mean over the texts.",
    ),
    _text(
        "rougeL",
        "share",
        1.0,
        "ROUGE-L F: the longest common subsequence of stemmed words, against the nearest "
        "reference; mean over the texts.",
    ),
    _text(
        "chrf",
        "points",
        100.0,
        "chrF2: F of character n-grams of up to 6, recall weighing double, against the references; "
        "0 to 100, mean over the texts.",
    ),
)
MEASURES: Mapping[str, Measure] = MappingProxyType(
    {measure.name: measure for measure in (*_DECLARED, *_PLAYED)}
)


def get(name: str) -> Measure:
    """The measure of this name.

    Raises:
        DataError: there is none; suggests similar names.
    """
    if name not in MEASURES:
        raise unknown("measure", name, MEASURES)
    return MEASURES[name]
