"""The task: every game that model and people share, its figures, and their mean."""

import json

import numpy as np
import pytest

from befm_jax.data import games
from befm_jax.data.choices import People, read_people
from befm_jax.errors import DataError
from befm_jax.evals import tasks
from befm_jax.evals.answers import Answers
from befm_jax.evals.measures import METRICS
from befm_jax.evals.tasks.game_behavior import DEFINITIONS, evaluate

BASELINES = {"uniform", "median", "equilibrium", "pooled"}


def crowd(game: str, number: int, seed: int) -> np.ndarray:
    values = games.get(game).values
    rng = np.random.default_rng(seed)
    return rng.multinomial(number, rng.dirichlet(np.full(len(values), 0.5)))


@pytest.fixture(scope="module")
def people():
    counts = {
        "dictator": crowd("dictator", 800, 0),
        "public_goods": crowd("public_goods", 500, 1),
        "bomb": crowd("bomb", 300, 2),
        "trust_banker": np.zeros(len(games.get("trust_banker").values), np.int64),
    }
    return People(source="made up", counts=counts, split="test", fingerprint="0")


@pytest.fixture(scope="module")
def answers(people):
    return {
        "dictator": Answers.from_distribution(people.counts["dictator"] / 800 * 0.9),
        "public_goods": Answers.from_counts(crowd("public_goods", 97, 5), 2, 1, 0.75),
        "trust_banker": Answers.from_distribution(np.full(151, 1 / 151)),
        "push_pull": Answers.from_distribution([0.5, 0.5]),
    }


@pytest.fixture(scope="module")
def result(answers, people):
    return evaluate(answers, people, resamples=300, seed=1)


def test_the_result_is_strict_json_and_has_every_figure(result):
    json.dumps(result, allow_nan=False)
    assert set(result["groups"]) == {"dictator", "public_goods"}
    for holder in (result, *result["groups"].values()):
        assert set(holder["metrics"]) == set(METRICS)
        for name, figure in holder["metrics"].items():
            assert set(figure["baselines"]) == BASELINES
            assert figure["unit"] == METRICS[name].unit
            assert (figure["ci95"] is None) == ("note" in figure)
    assert {*METRICS, "ci95", "floor", "ceiling", "skill"} <= set(result["definitions"])
    assert result["definitions"] == dict(DEFINITIONS)


def test_a_game_says_who_was_compared_with_whom(result, people):
    group = result["groups"]["public_goods"]
    assert group["title"] == games.get("public_goods").title
    assert group["unit"] == games.get("public_goods").answers.unit
    assert group["people"] == 500
    assert group["model"] == {
        "exact": False,
        "answers": 100,
        "unparsed": 2,
        "out_of_set": 1,
        "outside_mass": pytest.approx(0.03),
        "ends_after_answer": 0.75,
    }
    assert group["distribution"]["people"] == people.counts["public_goods"].tolist()
    assert sum(group["distribution"]["model"]) == pytest.approx(1)
    assert result["groups"]["dictator"]["model"]["answers"] is None
    assert result["outside_mass"] == {
        "value": pytest.approx(0.065),
        "max": pytest.approx(0.1),
    }
    # Nobody knows it of the other game.
    assert result["groups"]["dictator"]["model"]["ends_after_answer"] is None
    assert result["ends_after_answer"] == {"value": 0.75, "min": 0.75}


def test_how_often_a_turn_ends_after_an_answer_is_averaged_over_games(people):
    answers = {
        name: Answers.from_counts(crowd(name, 50, 3), ends_after_answer=share)
        for name, share in (("dictator", 0.5), ("public_goods", 1.0), ("bomb", 0.9))
    }
    found = evaluate(answers, people, resamples=50)
    assert found["ends_after_answer"] == {"value": pytest.approx(0.8), "min": 0.5}
    unknown = {"bomb": Answers.from_counts(crowd("bomb", 50, 3))}
    found = evaluate(unknown, people, resamples=50)
    assert found["ends_after_answer"] == {"value": None, "min": None}


def test_games_that_only_one_side_has_are_listed_with_the_reason(result):
    assert result["skipped"] == {
        "bomb": "no answers of the model",
        "trust_banker": "no people to compare with",
        "push_pull": "no people to compare with",
    }


def test_the_mean_is_that_of_the_games_and_its_interval_narrower(result):
    mean = result["metrics"]["wasserstein"]
    games_figures = [group["metrics"]["wasserstein"] for group in result["groups"].values()]
    for field in ("value", "floor", "ceiling"):
        assert mean[field] == pytest.approx(np.mean([one[field] for one in games_figures]))
    for answerer in BASELINES:
        assert mean["baselines"][answerer] == pytest.approx(
            np.mean([one["baselines"][answerer] for one in games_figures])
        )
    width = mean["ci95"][1] - mean["ci95"][0]
    assert width < max(one["ci95"][1] - one["ci95"][0] for one in games_figures)
    assert mean["ci95"][0] <= mean["value"] <= mean["ci95"][1]


