"""Gambles as they are asked: names and order carry no meaning, and all that is known is told."""

import re

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data.gambles import Problem
from befm_jax.tasks.wording import DEFAULT

TASK = tasks.get("games/risky")
FIRST, SECOND = ((26.0, 0.95), (-1.0, 0.05)), ((8.5, 0.003), (0.0, 0.997))


def items(number=200, first=FIRST, second=SECOND, **asked):
    settings = {"is_hidden": False, "linked": 0, "has_feedback": True, **asked}
    for n in range(number):
        row = Problem(str(n), first, second, people=20, share=0.3, **settings)
        (item,) = TASK.items(row, DEFAULT, np.random.default_rng(n))
        yield item


def told(item):
    """By name, what the text says of a gamble."""
    found = {}
    for name, said in re.findall(r"^(Red|Blue) pays (.*) points\.$", item.prompt[-1].text, re.M):
        pairs = re.findall(r"(-?[\d.]+) \(chance ([\d.]+) %\)", said)
        found[name] = tuple((float(pays), float(chance) / 100) for pays, chance in pairs)
    return found


def test_the_prompt_the_notes_and_the_target_say_the_same():
    for item in items():
        said = told(item)
        for at, name in enumerate(item.answers.names):
            np.testing.assert_allclose(said[name], item.notes["gambles"][at])
            taken = {FIRST: 14, SECOND: 6}[item.notes["gambles"][at]]
            assert item.target[at] == pytest.approx(taken)
        assert item.target.sum() == 20


def test_names_and_what_is_told_first_are_drawn():
    asked = list(items())
    swapped = np.array([item.notes["gambles"][0] == SECOND for item in asked])
    red_first = np.array([next(iter(told(item))) == "Red" for item in asked])
    for drawn in (swapped, red_first, swapped ^ red_first):
        assert 70 < drawn.sum() < 130


def test_hidden_probabilities_are_neither_told_nor_known():
    for item in items(20, is_hidden=True):
        text, place = item.prompt[-1].text, item.notes["gambles"].index(FIRST)
        assert "pays 8.5 or 0 points; the chances are not told." in text
        assert "0.3" not in text
        assert item.notes["gambles"][1 - place] == ((8.5, 0.5), (0.0, 0.5))
        assert item.labels["probabilities"] == "hidden"


def test_feedback_and_links_are_told():
    texts = {
        (linked, feedback): next(items(1, linked=linked, has_feedback=feedback)).prompt[-1].text
        for linked in (-1, 0, 1)
        for feedback in (False, True)
    }
    assert len(set(texts.values())) == 6
    assert "so does the other" in texts[1, True]
    assert "pays little" in texts[-1, False]
    assert "drawn together" not in texts[0, True]
    assert "you are shown" in texts[0, True]
    sure = next(items(1, first=((1.0, 1.0),))).prompt[-1].text
    assert "pays 1 point for sure." in sure
