"""Logs: whose records they are, in what order, and what can't be used."""

import json

import pytest

from befm_jax.data import logs
from befm_jax.data.logs import Event, Log
from befm_jax.errors import DataError


def read(tmp_path, *records):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return logs.read(path)


def asked(number, **fields):
    return {"person": "p", "prompt": f"q{number}", "answer": f"a{number}", **fields}


def prompts(row):
    return [event.prompt for event in row.events]


@pytest.mark.parametrize(
    "times",
    [
        (3, 1.5, 2),
        ("2024-05-02T00:30:00+02:00", "2024-05-01T21:00:00Z", "2024-05-01 22:00"),
        ("2024-05-03", "2024-05-01", "2024-05-02"),
    ],
)
def test_a_person_is_a_row_in_order_of_time(tmp_path, times):
    records = [asked(n, time=time) for n, time in enumerate(times)]
    (row,) = read(tmp_path, *records).rows
    assert prompts(row) == ["q1", "q2", "q0"]
    assert row.events[0] == Event("q1", "a1")


def test_without_times_the_order_is_the_file_s(tmp_path):
    others = [asked(n, person=person) for n, person in enumerate(["7", "a", 7, "007", "a"])]
    first, second = read(tmp_path, *others).rows
    assert (first.person, prompts(first)) == ("7", ["q0", "q2", "q3"])
    assert (second.person, prompts(second)) == ("a", ["q1", "q4"])


def test_a_conversation_is_events_of_which_some_are_learnt(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine", "weight": 0},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Tired"},
    ]
    rows = read(tmp_path, {"messages": messages}, {"messages": messages[1:3] + messages[5:]})
    first, second = rows.rows
    assert first.system == "Be brief."
    assert first.events == (
        Event("Hello\n\nHow are you?", "Fine", is_learnt=False),
        Event("And now?", "Tired"),
    )
    assert first.person != second.person


def test_options_are_a_scale_or_names(tmp_path):
    (row,) = read(
        tmp_path,
        asked(0, options=[3, 1, 2], answer="2"), asked(1, options=["Yes", "No"], answer="no"),
        asked(2, question="age"),
    ).rows  # fmt: skip
    first, second, third = row.events
    assert (first.answers.values, first.answers.written) == ((1, 2, 3), ("[1]", "[2]", "[3]"))
    assert second.answers.names == ("Yes", "No")
    assert (third.answers, third.question) == (None, "age")


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    rows = read(
        tmp_path, asked(0, time=1, system="s", labels={"sex": "f"}), asked(1),
        asked(2, time="soon"), asked(3, time=True), asked(4, time=4, options=["Yes", "No"]),
        asked(5, time=5, options="Yes"), asked(6, time=6, person=" "), asked(7, time=7, person=[]),
        asked(8, time=8, system="other"), asked(9, time=9, labels={"sex": "m"}),
        asked(10, time=10, labels={"person": "x"}), asked(11, time=11, labels=["x"]),
        asked(12, time=12, answer=" "), {"person": "p", "text": "x"},
        {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]},
        asked(13, time=13, weight=2, labels={"city": "x"}),
    )  # fmt: skip
    (row,) = rows.rows
    assert row == Log("p", (Event("q0", "a0"), Event("q13", "a13")), "s", {"sex": "f", "city": "x"})
    counts = dict(rows.left_out.counts)
    without_fields = [reason for reason in counts if reason.startswith("record: has person, text")]
    assert counts.pop(*without_fields) == 1
    assert counts == {
        "record: no time, which others of this person have": 1,
        "record: time is neither a number nor a date as in ISO 8601": 2,
        "record: outside Yes, No": 1,
        "record: options are not a list of texts or numbers": 1,
        "record: person is not a text or a number": 2,
        "record: another system message than before": 1,
        "record: other labels than before": 1,
        "record: labels have person, which items have of their own": 1,
        "record: labels are not texts by name": 1,
        "record: assistant: blank; a question and an answer are needed": 1,
        "record: a reply has no question before it": 1,
        "weight: not used, records count alike": 1,
    }


def test_what_is_no_log_is_refused_with_its_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n[1]\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: holds a list"):
        logs.read(path)
    with pytest.raises(DataError, match="no record; left out, record: has text"):
        read(tmp_path, {"text": "x"})


def test_records_without_a_person_are_persons_of_their_own_also_where_they_are_alike(tmp_path):
    alike = {"prompt": "Buy?", "answer": "Yes", "options": ["Yes", "No"]}
    rows = read(tmp_path, alike, {**alike, "answer": "No"}, alike, alike).rows
    assert [len(row.events) for row in rows] == [1, 1, 1, 1]
    assert len({row.person for row in rows}) == 4


def test_a_log_that_has_grown_or_was_saved_again_is_of_the_same_people(tmp_path):
    before = [asked(n, person=f"p{n}", labels={"a": "x", "b": "y"}) for n in range(40)]
    grown = [
        {**one, "labels": dict(reversed(one["labels"].items()))} for one in before
    ] + [asked(n + 100, person=f"p{n}") for n in range(40)]  # fmt: skip
    old, new = read(tmp_path, *before), read(tmp_path, *grown)
    assert new.shares_people(old.sketch)
    assert read(tmp_path, *before).fingerprint == read(tmp_path, *grown[:40]).fingerprint


def test_a_person_without_times_is_read_beside_one_with_them(tmp_path):
    rows = read(tmp_path, asked(0, person="a", time=3), asked(1, person="b"), asked(2, person="b"))
    assert {row.person: len(row.events) for row in rows.rows} == {"a": 1, "b": 2}
