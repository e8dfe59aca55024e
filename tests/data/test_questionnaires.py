"""Questionnaires: keys and scores worked by hand, and what tables of strangers hold."""

import csv

import numpy as np
import pytest

from befm_jax.data import questionnaires
from befm_jax.data.questionnaires import age_band
from befm_jax.errors import DataError
from tests.conftest import SHARED

FIFTY = questionnaires.get("big_five_50")
CODES = [f"{trait}{number}" for trait in "ENACO" for number in range(1, 11)]
HEADER = ["race", "age", "engnat", "gender", "hand", "source", "country", *CODES]
# The first person of the published table.
ANSWERS = "22333315152342343224133444234341323151443333233132"
PERSON = ["13", "46", "1", "2", "1", "1", "US", *ANSWERS]


def written(tmp_path, *people, header=HEADER, name="people.csv"):
    path = tmp_path / name
    path.write_text("\n".join("\t".join(cells) for cells in [header, *people]) + "\n")
    return path


def test_scores_are_those_worked_by_hand(tmp_path):
    (person,) = questionnaires.read(written(tmp_path, PERSON)).rows
    assert person.age == 46
    assert person.labels == {
        "age_band": "45-54", "sex": "female", "native_english": "yes", "country": "US",
    }  # fmt: skip
    # 2 + (6-2) + 3 + (6-3) + 3 + (6-3) + 1 + (6-5) + 1 + (6-5)
    assert person.scores()["extraversion"] == 22
    # (6-2) + 3 + (6-4) + 2 + (6-3) + (6-4) + (6-3) + (6-2) + (6-2) + (6-4)
    assert person.scores()["emotional stability"] == 29
    # (6-1) + 3 + (6-3) + 4 + (6-4) + 4 + (6-2) + 3 + 4 + 3
    assert person.scores()["agreeableness"] == 35
    # 4 + (6-1) + 3 + (6-2) + 3 + (6-1) + 5 + (6-1) + 4 + 4
    assert person.scores()["conscientiousness"] == 42
    # 3 + (6-3) + 3 + (6-3) + 2 + (6-3) + 3 + 1 + 3 + 2
    assert person.scores()["openness"] == 26


def test_a_missing_answer_leaves_its_trait_without_a_score(tmp_path):
    missing = [*PERSON[:7], "0", *PERSON[8:]]
    (person,) = questionnaires.read(written(tmp_path, missing)).rows
    assert "E1" not in person.answers
    assert len(person.answers) == 49
    assert "extraversion" not in person.scores()
    assert len(person.scores()) == 4


@pytest.mark.parametrize("age", ["1989", "999999999", "12", "", "none", "-5", "3.5", "²"])
def test_nobodys_age_is_counted_and_the_person_kept(tmp_path, age):
    rows = questionnaires.read(written(tmp_path, [PERSON[0], age, *PERSON[2:]]))
    (person,) = rows.rows
    assert person.age is None
    assert "age_band" not in person.labels
    assert rows.left_out.counts == {"age: not 13 to 100 (the person is kept)": 1}


def test_what_can_not_be_used_is_counted_by_reason(tmp_path):
    silent = [*PERSON[:7], *["0"] * 50]
    off_the_scale = [*PERSON[:7], "6", *PERSON[8:]]
    rows = questionnaires.read(written(tmp_path, PERSON, silent, PERSON[:9], off_the_scale, PERSON))
    assert rows.left_out.counts == {
        "row: no statement is answered": 1,
        "row: wrong number of cells": 1,
        "answer: outside 1 to 5": 1,
        "row: the same as one before": 1,
    }
    assert [len(row.answers) for row in rows.rows] == [50, 49]


def test_people_are_known_by_what_they_said(tmp_path):
    other = [*PERSON[:7], "5", *PERSON[8:]]
    one = questionnaires.read(written(tmp_path, PERSON, other))
    again = questionnaires.read(
        written(tmp_path, [*other, "x"], [*PERSON, "y"], header=[*HEADER, "more"], name="b.csv")
    )
    assert [row.person for row in one.rows] == [row.person for row in again.rows[::-1]]
    assert one.fingerprint == again.fingerprint


def test_a_table_of_something_else_is_refused_with_its_columns(tmp_path):
    with pytest.raises(DataError, match=r":1: columns of no questionnaire: found a, b"):
        questionnaires.read(written(tmp_path, ["1", "2"], header=["a", "b"]))
    with pytest.raises(DataError, match="nobody answered"):
        questionnaires.read(written(tmp_path))


