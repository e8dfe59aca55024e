"""Pictures: bins that show shares as areas, ticks, and a slide of any number of panels."""

import numpy as np
import pytest

from befm_jax.evals import charts
from befm_jax.evals.results import Distribution


def distribution(length: int, people=None, named: bool = False) -> Distribution:
    answers = [f"answer {place}" if named else str(place) for place in range(length)]
    values = None if named else list(range(length))
    counts = np.ones(length) if people is None else people
    shares = list(np.full(length, 1 / length))
    return Distribution("task", "me", {}, "A $title", "dollars", answers, values, counts, shares)


@pytest.mark.parametrize(
    ("values", "count", "width"),
    [(range(101), 21, 5), (range(151), 31, 5), (range(21), 21, 1), (range(2), 2, 1)],
)
def test_bins_are_few_and_round_values_are_inside_them(values, count, width):
    bins = charts.Bins.of(list(values))
    assert len(bins.edges) == count + 1
    np.testing.assert_array_equal(np.digitize(list(values), bins.edges) - 1, bins.index)
    np.testing.assert_array_equal(bins.index[::width], np.arange(count))
    assert (bins.edges[0], bins.edges[-1]) == (-0.5, values[-1] + 0.5)


@pytest.mark.parametrize("length", [101, 151, 21, 2, 38])
def test_evenly_spread_people_are_a_flat_line_also_at_the_ends(length):
    """The first bin of 0 to 100 holds three answers, its neighbour five."""
    bins = charts.Bins.of(range(length))
    np.testing.assert_allclose(bins.percent(np.ones(length)), 100 / length)


def test_areas_are_shares():
    weights = np.random.default_rng(0).random(101)
    bins = charts.Bins.of(range(101))
    assert bins.percent(weights) @ np.diff(bins.edges) == pytest.approx(100)


@pytest.mark.parametrize(
    ("high", "ticks"),
    [(100, [0, 25, 50, 75, 100]), (150, [0, 50, 100, 150]), (20, [0, 5, 10, 15, 20]), (1, [0, 1])],
)
def test_ticks_are_round(high, ticks):
    assert charts.nice_ticks(0, high, 5) == ticks


def test_few_answers_and_those_without_an_order_are_named():
    assert charts.ticks(distribution(3)) == [(0, "0"), (1, "1"), (2, "2")]
    named = charts.ticks(distribution(255, named=True))
    assert len(named) <= 31
    assert named[0] == (0, "answer 0")
    long = Distribution("t", "m", {}, "t", "", ["x" * 40, "y"], None, [1, 1], [0.5, 0.5])
    assert charts.ticks(long)[0][1] == "x" * 13 + "…"


def test_a_panel_says_what_a_bar_holds():
    panel = charts.panel(distribution(101), {"me": np.full(101, 1 / 101)})
    assert panel.bars[0]["title"].startswith("0–2 dollars: people 1.0 % per answer, me 1.0 %")
    assert panel.bars[1]["title"].startswith("3–7 dollars")
    assert panel.bars[0]["width"] < panel.bars[1]["width"]


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_the_slide_takes_any_number_of_panels(count):
    cells = [charts.Cell(distribution(21), None, "$near$")] * count
    figure = charts.slide(cells, "$me", "", ["a line"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles.count("A $title") == count
    figure.savefig("/dev/null", format="png")
