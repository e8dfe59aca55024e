"""2x2 games: equilibria against a search of the definition, and games that are held out."""

import gzip

import numpy as np
import pytest

from befm_jax.data import matrix_games
from befm_jax.data.matrix_games import Game
from befm_jax.errors import DataError
from tests.conftest import SHARED

HEADER = "participant,trial,AC_you,AC_other,AD_you,AD_other,BC_you,BC_other,BD_you,BD_other,choice"
PD = Game(((3, 0), (5, 1)), ((3, 5), (0, 1)))
CHICKEN = Game(((3, 1), (5, 0)), ((3, 5), (1, 0)))
PENNIES = Game(((1, -1), (-1, 1)), ((-1, 1), (1, -1)))


def written(tmp_path, *lines, header=HEADER):
    path = tmp_path / "games.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def line(person, trial, game, choice):
    payoffs = [game.own[i][j] if mine else game.other[i][j] for i, j, mine in CELLS]
    return ",".join(map(str, (person, trial, *payoffs, choice)))


CELLS = [(i, j, mine) for i in (0, 1) for j in (0, 1) for mine in (True, False)]


def drawn(rng, highest):
    own, other = rng.integers(0, highest, (2, 2, 2)).tolist()
    return Game(tuple(map(tuple, own)), tuple(map(tuple, other)))


def is_nash(game, share):
    """Whether the other has an answer to which the share is best, and which is best to it."""
    own, other = np.array(game.own, float), np.array(game.other, float)
    gain = own[0] - own[1]
    answers = {0.0, 1.0, *([gain[1] / (gain[1] - gain[0])] if gain[0] != gain[1] else [])}
    for answer in (one for one in answers if 0 <= one <= 1):
        mine, theirs = own @ [answer, 1 - answer], [share, 1 - share] @ other
        gains = mine.max() - [share, 1 - share] @ mine, theirs.max() - theirs @ [answer, 1 - answer]
        if max(gains) < 1e-9:
            return True
    return False


class TestGame:
    def test_equilibria_are_the_textbooks(self):
        assert (PD.equilibrium, PD.kind) == ((0, 1), "a dominant action")
        # Two pure ones; mixed, 3q + (1-q) = 5q.
        assert CHICKEN.pure_equilibria == [(0, 1), (1, 0)]
        assert CHICKEN.equilibrium == pytest.approx((1 / 3, 2 / 3))
        assert CHICKEN.kind == "several equilibria"
        assert (PENNIES.equilibrium, PENNIES.kind) == ((0.5, 0.5), "no pure equilibrium")

    def test_nobody_gains_by_leaving_an_equilibrium(self):
        rng = np.random.default_rng(0)
        for _ in range(500):
            game = drawn(rng, rng.choice([3, 40]))
            assert is_nash(game, game.equilibrium[0]), game
            pure = {(i, j) for i in (0, 1) for j in (0, 1) if stays(game, i, j)}
            assert set(game.pure_equilibria) == pure

    def test_one_id_for_all_arrangements_and_both_players(self):
        game = Game(((1, 2), (3, 4)), ((5, 6), (7, 8)))
        same = [
            side.arranged(rows, columns)
            for side in (game, game.other_side())
            for rows in (False, True)
            for columns in (False, True)
        ]
        assert len(set(same)) == 8
        assert {one.id for one in same} == {game.id}
        assert game.arranged(True, False).own == ((3, 4), (1, 2))
        assert game.arranged(False, True).other == ((6, 5), (8, 7))
        assert game.other_side().other_side() == game
        assert Game(game.own, ((5, 6), (8, 7))).id != game.id


def stays(game, i, j):
    return game.own[i][j] >= game.own[1 - i][j] and game.other[i][j] >= game.other[i][1 - j]


def test_lines_become_people(tmp_path):
    lines = [line(7, 1, PD, "A"), line("7.0", 2, CHICKEN, "b"), line(8, 1, PD, "B")]
    rows = matrix_games.read(written(tmp_path, *lines))
    first, second = rows.rows
    assert (first.person, second.person) == ("7", "8")
    assert [(one.id, one.game, one.choice) for one in first.trials] == [
        ("1", PD, 0), ("2", CHICKEN, 1),
    ]  # fmt: skip
    packed = tmp_path / "games.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "games.csv").read_bytes()))
    again = matrix_games.read(packed)
    assert (again.rows, again.fingerprint) == (rows.rows, rows.fingerprint)


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    good = line(7, 1, PD, "A")
    rows = matrix_games.read(
        written(
            tmp_path, good, good, line("", 2, PD, "A"), line(7, 3, PD, "C"), "7,4,1",
            line(7, 5, Game((("nan", 1), (1, 1)), PD.other), "A"),
            line(7, 6, Game((("", 1), (1, 1)), PD.other), "A"),
        )
    )  # fmt: skip
    assert rows.left_out.counts == {
        "row: second choice in a trial": 1,
        "row: no participant or trial": 1,
        "row: choice is not A or B": 1,
        "row: wrong number of cells": 1,
        "row: a payoff is not a finite number": 2,
    }
    assert len(rows.rows) == len(rows.rows[0].trials) == 1


def test_another_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"games\.csv:1: no column 'participant', 'trial', 'AC_you"):
        matrix_games.read(written(tmp_path, "1,2", header="a,b"))
    with pytest.raises(DataError, match="no choice; no rows"):
        matrix_games.read(written(tmp_path))


def test_people_and_games_are_both_held_out(tmp_path):
    rng = np.random.default_rng(1)
    games = [drawn(rng, 40) for _ in range(60)]
    lines = []
    for person in range(300):
        for trial, at in enumerate(rng.integers(60, size=8)):
            game = games[at] if rng.integers(2) else games[at].other_side()
            game = game.arranged(*map(bool, rng.integers(2, size=2)))
            lines.append(line(person, trial, game, "AB"[rng.integers(2)]))
    rows = matrix_games.read(written(tmp_path, *lines))
    parts = {split: rows.part(split).rows for split in ("train", "validation", "test")}
    seen = {
        split: {one.game.id for row in part for one in row.trials} for split, part in parts.items()
    }
    people = {split: {row.person for row in part} for split, part in parts.items()}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not seen[one] & seen[other]
        assert not people[one] & people[other]
    assert all(row.trials for part in parts.values() for row in part)
    assert sum(map(len, seen.values())) == 60


def test_the_real_table():
    path = SHARED / "matrix_games" / "zhu_2024_games.csv.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data/matrix_games, absent here")
    rows = matrix_games.read(path)
    assert (len(rows.rows), rows.left_out.counts) == (3_731, {})
    trials = [one for row in rows.rows for one in row.trials]
    assert (len(trials), len({one.game for one in trials})) == (74_620, 9_663)
    first = trials[0]
    assert first.game == Game(((10, 21), (26, 1)), ((7, 8), (13, 3)))
    assert first.choice == 1
