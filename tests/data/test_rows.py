"""Rows: splits by person, ids, fingerprints and sketches, tables of one's own."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data import rows
from befm_jax.data.rows import SPLITS, LeftOut, Rows, normal_id, split_of
from befm_jax.errors import DataError


@dataclass(frozen=True)
class Someone:
    person: str
    answer: int = 0


class TestIds:
    @pytest.mark.parametrize(
        ("written", "normal"),
        [
            ("131074", "131074"),
            ("131074.0", "131074"),
            ("131074.", "131074"),
            ("0131074", "131074"),
            (" +7 ", "7"),
            ("-7.00", "-7"),
            ("000", "0"),
            ("7.5", "7.5"),
            ("7e3", "7e3"),
            ("p07", "p07"),
            ("a b", "a b"),
            ("", ""),
        ],
    )
    def test_whole_numbers_have_one_writing(self, written, normal):
        assert normal_id(written) == normal
        assert split_of(written) == split_of(normal)

    def test_a_very_long_id_is_read_in_a_moment(self):
        assert normal_id("0" * 200_000 + "x") == "0" * 200_000 + "x"
        assert normal_id("0" * 200_000 + "7") == "7"

    @given(st.text())
    def test_writing_it_again_changes_nothing(self, text):
        assert normal_id(normal_id(text)) == normal_id(text)


class TestSplits:
    def test_shares_are_eighty_ten_ten(self):
        shares = Counter(split_of(str(n)) for n in range(20_000))
        assert shares["train"] / 20_000 == pytest.approx(0.8, abs=0.01)
        assert shares["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
        assert shares["test"] / 20_000 == pytest.approx(0.1, abs=0.01)

    def test_a_change_of_these_moves_people_between_the_splits_of_published_runs(self):
        assert [split_of(str(n)) for n in range(6)] == [
            *("test", "train", "train", "test", "train", "train")
        ]
        assert any(split_of(str(n), 1) != split_of(str(n), 0) for n in range(20))

    def test_parts_are_disjoint_and_add_up(self):
        whole = Rows.of([Someone(str(n // 2), n) for n in range(600)], "made up")
        parts = [whole.part(name, 3) for name in SPLITS[1:]]
        assert sorted(row.answer for part in parts for row in part.rows) == list(range(600))
        persons = [{row.person for row in part.rows} for part in parts]
        assert not persons[0] & persons[1]
        assert not persons[0] & persons[2]
        assert {(part.split, part.split_seed) for part in parts} == {(s, 3) for s in SPLITS[1:]}
        assert whole.part("all") is whole

    def test_another_attribute_may_say_whose_a_row_is(self):
        whole = Rows.of([("7.0", 1), ("8", 2)], "made up")
        found = [
            name
            for name in SPLITS[1:]
            if split_of("7") == name and whole.part(name, person=lambda row: row[0]).rows
        ]
        assert found == [split_of("7")]

    def test_what_is_no_split(self):
        whole = Rows.of([Someone(str(n)) for n in range(100)], "made up")
        with pytest.raises(DataError, match="unknown split 'tset': did you mean 'test'"):
            whole.part("tset")
        with pytest.raises(DataError, match="are the train split already"):
            whole.part("train").part("test")
        alone = Rows.of([Someone("0")], "made up")
        with pytest.raises(DataError, match="nobody is in the train split"):
            alone.part("train")


class TestFingerprint:
    def test_it_is_of_a_set(self):
        assert rows.fingerprint_of(["b", "a", "a"]) == rows.fingerprint_of(iter("ab"))
        assert rows.fingerprint_of(["a", "b"]) != rows.fingerprint_of(["ab"])
        assert len(rows.fingerprint_of([])) == 64

    @pytest.mark.parametrize("common", [0, 100, 400, 900, 1000])
    def test_a_sketch_tells_the_share_that_two_sets_have_in_common(self, common):
        errors = []
        for seed in range(8):
            one = {f"{seed}/{n}" for n in range(1000)}
            other = {f"{seed}/{n}" for n in range(1000 - common, 2000 - common)}
            jaccard = len(one & other) / len(one | other)
            errors.append(rows.resemblance(rows.sketch_of(one), rows.sketch_of(other)) - jaccard)
        # The mean of eight, each with a standard error of at most .0625.
        assert abs(np.mean(errors)) < 0.07
        assert np.std(errors) < 0.11

    def test_without_a_sketch_nothing_is_known(self):
        assert rows.sketch_of([]) == ""
        assert rows.resemblance("", "") == rows.resemblance("00", "") == 0


class TestOwnTables:
    COLUMNS = ("id", "n")

    @staticmethod
    def someone(cells):
        if not cells["n"].isdigit():
            raise DataError("n is not a whole number")
        return Someone(cells["id"], int(cells["n"]))

    def test_what_a_row_refuses_is_left_out_with_its_line(self, tmp_path):
        path = tmp_path / "mine.csv"
        path.write_text("n,id,more\n1,a,x\nmany,b,y\n\n3,c,z\n")
        read = Rows.read(path, self.COLUMNS, self.someone)
        assert read.rows == [Someone("a", 1), Someone("c", 3)]
        assert read.left_out.lines() == [
            "left out, n is not a whole number: 1 (line 3: id 'b', n 'many')"
        ]
        path.write_text("id,n\nc,3\na,1\n")
        assert Rows.read(path, self.COLUMNS, self.someone).fingerprint == read.fingerprint

    def test_weights_that_are_not_asked_for_are_noted(self, tmp_path):
        path = tmp_path / "mine.csv"
        path.write_text("id,n,weight,w2_wgt\na,1,0.2,1\nb,2,9.8,1\n")
        read = Rows.read(path, (*self.COLUMNS, "w2_wgt"), self.someone)
        assert read.left_out.counts == {
            "column 'weight': weights are not used, people count alike": 1
        }

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("id,m\na,1\n", r"mine\.csv:1: no column 'n'; found 'id', 'm'"),
            ("id,n\na\n", r"mine\.csv:2: 1 cells, but 2 columns"),
            ("id,n\n", "no rows"),
            ("id,n\na,few\n", r"no rows; left out, n is not .* \(line 2: id 'a', n 'few'\)"),
        ],
    )
    def test_a_table_that_can_not_be_used_says_why(self, tmp_path, text, says):
        path = tmp_path / "mine.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            Rows.read(path, self.COLUMNS, self.someone)


def test_five_of_a_reason_are_shown_and_all_are_counted():
    left_out = LeftOut()
    for line in range(9):
        left_out.add("odd", f"line {line}", "x" * 100)
    assert left_out.counts == {"odd": 9}
    assert len(left_out.examples["odd"]) == 5
    assert LeftOut({"odd": 9}).lines() == ["left out, odd: 9"]
