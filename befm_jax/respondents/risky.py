"""Models of how people choose between two gambles, fitted by maximum likelihood.

Each gives a gamble a value; the log odds of a gamble are the difference of the two values times a
precision.  They differ in the value:

- expected value: the mean of what a gamble pays;
- expected utility: the mean of `sign(x) |x|^power`;
- prospect theory: gains `x^power`, losses `-aversion |x|^power`, weighted by their rank: the
  probability of a gain at least as good, and of a loss at least as bad, is transformed by
  `w(p) = p^g / (p^g + (1 - p)^g)^(1/g)` (A. Tversky, D. Kahneman, "Advances in prospect theory",
  Journal of Risk and Uncertainty 5, 1992, with one power and one `g` for gains and losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize
from scipy.special import expit

from befm_jax.data.items import AnswerSet, Item
from befm_jax.errors import DataError

# Of N problems and their two gambles, K outcomes at most, the best first: what they pay and with
# what probability, 0 where there are fewer.
Outcomes = Float64[np.ndarray, "N 2 K"]
Values = Float64[np.ndarray, "N 2"]
# Precisions that are tried first, times the standard deviation of the values.
_PRECISIONS = np.geomspace(1e-2, 1e2, 13)


def expected_value(pays: Outcomes, chances: Outcomes) -> Values:
    """`[N, 2]` means of what gambles pay."""
    return (pays * chances).sum(-1)


def expected_utility(pays: Outcomes, chances: Outcomes, power: float) -> Values:
    """`[N, 2]` means of the utility of what gambles pay."""
    return (np.sign(pays) * np.abs(pays) ** power * chances).sum(-1)


def prospect_theory(
    pays: Outcomes, chances: Outcomes, power: float, aversion: float, curvature: float
) -> Values:
    """`[N, 2]` values of gambles by cumulative prospect theory; `curvature` is `g`."""

    def weighted(cumulated: Outcomes) -> Outcomes:
        # Sums of probabilities may be beyond 1 by rounding.
        p = np.clip(cumulated, 0.0, 1.0)
        scaled = p**curvature
        found: Outcomes = scaled / (scaled + (1.0 - p) ** curvature) ** (1.0 / curvature)
        return found

    # Outcomes are in descending order: of gains the better ones come before, of losses the worse
    # ones after.
    gains, losses = chances * (pays > 0), chances * (pays < 0)
    up_to = np.cumsum(gains, -1)
    from_here = np.cumsum(losses[..., ::-1], -1)[..., ::-1]
    of_gains = weighted(up_to) - weighted(up_to - gains)
    of_losses = weighted(from_here) - weighted(from_here - losses)
    sizes = np.abs(pays) ** power
    return (sizes * (of_gains - aversion * of_losses)).sum(-1)


class Model(NamedTuple):
    """A value of gambles, and the range of each of its parameters; at 1 all are expected value."""

    value: Callable[..., Values]
    ranges: tuple[tuple[float, float], ...] = ()


MODELS: Mapping[str, Model] = {
    "expected_value": Model(expected_value),
    "expected_utility": Model(expected_utility, ((0.1, 3.0),)),
    # Below .28 the weights do not increase with the probability.
    "prospect_theory": Model(prospect_theory, ((0.1, 3.0), (0.1, 10.0), (0.28, 3.0))),
}


@dataclass(frozen=True)
class Fitted:
    """A model fitted to the choices of training items, when it is first asked.

    Attributes:
        model: one of `MODELS`.
        training: items whose `notes["gambles"]` are the gambles by the position of the answer, each
            its (pays, probability), the best first; others are passed over.
    """

    model: Model
    training: Sequence[Item]

    def shares(self, item: Item, answers: AnswerSet) -> Float64[np.ndarray, " A"]:
        """The shares `[2]` of an item's answers.

        Raises:
            DataError: an item without gambles, or no training item with them.
        """
        if "gambles" not in item.notes:
            raise DataError(f"item {item.id}: no gambles in its notes")
        precision, *parameters = self.parameters
        ((first, second),) = precision * self.model.value(*_outcomes([item]), *parameters)
        return np.array([expit(first - second), expit(second - first)])

    @cached_property
    def parameters(self) -> tuple[float, ...]:
        """The precision and the model's parameters of the greatest likelihood.

        Raises:
            DataError: no training item with gambles.
        """
        items = [one for one in self.training if one.target is not None and "gambles" in one.notes]
        if not items:
            raise DataError("no training people of whom the gambles are known")
        outcomes = _outcomes(items)
        chosen = np.array([item.target for item in items], np.float64)
        chosen /= chosen.sum()

        def loss(logs: Float64[np.ndarray, " P"]) -> float:
            precision, *parameters = np.exp(logs)
            values = precision * self.model.value(*outcomes, *parameters)
            # -log of the shares: of log odds x, log(1 + exp(-x)) and log(1 + exp(x)).
            odds = values[:, 1] - values[:, 0]
            return float((chosen * np.logaddexp(0.0, np.stack([odds, -odds], 1))).sum())

        means = expected_value(*outcomes)
        gain = means[:, 0] - means[:, 1]
        tried = np.log(_PRECISIONS / (np.std(gain) or 1.0))
        others = np.zeros(len(self.model.ranges))
        start = min((np.array([one, *others]) for one in tried), key=loss)
        # A power changes the size of values by much, and the precision with it.
        bounds = [(float(tried[0]) - 10.0, float(tried[-1]) + 10.0)]
        bounds += [(math.log(low), math.log(high)) for low, high in self.model.ranges]
        found = minimize(loss, start, method="L-BFGS-B", bounds=bounds)
        return tuple(np.exp(found.x).tolist())


def _outcomes(items: Sequence[Item]) -> tuple[Outcomes, Outcomes]:
    gambles = [gamble for item in items for gamble in item.notes["gambles"]]
    most = max(map(len, gambles))
    table = np.zeros((len(gambles), most, 2))
    for row, gamble in zip(table, gambles, strict=True):
        row[: len(gamble)] = gamble
    pays, chances = np.moveaxis(table.reshape(len(items), 2, most, 2), -1, 0)
    return pays, chances
