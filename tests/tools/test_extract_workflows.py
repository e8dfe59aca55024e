"""Workflows from abstracts, by a server on the loopback address that picks out sentences."""

import csv
import json
import math
import re
import sys

import extract_workflows
import pytest

pytest.importorskip("openai", reason="needs the extra api")

from befm_jax.data import literature
from befm_jax.data.literature import ASPECTS
from befm_jax.errors import DataError
from tests.conftest import SHARED
from tests.helpers.openai_server import Fault, Server

TITLES = ["Gifts and Norms", "Trust, Twice", "A Market", "Bombs", "Nothing Said"]


def papers(path):
    """Five papers whose abstracts have a sentence a part; the last has one sentence alone."""
    with path.open("w") as file:
        for title in TITLES:
            sentences = [f"The {name} of {title} is here." for name in ASPECTS]
            abstract = " ".join(sentences[:1] if title == TITLES[-1] else sentences)
            file.write(json.dumps({"title": title, "abstract": abstract, "year": 2020}) + "\n")
    return path


def sentences(body):
    """The five parts as the sentences of the abstract, null where there are too few."""
    prompt = body["messages"][-1]["content"]
    abstract = re.search(r"Its abstract: (.*)", prompt)[1]
    found = re.findall(r"[^.]+\.", abstract)
    return dict(zip(ASPECTS, [*(text.strip() for text in found), *[None] * 5], strict=False))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["extract_workflows.py", *map(str, arguments)])
    extract_workflows.main()
    return capsys.readouterr()


def asked(body):
    return next(title for title in TITLES if f"paper: {title}\n" in body["messages"][-1]["content"])


def test_a_table_that_the_tasks_read(tmp_path, monkeypatch, capsys):
    out = tmp_path / "workflows.csv"
    with Server(lambda body: json.dumps(sentences(body))) as server:
        options = ("--out", out, "--model", "m", "--base_url", server.base_url)
        found = run(monkeypatch, capsys, papers(tmp_path / "papers.jsonl"), *options, "--yes")
    assert "m at http://127.0.0.1" in found.err
    assert "5 requests, at most" in found.err
    assert f"{out}: 5 of 5 papers" in found.out
    rows = literature.read_workflows(out)
    assert [paper.title for paper in rows.rows] == TITLES
    assert rows.rows[1].aspects["method"] == ("The method of Trust, Twice is here.",)
    assert list(rows.rows[4].aspects) == ["context"]
    assert rows.rows[0].labels == {"year": "2020"}
    (first, *_) = server.requests
    assert first["temperature"] == 0.0
    schema = first["response_format"]["json_schema"]["schema"]
    jsonschema = pytest.importorskip("jsonschema")
    for body in server.requests:
        jsonschema.validate(sentences(body), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"context": "a"}, schema)


DAMAGED = {
    "Trust, Twice": "I can't do that.",
    "A Market": '{"context": "so", "key_idea": "it ends in the mid',
    "Bombs": '{"context": 7, "key_idea": "", "method": "", "outcome": "", "impact": ""}',
}


def test_damaged_answers_are_asked_again_then_counted_and_not_asked_again(
    tmp_path, monkeypatch, capsys
):
    out, table = tmp_path / "workflows.csv", papers(tmp_path / "papers.jsonl")
    told = []

    def answer(body):
        title = asked(body)
        told.append(title)
        if title in DAMAGED and not (title == "A Market" and told.count(title) > 1):
            return DAMAGED[title]
        # As a model without a schema may write it.
        return f"Here it is:\n```json\n{json.dumps(sentences(body))}\n```"

    with Server(answer, [Fault(500, headers={"Retry-After": "0.01"})]) as server:
        options = ("--out", out, "--model", "m", "--base_url", server.base_url, "--yes")
        found = run(monkeypatch, capsys, table, *options)
        assert [told.count(title) for title in TITLES] == [1, 3, 2, 3, 1]
        again = run(monkeypatch, capsys, table, *options)
        assert len(told) == 10
    assert f"{out}: 3 of 5 papers" in found.out
    assert "damaged: 4 answers: not a JSON object" in found.out
    assert "damaged: 3 answers: context is a int; it must be a text or null" in found.out
    assert again.out == found.out
    with out.open(newline="") as file:
        assert [row["title"] for row in csv.DictReader(file)] == [TITLES[0], TITLES[2], TITLES[4]]
    of_trust = [body for body in server.requests if asked(body) == "Trust, Twice"]
    assert len({body["seed"] for body in of_trust}) == 3


