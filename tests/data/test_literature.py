"""Papers: what files of them hold, what is missing, and which rows are one paper."""

import csv
import json

import pytest

from befm_jax.data import literature
from befm_jax.errors import DataError
from tests.conftest import SHARED

PAPER = {
    "title": "Gifts and Norms",
    "context": "People give to strangers.",
    "key_idea": "Norms explain it.",
    "method": "A dictator game with 200 people.",
    "outcome": "Gifts follow the norm.",
    "future_impact": "Models of norms.",
}


def written(tmp_path, *records, name="papers.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table(tmp_path, *rows):
    path = tmp_path / "papers.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, absent here")
    return path


def test_the_five_aspects_of_a_paper(tmp_path):
    (paper,) = literature.read_workflows(written(tmp_path, {**PAPER, "year": 2020})).rows
    assert list(paper.aspects) == ["context", "key_idea", "method", "outcome", "impact"]
    assert paper.aspects["impact"] == ("Models of norms.",)
    assert paper.title == "Gifts and Norms"
    assert paper.labels == {"year": "2020"}
    assert paper.abstract == ""


def test_names_of_fields_as_other_files_write_them(tmp_path):
    record = {"Title": "T", "Key Idea": "k", "Projected Impact": "i", "Journal": "J"}
    (paper,) = literature.read_workflows(written(tmp_path, record)).rows
    assert paper.aspects == {"key_idea": ("k",), "impact": ("i",)}
    assert paper.labels == {"venue": "J"}


@pytest.mark.parametrize(
    "nothing", ["N/A", "n/a.", "", " - ", "None", None, "NA", "Not mentioned."]
)
def test_what_says_that_there_is_nothing_is_missing(tmp_path, nothing):
    rows = literature.read_workflows(written(tmp_path, {**PAPER, "method": nothing}))
    (paper,) = rows.rows
    assert list(paper.aspects) == ["context", "key_idea", "outcome", "impact"]
    assert rows.left_out.counts == {"method: missing (the paper is kept)": 1}


def test_texts_that_begin_likewise_are_texts(tmp_path):
    record = {**PAPER, "outcome": "None of the gifts differ.", "method": "Nash's model"}
    (paper,) = literature.read_workflows(written(tmp_path, record)).rows
    assert paper.aspects["outcome"] == ("None of the gifts differ.",)
    assert paper.aspects["method"] == ("Nash's model",)


def test_two_people_of_one_paper_are_two_texts(tmp_path):
    second = {**PAPER, "context": "N/A", "method": "A survey.", "title": "Gifts and norms."}
    rows = literature.read_workflows(written(tmp_path, PAPER, second))
    (paper,) = rows.rows
    assert paper.aspects["method"] == ("A dictator game with 200 people.", "A survey.")
    assert paper.aspects["context"] == ("People give to strangers.",)
    assert paper.aspects["outcome"] == ("Gifts follow the norm.",)
    assert rows.left_out.counts == {}
    again = literature.read_workflows(written(tmp_path, PAPER, PAPER))
    assert again.left_out.counts == {"row: nothing new of a paper before": 1}


def test_papers_without_aspects_and_rows_without_titles_are_counted(tmp_path):
    path = written(tmp_path, PAPER, {"title": "B", "abstract": "b"}, {**PAPER, "title": "?"})
    rows = literature.read_workflows(path)
    assert [paper.title for paper in rows.rows] == ["Gifts and Norms"]
    assert rows.left_out.counts == {
        "row: no title": 1,
        "paper: none of context, key_idea, method, outcome, impact": 1,
    }
    with pytest.raises(DataError, match="no paper; left out, paper: no abstract: 1"):
        literature.read_abstracts(written(tmp_path, PAPER))


