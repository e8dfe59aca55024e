"""Bomb risk with age, sex and country."""

import pytest

from befm_jax.data import bomb_risk
from befm_jax.data.bomb_risk import Opened
from befm_jax.errors import DataError
from tests.conftest import SHARED

HEADER = "study,id,age,gender,country,treatment,boxes,choice"


def read(tmp_path, *lines, header=HEADER):
    path = tmp_path / "bomb.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return bomb_risk.read(path)


def test_a_line_is_a_person(tmp_path):
    rows = read(tmp_path, "S,a,20,0,Austria,,25,13", "S,b,,,,high stakes,100,40")
    assert rows.rows == [
        Opened(
            "a", 25, 13, 20,
            {"sex": "male", "age_band": "18-24", "country": "Austria", "study": "S"},
        ),
        Opened("b", 100, 40, None, {"stakes": "high", "study": "S", "treatment": "high stakes"}),
    ]  # fmt: skip
    assert len(rows.rows[0].game.answers) == 26
    assert rows.left_out.counts == {}


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    rows = read(
        tmp_path, "S,a,20,0,,,25,13", "S,a,20,0,,,25,14", "S,,20,0,,,25,14", "S,b,20,0,,,50,14",
        "S,c,20,0,,,25,26", "S,d,20,0,,,100,6.5", "S,e,20,0,,lossaversion,100,6", "S,f",
        "S,g,1989,0,,,25,1",
    )  # fmt: skip
    assert rows.left_out.counts == {
        "row: second choice of the same person": 1,
        "row: no id": 1,
        "row: not 25 or 100 boxes": 1,
        "choice: outside 0 to 25 boxes": 1,
        "choice: not a whole number": 1,
        "row: about losses": 1,
        "row: wrong number of cells": 1,
        "age: not 13 to 100 (the person is kept)": 1,
    }
    assert [row.person for row in rows.rows] == ["a", "g"]
    assert rows.rows[1].age is None


def test_another_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"bomb\.csv:1: no column 'study', 'id'"):
        read(tmp_path, header="a,b")
    with pytest.raises(DataError, match="nobody chose; no rows"):
        read(tmp_path)


def test_the_real_table():
    path = SHARED / "risk_tasks" / "bret.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/risk_tasks, absent here")
    rows = bomb_risk.read(path)
    assert rows.left_out.counts == {"row: about losses": 102, "choice: not a whole number": 18}
    assert len(rows.rows) == 3_934 - 120
    assert sum(row.labels.get("stakes") == "high" for row in rows.rows) == 843 + 71
