"""People's first numbers in the guessing game."""

import numpy as np
import pytest

from befm_jax.data import games, guesses
from befm_jax.errors import DataError
from tests.conftest import SHARED

HEAD = "p,choice,count\n"


def read(tmp_path, text):
    path = tmp_path / "guesses.csv"
    path.write_text(text)
    return guesses.read(path)


def test_numbers_are_counted_by_fraction(tmp_path):
    rows = read(tmp_path, HEAD + "2/3,33,4\n1/2,17,1\n2/3,33,1\n2/3,0,2\n")
    assert len(rows.rows) == 2 * guesses.SESSIONS
    assert len({row.person for row in rows.rows}) == len(rows.rows)
    first, second = rows.rows[:2]
    assert first.game == games.get("guessing")
    assert second.game.parameters["fraction"] == 0.5
    assert {n: count for n, count in enumerate(first.guesses) if count} == {0: 2, 33: 5}


def test_what_cant_be_used_is_counted(tmp_path):
    bad = "x,33,1\n1/0,33,1\n-1,33,1\n2/3,101,1\n2/3,33.5,1\n2/3,33,-1\n2/3,1,1,1\n"
    rows = read(tmp_path, HEAD + bad + "2/3,1,1\n")
    assert rows.left_out.counts == {
        "p: not a fraction": 2,
        "p: not above 0": 1,
        "choice: outside 0 to 100": 1,
        "choice: not a whole number": 1,
        "count: not a whole number": 1,
        "row: wrong number of cells": 1,
    }
    with pytest.raises(DataError, match=r"guesses\.csv: no number; left out, p: not a fraction"):
        read(tmp_path, HEAD + "x,33,1\n")
    with pytest.raises(DataError, match=r"guesses\.csv:1: no column 'p'"):
        read(tmp_path, "fraction,choice,count\n1,1,1\n")


def test_the_real_table():
    path = SHARED / "guessing" / "nagel_1995_first_period.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/guessing, absent here")
    rows = guesses.read(path)
    assert not rows.left_out.counts
    people = {row.game.parameters["fraction"]: np.array(row.guesses) for row in rows.rows}
    assert [(sum(of), round(of @ np.arange(101) / sum(of), 2)) for of in people.values()] == [
        (48, 27.06), (67, 36.75), (51, 60.12),
    ]  # fmt: skip
