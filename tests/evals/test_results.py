"""results.json and figures.csv: what is written comes back, and is what the schema says."""

import csv
import dataclasses
import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from befm_jax.errors import DataError, UserError
from befm_jax.evals import results
from befm_jax.evals.results import Distribution, Figure
from tests.helpers import made_up_results

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results.md"


@pytest.fixture(scope="module")
def found():
    return made_up_results.made_up()


@pytest.fixture(scope="module")
def schema():
    text = resources.files("befm_jax.evals").joinpath("results.schema.json").read_text("utf-8")
    return json.loads(text)


def test_what_is_written_comes_back(found, tmp_path):
    found.write(tmp_path)
    again = results.read(tmp_path / "results.json")
    assert again.figures == found.figures
    assert again.as_dict() == json.loads((tmp_path / "results.json").read_text("utf-8"))
    again.write(tmp_path / "again")
    for name in ("results.json", "figures.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_results_are_what_the_schema_says(found, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    jsonschema.validate(content, schema)
    for broken in (
        {**content, "schema": "befm_jax.results/1"},
        {**content, "more": 1},
        {**content, "figures": [{**content["figures"][0], "outside": 1.5}]},
        {**content, "figures": [{**content["figures"][0], "ci95": [1.0]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_the_schema_and_the_document_have_every_field(schema):
    text = DOCS.read_text("utf-8")
    for record, name in ((Figure, "figure"), (Distribution, "distribution")):
        names = [one.name for one in dataclasses.fields(record)]
        assert schema["$defs"][name]["required"] == names
        assert [one for one in names if f"`{one}`" not in text] == []
    assert [one for one in schema["required"] if f"`{one}`" not in text] == []


def test_the_table_has_a_row_a_figure(found, tmp_path):
    found.write(tmp_path)
    with (tmp_path / "figures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.figures)
    for row, figure in zip(rows, found.figures, strict=True):
        assert row["task"] == figure.task
        assert (float(row["value"]) if row["value"] else None) == figure.value
        assert (float(row["low95"]) if row["low95"] else None) == (figure.ci95 or (None,))[0]
        assert (json.loads(row["where"]) if row["where"] else {}) == figure.where


def test_figures_are_found_by_what_they_are_of(found):
    own = found.figure("games", "wasserstein", "tuned", {"game": "bomb"})
    assert (own.respondent, own.where) == ("tuned", {"game": "bomb"})
    assert found.figure("games", "wasserstein", "tuned").where == {}
    assert found.figure("games", "wasserstein", "nobody") is None
    assert len(found.select("games", "wasserstein", "tuned")) == 4


def test_the_same_evaluation_twice_is_refused(found):
    items, responses = made_up_results.games(1)
    again = made_up_results.evaluate(
        made_up_results.GAMES, items, responses, respondent="tuned", resamples=10
    )
    with pytest.raises(UserError, match="tuned was evaluated on games already"):
        found.add(again, {}, made_up_results.Exact())


def test_nan_and_figures_of_nobody_are_refused_before_anything_is_written(found, tmp_path):
    figure = found.figures[0]
    for broken in (
        dataclasses.replace(figure, value=float("nan")),
        dataclasses.replace(figure, respondent="nobody"),
    ):
        wrong = dataclasses.replace(found, figures=[broken])
        with pytest.raises(ValueError, match=r"JSON|nobody"):
            wrong.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: "nothing", "not valid JSON"),
        (lambda one: json.dumps([1]), "schema is None"),
        (lambda one: json.dumps({**one, "schema": "befm_jax.results/1"}), "results/1"),
        (lambda one: json.dumps({k: v for k, v in one.items() if k != "tasks"}), "tasks"),
        (lambda one: json.dumps({**one, "figures": [{"task": "games"}]}), r"figures\[0\]"),
        (lambda one: json.dumps({**one, "main": "nobody"}), "nobody"),
        (
            lambda one: json.dumps({**one, "people": {"games": []}}),
            r"\$\.people\.games: \[\] is not",
        ),
    ],
)
def test_other_files_are_refused_with_the_reason(found, tmp_path, change, message):
    path = tmp_path / "results.json"
    path.write_text(change(found.as_dict() | {"figures": [], "distributions": []}), "utf-8")
    with pytest.raises(DataError, match=message):
        results.read(path)
