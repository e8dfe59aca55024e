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
    ("values", "count"), [(range(101), 21), (range(151), 31), (range(21), 21), (range(2), 2)]
)
def test_bins_are_few_and_equal_and_hold_multiples_of_five_whole(values, count):
    bins = charts.Bins.of(list(values))
    assert bins.shares.shape == (count, len(values))
    widths = np.diff(bins.edges)
    np.testing.assert_allclose(widths, len(values) / count)
    assert (bins.edges[0], bins.edges[-1]) == pytest.approx((-0.5, values[-1] + 0.5))
    np.testing.assert_allclose(bins.shares.sum(0), 1)  # every value is somewhere, once
    np.testing.assert_allclose(bins.shares.sum(1), widths)  # and every bin holds equally many
    step = 5 if count < len(values) else 1
    np.testing.assert_allclose(bins.shares[:, ::step], np.eye(count))


@pytest.mark.parametrize("length", [101, 151, 21, 2, 38])
def test_evenly_spread_people_are_a_flat_line_also_at_the_ends(length):
    bins = charts.Bins.of(range(length))
    np.testing.assert_allclose(bins.percent(np.ones(length)), 100 / len(bins.shares))


def test_a_share_of_people_at_an_end_is_as_high_as_in_the_middle():
    bins = charts.Bins.of(range(101))
    heights = [bins.percent(np.eye(101)[at]).max() for at in (0, 50, 100)]
    assert heights == pytest.approx([100, 100, 100])


def test_bars_add_up_to_everybody():
    weights = np.random.default_rng(0).random(101)
    assert charts.Bins.of(range(101)).percent(weights).sum() == pytest.approx(100)
    uneven = charts.Bins.of([0, 0.1, 0.25])
    assert uneven.percent([1, 2, 1]).tolist() == pytest.approx([25, 50, 0, 25])


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
    assert panel.bars[0]["title"] == "about 0–4 dollars: people 4.8 %, me 4.8 %"
    assert panel.bars[1]["title"].startswith("about 5–9 dollars")
    assert panel.bars[0]["width"] == pytest.approx(panel.bars[1]["width"], abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_the_slide_takes_any_number_of_panels(count):
    cells = [charts.Cell(distribution(21), None, "$near$")] * count
    figure = charts.slide(cells, "$me", "", ["a line"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles.count("A $title") == count
    figure.savefig("/dev/null", format="png")
