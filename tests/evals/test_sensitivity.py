"""Who follows a change of the question and who goes on as before, by hand-made responses."""

from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import games
from befm_jax.data.responses import Exact, Response
from befm_jax.errors import DataError
from befm_jax.evals import report, sensitivity
from befm_jax.evals.results import Results
from befm_jax.tasks.wording import DEFAULT

TASK = tasks.get("sensitivity")
ITEMS = [
    item
    for game in games.ids()
    if games.get(game).id in ("dictator", "trust_investor", "public_goods", "push_pull")
    for item in TASK.items(games.get(game), DEFAULT, np.random.default_rng(0))
]


def habit(item) -> np.ndarray:
    """Mostly a third of what there was to begin with, else anything: of two actions the first."""
    size = len(item.answers)
    shares = np.full(size, 0.3 / size)
    shares[size // 3] += 0.7
    return shares


def followed(item) -> np.ndarray:
    """What somebody of that habit answers who does as the change demands."""
    shares, notes = habit(item), item.notes
    if "right" in notes:
        shares = np.zeros(len(shares))
        shares[notes["right"][len(notes["right"]) // 2]] = 1.0
    elif "moved_to" in notes:
        shares = shares[list(notes["moved_to"])]  # its own inverse
    return shares


def unnoticed(item) -> np.ndarray:
    """What somebody answers who doesn't see the change: of two options, the one in that place."""
    return habit(item)[list(item.notes.get("as_before", range(len(item.answers))))]


def responses(answer) -> dict[str, Response]:
    return {item.id: Response(item.id, answer(item), True, 0.01) for item in ITEMS}


def evaluated(answer, **fields):
    return sensitivity.evaluate(
        TASK, ITEMS, responses(answer), respondent="me", **{"resamples": 200, **fields}
    )


def by_change(evaluation):
    return {
        one.where["change"]: one for one in evaluation.figures if "change" in one.where
    }  # fmt: skip


def test_who_follows_has_1_and_who_answers_as_before_0():
    for answer, expected in ((followed, 1.0), (unnoticed, 0.0)):
        found = evaluated(answer)
        assert found.figures[0].where == {}
        assert {one.level for one in found.figures} == {"check"}
        for one in found.figures:
            assert one.value == pytest.approx(expected, abs=1e-12), one.where
        assert found.figures[0].ci95 == pytest.approx((expected, expected))
        assert found.skipped == {}
    notes = {change: one.note for change, one in by_change(evaluated(unnoticed)).items()}
    assert list(notes) == [
        "endowment", "wording", "instruction", "multiplier", "return rate", "labels",
        "order of the actions",
    ]  # fmt: skip
    assert notes["endowment"] == (
        "does not read the endowment: in 3 questions its answers go 0% of the way that the change "
        "demands"
    )
    assert all(note.startswith(f"does not read the {change}: ") for change, note in notes.items())
    assert [one.note for one in evaluated(followed).figures] == [""] * (1 + 7 + 14)


def test_a_figure_is_the_share_of_wrong_answers_that_are_not_given_any_more():
    """The endowment of a dictator, by hand: .7 + .3 x 80/101 of the answers are above 20."""
    one = next(item for item in ITEMS if item.id == "dictator/endowment")
    wrong_before = 0.7 + 0.3 * 80 / 101

    def half_of_them(item):
        return 0.5 * habit(item) + 0.5 * followed(item) if item is one else unnoticed(item)

    found = evaluated(half_of_them)
    of_question = {
        tuple(figure.where.items()): figure for figure in found.figures if figure.where
    }  # fmt: skip
    dictator = of_question[("question", "endowment, dictator"),]
    assert dictator.value == pytest.approx(0.5)
    # Others of the change: 80 of an investor's 101, and 16 of 21 in public goods.
    others = wrong_before + 0.7 + 0.3 * 16 / 21
    assert of_question[("change", "endowment"),].value == pytest.approx(
        0.5 * wrong_before / (wrong_before + others)
    )
    assert found.figures[0].value == pytest.approx(
        np.mean([figure.value for figure in by_change(found).values()])
    )


def test_an_answer_that_is_nearly_where_it_belongs_on_a_scale_is_nearly_right():
    def one_off(item):
        top = len(item.answers) - 1
        given = top // 4
        return item.answers.one(top - given - 1 if item.id.endswith("/wording") else given)

    found = by_change(evaluated(one_off))["wording"]
    # Old answers are off by the scale less twice what is given: 100 - 50 and 20 - 10 of the whole.
    tops = [len(item.answers) - 1 for item in ITEMS if item.id.endswith("/wording")]
    off = sum(1 / top for top in tops), sum((top - 2 * (top // 4)) / top for top in tops)
    assert found.value == pytest.approx(1.0 - off[0] / off[1])
    assert found.value > 0.9


def test_an_action_by_name_alone_is_told_from_one_by_place_alone():
    def by_name(item):
        return habit(item)

    named = by_change(evaluated(by_name))
    assert (named["labels"].value, named["order of the actions"].value) == pytest.approx((0.0, 1.0))

    def by_place(item):
        first = item.prompt[-1].text.rstrip(".").endswith("[Push] or [Pull]")
        shares = np.array([0.9, 0.1] if first else [0.1, 0.9])
        return shares if len(item.answers) == 2 else habit(item)

    placed = by_change(evaluated(by_place))
    assert (placed["labels"].value, placed["order of the actions"].value) == pytest.approx(
        (0.0, 0.0)
    )


def test_what_a_habit_can_not_show_is_not_in_the_mean():
    """Who always gives nothing answers as well with a fifth of the endowment."""

    def nothing(item):
        return item.answers.one(0)

    found = evaluated(nothing)
    of_change = by_change(found)
    assert of_change["endowment"].value is None
    assert of_change["endowment"].note == (
        "shows nothing of the endowment: the change makes hardly any of its answers wrong"
    )
    known = [one.value for one in of_change.values() if one.value is not None]
    assert known
    assert found.figures[0].value == pytest.approx(np.mean(known))


def test_questions_that_were_not_answered_twice_are_left_out():
    some = responses(followed)
    some = {id: replace(one, draws=10, unread=1) for id, one in some.items()}
    del some["dictator"], some["push_pull/order"]
    some["public_goods/wording"] = Response("public_goods/wording", np.zeros(21), True, 1.0, 10, 1)
    found = sensitivity.evaluate(TASK, ITEMS, some, respondent="me", resamples=20)
    assert found.skipped == {
        "no response": [
            "dictator/endowment", "dictator/wording", "dictator/instruction", "push_pull/order",
        ],
        "nothing answered is in the answer set": ["public_goods/wording"],
    }  # fmt: skip
    assert "order of the actions" not in by_change(found)
    # What is outside is of every question that was asked twice, once each.
    pairs = [
        (item.notes["changed_from"], item.id) for item in ITEMS if "changed_from" in item.notes
    ]
    asked = {id for pair in pairs if set(pair) <= set(some) for id in pair}
    assert found.figures[0].outside == pytest.approx(np.mean([some[id].outside for id in asked]))
    assert (found.figures[0].draws, found.figures[0].unread) == (10 * len(asked), len(asked))
    with pytest.raises(DataError, match="me answered no question twice"):
        sensitivity.evaluate(TASK, ITEMS[:1], some, respondent="me")


def test_only_what_is_surely_not_read_is_said_and_only_where_answers_are_in_the_set():
    figure = next(one for one in evaluated(unnoticed).figures if one.where.get("change"))
    for value, ends, said in (
        (0.4, None, True),
        (0.4, (0.3, 0.45), True),
        (0.4, (0.1, 0.6), False),
    ):
        assert bool(sensitivity.verdict(replace(figure, value=value, ci95=ends))) is said

    def findings(answer, outside=0.0):
        results = Results()
        own = {name: replace(one, outside=outside) for name, one in responses(answer).items()}
        evaluation = sensitivity.evaluate(TASK, ITEMS, own, respondent="me", resamples=20)
        results.add(evaluation, {}, Exact())
        return report.sections(results)[0].findings

    assert len(findings(unnoticed)) == 7
    # The notes of these figures say that something is outside, or that a habit shows nothing.
    assert findings(followed, 0.1) == findings(unnoticed, 0.6) == []
    assert not any("nothing" in one for one in findings(lambda item: item.answers.one(0)))


def test_report_and_results_name_what_is_not_read_with_the_figure(tmp_path):
    results = Results()
    beside = {"uniform": responses(lambda item: np.full(len(item.answers), 1 / len(item.answers)))}
    results.add(evaluated(unnoticed, beside=beside), {}, Exact())
    assert results.figures[0].beside == {"uniform": pytest.approx(0.0, abs=1e-9)}
    report.write(results, tmp_path)
    sentence = (
        "me does not read the endowment: in 3 questions its answers go 0% of the way that the "
        "change demands (follows change "
    )
    assert sentence in report.summary(results)
    page = (tmp_path / "report.html").read_text()
    assert sentence in page
    assert "each asked with a change and without" in page
    assert ">questions</th>" in page
    # Both distributions are kept.
    kept = {one.where["question"]: one.model for one in results.distributions}
    assert kept["dictator"] == pytest.approx(habit(ITEMS[0]))
    assert kept["endowment, dictator"] == kept["dictator"]
