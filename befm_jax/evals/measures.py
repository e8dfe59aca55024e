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

from befm_jax.data.items import AnswerSet, Item
from befm_jax.errors import unknown
from befm_jax.evals import effects, text_measures
from befm_jax.evals.effects import Effects
from befm_jax.evals.retrieval import Retrieved

Floats = NDArray[np.float64]
_ROUNDING = 1e-12
# A change that makes a smaller share of the answers wrong, or moves them by less of the scale, says
# nothing of who answers.
_SAYS_ENOUGH = 0.05


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
        target: `[I, A]` observations; of arms of published effects, which may have different
            answer sets, `[I, 1]` with 1 each, and `model` is 0 beyond an item's answers.
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
    def shares(self) -> Float64[np.ndarray, "I A"]:
        """The model's shares."""
        return self.model / self.model.sum(1, keepdims=True)

    @cached_property
    def retrieved(self) -> Retrieved:
        """What people did in each item's context, under `notes["candidates"]`, its own first.

        A context whose item has no response is nobody's candidate.
        """
        rows = {item.labels["context"]: row for row, item in enumerate(self.items)}
        found = [[rows.get(name, -1) for name in one.notes["candidates"]] for one in self.items]
        candidates = np.full((len(found), max(map(len, found))), -1)
        for own, names in zip(candidates, found, strict=True):
            own[: len(names)] = names
        return Retrieved.of(self.shares, self.target, candidates)

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
    ascending = np.sort(numbers)
    # As scipy.stats.rankdata, whose import takes a second.
    below, to = (np.searchsorted(ascending, numbers, side) for side in ("left", "right"))
    return 0.5 * (below + to) / len(numbers)


def _later(numbers: Floats, columns: Floats) -> Floats:
    """`[I]` the mean over j of (1[x_i < x_j] + 1[x_i = x_j]/2) g_j, for every i."""
    order = np.argsort(numbers, kind="stable")
    cumulated = np.concatenate([[0.0], np.cumsum(columns[order])])
    low, high = (np.searchsorted(numbers[order], numbers, side) for side in ("left", "right"))
    return (cumulated[-1] - 0.5 * (cumulated[low] + cumulated[high])) / len(numbers)


def rank_correlation(
    first: Floats, shares: Float64[np.ndarray, "I A"]
) -> tuple[float, Float64[np.ndarray, " I"]]:
    """Spearman's rho of a known number with an answer that is a distribution, and its influence.

    The joint distribution puts `1 / I` on each person's number and spreads it over their answers;
    ties have mid-ranks.  With one answer each it is `scipy.stats.spearmanr`; with the number of a
    first answer and the distribution of the second given it, it is that of a population that
    answers both, without a draw.

    Args:
        first: `[I]` what is known of each person.
        shares: `[I, A]` each person's distribution over the answers, in ascending order.

    Returns:
        rho, and `[I]` how much each person pulls it: the mean of the squares over `I` is its
        variance.  NaN where the number or the answer is the same for everybody.
    """
    unknown = np.nan, np.full(len(first), np.nan)
    if len(first) < 3:
        return unknown
    answers = shares.mean(0)
    # Mid-ranks of the numbers, and of the answers in the mixture of all people.
    x, of_answer = _midrank(first), np.cumsum(answers) - answers / 2.0
    y = shares @ of_answer
    squared = shares @ np.square(of_answer)
    xy, xx, yy = (x * y).mean() - 0.25, np.square(x).mean() - 0.25, squared.mean() - 0.25
    if min(xx, yy) < _ROUNDING:
        return unknown
    pulls = (
        x * y + _later(first, y) + shares @ _above(x @ shares / len(x)),
        np.square(x) + 2.0 * _later(first, x),
        squared + 2.0 * shares @ _above(answers * of_answer),
    )
    dxy, dxx, dyy = (pull - pull.mean() for pull in pulls)
    rho = float(xy / np.sqrt(xx * yy))
    return rho, dxy / np.sqrt(xx * yy) - rho / 2.0 * (dxx / xx + dyy / yy)


def _above(weights: Floats) -> Floats:
    """`[A]` the sum of the weights of all later answers, and half of an answer's own."""
    return weights.sum() - np.cumsum(weights) + weights / 2.0