def test_what_is_above_the_limit_is_not_asked_again_and_the_rest_is_written(
    tmp_path, monkeypatch, capsys
):
    out, table = tmp_path / "workflows.csv", papers(tmp_path / "papers.jsonl")

    def answer(body):
        found = sentences(body)
        # So long that what is left is too little for another.
        return json.dumps(found | {"method": "a\0b" * 2000} if asked(body) == "Bombs" else found)

    with Server(answer) as server:
        options = ("--out", out, "--model", "m", "--base_url", server.base_url)
        for _ in range(2):
            found = run(monkeypatch, capsys, table, *options, "--budget_tokens", 8000)
            assert "above the limit: 1 of 5 papers" in found.err
            assert f"{out}: 4 of 5 papers" in found.out
            assert "damaged: 1 answers: method holds a NUL, which no table can" in found.out
    assert len(server.requests) == 5


def test_a_server_without_schemas_is_asked_without_one(tmp_path, monkeypatch, capsys):
    out, table = tmp_path / "workflows.csv", papers(tmp_path / "papers.jsonl")
    with Server(lambda body: json.dumps(sentences(body)), refuses=("response_format",)) as server:
        options = ("--out", out, "--model", "m", "--base_url", server.base_url, "--concurrency", 1)
        found = run(monkeypatch, capsys, table, *options, "--budget_tokens", 20_000)
        with pytest.raises(SystemExit, match="no such file"):
            run(monkeypatch, capsys, tmp_path / "absent.csv", *options)
    assert "5 of 5 papers" in found.out
    assert "refuses response_format: left out" in found.err
    assert sum("response_format" in body for body in server.requests) == 1
    with pytest.raises(SystemExit, match="nothing was asked: 5 requests"):
        run(monkeypatch, capsys, table, *options[2:], "--out", tmp_path / "other.csv")


def written(path, *rows):
    path.write_text("".join(json.dumps({"title": "T", **row}) + "\n" for row in rows))
    return path


def test_agreement_by_hand(tmp_path):
    pytest.importorskip("rouge_score")
    people = [
        {"title": "One", "method": "gold silver", "outcome": "iron"},
        {"title": "One", "method": "gold copper", "outcome": "N/A"},
        {"title": "Two", "method": "wood", "outcome": "iron"},
        {"title": "Two", "method": "wood", "outcome": "iron"},
        {"title": "Alone", "method": "stone"},
    ]
    model = [
        {"title": "One", "method": "gold"},
        {"title": "Two", "method": "wood", "outcome": "tin"},
    ]
    annotated = literature.read_annotations(written(tmp_path / "people.jsonl", *people))
    extracted = literature.read_workflows(written(tmp_path / "model.jsonl", *model)).rows
    rows = extract_workflows.agreements({paper.id: paper for paper in extracted}, annotated)
    by = {(row.aspect, row.sides): row for row in rows}
    mean = {key: row.rouge["rouge1"][0] for key, row in by.items()}
    # One: half of the words; Two: all.
    assert mean["method", "people"] == pytest.approx((1 / 2 + 1) / 2)
    # One: precision 1 and recall 1/2 against either.
    assert mean["method", "extraction"] == pytest.approx((2 / 3 + 1) / 2)
    assert mean["method", "another paper"] == 0
    assert by["method", "people"].papers == 2
    # Of One people don't agree, and the extraction says nothing.
    assert by["outcome", "people"].stated == 1 / 2
    assert by["outcome", "extraction"].stated == pytest.approx((1 / 2 + 1) / 2)
    assert (by["outcome", "people"].papers, by["outcome", "extraction"].papers) == (1, 1)
    assert mean["outcome", "people"] == 1
    assert mean["outcome", "extraction"] == 0
    assert math.isnan(mean["context", "people"])
    low, high = by["method", "people"].rouge["rouge1"][1:]
    assert (low, high) == (1 / 2, 1)
    text = extract_workflows.table(iter(by.values()))
    assert "| method | people | 2 | 0.750 [0.500, 1.000] | 0.750 [0.500, 1.000] | 100% |" in text
    with pytest.raises(DataError, match="annotated by two people"):
        next(extract_workflows.agreements({}, annotated))


def test_sentences_of_real_abstracts_against_their_annotators(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    folder = SHARED / "workflows_massw"
    if not folder.exists():
        pytest.skip("needs ../shared/data/workflows_massw, absent here")
    first = (folder / "human_annotations.jsonl").read_text().splitlines()[:24]
    people, out = tmp_path / "people.jsonl", tmp_path / "workflows.csv"
    people.write_text("\n".join(first))
    with Server(lambda body: json.dumps(sentences(body))) as server:
        options = ("--out", out, "--model", "m", "--base_url", server.base_url, "--yes")
        found = run(monkeypatch, capsys, people, *options, "--check", people)
    figures = {}
    for line in found.out.splitlines():
        if line.startswith("| context |"):
            _, _, sides, _, rouge1, *_ = line.split("|")
            figures[sides.strip()] = float(rouge1.split()[0])
    # First sentences are much of the context, and of that of no other paper.
    assert figures["another paper"] + 0.1 < figures["extraction"]
    assert figures["another paper"] + 0.1 < figures["people"]
