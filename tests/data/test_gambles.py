"""Gambles: lotteries worked by hand, and those that the published table comes with."""

import json

import pytest

from befm_jax.data import gambles
from befm_jax.errors import DataError
from tests.conftest import SHARED

HEADER = "Problem,Feedback,n,Block,Ha,pHa,La,Hb,pHb,Lb,LotShapeB,LotNumB,Amb,Corr,bRate,bRate_std"


def read(tmp_path, *lines, header=HEADER):
    path = tmp_path / "gambles.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return gambles.read(path)


def line(id="1", feedback="True", n="15", lottery="0,1", amb="False", corr="0", rate=".4", a="26"):
    return f"{id},{feedback},{n},2,{a},.95,-1,8,.5,-5,{lottery},{amb},{corr},{rate},.1"


def test_a_line_is_a_problem(tmp_path):
    (row,) = read(tmp_path, line(amb="True", corr="-1")).rows
    assert row.id == "1/feedback"
    assert row.first == ((26, 0.95), (-1, 0.05))
    assert row.second == ((8, 0.5), (-5, 0.5))
    assert (row.is_hidden, row.linked, row.has_feedback) == (True, -1, True)
    assert (row.people, row.share) == (15, 0.4)


@pytest.mark.parametrize(
    ("lottery", "outcomes"),
    [
        ("1,3", ((9, 0.125), (8, 0.25), (7, 0.125))),
        ("2,3", ((12, 0.125), (8, 0.125), (6, 0.25))),
        ("3,3", ((10, 0.25), (8, 0.125), (4, 0.125))),
    ],
)
def test_lotteries_are_those_worked_by_hand(tmp_path, lottery, outcomes):
    (row,) = read(tmp_path, line(lottery=lottery)).rows
    assert row.second == (*outcomes, (-5, 0.5))
    mean = sum(pays * chance for pays, chance in outcomes) / 0.5
    assert mean == 8


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    rows = read(
        tmp_path, line(), line(rate=".5"), line(feedback="False"), line("2", n="1.5"),
        line("3", rate="1.2"), line("4", a="x"), line("5", a="inf"), line("6", lottery="4,1"),
        line("7", lottery="1,99"), line("8", amb="?"), line("9", corr="2"), line("10", n="0"),
        "1,2",
    )  # fmt: skip
    assert [row.id for row in rows.rows] == ["1/feedback", "1"]
    assert rows.left_out.counts == {
        "row: second line of a problem": 1,
        "row: n is not a whole number of people": 2,
        "row: a probability or a rate is not 0 to 1": 1,
        "row: a number is missing or not finite": 2,
        "row: a lottery that can't be": 2,
        "row: Feedback, Amb or Corr is not one of theirs": 2,
        "row: wrong number of cells": 1,
    }


def test_another_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gambles\.csv:1: no column 'Problem', 'Feedback'"):
        read(tmp_path, header="a,b")
    with pytest.raises(DataError, match="no problem; no rows"):
        read(tmp_path)


def test_the_same_gambles_are_in_one_split(tmp_path):
    a, b = "26,.95,-1", "7,.5,-5"
    lines = [
        f"1,True,9,2,{a},{b},0,1,False,0,.4,.1",
        f"1,False,9,1,{a},{b},0,1,False,0,.4,.1",
        f"2,True,9,2,{b},{a},0,1,True,1,.4,.1",
        f"3,True,9,2,{a},{a},0,1,False,0,.4,.1",
    ]
    persons = [row.person for row in read(tmp_path, *lines).rows]
    assert persons[0] == persons[1] == persons[2] != persons[3]


def test_the_real_table_is_that_of_its_published_gambles():
    path = SHARED / "choices13k" / "c13k_selections.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/choices13k, absent here")
    rows = gambles.read(path)
    published = json.loads(path.with_name("c13k_problems.json").read_text())
    assert len(rows.rows) == len(published) == 14_568
    assert rows.left_out.counts == {}
    for number, row in enumerate(rows.rows):
        for gamble, name in ((row.first, "A"), (row.second, "B")):
            chances = {}
            for chance, pays in published[str(number)][name]:
                chances[pays] = chances.get(pays, 0.0) + chance
            expected = {pays: chance for pays, chance in chances.items() if chance > 1e-12}
            assert {pays for pays, _ in gamble} == set(expected)
            assert max(abs(chance - expected[pays]) for pays, chance in gamble) < 1e-9
    parts = [{row.person for row in rows.part(name).rows} for name in ("train", "test")]
    assert not parts[0] & parts[1]
    assert abs(len(parts[1]) / 12_992 - 0.1) < 0.01