def _correlation(figure: Callable[[Floats, Floats, Floats], Floats]) -> Summed:
    """A function of the model's correlation, the people's, and the variance of their difference.

    Of items with one thing known of a person: `notes["known"]`.  Ranks are not recomputed in a
    resample: both correlations are shifted by their mean influence.
    """

    def sums(answered: Answered) -> Sums:
        first = _known(answered)
        shares = answered.pair.model.shares, answered.pair.people.shares
        (model, pull), (people, pull_of_people) = (rank_correlation(first, one) for one in shares)
        noise = np.square(pull - pull_of_people).mean() / len(first)

        def finish(summed: Floats, number: Floats) -> Floats:
            shift = _ratio(summed, number[..., None])
            return figure(model + shift[..., 0], people + shift[..., 1], noise)

        columns = np.stack([pull, pull_of_people], 1) * answered.people[:, None]
        return Sums(columns, finish)

    return sums


def _known(answered: Answered) -> Floats:
    """`[I]` the one thing that is known of each item's person; NaN where it is not one."""
    known = [list(item.notes.get("known", {}).values()) for item in answered.items]
    if {len(values) for values in known} != {1}:
        return np.full(len(answered.model), np.nan)
    return np.array([values[0] for values in known], np.float64)


def _slope(answered: Answered) -> Sums:
    """The model's slope on what is known less the people's, least squares."""
    first = _known(answered)
    if not first.std() > _ROUNDING:
        return Sums(np.full((len(first), 1), np.nan), lambda s, _: s[..., 0])
    x = (first - first.mean()) / first.std()
    apart = answered.pair.model.mean - answered.pair.people.mean
    columns = np.stack([x, x * x, apart, x * apart], 1) * answered.people[:, None]

    def finish(summed: Floats, number: Floats) -> Floats:
        x, xx, apart, both = np.moveaxis(_ratio(summed, number[..., None]), -1, 0)
        return _ratio(both - x * apart, xx - x * x)

    return Sums(columns, finish)


def _variance_kept(answered: Answered) -> Sums:
    """The variance over people of the model's mean for each, over that of their answers."""
    model, observed = answered.pair.model, answered.pair.people.mean
    squared = np.square(model.mean)
    if not answered.exact:
        # The noise of the draws is no difference between people.
        squared = squared - model.variance / answered.model.sum(1)
    columns = np.stack([model.mean, squared, observed, np.square(observed)], 1)

    def finish(summed: Floats, number: Floats) -> Floats:
        mean, squared, own, own_squared = np.moveaxis(_ratio(summed, number[..., None]), -1, 0)
        return _ratio(squared - np.square(mean), own_squared - np.square(own))

    return Sums(columns * answered.people[:, None], finish)


def _macro_f1(answered: Answered) -> Sums:
    """F1 of the likeliest answer, mean over the answers that are predicted or observed."""
    return _f1(answered, answered.pair.model.likeliest, lambda predicted, seen: predicted + seen)


def _expected_f1(answered: Answered) -> Sums:
    """F1 of one draw, from the expected numbers of hits and predictions, over observed answers."""
    return _f1(answered, answered.pair.model.shares, lambda predicted, seen: seen)


def _f1(answered: Answered, guess: Floats, counted: Callable[[Floats, Floats], Floats]) -> Sums:
    """The mean F1 of a guess `[I, A]` over the answers whose `counted` number is not 0.

    `counted` is of the numbers of predictions and of observations `[..., A]`.
    """
    columns = (guess * answered.target, guess * answered.people[:, None], answered.target)

    def finish(sums: Floats, _: Floats) -> Floats:
        hits, predicted, observed = np.split(sums, 3, -1)
        present = counted(predicted, observed) > 1e-3
        f1 = np.divide(2.0 * hits, predicted + observed, where=present, out=np.zeros(present.shape))
        return _ratio(f1.sum(-1), present.sum(-1))

    return Sums(np.concatenate(columns, 1), finish)


def _retrieved(
    columns: Callable[[Retrieved], Floats], finish: Callable[[Floats], Floats]
) -> Summed:
    """A function of the mean over behaviours of columns `[I, K]`; every context counts alike."""

    def sums(answered: Answered) -> Sums:
        values = columns(answered.retrieved)
        number = np.ones((len(values), 1))

        def finished(totals: Floats, _: Floats) -> Floats:
            return finish(_ratio(totals[..., :-1], totals[..., -1:]))

        return Sums(np.concatenate([values, number], 1), finished)

    return sums


