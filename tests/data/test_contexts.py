"""Contexts: what people did first in each, and the distractors among which it is looked for."""

import itertools

import numpy as np
import pytest

from befm_jax.data import contexts, games
from befm_jax.data.contexts import OTHER, SAME
from befm_jax.data.matrix_games import Game, Player, Trial
from befm_jax.data.rounds import Decision, Played
from befm_jax.data.rows import Rows
from tests.conftest import SHARED

DILEMMA = games.get("push_pull").answers
PD = Game(((3, 0), (5, 1)), ((3, 5), (0, 1)))
CHICKEN = Game(((3, 1), (5, 0)), ((3, 5), (1, 0)))


def played(person, design, choice, study="", first=1):
    labels = {"design": design, **({"study": study} if study else {})}
    later = Decision(1, first + 1, 1 - choice)
    decisions = (Decision(1, first, choice), later)
    return Played(person, "dilemma", DILEMMA, {}, design, person, labels, decisions)


def counted(rows):
    return contexts.counted(Rows.of(rows, "rows")).rows


def test_first_choices_alone_are_counted_one_a_person():
    rows = [played("1", "a", 0), played("2", "a", 0), played("3", "a", 1), played("4", "b", 1)]
    found = {one.name: one.counts.tolist() for one in counted(rows)}
    assert found == {"a": [2, 1], "b": [0, 1]}
    assert not contexts.serves(played("1", "a", 0, first=2))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_all_arrangements_of_a_table_are_one_context(rows, columns):
    arranged = PD.arranged(rows, columns)
    people = [
        Player("1", (Trial("1", PD, 0), Trial("2", CHICKEN, 1))),
        Player("2", (Trial("1", arranged, int(rows)),)),
    ]
    found = {one.kind: one for one in counted(people)}
    one = found["a dominant action"]
    (trial,) = one.asked.trials
    # Both chose the action that pays 3 or 0.
    cooperation = [sorted(row) for row in trial.game.own].index([0, 3])
    assert one.counts.sum() == one.counts[cooperation] == 2
    assert found["several equilibria"].counts.sum() == 1


def test_distractors_are_of_the_same_kind_or_of_others_and_a_set_is_shared():
    sizes = {"large": 23, "small": 3, "alone": 1}
    rows = [
        played(f"{study}{n}", f"{study} {n}", n % 2, study)
        for study, number in sizes.items() for n in range(number)
    ]  # fmt: skip
    found = {one.name: one for one in counted(rows)}
    assert len(found) == 27
    for name, one in found.items():
        same, other = (one.distractors.get(which, ()) for which in (SAME, OTHER))
        assert all(found[each].kind == one.kind for each in same)
        assert all(found[each].kind != one.kind for each in other)
        assert name not in same
        for group in (same, other):
            assert len(set(group)) == len(group) < contexts.CANDIDATES
        # Whoever is mine has me: the sets are shared, so that each is a fair lottery.
        assert all(name in found[each].distractors[SAME] for each in same)
    # 23 are dealt into three sets, as evenly as can be.
    assert {len(found[f"large {n}"].distractors[SAME]) for n in range(23)} == {6, 7}
    assert SAME not in found["alone 0"].distractors
    assert len(found["small 0"].distractors[OTHER]) == contexts.CANDIDATES - 1
    assert len(found["large 0"].distractors[OTHER]) == 4
    assert found["small 0"].experiment == "small"
    assert counted([played("1", "a", 0), played("2", "b", 0)])[0].experiment == "a"


def test_distractors_do_not_depend_on_the_order_of_rows():
    rows = [played(str(n), f"design {n}", n % 2, "ab"[n % 2]) for n in range(30)]
    backwards = {one.name: one.distractors for one in counted(rows[::-1])}
    assert {one.name: one.distractors for one in counted(rows)} == backwards


def test_a_context_without_distractors_is_left_out():
    assert counted([played("1", "a", 0)]) == []


def test_real_designs_and_tables():
    path = SHARED / "repeated_pd" / "dal_bo_frechette_2011.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = contexts.read(path)
    found = contexts.counted(rows).rows
    assert len(found) == 6
    assert sum(one.counts.sum() for one in found) == len(rows.rows) == 266
    by_name = {one.name: one.counts for one in found}
    # Of D75R48 nearly everybody begins with Push, of D5R32 nearly nobody.
    assert by_name["continuation 0.75, reward 48"].argmax() == 0
    assert by_name["continuation 0.5, reward 32"].argmax() == 1
    assert np.diff([by_name[f"continuation 0.5, reward {r}"][0] for r in (32, 40, 48)]).min() > 0
    assert {len(one.distractors[SAME]) for one in found} == {5}
    assert all(OTHER not in one.distractors for one in found)
    assert all(a.name in b.distractors[SAME] for a, b in itertools.permutations(found, 2))
