"""Multiple-choice questions in the layouts that they come in, and what can't be used of them."""

import csv
import json
from collections import Counter

import pytest

from befm_jax.data import knowledge
from befm_jax.errors import DataError
from tests.conftest import SHARED

HEADER = ["subject", "question", "A", "B", "C", "D", "answer"]
SUMS = ["sums", "2 + 2?", "3", "4", "5", "6", "B"]
PRIMES = ["primes", "Which are prime?", "7", "8", "9", "11", "AD"]


def written(tmp_path, *rows, name="questions.csv"):
    path = tmp_path / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def written_json(tmp_path, *records):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, absent here")
    return path


def test_a_table_with_one_or_several_right_letters(tmp_path):
    one, two = knowledge.read(written(tmp_path, HEADER, SUMS, PRIMES)).rows
    assert (one.subject, one.question, one.options) == ("sums", "2 + 2?", ("3", "4", "5", "6"))
    assert (one.right, two.right) == ((1,), (0, 3))
    # One question of the file has several right options, so all may have.
    assert one.several
    assert two.several
    (alone,) = knowledge.read(written(tmp_path, HEADER, SUMS)).rows
    assert not alone.several


@pytest.mark.parametrize("answer", ["AD", "DA", "a, d", "A; D", "[AD]", "(A) (D)"])
def test_letters_as_people_write_them(tmp_path, answer):
    (row,) = knowledge.read(written(tmp_path, HEADER, [*PRIMES[:-1], answer])).rows
    assert row.right == (0, 3)


def test_questions_may_have_fewer_options_than_others(tmp_path):
    header = ["question", "A", "B", "C", "answer"]
    path = written(tmp_path, header, ["Up?", "yes", "no", "", "A"], ["One?", "1", "2", "3", "A"])
    rows = knowledge.read(path).rows
    assert [len(row.options) for row in rows] == [2, 3]
    assert {row.subject for row in rows} == {"questions"}


def test_a_table_without_a_header(tmp_path):
    # A first row of which two cells are the same would be no header.
    first = ["Which number is not like the others?", "1", "1", "2", "C"]
    path = written(tmp_path, first, ["2 + 2?", "3", "4", "5", "B"], name="sums_test.csv")
    rows = knowledge.read(path).rows
    assert [row.right for row in rows] == [(2,), (1,)]
    assert {row.subject for row in rows} == {"sums_test"}


def test_a_first_question_that_can_not_be_used_is_no_table_of_something_else(tmp_path):
    rows = knowledge.read(written(tmp_path, ["Same?", "1", "1", "A"], ["2 + 2?", "3", "4", "B"]))
    assert len(rows.rows) == 1
    assert rows.left_out.counts == {"question: a wrong option is the same as a right one": 1}