def test_skill_is_one_for_the_floor_and_nought_for_a_uniform_answerer(people):
    flat = {"dictator": Answers.from_distribution(np.full(101, 1 / 101))}
    figures = evaluate(flat, people, resamples=50)["metrics"]
    for name, metric in METRICS.items():
        expected = pytest.approx(0.0, abs=1e-9) if metric.has_skill else None
        assert figures[name]["skill"] == expected
    own = {"dictator": Answers.from_distribution(people.counts["dictator"] / 800)}
    figure = evaluate(own, people, resamples=50)["metrics"]["wasserstein"]
    uniform, floor = figure["baselines"]["uniform"], figure["floor"]
    assert figure["skill"] == pytest.approx(uniform / (uniform - floor))


def test_an_impossible_choice_leaves_the_log_score_undefined_with_a_note(result, people):
    answers = {"dictator": Answers.from_distribution(np.eye(101)[50])}
    figure = evaluate(answers, people, resamples=50)["groups"]["dictator"]["metrics"]["log_score"]
    assert (figure["value"], figure["ci95"], figure["skill"]) == (None, None, None)
    assert "no probability" in figure["note"]
    assert figure["floor"] is not None
    assert result["metrics"]["log_score"]["value"] is None


def test_one_seed_gives_one_result_whatever_other_games_are_there(answers, people, result):
    alone = evaluate({"dictator": answers["dictator"]}, people, resamples=300, seed=1)
    assert alone["groups"]["dictator"] == result["groups"]["dictator"]
    other = evaluate({"dictator": answers["dictator"]}, people, resamples=300, seed=2)
    assert other["groups"]["dictator"] != result["groups"]["dictator"]


def test_games_are_resampled_independently(people):
    same = dict.fromkeys(("dictator", "bomb"), people.counts["dictator"])
    flat = {name: Answers.from_distribution(np.full(101, 1 / 101)) for name in same}
    found = evaluate(flat, People(source="made up", counts=same), resamples=2000)
    one, other = (found["groups"][name]["metrics"]["wasserstein"] for name in same)
    assert one["value"] == other["value"]
    both = found["metrics"]["wasserstein"]["ci95"]
    ratio = (both[1] - both[0]) / (one["ci95"][1] - one["ci95"][0])
    assert ratio == pytest.approx(np.sqrt(0.5), rel=0.1)


def test_a_model_that_never_answers_in_the_set_is_skipped_not_scored(answers, people):
    silent = {**answers, "dictator": Answers.from_counts(np.zeros(101), unparsed=5)}
    found = evaluate(silent, people, resamples=50)
    assert found["skipped"]["dictator"] == (
        "none of the model's 5 answers is in the answer set (5 unreadable, 0 not allowed)"
    )
    assert set(found["groups"]) == {"public_goods"}
    silent["dictator"] = Answers.from_distribution(np.zeros(101))
    found = evaluate(silent, people, resamples=50)
    assert found["skipped"]["dictator"] == "none of the model's probability is on the answer set"


def test_one_person_and_one_draw_leave_undefined_figures_null(people):
    alone = People(source="made up", counts={"dictator": np.eye(101, dtype=np.int64)[30]})
    found = evaluate({"dictator": Answers.from_counts(np.eye(101)[40])}, alone, resamples=20)
    json.dumps(found, allow_nan=False)
    assert found["metrics"]["energy"]["value"] is None
    assert found["metrics"]["wasserstein"]["value"] == pytest.approx(10)


def test_a_uniform_answerer_on_the_real_table(moblab_csv):
    chosen = [game for name in games.ids() if (game := games.get(name)).reference]
    crowds = read_people(moblab_csv, chosen)
    flat = {
        game.id: Answers.from_distribution(np.full(len(game.values), 1 / len(game.values)))
        for game in chosen
    }
    found = evaluate(flat, crowds, resamples=200)
    assert len(found["groups"]) == 7
    figure = found["metrics"]["wasserstein"]
    assert figure["value"] == pytest.approx(12.2, abs=0.05)
    assert figure["ci95"][0] < 12.2 < figure["ci95"][1]
    assert figure["ceiling"] == pytest.approx(0.53, abs=0.03)
    assert figure["baselines"]["median"] == pytest.approx(20.9, abs=0.05)


def test_nothing_in_common_or_nothing_that_fits_is_refused(answers, people):
    with pytest.raises(ValueError, match=r"no game with both.*push_pull: no people"):
        evaluate({"push_pull": answers["push_pull"]}, people)
    with pytest.raises(ValueError, match="dictator: has 101 choices, but the answers have 2"):
        evaluate({"dictator": Answers.from_distribution([0.5, 0.5])}, people)
    with pytest.raises(ValueError, match="seed: -1"):
        evaluate(answers, people, seed=-1)


def test_tasks_are_found_by_name_and_a_misspelt_one_names_the_near():
    assert "game_behavior" in tasks.names()
    assert tasks.get("game_behavior") is evaluate
    with pytest.raises(DataError, match="game_behavior"):
        tasks.get("game_behaviour")
