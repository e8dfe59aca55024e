"""BehaviorBench's tasks: all 25 figures, against the published formulas written out here."""

import dataclasses
import json
import os
import re
import sys
import types

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import wasserstein_distance
from sklearn.metrics import f1_score

from befm_jax import tasks
from befm_jax.data.behaviorbench import SETS
from befm_jax.data.items import AnswerSet, FreeText
from befm_jax.data.responses import Exact, Response, Sampled
from befm_jax.errors import DataError
from befm_jax.evals import measures, report, text_measures
from befm_jax.evals.results import Results
from befm_jax.respondents.comparing import compare
from befm_jax.tasks import sources
from befm_jax.tasks.behaviorbench import wins
from tests.conftest import SHARED
from tests.helpers import behaviorbench_files

RECORDS = 10
LEVELS = {"individual": "individual", "distributional": "distribution"}


class Drawing:
    """Draws one answer for each record, 20 for a game; now and then one out of range, or none."""

    name = "drawing"

    def __init__(self):
        self.texts = {}

    def respond(self, items, how):
        for item in items:
            rng = np.random.default_rng(list(item.id.encode()))
            if isinstance(item.answers, FreeText):
                texts = (" ".join(rng.choice(behaviorbench_files.WORDS, 5)),)
                response = Response(item.id, None, exact=False, draws=1, texts=texts)
            else:
                number = 1 if item.target.sum() == 1 else 20
                texts = tuple(self.text(item.answers, rng) for _ in range(number))
                found = [item.answers.parse(text) for text in texts]
                places = [one.position for one in found if one.position is not None]
                response = Response.from_counts(
                    item.id,
                    np.bincount(places, minlength=len(item.answers)),
                    unread=len(texts) - len(places),
                    texts=texts,
                )
            self.texts[item.id] = texts
            yield response

    def text(self, answers, rng):
        written = str(rng.choice(answers.written))
        if answers.kind == "letters" or len(answers) == 5:
            return written
        odd = ["I can't say.", "[9999]", "[-4]"] if answers.kind == "numbers" else ["Neither."]
        return str(rng.choice(odd)) if rng.random() < 0.2 else f"Not [3], but {written}"

    def describe(self):
        return {}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The records by path, what was drawn by task and item, and the results."""
    folder = tmp_path_factory.mktemp("behaviorbench")
    files = behaviorbench_files.write(folder, RECORDS)
    results, texts = Results(), {}
    for source in sources.select(f"behaviorbench={folder}", []):
        respondent = Drawing()
        how = Sampled(1)
        compare(results, source, source, [("drawing", respondent, how)], resamples=4, seed=0)
        texts[source.task.name.split("/")[1]] = respondent.texts
    return files, texts, results


# The published formulas, from the texts of records and draws alone.


def number(text):
    """The last number in brackets, else the first in the text."""
    bracketed = re.findall(r"\[\$?(-?\d+(?:\.\d+)?)\]", text)
    bare = re.search(r"-?\d+(?:\.\d+)?", text)
    return float(bracketed[-1]) if bracketed else float(bare[0]) if bare else None


def card(text):
    found = re.findall(r"\[(push|pull)\]", text.lower()) or re.findall("push|pull", text.lower())
    return float(found[-1] == "pull") if found else None


def clipped(value, low, high):
    return min(max(value, low), high)


def pairs(files, texts, name):
    """Of each file of a set, the answers of draws and people: pairs, None where nothing is read."""
    for file in SETS[name]:
        read = card if "push_pull" in name else number
        low, high = file.answers.values[0], file.answers.values[-1]
        for line, record in enumerate(files[file.path], 1):
            (text,) = texts[name][f"{file.name}/{line}"]
            value = read(text)
            yield (
                record,
                file,
                None if value is None else clipped(value, low, high),
                read(record["assistant"]),
            )


def groups(files, texts, name, group, with_unread=False):
    found = {}
    for record, file, guess, truth in pairs(files, texts, name):
        if guess is not None or with_unread:
            found.setdefault(group(record, file), []).append((guess, truth))
    return [np.array(own, float).T for own in found.values()]


def of_game(record, file):
    return file.name


def of_trait(record, file):
    return re.search(r"\*(\w+)\*", record["user"])[1]


def of_statement(record, file):
    target = record.get("metadata", {}).get("target_item")
    return target or re.search("5: (.*) Only", record["user"])[1]


GROUPS = {
    **dict.fromkeys(("across", "rounds", "across_push_pull", "rounds_push_pull"), of_game),
    **dict.fromkeys(("traits", "other_traits"), of_trait),
    **dict.fromkeys(("answer", "masked", "next"), of_statement),
    "age": lambda record, file: "",
}


def spans(files, texts, name):
    """Of each group what a figure is divided by to be of 100: 1 where it is in its own unit."""
    if name not in ("across", "rounds", "across_push_pull", "rounds_push_pull"):
        return [1.0] * len(groups(files, texts, name, GROUPS[name]))
    return [(file.answers.values[-1] - file.answers.values[0]) / 100 for file in SETS[name]]


def mae(files, texts, name):
    found = groups(files, texts, name, GROUPS[name])
    each = [np.abs(guess - truth).mean() for guess, truth in found]
    return np.mean(np.array(each) / spans(files, texts, name))


def distance(files, texts, name):
    if name in ("games", "push_pull"):
        each = []
        for file in SETS[name]:
            read = card if name == "push_pull" else number
            low, high = file.answers.values[0], file.answers.values[-1]
            drawn = [read(text) for text in texts[name][file.name]]
            drawn = [clipped(one, low, high) for one in drawn if one is not None]
            people = [read(record["assistant"]) for record in files[file.path]]
            each.append(wasserstein_distance(drawn, people) * 100 / (high - low))
        return np.mean(each)
    found = groups(files, texts, name, GROUPS[name])
    each = [wasserstein_distance(guess, truth) for guess, truth in found]
    return np.mean(np.array(each) / spans(files, texts, name))


def accuracy(files, texts, name):
    return np.mean([(g == t).mean() for g, t in groups(files, texts, name, GROUPS[name])])


def f1(files, texts, name):
    ((guess, truth),) = groups(files, texts, name, GROUPS[name])
    return f1_score(truth, guess, labels=sorted(set(truth)), average="macro", zero_division=0)


def contest(files, texts, name):
    (file,) = SETS[name]
    right = [
        set(texts[name][f"{file.name}/{line}"][0]) == set(record["assistant"])
        for line, record in enumerate(files[file.path], 1)
    ]
    return 100 * np.mean(right)


def win_rate(files, texts, name):
    won = []
    for record, _, guess, _ in pairs(files, texts, name):
        if guess is None:
            continue
        others = record["metadata"]["other_players_choices"]
        target = 2 / 3 * (guess + sum(others)) / (1 + len(others))
        won.append(abs(guess - target) <= min(abs(one - target) for one in others))
    return np.mean(won)


FORMULAS = {
    "MAE": mae, "W Distance": distance, "Accuracy": accuracy, "F1": f1, "Accuracy %": contest,
    "Win Rate %": win_rate,
}  # fmt: skip
PUBLISHED = [(task.name, one) for task in tasks.select("behaviorbench") for one in task.published]


@pytest.mark.parametrize(("task", "one"), PUBLISHED, ids=[one.id for _, one in PUBLISHED])
def test_a_figure_of_draws_is_that_of_the_published_formula(drawn, task, one):
    files, texts, results = drawn
    row = next(row for row in report.published(results) if row.id == one.id)
    value = row.figures["drawing"].value
    if one.metric == "BLEURT":
        assert value is None
        assert "needs the package bleurt" in row.figures["drawing"].note
    else:
        expected = FORMULAS[one.metric](files, texts, task.split("/")[1])
        assert value == pytest.approx(expected, rel=1e-9)


def test_unread_draws_are_counted_and_are_in_no_figure(drawn):
    _, texts, results = drawn
    for name in ("across", "rounds_push_pull", "games"):
        unread = sum(
            text in ("I can't say.", "Neither.") for own in texts[name].values() for text in own
        )
        figure = results.figure(f"behaviorbench/{name}", "wasserstein", "drawing")
        assert figure.unread == unread > 0
        assert figure.draws == sum(map(len, texts[name].values()))


def test_rouge_is_the_mean_over_the_steps(drawn):
    files, texts, results = drawn
    score = RougeScorer(["rouge1"], use_stemmer=True).score
    steps = []
    for file in SETS["workflow"]:
        own = [
            score(record["assistant"], texts["workflow"][f"{file.name}/{line}"][0])
            for line, record in enumerate(files[file.path], 1)
        ]
        steps.append(np.mean([one["rouge1"].fmeasure for one in own]))
    figure = results.figure("behaviorbench/workflow", "rouge1", "drawing")
    assert figure.value == pytest.approx(np.mean(steps))
    assert results.figure("behaviorbench/workflow", "rouge1", "drawing", {"journal": "aer"})


def test_they_are_the_leaderboards_25_figures():
    path = SHARED / "behaviorbench" / "leaderboard.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data/behaviorbench/leaderboard.json, absent here")
    published = json.loads(path.read_text())["scenarios"]
    ours = {one.id: (tasks.get(name), one) for name, one in PUBLISHED}
    assert sorted(ours) == sorted(row["id"] for row in published)
    for row in published:
        task, one = ours[row["id"]]
        measure = measures.get(one.measure)
        assert (one.name, one.metric) == (row["name"], row["metric"])
        assert measure.better == {"lower": "low", "higher": "high"}[row["direction"]]
        assert measure.level == LEVELS[row["level"]]
        assert one.measure in task.measures


class Uncertain(Drawing):
    """Says of each item how likely every answer is."""

    name = "uncertain"

    def respond(self, items, how):
        for item in items:
            rng = np.random.default_rng(list(item.id.encode()))
            shares = rng.dirichlet(np.ones(len(item.answers)))
            self.texts[item.id] = shares
            yield Response.from_mass(item.id, shares)


def test_exact_figures_are_what_one_draw_for_each_record_is_expected_to_score(tmp_path):
    """Linear ones to the digit; the distance is that of very many draws."""
    files = behaviorbench_files.write(tmp_path, RECORDS)
    results = Results()
    for name in ("rounds_push_pull", "guessing", "masked"):
        (source,) = sources.select(f"behaviorbench/{name}={tmp_path}", [])
        respondent = Uncertain()
        compare(results, source, source, [("it", respondent, Exact())], resamples=4, seed=0)
        shares, found = respondent.texts, {}
        for item in source.items():
            values = np.array(item.answers.values)
            truth = values[item.target.argmax()]
            found.setdefault(item.labels.get("statement", ""), []).append(
                (shares[item.id], values, truth, item)
            )
        value = {
            row.id: row.figures["it"].value
            for row in report.published(results)
            if row.figures["it"].task == source.task.name
        }
        if name == "masked":
            hits = [
                np.mean([own[values.tolist().index(truth)] for own, values, truth, _ in group])
                for group in found.values()
            ]
            assert value["bf_missing_acc"] == pytest.approx(np.mean(hits))
            distances = [
                wasserstein_distance(
                    group[0][1], [truth for *_, truth, _ in group],
                    np.mean([own for own, *_ in group], 0),
                )
                for group in found.values()
            ]  # fmt: skip
            assert value["bf_missing_wdist"] == pytest.approx(np.mean(distances))
        elif name == "guessing":
            records = files[SETS[name][0].path]
            won = 0.0
            for own, values, _, item in found[""]:
                record = records[int(item.id.split("/")[1]) - 1]
                others = record["metadata"]["other_players_choices"]
                for guess, share in zip(values, own, strict=True):
                    target = 2 / 3 * (guess + sum(others)) / (1 + len(others))
                    wins = abs(guess - target) <= min(abs(one - target) for one in others)
                    won += share * wins / RECORDS
            assert value["sg_winrate"] == pytest.approx(won)
        else:
            own, truth = np.array([own for own, *_ in found[""]]), [t for *_, t, _ in found[""]]
            weights = own.T.ravel()  # every person as both draws, weighted
            guesses = np.repeat([0.0, 1.0], RECORDS)
            expected = f1_score(truth * 2, guesses, average="macro", sample_weight=weights)
            assert value["ho_pp_multiround_f1"] == pytest.approx(expected)


def test_who_wins_is_worked_by_hand():
    answers = AnswerSet.numbers(range(101))
    won = wins(answers, (30.0, 60.0))
    # 22 makes the target 2/3 of 112/3, 24.9: it is 2.9 away, and 30 is 5.1 away.
    assert won[22]
    # 10 makes it 22.2: it is 12.2 away, and 30 is 7.8 away; 31 makes it 26.9, and 30 is nearer.
    assert not won[10]
    assert not won[31]
    assert won[30]  # as near as the other 30
    assert wins(answers, (0.0,) * 15).nonzero()[0].tolist() == [0]


def test_prompts_are_the_records_own_whatever_the_wording(tmp_path):
    files = behaviorbench_files.write(tmp_path, 3)
    (tmp_path / "own.toml").write_text('["survey/age"]\nuser = "Else?"\n')
    spec = f"behaviorbench/age={tmp_path}"
    (source,) = sources.select(spec, [], wording=str(tmp_path / "own.toml"))
    records = files[SETS["age"][0].path]
    assert [item.prompt[-1].text for item in source.items()] == [one["user"] for one in records]


def test_what_is_learnt_are_the_records(tmp_path):
    files = behaviorbench_files.write(tmp_path, 3)
    for source in sources.select(f"behaviorbench={tmp_path}", []):
        own = [one for file in SETS[source.task.name.split("/")[1]] for one in files[file.path]]
        family = source.family()
        learnt = [
            (example.messages[-2].text, example.messages[-1].text)
            for row in family.rows
            for example in family.examples(row, np.random.default_rng(0))
            for _ in range(int(example.weight))
        ]
        assert sorted(learnt) == sorted((one["user"], one["assistant"]) for one in own)


def test_one_name_is_all_of_them_and_a_part_needs_its_own_files_alone(tmp_path):
    assert len(tasks.select("behaviorbench")) == 15
    assert len({one.id for _, one in PUBLISHED}) == 25
    behaviorbench_files.write(tmp_path, 3)
    (tmp_path / SETS["games"][0].path).unlink()
    (source,) = sources.select(f"behaviorbench/age={tmp_path}", [])
    assert len(source.items()) == 3
    with pytest.raises(DataError, match=r"dictator_test\.jsonl: no such file"):
        sources.select(f"behaviorbench={tmp_path}", [])
    with pytest.raises(DataError, match="behaviorbench/age: it reads a table"):
        sources.select("behaviorbench/age", [])


def test_few_people_keep_every_game_and_all_of_a_population(tmp_path):
    behaviorbench_files.write(tmp_path, 4)
    spec = f"behaviorbench/across={tmp_path},behaviorbench/games={tmp_path}"
    across, games = (source.limited(8) for source in sources.select(spec, []))
    assert {item.labels["game"] for item in across.items()} == set(behaviorbench_files.GAMES)
    assert [item.target.sum() for item in games.items()] == [4] * 8


def test_the_page_and_the_terminal_have_the_published_names(drawn):
    *_, results = drawn
    page, printed = report.html(results), report.summary(results)
    for _, one in PUBLISHED:
        assert one.id in page
        assert one.name in printed
    assert "Sci. Workflow Pred., BLEURT: undefined" in printed
    withheld = dataclasses.replace(
        results, figures=[dataclasses.replace(one, outside=0.9) for one in results.figures]
    )
    (line,) = [line for line in report.summary(withheld).split("\n") if "Economics Con" in line]
    assert line.endswith("withheld")


def test_bleurt_is_asked_where_there_is_one(monkeypatch, tmp_path):
    """Its own package and checkpoint are large: here stands one that compares lengths."""

    class BleurtScorer:
        def __init__(self, checkpoint):
            assert checkpoint == str(tmp_path)

        def score(self, *, references, candidates):
            return [
                -abs(len(one) - len(other))
                for one, other in zip(references, candidates, strict=True)
            ]

    package, module = types.ModuleType("bleurt"), types.ModuleType("bleurt.score")
    module.BleurtScorer = BleurtScorer
    package.score, package.__spec__ = module, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "bleurt", package)
    assert "CHECKPOINT" in text_measures.without("bleurt")
    monkeypatch.setitem(os.environ, text_measures.CHECKPOINT, str(tmp_path))
    assert text_measures.without("bleurt") == ""
    found = text_measures.scores("bleurt", [["abc", "a"]], [["ab", "abcdef"]])
    assert found == pytest.approx([-1.0])
