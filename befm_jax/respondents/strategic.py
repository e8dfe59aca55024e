"""Models of how people choose in games of two actions each, fitted by maximum likelihood.

Each has one parameter, the precision: how many nats of log odds a point of expected payoff is
worth.  At 0 both actions are equally likely, and without limit the better one is certain.

- quantal response: both players respond to each other's shares (R. McKelvey, T. Palfrey, "Quantal
  response equilibria for normal form games", Games and Economic Behavior 10, 1995).  Where several
  pairs of shares do so, the one that is reached first from equal shares.
- level 1: the other's actions are taken to be equally likely; level 2: the other is taken to be at
  level 1 of the same precision (D. Stahl, P. Wilson, "On players' models of other players", Games
  and Economic Behavior 10, 1995, with a logistic error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize_scalar
from scipy.special import expit

from befm_jax.data.items import AnswerSet, Item
from befm_jax.errors import DataError

Payoffs = Float64[np.ndarray, "N 2 2"]
LogOdds = Float64[np.ndarray, " N"]
# From own payoffs, the other's, and a precision to the log odds of the first own action.
Model = Callable[[Payoffs, Payoffs, float], LogOdds]
# Steps from equal shares to a certain action, in which the first solution is looked for, and
# halvings of the step that has it.
_STEPS, _HALVINGS = 32, 30
# Precisions that are tried, times the standard deviation of the payoffs.
_PRECISIONS = np.geomspace(1e-2, 1e2, 13)


def level_1(own: Payoffs, other: Payoffs, precision: float) -> LogOdds:
    """`[N]` log odds of the first action, the other's actions being equally likely."""
    return precision * _gain(own, np.full(len(own), 0.5))


def level_2(own: Payoffs, other: Payoffs, precision: float) -> LogOdds:
    """`[N]` log odds of the first action, the other being at level 1."""
    return precision * _gain(own, expit(level_1(_turned(other), own, precision)))


def quantal_response(own: Payoffs, other: Payoffs, precision: float) -> LogOdds:
    """`[N]` log odds of the first action in the logit quantal response equilibrium."""
    turned = _turned(other)

    def response(share: LogOdds) -> LogOdds:
        return precision * _gain(own, expit(precision * _gain(turned, share)))

    # On the side of the response to equal shares there is a solution: a response is never certain.
    side = np.sign(response(np.full(len(own), 0.5)))

    def beyond(step: LogOdds) -> LogOdds:
        share = 0.5 + side * step
        return side * (expit(response(share)) - share)

    low, high = np.zeros(len(own)), np.full(len(own), 0.5)
    found = np.zeros(len(own), bool)
    for number in range(1, _STEPS + 1):
        step = np.full(len(own), 0.5 * number / _STEPS)
        crossed = ~found & (beyond(step) <= 0)
        low = np.where(crossed, step - 0.5 / _STEPS, low)
        high = np.where(crossed, step, high)
        found |= crossed
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = beyond(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return response(0.5 + side * (low + high) / 2)


MODELS: Mapping[str, Model] = {
    "quantal_response": quantal_response,
    "level_1": level_1,
    "level_2": level_2,
}


@dataclass(frozen=True)
class Fitted:
    """A model fitted to the choices of training items, when it is first asked.

    Attributes:
        model: one of `MODELS`.
        training: items whose `notes["payoffs"]` are `own` and `other`, by the position of the
            answer and the other's action; others are passed over.
    """

    model: Model
    training: Sequence[Item]

    def shares(self, item: Item, answers: AnswerSet) -> Float64[np.ndarray, " A"]:
        """The shares `[2]` of an item's answers.

        Raises:
            DataError: an item without payoffs, or no training item with them.
        """
        if "payoffs" not in item.notes:
            raise DataError(f"item {item.id}: no payoffs in its notes")
        own, other = _payoffs([item])
        first = expit(self.model(own, other, self.precision)[0])
        return np.array([first, 1.0 - first])

    @cached_property
    def precision(self) -> float:
        """The precision of the greatest likelihood, per point.

        Raises:
            DataError: no training item with payoffs.
        """
        items = [one for one in self.training if one.target is not None and "payoffs" in one.notes]
        if not items:
            raise DataError("no training people of whom the payoffs are known")
        own, other = _payoffs(items)
        chosen = np.array([item.target for item in items], np.float64)
        tried = np.log(_PRECISIONS / np.std(np.concatenate([own, other])))

        def loss(log_precision: float) -> float:
            odds = self.model(own, other, float(np.exp(log_precision)))
            # -log of the shares: of log odds x, log(1 + exp(-x)) and log(1 + exp(x)).
            return float((chosen * np.logaddexp(0.0, np.stack([-odds, odds], 1))).sum())

        best = int(np.argmin([loss(one) for one in tried]))
        bounds = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _payoffs(items: Sequence[Item]) -> tuple[Payoffs, Payoffs]:
    own, other = (
        np.array([item.notes["payoffs"][side] for item in items], np.float64)
        for side in ("own", "other")
    )
    return own, other


def _turned(payoffs: Payoffs) -> Payoffs:
    """The payoffs of the other player, by that player's action."""
    return payoffs.swapaxes(1, 2)


def _gain(own: Payoffs, share: LogOdds) -> LogOdds:
    """What the first action pays more than the second, at a share of the other's first action."""
    more = own[:, 0] - own[:, 1]
    return more[:, 0] * share + more[:, 1] * (1.0 - share)
