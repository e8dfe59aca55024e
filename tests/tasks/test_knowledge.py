"""Multiple-choice questions as they are asked, and what is right then."""

import csv

import numpy as np
import pytest

from befm_jax.data import knowledge
from befm_jax.data.items import LETTERS
from befm_jax.data.responses import Exact, Response
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.results import Results
from befm_jax.respondents import baselines
from befm_jax.respondents.comparing import compare
from befm_jax.tasks import get, sources
from befm_jax.tasks.wording import DEFAULT

CHOICE, SHUFFLED = get("knowledge/choice"), get("knowledge/shuffled")
ROWS = (
    ["subject", "question", "A", "B", "C", "D", "answer"],
    ["sums", "2 + 2?", "3", "4", "5", "6", "B"],
    ["sums", "1 + 1?", "2", "4", "", "", "A"],
    ["primes", "Which are prime?", "7", "8", "9", "11", "AD"],
)


@pytest.fixture
def table(tmp_path):
    """A file with questions of four and two options, one with two right ones."""
    path = tmp_path / "questions.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(ROWS)
    return str(path)


def items(task, row, seed=0):
    return list(task.items(row, DEFAULT, np.random.default_rng(seed)))


def right(item):
    return item.answers.names[int(item.target.argmax())]


def test_the_prompt_has_the_options_with_their_letters(table):
    prime = knowledge.read(table).rows[2]
    (item,) = items(CHOICE, prime)
    assert item.prompt[-1].text.splitlines() == [
        "Which are prime?", "", "A. 7", "B. 8", "C. 9", "D. 11", "", item.answers.request,
    ]  # fmt: skip
    assert "all right options" in item.answers.request
    assert item.labels == {"subject": "primes"}
    assert right(item) == "AD"
    (example,) = item.examples()
    assert example.messages[-1].text == "[AD]"


def test_every_set_of_letters_is_an_answer_where_several_may_be_right(table):
    (first,), (second,), _ = (items(CHOICE, row) for row in knowledge.read(table).rows)
    assert len(first.answers) == 15
    assert second.answers.names == ("A", "B", "AB")
    assert (right(first), right(second)) == ("B", "A")


def test_one_letter_is_the_answer_where_no_question_has_several(tmp_path):
    path = tmp_path / "questions.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(ROWS[:3])
    (item,) = items(CHOICE, knowledge.read(path).rows[0])
    assert item.answers.names == tuple("ABCD")
    assert "the letter of one option" in item.answers.request


def test_shuffled_options_keep_their_key(table):
    prime = knowledge.read(table).rows[2]
    orders = set()
    for seed in range(40):
        (item,) = items(SHUFFLED, prime, seed)
        lines = item.prompt[-1].text.splitlines()[2:6]
        shown = dict(line.split(". ") for line in lines)
        assert list(shown) == list(LETTERS[:4])
        assert {shown[letter] for letter in right(item)} == {"7", "11"}
        orders.add(tuple(shown.values()))
    assert len(orders) > 15
    assert items(SHUFFLED, prime, 3)[0].prompt == items(SHUFFLED, prime, 3)[0].prompt


def test_each_place_is_right_as_often(table):
    first = knowledge.read(table).rows[0]
    rng = np.random.default_rng(0)
    places = [right(item) for _ in range(2000) for item in SHUFFLED.items(first, DEFAULT, rng)]
    shares = [places.count(letter) / len(places) for letter in "ABCD"]
    np.testing.assert_allclose(shares, 0.25, atol=0.04)


def test_options_that_speak_of_each_other_are_not_shuffled(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("Which?,one,two,three,Both A and B,D\n")
    (row,) = knowledge.read(path).rows
    asked = {items(SHUFFLED, row, seed)[0].prompt for seed in range(20)}
    assert asked == {items(CHOICE, row)[0].prompt}


def test_an_answer_is_right_if_it_is_the_whole_set(table):
    asked = [item for row in knowledge.read(table).rows for item in items(CHOICE, row)]

    def accuracy(*answers):
        responses = {
            item.id: Response.from_mass(item.id, item.answers.one(item.answers.names.index(answer)))
            for item, answer in zip(asked, answers, strict=True)
        }
        evaluation = evaluate(CHOICE, asked, responses, respondent="x", resamples=10)
        return {
            tuple(figure.where.values()): figure.value
            for figure in evaluation.figures
            if figure.measure == "accuracy"
        }

    # Subjects have equal weight, however many questions they have.
    assert accuracy("B", "A", "AD") == {(): 1.0, ("sums",): 1.0, ("primes",): 1.0}
    assert accuracy("B", "A", "A") == {(): 0.5, ("sums",): 1.0, ("primes",): 0.0}
    assert accuracy("B", "AB", "AD") == {(): 0.75, ("sums",): 0.5, ("primes",): 1.0}


def test_baselines_stand_beside_where_questions_have_unlike_options(table):
    (source,) = sources.select(f"knowledge/choice={table}", [])
    uniform = baselines.fit("uniform", [], "")
    results = Results()
    compare(results, source, source, [("guess", uniform, Exact())], resamples=20, seed=0)
    figure = results.figure("knowledge/choice", "accuracy", "guess")
    assert figure.items == 3
    # Ties share the hit: one of 15 and one of 3, and one of 15.
    assert figure.value == pytest.approx(((1 / 15 + 1 / 3) / 2 + 1 / 15) / 2)
    assert {"uniform", "mode", "training_people"} <= set(figure.beside)


def test_without_a_table_the_package_has_questions():
    choice, shuffled = sources.select("knowledge/choice,knowledge/shuffled", [])
    assert len(choice.items()) == len(shuffled.items()) == 36
    assert choice.table == ""
    assert choice.rows.fingerprint == shuffled.rows.fingerprint
    train, test = choice.part("train"), choice.part("test")
    assert not {row.id for row in train.rows.rows} & {row.id for row in test.rows.rows}
    family = train.family()
    (example,) = family.examples(family.rows[0], np.random.default_rng(0))
    assert example.family == "knowledge/choice"


def test_responses_to_one_task_are_not_taken_for_those_to_another(tmp_path, table):
    """Both tasks ask the same questions, with options in other orders."""
    tasks = sources.select(f"knowledge/choice={table},knowledge/shuffled={table}", [])

    class Knows:
        name = "knows"

        def describe(self):
            return {}

        def respond(self, items, how):
            for item in items:
                yield Response.from_mass(item.id, item.target)

    results = Results()
    for source in tasks:
        asked = [("knows", Knows(), Exact())]
        compare(results, source, source, asked, resamples=20, seed=0, folder=tmp_path)
    assert results.figure("knowledge/choice", "accuracy", "knows").value == 1.0
    assert results.figure("knowledge/shuffled", "accuracy", "knows").value == 1.0
