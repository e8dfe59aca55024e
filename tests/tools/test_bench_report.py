"""Ratios are of the same round and higher is better; goals hold or are said to be missed."""

import json

import pytest
from bench_report import Bench, Goal, Ratio


def test_a_ratio_compares_run_by_run():
    found = Ratio.of(ours=[1.0, 2.0, 4.0], peer=[3.0, 2.0, 2.0])
    assert (found.median, found.min, found.max) == (1.0, 0.5, 3.0)
    with pytest.raises(ValueError, match="argument"):
        Ratio.of([1.0], [1.0, 2.0])


def bench(*goals):
    runs = {"ours": [{"seconds": 0.5, "peak": 1_000_000}], "peer": [{"seconds": 1.0}]}
    return Bench("load", {"rounds": 1}, runs, {"warm": Ratio.of([0.5], [1.0])}, list(goals))


def test_goals_decide():
    most, least = Goal("memory", 3.0, 2.0, "MB"), Goal("speed", 3.0, 2.0, "times", at_least=True)
    assert (most.holds, least.holds) == (False, True)
    assert bench(least).holds
    assert not bench(least, most).holds
    assert "memory: 3.00 MB (goal <= 2.00) MISSED" in bench(most).table()


def test_the_table_and_the_file_hold_every_run():
    found = bench(Goal("speed", 3.0, 2.0, "times", at_least=True))
    table = found.table()
    assert "warm: 2.00 times the peer (2.00 to 2.00)" in table
    assert "1,000,000" in table
    written = json.loads(json.dumps(found.as_dict()))
    assert written["runs"] == found.runs
    assert written["ratio"]["warm"]["median"] == 2
    assert written["goals"][0]["holds"] is True
