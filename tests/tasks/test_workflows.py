"""A paper's steps as one conversation, each step alone, and titles with abstracts."""

import inspect
import itertools
import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from befm_jax.data.items import FreeText, Message, examples_of
from befm_jax.data.literature import ASPECTS, Paper
from befm_jax.data.responses import Sampled
from befm_jax.evals.results import Results
from befm_jax.respondents import baselines
from befm_jax.respondents.comparing import compare
from befm_jax.tasks import get, sources
from befm_jax.tasks.wording import DEFAULT

STEPS = ("idea", "method", "outcome", "impact", "title")
WHOLE = Paper("w", "Gifts", "", {name: (f"The {name}.",) for name in ASPECTS}, {"year": "2020"})


def items(name, row):
    return list(get(name).items(row, DEFAULT, np.random.default_rng(0)))


def without(*names):
    return Paper("p", "Gifts", "", {n: t for n, t in WHOLE.aspects.items() if n not in names})


def test_each_step_is_asked_after_the_true_ones_before_it():
    asked = items("workflow/steps", WHOLE)
    assert [item.labels["step"] for item in asked] == list(STEPS)
    assert [item.target for item in asked] == [
        ("The key_idea.",), ("The method.",), ("The outcome.",), ("The impact.",), ("Gifts",),
    ]  # fmt: skip
    for before, item in itertools.pairwise(asked):
        answered = (*before.prompt, Message("assistant", before.target[0]))
        assert item.prompt[:-1] == answered
    opening = asked[0].prompt[0].text
    assert "Context: The context." in opening
    told = "\n".join(message.text for message in asked[-1].prompt)
    assert all(told.count(f"The {name}.") == 1 for name in ASPECTS)
    assert "Gifts" not in told
    assert asked[0].labels == {"year": "2020", "person": "w", "step": "idea"}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_alone_is_that_of_the_conversation(step):
    (item,) = items(f"workflow/{step}", WHOLE)
    of_all = items("workflow/steps", WHOLE)[STEPS.index(step)]
    assert (item.id, item.prompt, item.target) == (of_all.id, of_all.prompt, of_all.target)
    assert item.answers == FreeText(64 if step == "title" else 256)
    # What a report says of the task.
    assert f"{step} of a paper, from its context" in inspect.getdoc(get(f"workflow/{step}").items)


def test_a_paper_is_learnt_as_one_conversation_with_a_span_a_step():
    (example,) = examples_of(items("workflow/steps", WHOLE), "workflow/steps")
    learnt = [example.messages[place].text[start:stop] for place, start, stop in example.spans]
    assert learnt == ["The key_idea.", "The method.", "The outcome.", "The impact.", "Gifts"]
    assert [place for place, _, _ in example.spans] == [1, 3, 5, 7, 9]
    assert [message.role for message in example.messages] == ["user", "assistant"] * 5


@pytest.mark.parametrize(
    ("missing", "steps", "given"),
    [
        (("key_idea",), ("method", "outcome", "impact", "title"), "Context: The context."),
        (("context",), ("method", "outcome", "impact", "title"), "Key idea: The key_idea."),
        (ASPECTS[:4], ("title",), "Impact: The impact."),
        (ASPECTS[1:], ("title",), "Context: The context."),
    ],
)
def test_what_nobody_described_is_neither_asked_nor_given(missing, steps, given):
    asked = items("workflow/steps", without(*missing))
    assert tuple(item.labels["step"] for item in asked) == steps
    assert given in asked[0].prompt[0].text
    told = "\n".join(message.text for message in asked[-1].prompt)
    assert not any(f"The {name}." in told for name in missing)
    for step in STEPS:
        assert len(items(f"workflow/{step}", without(*missing))) == (step in steps)


def test_what_two_people_wrote_are_two_references_each_learnt_once():
    both = {**WHOLE.aspects, "key_idea": ("One idea.", "Another idea."), "method": ("M 1", "M 2")}
    row = Paper("w", "Gifts", "", both)
    asked = items("workflow/steps", row)
    assert asked[0].target == ("One idea.", "Another idea.")
    assert asked[1].prompt[-2].text == "One idea."
    learnt = [
        example.messages[place].text[start:stop]
        for example in examples_of(asked)
        for place, start, stop in example.spans or [(len(example.messages) - 1, 0, None)]
    ]
    assert sorted(learnt) == sorted(
        ["One idea.", "Another idea.", "M 1", "M 2", "The outcome.", "The impact.", "Gifts"]
    )


def test_titles_and_abstracts_are_asked_from_each_other():
    row = Paper("p", "Gifts", "Strangers give.", {}, {"year": "2021"})
    (abstract,), (title,) = (items(f"literature/{name}", row) for name in ("abstract", "title"))
    assert "Gifts" in abstract.prompt[0].text
    assert "Strangers give." not in abstract.prompt[0].text
    assert abstract.target == ("Strangers give.",)
    assert "Strangers give." in title.prompt[0].text
    assert "Gifts" not in title.prompt[0].text
    assert title.target == ("Gifts",)
    assert title.labels == {"year": "2021", "person": "p"}
    assert abstract.answers.max_tokens > title.answers.max_tokens


@pytest.fixture
def path(tmp_path):
    """Twelve papers, of which two have no outcome."""
    records = [
        {"title": f"Paper {number} on gifts"}
        | {name: f"{name} number {number} of a paper" for name in ASPECTS}
        | ({"outcome": "N/A"} if number < 2 else {})
        for number in range(12)
    ]
    found = tmp_path / "papers.jsonl"
    found.write_text("".join(json.dumps(record) + "\n" for record in records))
    return found


def test_texts_are_compared_with_those_of_other_papers_and_of_the_prompt(path):
    steps, outcome = sources.select(f"workflow/steps={path},workflow/outcome={path}", [])
    assert len(steps.items()) == 58
    assert len(outcome.items()) == 10
    echo = baselines.fit("given_text", [], "step")
    results = Results()
    for source in (steps, outcome):
        compare(results, source, source, [("echo", echo, Sampled(1))], resamples=20, seed=0)
    figure = results.figure("workflow/outcome", "rouge1", "echo")
    score = RougeScorer(["rouge1"], use_stemmer=True).score
    expected = [
        score(item.target[0], item.notes["given"])["rouge1"].fmeasure for item in outcome.items()
    ]
    assert figure.value == pytest.approx(np.mean(expected))
    # Of another paper all but the number is the same, of the method the word outcome is not.
    assert figure.beside["another_person"] == pytest.approx(5 / 6)
    assert figure.beside["given_text"] == pytest.approx(figure.value)
    # Steps have equal weight in the mean, whatever the number of their papers.
    per_step = [results.figure("workflow/steps", "rouge1", "echo", {"step": s}) for s in STEPS]
    assert [one.items for one in per_step] == [12, 12, 10, 12, 12]
    mean = results.figure("workflow/steps", "rouge1", "echo").value
    assert mean == pytest.approx(np.mean([one.value for one in per_step]))


def test_papers_are_split_and_learnt_whole(path):
    (steps,) = sources.select(f"workflow/steps={path}", [])
    train, test = steps.part("train"), steps.part("test")
    assert not {row.id for row in train.rows.rows} & {row.id for row in test.rows.rows}
    family = train.family()
    for number, row in enumerate(family.rows):
        (example,) = family.examples(row, np.random.default_rng(number))
        assert len(example.spans) == len(row.aspects)
    apart = train.family(apart=True)
    assert len(list(apart.examples(apart.rows[0], np.random.default_rng(0)))) >= 4
