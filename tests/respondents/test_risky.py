"""Models of risky choice, against loops over their definitions and searches of the likelihood."""

import numpy as np
import pytest
from scipy.special import expit

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.responses import Exact
from befm_jax.errors import DataError
from befm_jax.respondents import baselines, risky

OPTIONS = AnswerSet.labels("Red", "Blue")
RNG = np.random.default_rng(0)
TRUE = {
    "expected_value": (0.15,),
    "expected_utility": (0.4, 0.7),
    "prospect_theory": (0.4, 0.8, 2.0, 0.6),
}


def drawn_gamble():
    pays = RNG.choice(np.arange(-40, 41), RNG.integers(1, 6), replace=False)
    chances = RNG.dirichlet(np.ones(len(pays)))
    return tuple(sorted(zip(pays.tolist(), chances.tolist(), strict=True), reverse=True))


GAMBLES = [(drawn_gamble(), drawn_gamble()) for _ in range(400)]


def asked(number, target=None, **notes):
    notes = notes or {"gambles": GAMBLES[number]}
    return Item(str(number), (Message("user", "?"),), OPTIONS, target, {}, notes)


def by_rank(gamble, power=1.0, aversion=1.0, curvature=1.0):
    """Prospect theory as it is defined, outcome by outcome."""

    def weight(p):
        p = min(max(p, 0.0), 1.0)
        return p**curvature / (p**curvature + (1 - p) ** curvature) ** (1 / curvature)

    total = 0.0
    for pays, _ in gamble:
        if pays >= 0:
            better = sum(chance for other, chance in gamble if other > pays)
            at_least = sum(chance for other, chance in gamble if other >= pays)
            total += pays**power * (weight(at_least) - weight(better))
        else:
            worse = sum(chance for other, chance in gamble if other < pays)
            at_most = sum(chance for other, chance in gamble if other <= pays)
            total -= aversion * (-pays) ** power * (weight(at_most) - weight(worse))
    return total


def values(name, parameters, number):
    """A model's values of the gambles of one problem, by a loop."""
    first, second = GAMBLES[number]
    if name == "prospect_theory":
        return by_rank(first, *parameters), by_rank(second, *parameters)
    (power,) = parameters or (1.0,)
    return tuple(
        sum(chance * np.sign(pays) * abs(pays) ** power for pays, chance in gamble)
        for gamble in (first, second)
    )


@pytest.fixture(scope="module", params=risky.MODELS)
def people(request):
    """A model's name, and items of people who choose as it says."""
    precision, *parameters = TRUE[request.param]
    odds = [np.subtract(*values(request.param, parameters, n)) for n in range(len(GAMBLES))]
    counts = np.random.default_rng(1).binomial(50, expit(precision * np.array(odds)))
    return request.param, [asked(n, np.array([c, 50.0 - c])) for n, c in enumerate(counts)]


def test_the_fit_recovers_the_parameters_and_is_the_best_nearby(people):
    name, training = people
    fitted = risky.Fitted(risky.MODELS[name], training)
    assert fitted.parameters == pytest.approx(TRUE[name], rel=0.15)

    def log_likelihood(precision, *parameters):
        odds = np.array([np.subtract(*values(name, parameters, n)) for n in range(len(GAMBLES))])
        counts = np.array([item.target for item in training])
        return -(counts * np.logaddexp(0, precision * np.stack([-odds, odds], 1))).sum()

    best = log_likelihood(*fitted.parameters)
    assert best >= log_likelihood(*TRUE[name])
    for at in range(len(TRUE[name])):
        for factor in (0.97, 1.03):
            moved = list(fitted.parameters)
            moved[at] *= factor
            assert log_likelihood(*moved) < best + 1e-6
    (response,) = baselines.fit(name, training, "").respond([asked(7)], Exact())
    precision, *parameters = fitted.parameters
    first = expit(precision * np.subtract(*values(name, parameters, 7)))
    np.testing.assert_allclose(response.weights, [first, 1 - first], atol=1e-12)


def test_a_die_as_tversky_and_kahneman_roll_it():
    # "If x is even, you receive $x; if odd, you pay $x" (1992, section 1.2), all with one curve.
    die = ((6, 1 / 6), (4, 1 / 6), (2, 1 / 6), (-1, 1 / 6), (-3, 1 / 6), (-5, 1 / 6))

    def weight(p, g=0.61):
        return p**g / (p**g + (1 - p) ** g) ** (1 / g)

    w1, w2, w3 = weight(1 / 6), weight(1 / 3), weight(1 / 2)
    gains = 2**0.88 * (w3 - w2) + 4**0.88 * (w2 - w1) + 6**0.88 * w1
    losses = 1 * (w3 - w2) + 3**0.88 * (w2 - w1) + 5**0.88 * w1
    pays, chances = np.array(die)[None, None].transpose(3, 0, 1, 2)
    found = risky.prospect_theory(pays, chances, 0.88, 2.25, 0.61)
    assert found[0, 0] == pytest.approx(gains - 2.25 * losses)


def test_what_has_no_gambles_is_not_served():
    training = [asked(0, np.array([1.0, 2.0]))]
    fitted = baselines.fit("prospect_theory", training, "")
    with pytest.raises(DataError, match="item 0: no gambles"):
        list(fitted.respond([asked(0, other=1)], Exact()))
    without = baselines.fit("expected_value", [asked(0, np.array([1.0, 0]), other=1)], "")
    assert not without.serves(asked(1))
