"""Which context people were in, inferred from what they did: ranks and a posterior.

With `p_k` the distribution of answers in candidate context k and `n` the counts of a behaviour, the
log-likelihood is `L_k = sum of n log p_k`, and the posterior at equal prior odds is `softmax(L)`.
Nothing is divided by the number of people: the ranks would stay, but a posterior would not be one.
Letters: `B` behaviours, `K` candidates at most, `A` answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import NDArray
from scipy.special import logsumexp

Floats = NDArray[np.float64]
# Log-likelihoods that differ by less are equal.
_TIED = 1e-9
BINS = 10


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Behaviours with the log-likelihood of each candidate.

    Attributes:
        likelihoods: `[B, K]`, the true context's first; NaN where there are fewer candidates.
    """

    likelihoods: Float64[np.ndarray, "B K"]

    @classmethod
    def of(
        cls,
        shares: Float64[np.ndarray, "I A"],
        counts: Float64[np.ndarray, "B A"],
        candidates: Int[np.ndarray, "B K"],
    ) -> Retrieved:
        """The likelihoods of behaviours under the distributions of their candidates.

        Args:
            shares: of all contexts, each row summing to 1.
            counts: people who gave each answer.
            candidates: rows of `shares`, the true context first; -1: none.
        """
        possible = shares > 0.0
        logs = np.log(shares, where=possible, out=np.zeros(shares.shape))
        found = np.einsum("ba,bka->bk", counts, logs[candidates])
        impossible = np.einsum("ba,bka->bk", counts, 1.0 - possible[candidates]) > 0.0
        found = np.where(impossible, -np.inf, found)
        return cls(np.where(candidates < 0, np.nan, found))

    @cached_property
    def number(self) -> Floats:
        """`[B]` candidates."""
        return (~np.isnan(self.likelihoods)).sum(1).astype(np.float64)

    @cached_property
    def better(self) -> Floats:
        """`[B]` candidates that are likelier than the true one."""
        return ((self.likelihoods > self.likelihoods[:, :1]) & ~self._tied).sum(1)

    @cached_property
    def ties(self) -> Floats:
        """`[B]` candidates as likely as the true one, which is one of them."""
        return self._tied.sum(1)

    @cached_property
    def _tied(self) -> NDArray[np.bool_]:
        return np.isclose(self.likelihoods, self.likelihoods[:, :1], rtol=0.0, atol=_TIED)

    def within(self, first: int) -> Floats:
        """`[B]` the probability that the true context is among the `first` ones; ties are drawn."""
        return np.clip((first - self.better) / self.ties, 0.0, 1.0)

    @cached_property
    def reciprocal_rank(self) -> Floats:
        """`[B]` 1 / rank; the mean over the ranks that ties share."""
        harmonic = np.cumsum(np.append(0.0, 1.0 / np.arange(1, self.likelihoods.shape[1] + 1)))
        return (harmonic[self.better + self.ties] - harmonic[self.better]) / self.ties

    @cached_property
    def posterior(self) -> Float64[np.ndarray, "B K"]:
        """The probability of each candidate, equally likely before; 0 where there is none.

        Where no candidate allows the behaviour, they stay equally likely.
        """
        there = ~np.isnan(self.likelihoods)
        none = (self.likelihoods == -np.inf).sum(1) == self.number
        levels = np.where(none[:, None], 0.0, self.likelihoods)
        levels = np.where(there, levels, -np.inf)
        return np.exp(levels - logsumexp(levels, axis=1, keepdims=True))

    @cached_property
    def log_loss(self) -> Floats:
        """`[B]` -ln of the true context's posterior; NaN where that is 0."""
        true = self.posterior[:, 0]
        return -np.log(true, where=true > 0.0, out=np.full(len(true), np.nan))

    def calibration(self) -> Float64[np.ndarray, "B bins"]:
        """Confidence less correctness, in the column of its confidence's tenth; 0 elsewhere.

        The confidence is the largest posterior probability; ties share the hit.
        """
        confidence = self.posterior.max(1)
        top = self.posterior >= confidence[:, None] - _TIED
        right = top[:, 0] / top.sum(1)
        column = np.minimum((confidence * BINS).astype(int), BINS - 1)
        gaps = np.zeros((len(confidence), BINS))
        gaps[np.arange(len(confidence)), column] = confidence - right
        return gaps
