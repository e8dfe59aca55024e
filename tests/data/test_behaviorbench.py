"""BehaviorBench's directory: what is read of it, and what a damaged file says."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import behaviorbench, examples, questionnaires
from befm_jax.data.behaviorbench import SETS, read, read_populations
from befm_jax.data.items import FreeText, Message
from befm_jax.data.rows import SPLITS
from befm_jax.errors import DataError
from befm_jax.tasks.wording import DEFAULT
from tests.helpers import behaviorbench_files
from tests.helpers.damage import damaged

RECORDS = 6
AGES = "big_five/demo_pred_age/test.jsonl"
DICTATOR = "moblab/game_behavior/dictator_test.jsonl"
GUESSES = "moblab/strategic_gameplay/guessing_strategic_gameplay_test.jsonl"


@pytest.fixture
def folder(tmp_path):
    behaviorbench_files.write(tmp_path, RECORDS)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("behaviorbench")
    return folder, behaviorbench_files.write(folder, RECORDS)


def change(folder, path, line, **fields):
    """Changes fields of one record of a file; those that are None are removed."""
    lines = (folder / path).read_text().splitlines()
    record = {**json.loads(lines[line - 1]), **fields}
    kept = {name: value for name, value in record.items() if value is not None}
    lines[line - 1] = json.dumps(kept)
    (folder / path).write_text("\n".join(lines) + "\n")


def test_every_file_of_the_layout_is_of_one_set(made):
    _, files = made
    paths = [file.path for own in SETS.values() for file in own]
    assert sorted(paths) == sorted(files)


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("games", "push_pull")])
def test_records_are_read_as_they_are(made, name):
    folder, files = made
    rows = read(folder, name)
    assert len(rows.rows) == RECORDS * len(SETS[name])
    assert rows.left_out.counts == {}
    # The first so many are of all files.
    assert len({row.id.split("/")[0] for row in rows.rows[: len(SETS[name])]}) == len(SETS[name])
    records = {
        f"{file.name}/{line}": record
        for file in SETS[name]
        for line, record in enumerate(files[file.path], 1)
    }
    assert sorted(records) == sorted(row.id for row in rows.rows)
    for row in rows.rows:
        record = records[row.id]
        texts = [record["system"], record["user"]] if record["system"] else [record["user"]]
        assert [message.text for message in row.prompt] == texts
        if isinstance(row.answers, FreeText):
            assert row.answer == record["assistant"]
        else:
            assert row.answers.written[row.answer] == record["assistant"]
        if "user_id" in record.get("metadata", {}):
            assert row.person == record["metadata"]["user_id"]


def test_a_game_is_one_row_with_how_many_gave_each_answer(made):
    folder, files = made
    rows = read_populations(folder, "games").rows
    assert [row.id for row in rows] == list(behaviorbench_files.GAMES)
    for row in rows:
        own = files[f"moblab/game_behavior/{row.id}_test.jsonl"]
        observed = Counter(record["assistant"] for record in own)
        counted = dict(zip(row.answers.written, row.counts.tolist(), strict=True))
        assert {text: number for text, number in counted.items() if number} == observed
        assert len(row.answers) == behaviorbench_files.GAMES[row.id] + 1
    (cards,) = read_populations(folder, "push_pull").rows
    assert cards.answers.written == ("[Push]", "[Pull]")
    assert cards.counts.sum() == RECORDS


def test_splits_are_disjoint_and_add_up(tmp_path):
    behaviorbench_files.write(tmp_path, 60)
    for name in ("masked", "guessing"):  # whose records they are is said, or not
        people = read(tmp_path, name)
        parts = [{row.person for row in people.part(split).rows} for split in SPLITS[1:]]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    games = read_populations(tmp_path, "games")
    counts = {split: games.part(split).rows for split in SPLITS}
    for place, whole in enumerate(counts["all"]):
        added = sum(counts[split][place].counts for split in SPLITS[1:])
        np.testing.assert_array_equal(added, whole.counts)


def test_the_reader_of_examples_reads_every_file(made):
    folder, files = made
    for path, records in files.items():
        found = list(examples.read(folder / path))
        assert [one.messages[-1].text for one in found] == [one["assistant"] for one in records]
        assert all(
            one.messages[-2] == Message("user", record["user"])
            for one, record in zip(found, records, strict=True)
        )


def test_what_a_record_is_about_is_its_label(made):
    folder, _ = made
    labels = {name: [row.labels for row in read(folder, name).rows] for name in SETS
              if name not in ("games", "push_pull")}  # fmt: skip
    assert {one["game"] for one in labels["rounds"]} == set(behaviorbench_files.ROUNDS)
    for name in ("traits", "other_traits"):
        assert {one["trait"] for one in labels[name]} == set(behaviorbench.TRAITS)
    assert [one["statement"] for one in labels["answer"]][:3] == ["E1", "A1", "C1"]
    assert [one["statement"] for one in labels["masked"]][:3] == ["A1", "C1", "N1"]
    assert {one["journal"] for one in labels["workflow"]} == {"aer", "nhb"}
    assert {one["step"] for one in labels["workflow"]} == {
        "idea", "method", "outcome", "impact", "title",
    }  # fmt: skip


def test_no_statement_holds_another():
    """A survey record without a code is recognised by the statement in its text."""
    texts = [one.text for one in questionnaires.get("big_five_50").statements.values()]
    assert not [(one, other) for one in texts for other in texts if one != other and one in other]


@pytest.mark.parametrize(
    ("texts", "written"),
    [
        (["[7]", "[8]", "$9"], "[33]"),
        (["[$7]", "[$8]", "[9]"], "[$33]"),
        (["7", "8"], "33"),
        (["I say 7."], "[33]"),
        (["[ 7 ]"], "[33]"),
    ],
)
def test_answers_are_written_as_most_records_write_them(folder, texts, written):
    lines = [json.dumps({"system": "", "user": "How much?", "assistant": text}) for text in texts]
    (folder / DICTATOR).write_text("\n".join(lines))
    row = read_populations(folder, "games").rows[0]
    assert row.answers.written[33] == written
    assert row.counts[7] == 1
    assert row.counts.sum() == len(texts)


def test_fractions_count_as_the_nearest_and_ages_of_jokes_are_left_out(folder):
    change(folder, DICTATOR, 1, assistant="[33.4]")
    assert read_populations(folder, "games").rows[0].counts[33] == 1
    for line, age in enumerate(("[999999999]", "[-3]", "[121]"), 1):
        change(folder, AGES, line, assistant=age)
    rows = read(folder, "age")
    assert len(rows.rows) == RECORDS - 3
    assert rows.left_out.counts == {"age: not 0 to 120": 3}
    (line, *_) = rows.left_out.lines()
    assert f"{AGES}:1: [999999999]" in line


def test_a_guess_without_others_is_left_out(folder):
    change(folder, GUESSES, 2, metadata={"other_players_choices": []})
    rows = read(folder, "guessing")
    assert len(rows.rows) == RECORDS - 1
    assert rows.left_out.counts == {"guess: nobody else in the group": 1}


ACROSS = "moblab/acrossgame_behavior/acrossgame_bomb_test.jsonl"
CARDS = "moblab/multiround_behavior/push_pull_multiround_test.jsonl"
CONTEST = "economics_contests/ieo_economics.jsonl"
MASKED = "big_five/missing_surv_resp/test.jsonl"
TRAITS = "big_five/pers_score_pred/test.jsonl"
STATEMENTS = "big_five/surv_resp_pred/test.jsonl"


@pytest.mark.parametrize(
    ("name", "path", "fields", "says"),
    [
        ("across", ACROSS, {"assistant": None}, "no assistant; a record has system, user and"),
        ("across", ACROSS, {"system": None}, "no system; .* found user, assistant, metadata"),
        ("across", ACROSS, {"user": 7}, "user is a int; it must be a text"),
        ("across", ACROSS, {"user": " "}, "user is blank"),
        ("across", ACROSS, {"metadata": []}, "metadata is a list; it must be an object"),
        ("across", ACROSS, {"assistant": "[101]"}, r"assistant is '\[101\]'; .*answer: 0 to 100"),
        ("across", ACROSS, {"assistant": "[-1]"}, r"assistant is '\[-1\]'"),
        ("across", ACROSS, {"assistant": "a lot"}, "assistant is 'a lot'; .* 0 to 100"),
        ("rounds_push_pull", CARDS, {"assistant": "[Jump]"}, "it must be an answer: Push, Pull"),
        ("contest", CONTEST, {"assistant": "E"}, "it must be an answer: A, B, C, D, AB"),
        ("age", AGES, {"assistant": "young"}, "assistant is 'young'"),
        ("masked", MASKED, {"metadata": {}}, "metadata.target_item is None; .* such as 'E1'"),
        ("guessing", GUESSES, {"metadata": {}}, "metadata.other_players_choices is None"),
        (
            "guessing", GUESSES, {"metadata": {"other_players_choices": [1, "2"]}},
            r"other_players_choices is \[1, '2'\]; it must be a list of numbers from 0 to 100",
        ),
        (
            "guessing", GUESSES, {"metadata": {"other_players_choices": [1, 1e999]}},
            r"other_players_choices is \[1, inf\]",
        ),
        ("traits", TRAITS, {"user": "Extraversion?"}, r"must mark the trait .* \*Extraversion\*"),
        ("answer", STATEMENTS, {"user": "I like tea."}, "one of the 50 Big Five statements"),
        ("games", DICTATOR, {"user": "Another game?"}, "asks something else than the file's first"),
    ],
)  # fmt: skip
def test_a_record_that_cant_be_is_an_error_with_its_line(folder, name, path, fields, says):
    change(folder, path, 3, **fields)
    reader = read_populations if name == "games" else read
    with pytest.raises(DataError, match=f"^{folder / path}:3: .*{says}") as error:
        reader(folder, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ": the file is empty"),
        (None, ": no such file"),
        ('{"system": "", "user": "a", "assistant": "[1]"}\n{"system": ', ":2: not JSON"),
        ("[1]\n", ":1: holds a list"),
        ('{"system": "", "user": "a\\u0000", "assistant": "[1]"}\n', ":1: holds a NUL"),
    ],
)
def test_a_file_that_cant_be_is_an_error_with_its_name(folder, content, says):
    (folder / AGES).unlink()
    if content is not None:
        (folder / AGES).write_text(content)
    with pytest.raises(DataError, match=f"^{folder / AGES}{says}"):
        read(folder, "age")
    assert len(read(folder, "masked").rows) == RECORDS  # the others do without it


@pytest.mark.parametrize(
    ("name", "path"), [("guessing", GUESSES), ("masked", MASKED), ("contest", CONTEST)]
)
def test_changed_bytes_are_read_or_refused_in_words(folder, name, path):
    content = (folder / path).read_bytes()
    refusals = []
    for seed in range(60):
        (folder / path).write_bytes(damaged(content, random.Random(seed), is_json=True))
        try:
            for row in read(folder, name).rows:
                list(tasks.get(f"behaviorbench/{name}").items(row, DEFAULT, None))
        except DataError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 60
    assert [line for line in refusals if path not in line] == []


def test_the_same_records_in_another_folder_are_recognised(made, tmp_path):
    folder, _ = made
    behaviorbench_files.write(tmp_path / "again", RECORDS)
    behaviorbench_files.write(tmp_path / "others", RECORDS, seed=1)
    for reader, name in ((read, "masked"), (read_populations, "games")):
        rows = reader(folder, name)
        again, others = (reader(tmp_path / one, name) for one in ("again", "others"))
        assert rows.fingerprint == again.fingerprint != others.fingerprint
        assert rows.shares_people(again.sketch)
        assert not rows.shares_people(others.sketch)