def _of_effects(name: str) -> Summed:
    """A measure of `befm_jax.evals.effects`; a contrast is in the row of its control."""

    def sums(answered: Answered) -> Sums:
        means = {
            (item.labels["effect"], item.labels["arm"]): float(
                shares[: len(item.notes["values"])] @ np.array(item.notes["values"])
            )
            for item, shares in zip(answered.items, answered.shares, strict=True)
        }
        known = [
            (row, item.notes["published"], means[item.labels["effect"], "treatment"] - mean)
            for row, (item, mean) in enumerate(zip(answered.items, means.values(), strict=True))
            if item.labels["arm"] == "control" and (item.labels["effect"], "treatment") in means
        ]

        def column(published: str) -> Floats:
            return np.array([getattr(one, published) for _, one, _ in known], np.float64)

        ends = [one.interval or (np.nan, np.nan) for _, one, _ in known]
        low, high = np.array(ends, np.float64).reshape(-1, 2).T
        found = Effects(
            np.array([difference for *_, difference in known]),
            column("difference"), column("standard_error"), low, high, column("direction"),
        ).columns[name]  # fmt: skip
        columns = np.zeros((len(answered.items), found.shape[1]))
        columns[[row for row, *_ in known]] = found
        return Sums(columns, lambda totals, _: effects.FINISH[name](totals))

    return sums


def _win_rate(answered: Answered) -> Floats:
    """`[I]` the probability that a draw is one of the answers that win, `notes["wins"]` `[A]`."""
    wins = [item.notes["wins"] for item in answered.items]
    return np.einsum("ia,ia->i", answered.pair.model.shares, np.array(wins, np.float64))


def _changes(answered: Answered) -> Sums:
    """Of each changed question, how wrong the answers are, and if nothing had changed them.

    From 0 to 1: the share of wrong answers; where old answers belong elsewhere, the distance from
    there.  See `befm_jax.tasks.sensitivity` for the notes; questions as they are have zeros.
    """
    shares = answered.model / answered.model.sum(1, keepdims=True)
    of_item = {item.id: own for item, own in zip(answered.items, shares, strict=True)}
    columns = np.zeros((len(shares), 2))
    for at, item in enumerate(answered.items):
        notes, after = item.notes, shares[at]
        if "changed_from" not in notes:
            continue
        before = of_item[notes["changed_from"]]
        if "right" in notes:
            columns[at] = [1.0 - own[list(notes["right"])].sum() for own in (after, before)]
        else:
            moved, unnoticed = np.empty_like(before), np.empty_like(before)
            moved[list(notes["moved_to"])] = before
            unnoticed[list(notes["as_before"])] = before
            assert isinstance(item.answers, AnswerSet)
            apart = _scale_distance if item.answers.values else _total_variation
            columns[at] = [apart(own - moved) for own in (after, unnoticed)]
    return Sums(columns, follows_change)


def _scale_distance(difference: Floats) -> float:
    """How far answers are moved on average, 0 to 1, from the difference of shares `[A]`."""
    return float(np.abs(np.cumsum(difference)).sum() / (len(difference) - 1))


def _total_variation(difference: Floats) -> float:
    """The share of answers that are changed, from the difference of shares `[A]`."""
    return float(0.5 * np.abs(difference).sum())


