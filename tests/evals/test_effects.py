"""Predicted against published effects, by hand and against a loop."""

import numpy as np
import pytest

from befm_jax.evals.effects import FINISH, Effects

NAN = np.nan


def figures(effects):
    return {name: float(FINISH[name](of.sum(0))) for name, of in effects.columns.items()}


def some(rng, number=40):
    published = rng.normal(0, 0.2, number)
    error = rng.uniform(0.02, 0.05, number)
    effects = {
        "predicted": published + rng.normal(0, 0.1, number),
        "published": published,
        "standard_error": error,
        "low": published - 2 * error,
        "high": published + 2 * error,
        "direction": np.sign(published),
    }
    for name in ("published", "standard_error", "low"):
        effects[name] = np.where(rng.random(number) < 0.2, NAN, effects[name])
    effects["high"] = np.where(np.isnan(effects["low"]), NAN, effects["high"])
    effects["standard_error"] = np.where(
        np.isnan(effects["published"]), NAN, effects["standard_error"]
    )
    effects["direction"] = np.where(rng.random(number) < 0.2, 0, effects["direction"])
    return effects


def test_by_hand():
    effects = Effects(
        predicted=np.array([0.1, -0.2, 0.0, 0.3]),
        published=np.array([0.2, 0.1, NAN, 0.3]),
        standard_error=np.array([0.1, NAN, NAN, 0.1]),
        low=np.array([0.15, NAN, NAN, 0.1]),
        high=np.array([0.25, NAN, NAN, 0.5]),
        direction=np.array([1.0, 1, -1, 0]),
    )
    assert figures(effects) == pytest.approx({
        "sign": (1 + 0 + 0.5) / 3,
        "correlation": (0.02 - 0.02 + 0.09) / np.sqrt((0.04 + 0.01 + 0.09) * (0.01 + 0.04 + 0.09)),
        "slope": (0.02 + 0.09) / (0.04 - 0.01 + 0.09 - 0.01),
        "coverage": 1 / 2,
    })  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loop_has_it(seed):
    given = some(np.random.default_rng(seed))
    signs, products, squares, predicted, slope, covered = [], 0.0, 0.0, 0.0, [0.0, 0.0], []
    for y, x, s, low, high, direction in zip(*given.values(), strict=True):
        if direction:
            signs.append((y > 0) == (direction > 0))
        if not np.isnan(x):
            products, squares, predicted = products + x * y, squares + x * x, predicted + y * y
        if not np.isnan(s):
            slope = [slope[0] + x * y, slope[1] + x * x - s * s]
        if not np.isnan(low):
            covered.append(low <= y <= high)
    assert figures(Effects(**given)) == pytest.approx({
        "sign": np.mean(signs),
        "correlation": products / np.sqrt(squares * predicted),
        "slope": slope[0] / slope[1],
        "coverage": np.mean(covered),
    })  # fmt: skip


def test_which_arm_is_the_control_does_not_matter():
    given = some(np.random.default_rng(0))
    turn = np.where(np.random.default_rng(1).random(40) < 0.5, -1.0, 1.0)
    low, high = given["low"] * turn, given["high"] * turn
    turned = {name: turn * given[name] for name in ("predicted", "published", "direction")}
    ends = {"low": np.fmin(low, high), "high": np.fmax(low, high)}
    again = Effects(**{**given, **turned, **ends})
    assert figures(again) == pytest.approx(figures(Effects(**given)))


def test_errors_in_what_was_published_do_not_make_the_slope_smaller():
    rng = np.random.default_rng(0)
    true, error = rng.normal(0, 0.1, 20_000), np.full(20_000, 0.1)
    published = true + rng.normal(0, error)
    none = np.full(20_000, NAN)
    effects = Effects(0.5 * true, published, error, none, none, np.sign(published))
    assert figures(effects)["slope"] == pytest.approx(0.5, abs=0.02)
    uncorrected = Effects(0.5 * true, published, 0 * error, none, none, np.sign(published))
    assert figures(uncorrected)["slope"] == pytest.approx(0.25, abs=0.02)


def test_no_predicted_difference_is_chance_and_has_no_correlation():
    given = {**some(np.random.default_rng(0)), "predicted": np.full(40, 1e-17)}
    found = figures(Effects(**given))
    assert found["sign"] == 0.5
    assert np.isnan(found["correlation"])
    assert found["slope"] == pytest.approx(0.0, abs=1e-12)
