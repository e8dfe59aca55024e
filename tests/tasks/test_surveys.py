"""Tasks of questionnaires: what is asked of a person, with what given, and what is learnt."""

from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import questionnaires
from befm_jax.data.items import Message, examples_of
from befm_jax.data.questionnaires import Questionnaire
from befm_jax.errors import DataError
from befm_jax.tasks import sources
from befm_jax.tasks.wording import DEFAULT

FORM = questionnaires.get("bfi_25")
LABELS = {"sex": "female", "age_band": "25-34", "country": "CA", "native_english": "no"}
PERSON = Questionnaire(
    "p1", "bfi_25", {code: at % 6 for at, code in enumerate(FORM.statements)}, 31, LABELS
)


def items(name, row=PERSON, seed=0):
    return list(tasks.get(name).items(row, DEFAULT, np.random.default_rng(seed)))


def text(item):
    return "\n".join(message.text for message in item.prompt)


def test_each_answer_follows_those_before_it():
    asked = items("survey/next")
    assert sorted(item.labels["statement"] for item in asked) == sorted(FORM.statements)
    for number, item in enumerate(asked):
        code = item.labels["statement"]
        assert item.id == f"p1/{code}"
        assert item.target.argmax() == PERSON.answers[code]
        assert item.prompt[-1].text.endswith(FORM.statements[code].text)
        assert len(item.prompt) == 2 * number + 1
        before = [one.labels["statement"] for one in asked[:number]]
        assert list(item.notes["known"]) == before
        told = [message.text for message in item.prompt if message.role == "assistant"]
        assert told == [f"[{PERSON.answers[one] + 1}]" for one in before]
        assert [item.notes["known"][one] for one in before] == [
            PERSON.answers[one] + 1 for one in before
        ]