def follows_change(sums: Float64[np.ndarray, "... 2"], questions: Floats) -> Floats:
    """`[...]` 1 - wrong answers / those there would be if nothing changed; NaN if hardly any."""
    wrong, if_unnoticed = np.moveaxis(np.asarray(sums), -1, 0)
    return 1.0 - _ratio(wrong, np.where(if_unnoticed > _SAYS_ENOUGH * questions, if_unnoticed, 0.0))


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
        level: "individual": of each person's answer; "distribution": of a population's; "check": of
            a respondent compared with itself (`befm_jax.evals.sensitivity`).
        sums: the measure of many items.
        kernel: the measure of one histogram; None where persons must be known.
        low: the lower end of the figure's range, to which its interval is clipped.
        high: the upper end.
        better: "low", "high", "0" or "1": the best figures; "" for none.
        skill: whether skill is defined: less is better, and the true distribution is best.
        ordered: whether answers must have values on a scale.
        perfect: a perfect model's score, where that is known without simulation.
        note: the note that items must have, for measures that need one.
        halves: whether other people's score is that of half of each item's people as the model of
            the other half, for measures without a kernel.
    """

    name: str
    definition: str
    unit: str
    level: Literal["individual", "distribution", "check"]
    sums: Summed
    kernel: Callable[[Pair], Floats] | None = None
    low: float = 0.0
    high: float = np.inf
    better: Literal["low", "high", "0", "1", ""] = "low"
    skill: bool = False
    ordered: bool = True
    perfect: float | None = None
    note: str = ""
    halves: bool = False

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


def _text(name: str, unit: str, high: float, definition: str, low: float = 0.0) -> Measure:
    def score(answered: Answered) -> Floats:
        return text_measures.scores(name, answered.texts, answered.references)

    return Measure(
        name, definition, unit, "individual", scored(score),
        low=low, high=high, better="high", ordered=False,
    )  # fmt: skip


def _retrieval(
    name: str,
    definition: str,
    columns: Callable[[Retrieved], Floats],
    finish: Callable[[Floats], Floats] = lambda means: means[..., 0],
    unit: str = "share",
    **more: Any,
) -> Measure:
    """A measure of contexts that are inferred from behaviour."""
    sums = _retrieved(columns, finish)
    return Measure(
        name, definition, unit, "distribution", sums,
        ordered=False, note="candidates", halves=True, **more,
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
        note="cooperation",
        high=1.0,
        better="",
        ordered=False,
    ),
    Measure(
        "cooperation_distance",
        "Absolute difference between the mean cooperation of the respondent and of people in the "
        "same setting and round, mean over settings and rounds by the respondent's choices there. "
        "The interval takes people's means as they are; for the floor persons are drawn again, "
        "with all their choices.",
        "share",
        "distribution",
        _cooperation_distance,
        note="people",
        high=1.0,
        ordered=False,
    ),
    Measure(
        "payoff",
        "Mean payoff a round, in the units of the game.",
        "units of the game",
        "individual",
        _noted("payoff"),
        note="payoff",
        low=-np.inf,
        better="high",
        ordered=False,
    ),
    Measure(
        "total_payoff",
        "Mean payoff of a whole game, in its units; undefined for rounds by themselves.",
        "units of the game",
        "individual",
        _total_payoff,
        note="payoff",
        low=-np.inf,
        better="high",
        ordered=False,
    ),
    Measure(
        "rounds_won",
        "Share of rounds that are won; a round that several win counts in equal parts for them. "
        "Other people: one over the size of the group, where the respondent plays with people.",
        "share",
        "individual",
        _noted("payoff"),
        note="payoff",
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
        "correlation_gap",
        "(model's - people's)^2 - variance of the difference, of Spearman's rank correlation of "
        "the answer with the one thing that is known of a person: unbiased, 0 if the two depend on "
        "each other in the model as in people; can be below 0. A population that answers "
        "independently has the people's own squared correlation.",
        "correlation",
        "distribution",
        _correlation(lambda model, people, noise: np.square(model - people) - noise),
        low=-1.0,
        high=4.0,
        better="0",
    ),
    Measure(
        "correlation_difference",
        "The model's rank correlation less the people's; the same people are on both sides.",
        "correlation",
        "distribution",
        _correlation(lambda model, people, noise: model - people),
        low=-2.0,
        high=2.0,
        better="0",
    ),
    Measure(
        "model_correlation",
        "Spearman's rank correlation of the model's answer, the whole distribution of it, with the "
        "one thing that is known of a person; ties have mid-ranks.",
        "correlation",
        "distribution",
        _correlation(lambda model, people, noise: model),
        low=-1.0,
        high=1.0,
        better="",
    ),
    Measure(
        "people_correlation",
        "Spearman's rank correlation of the people's answer with the one thing that is known of "
        "them: what the model's is compared with.",
        "correlation",
        "distribution",
        _correlation(lambda model, people, noise: people),
        low=-1.0,
        high=1.0,
        better="",
    ),
    Measure(
        "slope_difference",
        "The model's slope less the people's: by how much the answer rises with one standard "
        "deviation of what is known of a person, least squares.",
        "points",
        "distribution",
        _slope,
        low=-np.inf,
        better="0",
    ),
    Measure(
        "variance_kept",
        "The variance over people of the model's mean for each, over the variance of their "
        "answers: 0 if everybody is expected to do the same. A right model has the share of the "
        "variance that what it is told of them explains. That is below 1, and not known, since one "
        "answer of a person has noise: compare it with the baselines, not with 1.",
        "ratio",
        "distribution",
        _variance_kept,
        better="",
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
    _retrieval(
        "retrieved_first",
        "Share of contexts that are the likeliest of their candidates, by the probability of what "
        "people did there; ties share the hit.",
        lambda found: found.within(1)[:, None],
        high=1.0,
        better="high",
    ),
    _retrieval(
        "retrieved_in_3",
        "Share of contexts that are among the three likeliest of their candidates; ties share the "
        "hit.",
        lambda found: found.within(3)[:, None],
        high=1.0,
        better="high",
    ),
    _retrieval(
        "reciprocal_rank",
        "Mean of 1 / the rank of the true context among its candidates, by the probability of what "
        "people did there; the mean over the ranks that ties share.",
        lambda found: found.reciprocal_rank[:, None],
        high=1.0,
        better="high",
    ),
    _retrieval(
        "posterior_log_loss",
        "Mean of -ln of the true context's posterior probability, its candidates being equally "
        "likely before: softmax of the sums of counts x ln p; undefined where a context does not "
        "allow what people did in it.",
        lambda found: found.log_loss[:, None],
        unit="nats",
    ),
    _retrieval(
        "posterior_ece",
        "Expected calibration error of that posterior: |mean probability of the likeliest "
        "candidate - how often it is the true one|, in tenths of the probability; few contexts "
        "make it too high.",
        lambda found: found.calibration(),
        finish=lambda means: np.abs(means).sum(-1),
        high=1.0,
    ),
    Measure(
        "effect_sign",
        "Share of contrasts with a published sign whose predicted difference, the mean of the "
        "treatment less that of the control, has it; half of one where no difference is predicted.",
        "share",
        "distribution",
        _of_effects("sign"),
        note="published",
        high=1.0,
        better="high",
        ordered=False,
    ),
    Measure(
        "effect_correlation",
        "Correlation of predicted and published differences through the origin, sum xy / "
        "sqrt(sum x^2 sum y^2), which does not depend on which arm is the control.",
        "correlation",
        "distribution",
        _of_effects("correlation"),
        note="published",
        low=-1.0,
        high=1.0,
        better="high",
        ordered=False,
    ),
    Measure(
        "effect_slope",
        "Slope of predicted on published differences through the origin, corrected for the "
        "published standard errors s: sum xy / sum (x^2 - s^2); below 1, effects are too small.",
        "ratio",
        "distribution",
        _of_effects("slope"),
        note="published",
        low=-np.inf,
        better="1",
        ordered=False,
    ),
    Measure(
        "effect_coverage",
        "Share of contrasts with a published 95 % interval that holds the predicted difference.",
        "share",
        "distribution",
        _of_effects("coverage"),
        note="published",
        high=1.0,
        better="high",
        ordered=False,
    ),
    Measure(
        "expected_f1",
        "F1 = 2 hits / (predicted + observed) of one draw of the model for each person, from the "
        "expected numbers of hits and predictions, mean over the answers that people gave.",
        "share",
        "individual",
        _expected_f1,
        high=1.0,
        better="high",
        ordered=False,
    ),
    Measure(
        "win_rate",
        "The probability that one draw of the model wins against the people who played together, "
        "mean over items.",
        "share",
        "individual",
        scored(_win_rate),
        note="wins",
        high=1.0,
        better="high",
        ordered=False,
    ),
    Measure(
        "follows_change",
        "Of the answers to a question that a change of it makes wrong, the share that is not given "
        "any more: 0 for answering as before, 1 for following the change; below 0 for moving the "
        "other way. Undefined where a change makes fewer than 5 % of the answers wrong.",
        "share",
        "check",
        _changes,
        low=-np.inf,
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
    _text(
        "bleurt",
        "score",
        np.inf,
        "BLEURT: a learned similarity to the nearest reference, about 0 to 1 (BLEURT-20); mean "
        "over the texts.",
        low=-np.inf,
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