def test_tables_of_spreadsheets(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("question\tA\tB\tanswer\nUp?\tyes, it is\tno\tA\n")
    assert knowledge.read(path).rows[0].options == ("yes, it is", "no")
    path.write_text("sep=;\nquestion;A;B;answer\nUp?;yes;no;B\n")
    assert knowledge.read(path).rows[0].right == (1,)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        knowledge.read(tmp_path / "nowhere.csv")


def test_json_with_a_list_of_letters(tmp_path):
    path = written_json(
        tmp_path,
        {"passage": None, "question": "Prime?", "options": ["(A)7", "(B) 8"], "label": ["A"]},
        {"passage": "x is 2.", "question": "2x?", "options": ["4", "(A) is right"], "label": "A"},
        {"question": "Odd?", "options": ["(A)1", "(B)3"], "label": ["A", "B"], "subject": "odd"},
    )
    prime, passage, odd = knowledge.read(path).rows
    assert prime.options == ("7", "8")
    assert passage.question == "x is 2.\n\n2x?"
    assert passage.options == ("4", "(A) is right")
    assert odd.right == (0, 1)
    assert [row.subject for row in (prime, odd)] == ["questions", "odd"]


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    path = written(
        tmp_path,
        HEADER,
        SUMS,
        ["x", "", "1", "2", "3", "4", "A"],
        ["x", "Gap?", "1", "", "3", "4", "A"],
        ["x", "Alone?", "1", "", "", "", "A"],
        ["x", "None?", "1", "2", "3", "4", ""],
        ["x", "Beyond?", "1", "2", "3", "", "D"],
        ["x", "Word?", "1", "2", "3", "4", "none"],
        ["x", "Twice?", "Yes", "no", "yes ", "4", "A"],
        ["x", "Wrong twice?", "Yes", "no", "no", "4", "A"],
        ["other", "2 + 2?", "6", "5", "4", "3", "C"],
        ["x", "2 +  2?", "3", "4", "5", "6", "A"],
    )
    rows = knowledge.read(path)
    assert [row.question for row in rows.rows] == ["2 + 2?", "Wrong twice?"]
    assert rows.left_out.counts == {
        "question: no text": 1,
        "question: an option without text, or fewer than two": 2,
        "question: its answer is no letter of its options": 3,
        "question: a wrong option is the same as a right one": 1,
        "question: the same as one before": 1,
        "question: the same as one before, with another answer": 1,
    }
    assert rows.left_out.examples["question: no text"] == ["line 3: "]


def test_many_options_can_not_have_several_right_ones(tmp_path):
    header = ["question", *"ABCDEFGHI", "answer"]
    many, several = ["9?", *"123456789", "I"], ["Odd?", *"123", *[""] * 6, "AC"]
    assert len(knowledge.read(written(tmp_path, header, many)).rows) == 1
    rows = knowledge.read(written(tmp_path, header, many, several))
    assert [row.question for row in rows.rows] == ["Odd?"]
    (reason,) = rows.left_out.counts
    assert "more than 8 options" in reason


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["a", "b"], ["1", "2"]], r"csv:1: neither a header with question, A, B, .* nor"),
        ([["word"]], r"csv:1: neither a header"),
        ([["question", "A", "answer"], ["1", "2", "A"]], r"csv:1: no column 'B'"),
        ([HEADER, SUMS[:-1]], r"csv:2: 6 cells, but 7 columns"),
        ([SUMS[1:], SUMS[2:]], r"csv:2: 5 cells, but 6 in the first line"),
        ([HEADER], "no question; no rows"),
    ],
)
def test_a_table_of_something_else_is_refused_with_its_line(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        knowledge.read(written(tmp_path, *rows))


@pytest.mark.parametrize(
    "record",
    [
        {"user": "2 + 2?", "assistant": "4"},
        {"question": "2 + 2?", "options": ["3", 4], "label": "B"},
        {"question": "2 + 2?", "options": ["3", "4"], "label": 1},
    ],
)
def test_json_of_something_else_is_refused_with_its_line(tmp_path, record):
    with pytest.raises(DataError, match=r"jsonl:1: a question must have .*; found"):
        knowledge.read(written_json(tmp_path, record))


@pytest.mark.parametrize(
    ("option", "stays"),
    [
        ("All of the above", True),
        ("all of these", True),
        ("None of the above.", True),
        ("Both A and B", True),
        ("A, B and C", True),
        ("(a) and (c)", True),
        ("B only", True),
        ("Only A", True),
        ("Neither", True),
        ("both b and c", True),
        ("All three", True),
        ("Both firms earn nothing", False),
        ("The price is above its cost", False),
        ("Only a monopoly", False),
        ("I and II", False),
        ("A bank and a firm", False),
        ("Answer a question", False),
    ],
)
def test_options_that_speak_of_others_places_stay_where_they_are(tmp_path, option, stays):
    row = ["x", "Which?", "one", "two", "three", option, "D"]
    (question,) = knowledge.read(written(tmp_path, HEADER, row)).rows
    assert question.in_any_order is not stays


def test_a_question_is_known_by_its_content(tmp_path):
    reordered = ["", "2 + 2?", "6", "5", "4", "3", "C"]
    one = knowledge.read(written(tmp_path, HEADER, SUMS, PRIMES))
    again = knowledge.read(written(tmp_path, HEADER, PRIMES, reordered, name="again.csv"))
    assert [row.id for row in one.rows] == [row.id for row in again.rows[::-1]]
    assert one.fingerprint == again.fingerprint
    assert one.sketch == again.sketch
    # With another answer the question is the same and what is learnt is not.
    other = knowledge.read(written(tmp_path, HEADER, [*SUMS[:-1], "A"], PRIMES))
    assert one.fingerprint != other.fingerprint
    assert one.sketch == other.sketch


def test_the_package_has_questions_of_its_own():
    rows = knowledge.read_reference()
    assert rows.left_out.counts == {}
    assert Counter(row.subject for row in rows.rows) == {
        "behavioural economics": 18, "game theory": 18,
    }  # fmt: skip
    assert all(len(row.options) == 4 and row.in_any_order for row in rows.rows)
    several = [row for row in rows.rows if len(row.right) > 1]
    assert len(several) == 15
    # No letter is right much more often than another.
    letters = Counter(place for row in rows.rows for place in row.right)
    assert max(letters.values()) - min(letters.values()) <= 3


def test_real_questions_with_one_right_letter():
    rows = knowledge.read(shared("knowledge/mmlu_social.csv"))
    assert len(rows.rows) == 4128
    assert rows.left_out.counts == {
        "question: the same as one before": 34,
        "question: a wrong option is the same as a right one": 1,
    }
    assert len({row.subject for row in rows.rows}) == 18
    assert not any(row.several for row in rows.rows)


def test_real_questions_without_a_header():
    names = ("high_school_macroeconomics", "high_school_microeconomics", "econometrics")
    counts = []
    for name in names:
        path = shared(f"econ_mcq/{name}_test.csv")
        rows = knowledge.read(path)
        with path.open(newline="") as file:
            first = next(csv.reader(file))
        assert rows.rows[0].question == first[0]
        assert "ABCD"[rows.rows[0].right[0]] == first[-1]
        counts.append(len(rows.rows))
    assert counts == [390, 238, 114]


def test_real_questions_with_several_right_letters():
    rows = knowledge.read(shared("knowledge/agieval_gaokao_physics_several_right.jsonl"))
    assert len(rows.rows) == 35
    assert rows.rows[0].right == (0, 3)
    assert all(len(row.right) > 1 and row.several for row in rows.rows)
    options = [option for row in rows.rows for option in row.options]
    assert not any(option.startswith(("(A)", "(B)", "(C)", "(D)")) for option in options)