def test_orders_are_drawn_anew_and_follow_from_the_generator():
    orders = [
        [item.labels["statement"] for item in items("survey/next", seed=at)] for at in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_masked_answer_has_all_others_before_it():
    (item,) = items("survey/masked")
    assert len(item.notes["known"]) == len(FORM.statements) - 1
    assert item.labels["statement"] not in item.notes["known"]


def test_characteristics_are_told_and_the_age_is_not_where_it_is_asked_for():
    for name in ("survey/next", "survey/answer", "survey/traits", "survey/other_traits"):
        assert "Age: 31\nSex: female\nCountry: CA\nNative English: no" in text(items(name)[0])
    (item,) = items("survey/age")
    assert "31" not in text(item)
    assert "25-34" not in text(item)
    assert item.answers.values[item.target.argmax()] == 31.0


def test_an_answer_alone_has_no_other_answer_in_its_prompt():
    asked = items("survey/answer")
    assert len({item.labels["statement"] for item in asked}) == 5
    for item in asked:
        assert "[" not in text(item).replace(item.answers.request, "")


def test_scores_are_asked_with_the_others_or_without():
    scores = PERSON.scores()
    alone, with_others = items("survey/traits"), items("survey/other_traits")
    for item, informed in zip(alone, with_others, strict=True):
        trait = item.labels["trait"]
        assert item.answers.values[item.target.argmax()] == scores[trait]
        assert len(item.answers) == 26
        for other in scores:
            told = f"{other.capitalize()}: {scores[other]}"
            assert told not in text(item)
            assert (told in text(informed)) == (other != trait)


def test_who_has_no_score_or_age_is_not_asked_for_it():
    some = {"A1": PERSON.answers["A1"]}
    silent = Questionnaire("p2", "bfi_25", some)
    assert [items(name, silent) for name in ("survey/traits", "survey/age")] == [[], []]
    (item,) = items("survey/next", silent)
    assert "Age" not in text(item)


def test_a_person_is_learnt_in_one_conversation():
    asked = items("survey/next")
    (example,) = examples_of(asked, "survey/next")
    assert len(example.messages) == 2 * len(asked)
    learnt = [example.messages[at].text[start:stop] for at, start, stop in example.spans]
    assert learnt == [f"[{PERSON.answers[item.labels['statement']] + 1}]" for item in asked]
    # What is asked of one item is how the conversation begins.
    for number, item in enumerate(asked):
        assert example.messages[: 2 * number + 1] == item.prompt


def test_conversations_that_do_not_go_on_are_examples_of_their_own():
    asked = items("survey/answer")
    examples = list(examples_of(asked, "f"))
    assert [example.messages[:-1] for example in examples] == [item.prompt for item in asked]
    assert {example.spans for example in examples} == {()}
    first, second, *_ = items("survey/next")
    later = items("survey/next", seed=5)[0]
    merged = list(examples_of([first, second, later, second]))
    assert [len(example.messages) for example in merged] == [4, 2, 4]
    assert merged[2].messages[-1] == Message(
        "assistant", second.answers.written[second.target.argmax()]
    )


def test_people_counted_more_than_once_are_not_merged():
    first, second, *_ = items("survey/next")
    twice = type(first)(first.id, first.prompt, first.answers, 2 * first.target, first.labels)
    assert [one.weight for one in examples_of([twice, second])] == [2.0, 1.0]


def test_a_cell_is_asked_every_statement_and_holds_its_counts():
    cell = questionnaires.read_reference().rows[0]
    asked = list(tasks.get("survey/groups").items(cell, DEFAULT, np.random.default_rng(0)))
    assert len(asked) == 50
    for item in asked:
        counts = cell.counts[item.labels["statement"]]
        np.testing.assert_array_equal(item.target, counts)
        assert item.labels["sex"] == cell.labels["sex"]
        assert f"Sex: {cell.labels['sex']}\nAge: {cell.labels['age_band']}" in text(item)


def test_without_a_table_the_embedded_counts_serve():
    (source,) = sources.select("survey/groups", [])
    assert len(list(source.items())) == 16 * 50
    assert sum(item.target.sum() for item in source.part("test").items()) < 0.11 * sum(
        item.target.sum() for item in source.items()
    )
    with pytest.raises(DataError, match="survey/next: it reads a table; give survey/next=PATH"):
        sources.select("survey/next", [])


def test_fewer_persons_are_the_first_and_a_population_keeps_everybody(tmp_path):
    path = tmp_path / "people.csv"
    rows = [",".join(str((person + at) % 7) for at in range(25)) for person in range(9)]
    path.write_text("\n".join([",".join(FORM.statements), *rows]))
    people, cells = sources.select(f"survey/next={path},survey/groups", [])
    assert people.limited(4).rows.rows == people.rows.rows[:4]
    assert people.limited(0) is people
    assert cells.limited(4) is cells
    assert [item.id for item in people.items(per_row=2)][:2] == [
        item.id for item in people.items(most=2)
    ]
    assert len(people.items(per_row=2)) == 2 * len(people.rows.rows)


def test_each_trait_is_asked_for_with_one_other_and_by_age():
    asked = {item.labels["pair"]: item for item in items("survey/joint")}
    scores = PERSON.scores()
    assert len(asked) == len(scores) * (len(scores) - 1) + len(scores)
    item = asked["openness given extraversion"]
    assert item.notes["known"] == {"extraversion given openness": scores["extraversion"]}
    assert f"\nExtraversion: {scores['extraversion']:g}\n" in text(item)
    assert "\nAgreeableness: " not in text(item)
    assert float(item.answers.names[item.target.argmax()]) == scores["openness"]
    by_age = asked["openness given age"]
    assert by_age.notes["known"] == {"age": 31.0}
    assert "\nAge: 31\n" in text(by_age)
    assert "\nExtraversion: " not in text(by_age)
    assert len({item.id for item in asked.values()}) == len(asked)


def test_without_an_age_there_is_no_slope_with_it():
    asked = [item.labels["pair"] for item in items("survey/joint", replace(PERSON, age=None))]
    assert not [pair for pair in asked if pair.endswith("given age")]
