"""The report: a page that trusts no text, a picture, a table; sections for any task."""

import copy
import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest

from befm_jax.evals import report
from tests.helpers import made_up_results
from tests.helpers.made_up_results import EVIL, FIRST_PROMPT

VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def found():
    return made_up_results.made_up()


@pytest.fixture(scope="module")
def page(found):
    return report.html(found)


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


def changed(found, **fields):
    """The results with every figure of the main respondent changed."""
    figures = [
        dataclasses.replace(one, **fields) if one.respondent == found.main else one
        for one in found.figures
    ]
    return dataclasses.replace(found, figures=figures)


def test_the_files_are_written_and_nothing_else(found, tmp_path):
    folder = tmp_path / "deep" / "down"
    report.write(found, folder)
    report.write(found, folder)
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "figures.csv", "report.html", "populations.png",
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text("utf-8"))["main"] == "tuned"
    png = (folder / "populations.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [1600, 800]


def test_nan_is_refused_before_anything_is_written(found, tmp_path):
    broken = dataclasses.replace(found, extra={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        report.write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untrusted_text_is_escaped_everywhere(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "<b>of</b>" not in page


def test_the_page_is_well_formed_and_reaches_for_nothing_outside(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\(|@import|src=", page)
    links = [one["href"] for tag, one in parser.tags if tag == "a"]
    identities = {one.get("id") for _, one in parser.tags}
    assert links
    assert {link[1:] for link in links} <= identities


def test_the_main_table_comes_first_with_a_row_a_task(found, page):
    first = page[: page.index("</table>")]
    assert first.count("<tr>") == 1 + 3
    assert page.index("<table") < page.index("<h2")
    value = found.figure("games", "wasserstein", "tuned").value
    assert f"{value:.2f}" in first


def test_every_task_has_a_section_with_what_it_has(found):
    games, survey, papers = report.sections(found)
    assert [row.label for row in games.values] == [EVIL, "banker", "goods"]
    assert len(games.pictures) == 3
    assert set(games.pictures[0].panel.lines) == {"base", "tuned"}
    assert [row.label for row in survey.groups["sex"]] == ["f", "m"]
    assert len(survey.pictures) == 1
    assert (papers.pictures, papers.values) == ([], [])
    assert [one.main.measure for one in games.measures] == list(made_up_results.GAMES.measures)


def test_the_page_says_what_was_compared_left_out_and_how(found, page):
    assert page.count('<section class="game"') == 4
    assert "unplayed" in page
    assert "no people to compare with" in page
    assert ">31<" in page
    for setting in ("train.steps", "games.how.tuned.mode", "people.games.fingerprint", "command"):
        assert setting in page
    assert "50 values, in results.json" in page
    assert "games: people of a table, &lt;script&gt;" in page
    assert "(split: test), 60 bootstrap resamples, seed 0." in page
    assert html.escape("may have seen these people <script>") in page.replace("&#39;", "'")
    assert "62.5 %" in page  # how often the sampled one ends after its answer
    for term in report.DEFINITIONS:
        assert f"<dt>{term}</dt>" in page


def test_the_page_shows_the_first_prompt_as_text(found, page):
    shown = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert [html.unescape(text) for text in shown] == [FIRST_PROMPT]
    other = copy.deepcopy(found)
    for value in ("what?", {"ids": 3}, None):
        other.respondents["tuned"]["description"]["first_prompt"] = value
        assert "<pre>" not in report.html(other)


def test_much_outside_is_warned_of_and_most_outside_withheld(found):
    (section, *_) = report.sections(found)
    labels = [step["label"] for step in section.ladder]
    assert "base" not in labels  # 60 % of its mass is outside
    assert {"tuned", "tuned, sampled", "uniform", "other people (ceiling)"} <= set(labels)
    fine, warned, withheld = (changed(found, outside=share) for share in (0.049, 0.05, 0.5))
    assert "5 % outside" not in report.html(fine)
    assert "5 % outside" in report.html(warned)
    assert 'class="big"' in report.html(warned)
    bare = report.html(withheld)
    assert 'class="big"' not in bare
    assert "50.0 % of what tuned answers is outside the answer sets." in bare
    assert "tuned" not in [step["label"] for step in report.sections(withheld)[0].ladder]
    assert "tuned is withheld: 50.0 % of its answers are outside the answer sets" in bare


def test_the_printed_table_has_everybodys_share_outside(found):
    for share, mark in ((0.049, "4.9 %"), (0.05, "5 % !"), (0.5, "50.0 % !")):
        games = report.summary(changed(found, outside=share)).split("\n\n")[0]
        (mean,) = [line for line in games.splitlines() if line.startswith("mean")]
        _, _, base, outside, _, _, tuned, own, *_ = re.split(r"  +", mean)
        # 60 % of the base's mass is outside.
        assert (base, outside) == ("withheld", "60.0 % !")
        assert own == mark
        assert (tuned == "withheld") == (share == 0.5)
        assert ("tuned is withheld: 50.0 %" in games) == (share == 0.5)
        assert "base is withheld: 60.0 %" in games


def test_who_is_not_compared_is_said_first_on_the_page_and_last_in_the_terminal(found):
    other = dataclasses.replace(found, extra={"not_compared": {"mute": "no answer in any set"}})
    assert "mute is not compared: no answer in any set" in report.html(other).split("<table")[0]
    assert report.summary(other).endswith("mute is not compared: no answer in any set")


def test_a_figure_notes_what_is_outside(found):
    assert "outside" not in found.figure("games", "wasserstein", "tuned").note
    note = found.figure("games", "wasserstein", "base").note
    assert "60.0 % of the answers are outside the answer sets" in note
    assert note.endswith("withheld from headlines")
    sampled = found.figure("games", "wasserstein", "tuned, sampled")
    assert "10.0 % of the answers are outside" in sampled.note
    assert "withheld" not in sampled.note


def test_baselines_that_know_the_compared_people_are_in_no_ladder(found):
    figures = [
        dataclasses.replace(one, beside={**one.beside, "pooled": 0.5}) for one in found.figures
    ]
    fitted = dataclasses.replace(found, figures=figures)
    assert "pooled" in [step["label"] for step in report.sections(fitted)[0].ladder]
    people = {"games": {**found.people["games"], "in_sample": ["pooled"]}}
    known = dataclasses.replace(fitted, people=people)
    assert "pooled" not in [step["label"] for step in report.sections(known)[0].ladder]
    assert "Not in it: pooled, which are fitted on the compared" in report.html(known)
    assert "Not in it" not in report.html(fitted)
    assert 'pooled<small class="warn">in sample</small>' in report.html(known)


def test_the_ladder_goes_from_good_to_bad(found):
    games, survey, _ = report.sections(found)
    values = [step["value"] for step in games.ladder]
    assert values == sorted(values)
    assert max(step["width"] for step in games.ladder) == 100
    assert [step["label"] for step in survey.ladder] == ["tuned"]


def test_the_summary_has_a_row_a_value_and_their_mean(found):
    games, survey, papers = report.summary(found).split("\n\n")
    lines = games.splitlines()
    assert "smaller is better" in lines[0]
    assert [line.split()[0] for line in lines[3:6]] == ["banker", "goods", "mean"]
    mean = found.figure("games", "wasserstein", "tuned")
    assert f"{mean.value:.2f}" in lines[5]
    assert f"{mean.ceiling:.2f}" in lines[5]
    assert "1 items left out, no people to compare with (unplayed)" in games
    assert "larger is better" in survey
    assert "0.67" in papers or "0.57" in papers or "papers" in papers


def test_what_a_respondent_lacks_shows_as_a_dash(found):
    partial = dataclasses.replace(
        found,
        figures=[
            one
            for one in found.figures
            if (one.respondent, dict(one.where)) != ("base", {"game": "goods"})
        ],
    )
    row = next(line for line in report.summary(partial).splitlines() if line.startswith("goods"))
    assert "–" in row
    assert report.html(partial)


def test_results_without_figures_are_refused(found):
    with pytest.raises(ValueError, match="no figures"):
        report.html(dataclasses.replace(found, figures=[]))


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (-0.001, "0.00"), (1.005, "1.00")])
def test_numbers_are_written_without_minus_nought(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (1e-15, "0.0 %"), (0.0312, "3.1 %"), (0.5, "50.0 %")]
)
def test_shares_are_written_in_per_cent(share, text):
    assert report.percent(share) == text


def test_points_are_shown_in_the_items_own_unit(found):
    own = found.figure("games", "mean_difference", "tuned", {"game": "goods"})
    assert report.own_unit(own) == f"{own.value * 0.2:.2f} {EVIL}"
    assert report.unit(own) == f"points (1: 0.2 {EVIL})"
    mean = found.figure("games", "mean_difference", "tuned")
    assert report.own_unit(mean) == f"{mean.value:.2f} points"
    assert report.unit(mean) == "points (100: the whole scale)"
    assert report.unit(found.figure("games", "log_score", "tuned")) == "nats"


@pytest.mark.parametrize(
    ("better", "said"),
    [("low", "smaller is better"), ("high", "larger is better"), ("0", "0 is best"), ("", "")],
)
def test_which_figures_are_good(found, better, said):
    other = copy.deepcopy(found)
    other.tasks["papers"]["measures"]["rouge1"]["better"] = better
    papers = report.summary(other).split("\n\n")[2]
    assert papers.splitlines()[0] == "papers: rouge1 in share" + (f"; {said}" if said else "")
    page = report.html(other)
    assert f'rouge1 <span class="soft">(share{", " if said else ""}{said})</span>' in page


@pytest.mark.parametrize(
    ("better", "floor", "said"), [("low", 0.1, True), ("low", None, False), ("high", 0.1, False)]
)
def test_floors_are_named_under_groups_only_where_there_are_some(found, better, floor, said):
    other = changed(copy.deepcopy(found), level="distribution", floor=floor)
    other.tasks[made_up_results.SURVEY.name]["measures"]["accuracy"]["better"] = better
    assert ("compare a figure with its floor" in report.html(other)) is said


def test_of_published_contrasts_arms_are_counted(found):
    other = copy.deepcopy(found)
    measured = other.tasks["papers"]["measures"]
    measured["effect_sign"] = measured.pop("rouge1")
    other.figures = [
        dataclasses.replace(one, measure="effect_sign") if one.task == "papers" else one
        for one in other.figures
    ]
    assert [one.counts for one in report.sections(other)] == ["people", "people", "arms"]
    page = report.html(other)
    assert "1 item, each an arm of a published contrast." in page
    assert "1 answers of people" not in page
