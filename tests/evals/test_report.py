"""The report: strict JSON, a page that trusts no text, a picture, a table."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from befm_jax.data import games
from befm_jax.data.choices import People
from befm_jax.evals import charts, report
from befm_jax.evals.answers import Answers
from befm_jax.evals.tasks.game_behavior import evaluate

EVIL = "<script>alert('x')</script> & $\\frac{"
FIRST_PROMPT = f"<|begin_of_text|>How much?\n\n{EVIL}<|eot_id|>"
VOID = {"meta", "br"}


def evaluation(seed: int, sampled: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    counts, answers = {}, {}
    for name in ("dictator", "trust_banker", "public_goods"):
        length = len(games.get(name).values)
        counts[name] = np.random.default_rng(9).multinomial(200, np.full(length, 1 / length))
        shares = rng.dirichlet(np.ones(length))
        answers[name] = (
            Answers.from_counts(rng.multinomial(90, shares), 7, 3, ends_after_answer=0.625)
            if sampled
            else Answers.from_distribution(shares * 0.99)
        )
    answers["push_pull"] = Answers.from_distribution([0.5, 0.5])
    found = evaluate(answers, People(source="made up", counts=counts), resamples=60)
    found["groups"]["dictator"]["title"] = EVIL
    found["groups"]["dictator"]["unit"] = EVIL
    return {
        "schema": "befm_jax.results/1",
        "model": {
            "name": EVIL,
            "layers": 4,
            "first_prompt": {"game": "dictator", "ids": list(range(100)), "text": FIRST_PROMPT},
        },
        "answers": {"mode": "sampled" if sampled else "exact", "temperature": 1.0},
        "people": {
            "source": f"a table, {EVIL}",
            "split": "test",
            "fingerprint": "f00d",
            "excluded": {f"out of range {EVIL}": 31},
        },
        "tasks": {"game_behavior": found},
    }


@pytest.fixture(scope="module")
def trained():
    return {
        "schema": "befm_jax.results/1",
        "base": evaluation(0),
        "tuned": evaluation(1),
        "tuned_sampled": evaluation(1, sampled=True),
        "train": {"steps": 120, "loss": list(range(50)), EVIL: {"versions": {"numpy": "2"}}},
    }


class Balance(HTMLParser):
    """Fails on tags that are not closed in their order; collects tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_three_files_are_written_and_nothing_else(trained, tmp_path):
    report.write(trained, tmp_path / "deep" / "down")
    report.write(trained, tmp_path / "deep" / "down")
    directory = tmp_path / "deep" / "down"
    assert {path.name for path in directory.iterdir()} == {
        "results.json",
        "report.html",
        "games.png",
    }
    assert json.loads((directory / "results.json").read_text()) == trained
    png = (directory / "games.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [1600, 800]


def test_draws_that_all_miss_are_told_of_and_what_was_read_exactly_stands(trained):
    missed = trained | {
        "tuned_sampled": {"answers": {"mode": "sampled"}, "not_compared": "no <b> answer"}
    }
    assert [run.key for run in report.runs(missed)] == ["base", "tuned"]
    page = report.page(missed)
    assert "No figures of the tuned model, sampled: no &lt;b&gt; answer." in page
    assert "tuned model, sampled: no <b> answer" in report.summary(missed).splitlines()
    assert report.summary(missed).startswith(report.summary(trained))


def test_nan_is_refused_before_anything_is_written(trained, tmp_path):
    broken = copy.deepcopy(trained)
    broken["train"]["loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untrusted_text_is_escaped_everywhere(trained):
    for results in (trained, trained["tuned"]):
        page = report.page(results)
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_the_page_is_well_formed_and_reaches_for_nothing_outside(trained):
    for results in (trained, trained["tuned_sampled"]):
        page = report.page(results)
        parser = Balance()
        parser.feed(page)
        assert parser.open == []
        tags = {tag for tag, _ in parser.tags}
        assert not tags & {"script", "link", "img", "iframe", "object"}
        assert not re.search(r"url\(|@import|src=|href=", page)


def test_the_page_says_what_was_compared_left_out_and_how(trained):
    page = report.page(trained)
    mean = trained["tuned"]["tasks"]["game_behavior"]["metrics"]["wasserstein"]
    assert f"<b>{mean['value']:.1f} points</b>" in page
    assert page.count('<section class="game"') == 3
    assert "of 100 answers: 7 unreadable, 3 not allowed" in page
    assert "push_pull" in page
    assert ">31<" in page
    for setting in ("train.steps", "tuned.answers.temperature", "base.people.fingerprint"):
        assert setting in page
    assert "50 values, in results.json" in page
    for text in trained["tuned"]["tasks"]["game_behavior"]["definitions"]:
        assert text.replace("_", " ") in page


def test_the_page_shows_the_first_prompt_as_text(trained):
    for results in (trained, trained["tuned"]):
        page = report.page(results)
        shown = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
        assert [html.unescape(text) for text in shown] == [FIRST_PROMPT]
        assert page.count("&lt;|begin_of_text|&gt;") == 1
        assert "from its 100 tokens" in page
    del (without := copy.deepcopy(trained["tuned"]))["model"]["first_prompt"]
    assert "<pre>" not in report.page(without)
    for other in ("what?", {"ids": 3, "game": "x", "text": "y"}, {"text": EVIL}):
        without["model"]["first_prompt"] = other
        page = report.page(without)
        assert "<pre>" not in page
        assert "model.first_prompt" in page  # among the settings


def test_the_page_says_how_often_a_turn_ends_after_an_answer(trained):
    assert "stops after an answer: 62.5 %" in report.page(trained)  # of tuned_sampled
    alone = report.page(trained["tuned_sampled"])
    assert alone.count("<dt>stops after its answer</dt><dd>62.5 %</dd>") == 3
    unknown = report.page(trained["tuned"])
    assert unknown.count("<dt>stops after its answer</dt><dd>–</dd>") == 3


def test_one_evaluation_alone_has_a_page_without_a_base(trained):
    page = report.page(trained["tuned_sampled"])
    assert "base model" not in page
    assert "before" not in page.split("<h2>")[0]


def test_games_that_one_run_lacks_and_undefined_figures_show_as_dashes(trained):
    partial = copy.deepcopy(trained)
    del partial["base"]["tasks"]["game_behavior"]["groups"]["public_goods"]
    figure = partial["tuned"]["tasks"]["game_behavior"]["groups"]["dictator"]["metrics"]
    assert figure["log_score"]["baselines"]["median"] is None
    assert "–" in report.page(partial)
    assert "–" in report.summary(partial)


def test_results_without_the_task_are_refused():
    with pytest.raises(ValueError, match=r"no tasks\.game_behavior"):
        report.page({"schema": "befm_jax.results/1", "tasks": {}})


def test_the_summary_has_a_row_a_game_and_their_mean_last(trained):
    lines = report.summary(trained).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert "base" in lines[1]
    assert "tuned" in lines[1]
    mean = trained["tuned"]["tasks"]["game_behavior"]["metrics"]["wasserstein"]
    assert lines[-1].startswith("mean")
    assert f"{mean['value']:.2f}" in lines[-1]
    assert f"{mean['ceiling']:.2f}" in lines[-1]
    assert "base" not in report.summary(trained["tuned"])


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (-0.001, "0.00"), (1.005, "1.00")])
def test_numbers_are_written_without_minus_nought(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("values", "count", "width"),
    [(range(101), 21, 5), (range(151), 31, 5), (range(21), 21, 1), (range(2), 2, 1)],
)
def test_bins_are_few_and_centred_on_round_values(values, count, width):
    bins = charts.Bins.of(list(values))
    assert len(bins.edges) == count + 1
    centres = (bins.edges[1:] + bins.edges[:-1]) / 2
    np.testing.assert_array_equal(centres, np.arange(count) * width)
    np.testing.assert_array_equal(np.digitize(list(values), bins.edges) - 1, bins.index)
    assert bins.percent(np.ones(len(values))).sum() == pytest.approx(100)


@pytest.mark.parametrize(
    ("high", "ticks"),
    [(100, [0, 25, 50, 75, 100]), (150, [0, 50, 100, 150]), (20, [0, 5, 10, 15, 20]), (1, [0, 1])],
)
def test_ticks_are_round(high, ticks):
    assert charts.nice_ticks(0, high, 5) == ticks


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_the_figure_takes_any_number_of_games(trained, count):
    found = copy.deepcopy(trained["tuned"]["tasks"]["game_behavior"])
    group = found["groups"]["public_goods"]
    found["groups"] = {f"game{number}": group for number in range(count)}
    figure = charts.games_figure(found, None, "model")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles.count(group["title"]) == count
