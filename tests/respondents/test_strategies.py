"""Strategies by themselves; `tests/tasks/test_play.py` has them play."""

import pytest

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.responses import Exact
from befm_jax.errors import DataError
from befm_jax.respondents.strategies import ALL, DEFINITIONS
from befm_jax.tasks import repeated


def item(**notes):
    return Item("1", (Message("user", "Round 1."),), AnswerSet.labels("Yes", "No"), None, {}, notes)


def test_all_opponents_are_known():
    assert {*repeated.COOPERATORS, *repeated.GUESSERS, repeated.RECORDED} == set(DEFINITIONS)
    assert all(text.endswith(".") for text in DEFINITIONS.values())


def test_a_strategy_is_asked_in_its_own_game_alone():
    cooperating = item(cooperation=(1.0, 0.0), others=None, equilibrium=0.0, recorded=None)
    assert not ALL["level_1"].serves(cooperating)
    assert not ALL["recorded"].serves(cooperating)
    assert ALL["recorded"].serves(item(recorded=0))
    with pytest.raises(DataError, match="item 1: level_1 is no strategy in this game"):
        next(ALL["level_1"].respond([cooperating], Exact()))
    guessing = item(averages=(), fraction=2 / 3, equilibrium=0, recorded=None)
    for name in ("tit_for_tat", "always_defect", "generous_tit_for_tat"):
        assert not ALL[name].serves(guessing)
    assert ALL["equilibrium"].serves(guessing)


def test_shares():
    shares = {
        name: next(
            ALL[name].respond([item(cooperation=(1, 0), others=0.0, equilibrium=1)], Exact())
        )
        for name in repeated.COOPERATORS
    }
    assert {name: list(one.weights) for name, one in shares.items()} == {
        "always_cooperate": [1, 0],
        "always_defect": [0, 1],
        "tit_for_tat": [0, 1],
        "generous_tit_for_tat": [pytest.approx(1 / 3), pytest.approx(2 / 3)],
        "equilibrium": [1, 0],
        "uniform": [0.5, 0.5],
    }
