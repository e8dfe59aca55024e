"""Logs as they are asked: everything before an answer is given, and nothing after it."""

import numpy as np

from befm_jax import tasks
from befm_jax.data.items import FreeText, examples_of
from befm_jax.data.logs import Event, Log
from befm_jax.tasks.wording import DEFAULT

EVENTS = (
    Event("Buy?", "yes", ("Yes", "No")),
    Event("Why?", "It is {{ cheap }}."),
    Event("Again?", "maybe", is_learnt=False),
    Event("How much?", "2", ("1", "2", "3"), "amount"),
)
ROW = Log("p", EVENTS, "You shop.", {"city": "Bern"})


def items(name, row=ROW):
    return list(tasks.get(name).items(row, DEFAULT, np.random.default_rng(0)))


def test_all_that_came_before_is_given_in_order():
    first, last = items("logs/choice")
    (text,) = items("logs/text")
    assert [message.role for message in last.prompt] == [
        "system",
        *["user", "assistant"] * 3,
        "user",
    ]
    said = [message.text for message in last.prompt]
    request = "Answer with exactly one word in square brackets: [Yes] or [No]."
    assert said[:3] == ["You shop.", f"Buy?\n\n{request}", "[Yes]"]
    assert said[3:7] == ["Why?", "It is {{ cheap }}.", "Again?", "maybe"]
    assert said[7].startswith("How much?\n\nAnswer with exactly one whole number from 1 to 3")
    assert last.prompt[: len(text.prompt)] == text.prompt
    assert text.prompt[: len(first.prompt)] == first.prompt
    assert (first.target.tolist(), last.target.tolist()) == ([1, 0], [0, 1, 0])
    assert (text.answers, text.target) == (FreeText(), ("It is {{ cheap }}.",))


def test_ids_and_labels():
    first, last = items("logs/choice")
    assert [first.id, last.id] == ["p/1", "p/4"]
    assert first.labels == {"person": "p", "city": "Bern", "question": "Yes, No"}
    assert last.labels["question"] == "amount"
    assert items("logs/text")[0].labels["question"] == "free text"


def test_a_person_is_learnt_in_one_conversation():
    (example,) = examples_of(items("logs/choice"), "logs/choice")
    learnt = [example.messages[place].text[start:stop] for place, start, stop in example.spans]
    assert learnt == ["[Yes]", "[2]"]


def test_rows_without_such_answers_have_no_items():
    only_text = Log("p", EVENTS[1:3])
    assert not tasks.get("logs/choice").serves(only_text)
    assert tasks.get("logs/text").serves(only_text)
    assert not tasks.get("logs/text").serves(Log("p", EVENTS[2:]))
    assert items("logs/choice", only_text) == []