def test_bands_of_age():
    assert [age_band(age) for age in (13, 17, 18, 24, 25, 64, 65, 100)] == [
        "13-17", "13-17", "18-24", "18-24", "25-34", "55-64", "65+", "65+",
    ]  # fmt: skip


def test_keys_are_the_published_ones():
    path = SHARED / "bigfive" / "bigfive_IPIP.tsv"
    if not path.exists():
        pytest.skip("needs ../shared/data/bigfive, absent here")
    published = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        _, text, *_, key = line.split("\t")
        published[text.rstrip(".").casefold()] = key
    traits = ["E", "A", "C", "N", "O"]
    for code, statement in FIFTY.statements.items():
        text = statement.text.rstrip(".").casefold().removeprefix("i ").removeprefix("am ")
        (key,) = {key for name, key in published.items() if name.removeprefix("am ") == text}
        assert key == f"({traits.index(code[0]) + 1}{'-' if statement.is_reversed else '+'})"


def test_the_order_is_the_published_one():
    order = [f"{trait}{number}" for number in range(1, 11) for trait in "EACNO"]
    assert list(FIFTY.statements) == order


def test_everybody_in_the_real_tables():
    path = SHARED / "bigfive" / "bigfive_data.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/bigfive, absent here")
    rows = questionnaires.read(path)
    assert len(rows.rows) == 15_758
    assert rows.left_out.counts == {
        "age: not 13 to 100 (the person is kept)": 72,
        "row: no statement is answered": 1,
    }
    with path.open(newline="") as file:
        first = next(csv.DictReader(file, delimiter="\t"))
    assert rows.rows[0].answers["O10"] == int(first["O10"]) - 1


def test_the_other_questionnaire_has_six_points_and_missing_answers():
    path = SHARED / "bigfive_bfi" / "bfi.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/bigfive_bfi, absent here")
    rows = questionnaires.read(path)
    first = rows.rows[0]
    # -A1 A2 A3 A4 A5 of 2 4 3 4 4 on 1 to 6
    assert first.scores()["agreeableness"] == (7 - 2) + 4 + 3 + 4 + 4
    assert first.labels == {"age_band": "13-17", "sex": "male"}
    assert len(questionnaires.get("bfi_25").scores("openness")) == 26
    assert any(len(row.answers) < 25 for row in rows.rows)


class TestCells:
    def test_answers_are_counted_by_sex_and_age_band(self, tmp_path):
        older = [PERSON[0], "50", *PERSON[2:7], "5", *PERSON[8:]]
        man = [*PERSON[:3], "1", *PERSON[4:]]
        nobody = [PERSON[0], "1999", *PERSON[2:]]
        rows = questionnaires.read(written(tmp_path, PERSON, older, man, nobody))
        cells = {cell.name: cell for cell in questionnaires.counted(rows).rows}
        assert set(cells) == {"female/45-54", "male/45-54"}
        assert cells["female/45-54"].counts["E1"].tolist() == [0, 1, 0, 0, 1]
        assert cells["male/45-54"].counts["O10"].tolist() == [0, 1, 0, 0, 0]

    def test_the_embedded_ones_are_those_of_the_table(self):
        path = SHARED / "bigfive" / "bigfive_data.csv"
        if not path.exists():
            pytest.skip("needs ../shared/data/bigfive, absent here")
        table = questionnaires.read(path)
        reference = questionnaires.read_reference()
        assert reference.fingerprint == table.fingerprint
        counted = {cell.name: cell for cell in questionnaires.counted(table).rows}
        assert len(reference.rows) == 16
        for cell in reference.rows:
            for code, counts in cell.counts.items():
                np.testing.assert_array_equal(counts, counted[cell.name].counts[code])

    def test_parts_are_disjoint_and_add_up_to_everybody(self):
        reference = questionnaires.read_reference()
        parts = [
            questionnaires.part(reference, split, 3) for split in ("train", "validation", "test")
        ]
        for cells in zip(reference.rows, *(part.rows for part in parts), strict=True):
            whole, *drawn = (cell.counts["C7"] for cell in cells)
            np.testing.assert_array_equal(sum(drawn), whole)
            assert drawn[2].sum() == (whole.sum() + 5) // 10
        again = questionnaires.part(reference, "test", 3)
        other = questionnaires.part(reference, "test", 4)
        same, new = (
            [
                np.array_equal(one.counts["C7"], another.counts["C7"])
                for one, another in zip(parts[2].rows, drawn_again.rows, strict=True)
            ]
            for drawn_again in (again, other)
        )
        assert all(same)
        assert not all(new)
        with pytest.raises(DataError, match="unknown split"):
            questionnaires.part(reference, "tset")