def test_abstracts_that_are_missing_or_come_twice_are_counted(tmp_path):
    path = table(
        tmp_path,
        ["title", "year", "abstract"],
        ["One", "2001", "The first\n abstract."],
        ["Two", "2002", ""],
        ["Three", "2003", "-"],
        ["one", "2004", "The first abstract."],
        ["ONE!", "2005", "Another abstract."],
        ["Two", "2006", "A late abstract."],
    )
    rows = literature.read_abstracts(path)
    assert [(paper.title, paper.abstract) for paper in rows.rows] == [
        ("One", "The first abstract."), ("Two", "A late abstract."),
    ]  # fmt: skip
    assert [paper.labels["year"] for paper in rows.rows] == ["2001", "2002"]
    assert rows.left_out.counts == {
        "row: nothing new of a paper before": 1,
        "abstract: another of the same paper": 1,
        "paper: no abstract": 1,
    }
    assert rows.left_out.examples["paper: no abstract"] == ["line 5: Three"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"id": "1", "Context": "c"}, r"jsonl:2: no title; found id, Context; a paper has title"),
        ({**PAPER, "method": ["m"]}, r"jsonl:2: method is a list; it must be a text or null"),
        ({**PAPER, "title": 3}, r"jsonl:2: title is a int"),
        ([], r"jsonl:2: holds a list; it must be a JSON object"),
        ({**PAPER, "context": "a\0"}, r"jsonl:2: holds a NUL"),
        ({**PAPER, "context": "\ud83d"}, r"jsonl:2: holds a NUL or half a character"),
    ],
)
def test_what_is_no_paper_is_refused_with_its_line(tmp_path, record, says):
    with pytest.raises(DataError, match=says):
        literature.read_workflows(written(tmp_path, PAPER, record))


def test_a_table_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"csv:2: no title; found game, choice; a paper has title"):
        literature.read_abstracts(table(tmp_path, ["game", "choice"], ["bomb", "3"]))


def test_a_paper_is_known_by_the_words_of_its_title(tmp_path):
    one = literature.read_workflows(written(tmp_path, PAPER, {**PAPER, "title": "Other"}))
    other = literature.read_abstracts(
        table(tmp_path, ["title", "abstract"], ["Other", "o"], ["GIFTS  and  norms", "g"])
    )
    assert [paper.id for paper in one.rows] == [paper.id for paper in other.rows[::-1]]
    assert one.shares_people(other.sketch)
    assert one.fingerprint != other.fingerprint
    again = literature.read_workflows(written(tmp_path, {**PAPER, "title": "Other"}, PAPER))
    assert one.fingerprint == again.fingerprint


def test_the_real_workflows():
    rows = literature.read_workflows(shared("workflows_massw/benchmark_0531.jsonl"))
    assert len(rows.rows) == 1020
    assert rows.left_out.counts == {"impact: missing (the paper is kept)": 1}
    assert {len(texts) for paper in rows.rows for texts in paper.aspects.values()} == {1}


def test_the_real_workflows_of_two_people_each():
    path = shared("workflows_massw/human_annotations.jsonl")
    rows = literature.read_workflows(path)
    assert len(rows.rows) == 120
    # Two people of 120 papers, less what is the same and what is N/A.
    with path.open() as file:
        records = [json.loads(line) for line in file]
    for name, field in (("key_idea", "key_idea"), ("impact", "future_impact")):
        texts = {
            (record["title"], " ".join(record[field].split()))
            for record in records
            if record[field].strip() != "N/A"
        }
        assert sum(len(paper.aspects.get(name, ())) for paper in rows.rows) == len(texts)
    assert len(literature.read_abstracts(path).rows) == 120


@pytest.mark.parametrize(
    ("name", "papers", "counts"),
    [
        ("literature_aer/aej_2020_2026.csv", 737, {}),
        ("literature_aer/aer_2020_2026.csv", 747, {"paper: no abstract": 10}),
        (
            "literature/nber_abstracts.csv",
            496,
            {
                "row: nothing new of a paper before": 20,
                "abstract: another of the same paper": 5,
                "paper: no abstract": 440,
            },
        ),
    ],
)
def test_the_real_abstracts(name, papers, counts):
    rows = literature.read_abstracts(shared(name))
    assert len(rows.rows) == papers
    assert rows.left_out.counts == counts
