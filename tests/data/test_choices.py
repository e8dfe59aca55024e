"""Choices: tables of people, what is left out of them, splits, and the embedded reference."""

import csv
import dataclasses
import importlib.util
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data import choices, games
from befm_jax.data.choices import Histogram, Plays
from befm_jax.data.items import AnswerSet
from befm_jax.data.rows import SPLITS, Rows, split_of
from befm_jax.errors import DataError

SEVEN = games.select(
    "dictator,ultimatum_proposer,ultimatum_responder,trust_investor,trust_banker,public_goods,bomb"
)
DICTATOR, BOMB, PUSH_PULL = games.select("dictator,bomb,push_pull")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "human_histograms.py"


def table(tmp_path: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def part(path, wanted, split, seed=0):
    return choices.part(choices.read(path, wanted), split, seed)


def counts(rows, game) -> np.ndarray:
    return choices.histograms(rows, [game])[game.id]


def chosen(rows, game) -> dict[int, int]:
    return {int(v): int(n) for v, n in zip(game.values, counts(rows, game), strict=True) if n}


def error_of(path: Path, wanted=(DICTATOR, BOMB), split="all") -> str:
    with pytest.raises(DataError) as caught:
        part(path, wanted, split)
    return str(caught.value)


class TestRealTable:
    def test_every_choice_is_kept_with_its_person(self, moblab_csv):
        read = choices.read(moblab_csv, SEVEN)
        assert read.left_out.counts == {}
        with moblab_csv.open(newline="") as file:
            table = list(csv.DictReader(file))
        expected = {
            row["UserID"]: {g.id: float(row[g.reference]) for g in SEVEN if row[g.reference]}
            for row in table
        }
        found = {
            row.person: {id: games.get(id).values[place] for id, place in row.choices.items()}
            for row in read.rows
        }
        assert found == {person: played for person, played in expected.items() if played}
        for game in SEVEN:
            assert chosen(read, game) == Counter(
                played[game.id] for played in expected.values() if game.id in played
            )

    def test_the_embedded_reference_is_what_the_tool_makes_of_it(self, moblab_csv):
        specification = importlib.util.spec_from_file_location("human_histograms", TOOL)
        tool = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(tool)
        read = choices.read(moblab_csv, SEVEN)
        embedded = resources.files("befm_jax.data.reference") / choices.REFERENCE_FILE
        assert tool.render(read, SEVEN) == embedded.read_text(encoding="utf-8")
        reference = choices.read_reference(SEVEN)
        assert reference.fingerprint == read.fingerprint
        for game in SEVEN:
            np.testing.assert_array_equal(counts(reference, game), counts(read, game))

    def test_the_splits_by_person_are_disjoint_and_add_up_to_the_whole(self, moblab_csv):
        whole = choices.read(moblab_csv, SEVEN)
        parts = [choices.part(whole, name) for name in SPLITS[1:]]
        persons = [{row.person for row in one.rows} for one in parts]
        assert sum(map(len, persons)) == len(set.union(*persons)) == len(whole.rows)
        for game in SEVEN:
            total = sum(counts(one, game) for one in parts)
            np.testing.assert_array_equal(total, counts(whole, game))
        assert len(persons[0]) / len(whole.rows) == pytest.approx(0.8, abs=0.01)

    def test_saved_again_with_ids_as_floats_it_has_the_same_people_in_each_split(
        self, moblab_csv, tmp_path
    ):
        header, *lines = moblab_csv.read_text().splitlines()
        # As pandas writes a column that has a gap; some ids padded as spreadsheets do.
        rows = []
        for number, line in enumerate(reversed(lines)):
            id, cells = line.split(",", 1)
            rows.append(f"{id}.0,{cells}" if number % 2 else f"0{id},{cells}")
        text = "\ufeff" + "\r\n".join([header, *rows]) + "\r\n"
        again = choices.read(table(tmp_path, text), SEVEN)
        before = choices.read(moblab_csv, SEVEN)
        assert again.fingerprint == before.fingerprint
        for split in SPLITS[1:]:
            one, other = (
                {row.person: row for row in choices.part(rows, split).rows}
                for rows in (again, before)
            )
            assert one == other

    def test_a_damaged_copy_loses_only_its_bad_rows(self, moblab_csv, tmp_path):
        lines = moblab_csv.read_text().splitlines()
        header = lines[0].split(",")
        bad = dict.fromkeys(header, "")
        rows = [
            {**bad, "UserID": "x1", "dictator": "half"},
            {**bad, "UserID": "x2", "bomb": "101"},
            {**bad, "UserID": "x3", "PG": "-1", "trust_1": "nan"},
            {**bad, "bomb": "50"},
        ]
        lines += [",".join(row.values()) for row in rows] + ["x5,50"]
        path = table(tmp_path, "\ufeff" + "\r\n".join(lines) + "\r\n")
        read = choices.read(path, SEVEN)
        assert read.left_out.counts == {
            "dictator: not a number": 1,
            "bomb: outside 0 to 100 boxes": 1,
            "public_goods: outside 0 to 20 dollars": 1,
            "trust_investor: not finite": 1,
            "row: no participant": 1,
            "row: wrong number of cells": 1,
        }
        assert read.left_out.examples["dictator: not a number"] == ["line 55015: 'half'"]
        assert sum(n.sum() for n in choices.histograms(read, SEVEN).values()) == 65_596
        whole = choices.read(moblab_csv, SEVEN)
        assert read.fingerprint != whole.fingerprint
        assert read.shares_people(whole.sketch)


class TestReference:
    def test_it_has_the_published_number_of_choices(self):
        reference = choices.read_reference([games.get(id) for id in games.ids()])
        assert {row.game: int(row.counts.sum()) for row in reference.rows} == {
            "dictator": 8236,
            "ultimatum_proposer": 4195,
            "ultimatum_responder": 4195,
            "trust_investor": 13471,
            "trust_banker": 1251,
            "public_goods": 15285,
            "bomb": 18963,
        }
        assert choices.describe(reference).startswith("65,596 choices in 7 games from MobLab")

    def test_a_users_wording_of_a_game_has_the_same_people(self):
        reworded = dataclasses.replace(DICTATOR, id="dictator_short", instructions=lambda **_: "?")
        (short,) = choices.read_reference([reworded]).rows
        (usual,) = choices.read_reference([DICTATOR]).rows
        assert short.game == "dictator_short"
        np.testing.assert_array_equal(short.counts, usual.counts)

    def test_other_answers_than_those_of_the_people_are_an_error(self):
        small = dataclasses.replace(DICTATOR, parameters={"endowment": 10})
        with pytest.raises(DataError, match="0 to 10 dollars, but those of its human reference"):
            choices.read_reference([small])

    def test_a_game_without_human_data_alone_is_an_error(self):
        with pytest.raises(DataError, match="no choice of push_pull can be used"):
            choices.read("", [PUSH_PULL])

    def test_counts_cannot_be_written_over(self):
        rows = choices.read("", [BOMB])
        with pytest.raises(ValueError, match="read-only"):
            rows.rows[0].counts[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            counts(rows, BOMB)[0] = 1

    def test_it_does_not_say_who_chose_what(self):
        with pytest.raises(DataError, match="do not say who chose what"):
            choices.by_person(choices.read("", [BOMB]))


class TestDrawnSplit:
    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=20)
        .filter(lambda n: sum(n) >= 5)
        .map(lambda n: np.array(n, np.int64)),
        st.integers(0, 2**32),
    )
    def test_the_parts_add_up_and_have_their_sizes(self, drawn_from, seed):
        whole = Rows([Histogram("g", drawn_from)], "hypothesis", "")
        parts = {name: choices.part(whole, name, seed).rows[0].counts for name in SPLITS[1:]}
        np.testing.assert_array_equal(sum(parts.values()), drawn_from)
        assert all((one >= 0).all() for one in parts.values())
        assert abs(int(parts["test"].sum()) - drawn_from.sum() / 10) <= 0.5
        assert int(parts["validation"].sum()) == int(parts["test"].sum())

    def test_it_is_a_function_of_the_seed_and_the_game_alone(self):
        one = part("", [DICTATOR, BOMB], "test", seed=3)
        other = part("", [BOMB], "test", seed=3)
        np.testing.assert_array_equal(counts(one, BOMB), counts(other, BOMB))
        assert (counts(one, BOMB) != counts(part("", [BOMB], "test", 4), BOMB)).any()
        assert (one.split, one.split_seed) == ("test", 3)

    def test_games_are_drawn_independently(self):
        same = np.full(50, 20, np.int64)
        whole = Rows([Histogram("one", same), Histogram("two", same)], "made up", "")
        one, two = choices.part(whole, "test").rows
        assert (one.counts != two.counts).any()

    def test_a_part_is_not_split_again(self):
        with pytest.raises(DataError, match="are the test split already"):
            choices.part(part("", [BOMB], "test"), "train")
        with pytest.raises(DataError, match="unknown split 'trian': did you mean 'train'"):
            part("", [BOMB], "trian")


class TestPersons:
    def test_someone_is_in_one_split_in_every_layout(self, tmp_path):
        wide = "UserID,dictator,bomb\n" + "".join(f"p{n},{n % 100},{n % 50}\n" for n in range(300))
        tidy = "game,participant,choice\n" + "".join(
            f"dictator,p{n},{n % 100}\nbomb,p{n},{n % 50}\n" for n in range(300)
        )
        one = choices.read(table(tmp_path, wide, "wide.csv"), [DICTATOR, BOMB])
        other = choices.read(table(tmp_path, tidy, "tidy.csv"), [DICTATOR, BOMB])
        assert one.fingerprint == other.fingerprint
        for split in SPLITS:
            mine = choices.part(one, split, seed=5)
            assert mine.rows == choices.part(other, split, seed=5).rows
            assert all(set(row.choices) == {"dictator", "bomb"} for row in mine.rows)

    def test_two_spellings_in_one_table_are_one_person(self, tmp_path):
        path = table(tmp_path, "UserID,dictator,bomb\n7,5,\n7.0,6,8\n007,7,9\n")
        read = choices.read(path, [DICTATOR, BOMB])
        assert read.rows == [Plays("7", {"dictator": 5, "bomb": 8})]
        assert read.left_out.counts == {
            "dictator: second choice of the same participant": 2,
            "bomb: second choice of the same participant": 1,
        }

    def test_further_columns_are_labels_where_they_have_one_value_a_person(self, tmp_path):
        path = table(
            tmp_path,
            "game,participant,choice,sex,round,person\n"
            "bomb,1,5,female,1,x\ndictator,1,6,female,2,y\nbomb,2,7,,1,z\n",
        )
        read = choices.read(path, [BOMB, DICTATOR])
        assert [row.labels for row in read.rows] == [{"sex": "female"}, {}]
        assert read.left_out.lines() == [
            "left out, column 'person': no label, because items have one of this name: 1 "
            "(line 1: 'person')",
            "left out, column 'round': values differ within a person, so it is no label: 1 "
            "(line 3: the first that differs)",
        ]

    def test_columns_of_games_are_no_labels(self, tmp_path):
        path = table(tmp_path, "UserID,bomb,PG,country\n1,5,20,Chile\n2,,3,Peru\n")
        read = choices.read(path, [BOMB])
        assert read.rows == [Plays("1", {"bomb": 5}, {"country": "Chile"})]

    @pytest.mark.parametrize(
        "column",
        [
            "weight",
            "Weight",
            "pspwght",
            "survey_wt",
            "sampling weight",
            "W_WEIGHT_1",
            "WTSSPS",
            "Count",
        ],
    )
    @pytest.mark.parametrize(
        ("header", "row"),
        [("UserID,bomb", "1,5"), ("game,participant,choice", "bomb,1,5")],
    )
    def test_weights_are_not_ignored_in_silence(self, tmp_path, column, header, row):
        read = choices.read(table(tmp_path, f"{header},{column}\n{row},9.8\n"), [BOMB])
        reason = f"column {column!r}: weights are not used, people count alike"
        assert read.left_out.counts == {reason: 1}
        assert read.rows[0].labels == {}
        assert reason in choices.describe(read)

    def test_weights_of_a_histogram_are_noted_and_other_columns_are_no_weights(self, tmp_path):
        path = table(tmp_path, "game,choice,count,weight\nbomb,1,5,2\n")
        (reason,) = choices.read(path, [BOMB]).left_out.counts
        assert reason == "column 'weight': weights are not used, people count alike"
        path = table(tmp_path, "UserID,bomb,height,wealth,waiting\n1,5,180,3,4\n")
        read = choices.read(path, [BOMB])
        assert read.rows[0].labels == {"height": "180", "wealth": "3", "waiting": "4"}

    def test_histograms_are_derived(self, tmp_path):
        path = table(tmp_path, "UserID,bomb,dictator\n1,5,\n2,5,7\n")
        read = choices.read(path, [DICTATOR, BOMB])
        derived = choices.counted(read, [DICTATOR, BOMB, PUSH_PULL])
        assert [row.game for row in derived.rows] == ["dictator", "bomb"]
        assert derived.fingerprint == read.fingerprint
        assert choices.histograms(read, [PUSH_PULL])["push_pull"].tolist() == [0, 0]
        for rows in (read, derived):
            assert (chosen(rows, DICTATOR), chosen(rows, BOMB)) == ({7: 1}, {5: 2})
            assert choices.describe(rows).splitlines()[0].endswith("from table.csv (MobLab layout)")
        assert choices.by_person(read) is read
        with pytest.raises(DataError, match="counted already; its persons are split before"):
            choices.part(derived, "test")
        for rows in (read, derived):
            with pytest.raises(DataError, match="game bomb: 4 answers, but the people of table"):
                choices.histograms(rows, [BOMB.with_parameters(boxes=3)])


class TestFingerprint:
    ROWS = "".join(f"bomb,p{i},{(i * 7) % 101}\n" for i in range(400))

    def read(self, tmp_path, text):
        return choices.read(table(tmp_path, text), [BOMB])

    def test_a_table_that_was_only_saved_again_keeps_it(self, tmp_path):
        text = "game,participant,choice\n" + self.ROWS
        before = self.read(tmp_path, text)
        lines = self.ROWS.splitlines()
        for again in (
            text.replace("\n", "\r\n"),
            "\ufeff" + text,
            "game,participant,choice\n" + "\n".join(sorted(lines)),
            "sep=,\nGame,PARTICIPANT,choice,,\n"
            + "".join(f"{line}.0,,\n" for line in lines).replace("bomb", "Bomb"),
        ):
            assert self.read(tmp_path, again).fingerprint == before.fingerprint

    def test_another_choice_person_or_row_is_another(self, tmp_path):
        text = "game,participant,choice\n" + self.ROWS
        before = self.read(tmp_path, text)
        for other in (
            text.replace("p3,21", "p3,22"),
            text.replace("p3,", "q3,"),
            text + "bomb,new,5\n",
        ):
            changed = self.read(tmp_path, other)
            assert changed.fingerprint != before.fingerprint
            # Yet these are the same people, but for one.
            assert changed.shares_people(before.sketch)
            assert before.shares_people(changed.sketch)

    def test_it_does_not_depend_on_the_games_that_are_asked_for(self, tmp_path):
        text = "UserID,bomb,dictator\n1,5,6\n2,7,\n3,,4\n"
        read = [
            choices.read(table(tmp_path, text), wanted)
            for wanted in ([BOMB], [DICTATOR], [BOMB, DICTATOR])
        ]
        assert len({rows.fingerprint for rows in read}) == 1
        assert len({rows.sketch for rows in read}) == 1

    def test_names_and_values_of_an_answer_are_one(self, tmp_path):
        head = "game,participant,choice\n"
        assert (
            self.read_push(tmp_path, head + "push_pull,1,Push\npush_pull,2,[pull]\n").fingerprint
            == self.read_push(tmp_path, head + "push_pull,1,0\npush_pull,2,1.0\n").fingerprint
        )

    def read_push(self, tmp_path, text):
        return choices.read(table(tmp_path, text), [PUSH_PULL])

    def test_strangers_are_not_taken_for_these_people(self, tmp_path):
        generator = np.random.default_rng(0)
        one, other = (
            self.read(
                tmp_path,
                "game,participant,choice\n"
                + "".join(f"bomb,{i},{n}\n" for i, n in enumerate(generator.integers(0, 101, 500))),
            )
            for _ in range(2)
        )
        assert not one.shares_people(other.sketch)
        assert not choices.read("", [BOMB]).shares_people(one.sketch)

    def test_of_a_histogram_it_is_of_its_bars(self, tmp_path):
        one = self.read(tmp_path, "game,choice,count\nbomb,1,5\nbomb,2,6\n")
        same = self.read(tmp_path, "choice,game,count\r\n2.0,bomb,6\r\n[1],bomb,5.0\r\n")
        other = self.read(tmp_path, "game,choice,count\nbomb,1,6\nbomb,2,5\n")
        assert one.fingerprint == same.fingerprint != other.fingerprint


class TestLayouts:
    def test_moblab_an_empty_cell_is_a_game_not_played(self, tmp_path):
        path = table(tmp_path, "UserID,bomb,dictator,other\n1,50,,x\n2, 60 ,30.0,\n3,,,\n")
        read = choices.read(path, [DICTATOR, BOMB, PUSH_PULL])
        assert read.rows == [
            Plays("1", {"bomb": 50}, {"other": "x"}),
            Plays("2", {"dictator": 30, "bomb": 60}),
        ]
        assert read.left_out.counts == {}
        assert read.source == "table.csv (MobLab layout)"

    def test_tidy_choices_may_be_words_for_named_actions(self, tmp_path):
        path = table(
            tmp_path,
            'game,participant,choice\n"push_pull",1,Pull\npush_pull,2,push\npush_pull,3,1\n'
            "push_pull,4,[Push]\nbomb,3,9\npush_pull,5,jump\n",
        )
        read = choices.read(path, [PUSH_PULL])
        assert chosen(read, PUSH_PULL) == {0: 2, 1: 2}
        # A registered game that was not asked for is passed over; an unknown one is counted.
        assert read.left_out.counts == {"push_pull: outside Push, Pull": 1}

    def test_choices_may_be_decimals(self, tmp_path):
        tenths = dataclasses.replace(
            BOMB,
            id="tenths",
            answers_of=lambda boxes: AnswerSet.numbers([0.1, 0.25, 0.5], "euros"),
            equilibrium_of=lambda boxes: 0.1,
        )
        path = table(tmp_path, "game,participant,choice\ntenths,1,0.25\ntenths,2,.5\ntenths,3,1\n")
        read = choices.read(path, [tenths])
        assert [row.choices for row in read.rows] == [{"tenths": 1}, {"tenths": 2}]
        assert read.left_out.counts == {"tenths: outside 0.1 to 0.5 euros": 1}

    def test_histograms_are_read_whole_and_split_by_a_draw(self, tmp_path):
        path = table(tmp_path, "choice,count,game\n0,40,bomb\n50,60,bomb\n7,0,bomb\n")
        whole = choices.read(path, [BOMB])
        assert chosen(whole, BOMB) == {0: 40, 50: 60}
        parts = [choices.part(whole, name, seed=1) for name in SPLITS[1:]]
        assert [int(counts(one, BOMB).sum()) for one in parts] == [80, 10, 10]
        np.testing.assert_array_equal(sum(counts(p, BOMB) for p in parts), counts(whole, BOMB))

    def test_a_histogram_counts_what_it_leaves_out(self, tmp_path):
        path = table(
            tmp_path,
            "game,choice,count\nbomb,1,5\nbomb,1,6\nbomb,2,-1\nbomb,3,few\nbomb,4,1.5\n"
            f"bomb,7,{'9' * 5000}\nbomb,500,1\nbmob,1,1\nbomb,5\n",
        )
        read = choices.read(path, [BOMB])
        assert chosen(read, BOMB) == {1: 5}
        assert read.left_out.counts == {
            "bomb: choice listed before": 1,
            "bomb: count is not a whole number of people": 4,
            "bomb: outside 0 to 100 boxes": 1,
            "row: unknown game": 1,
            "row: wrong number of cells": 1,
        }
        path = table(tmp_path, "game,choice,count\nbomb,1,999999999\nbomb,2,999999999\n")
        assert "1,999,999,998 people" in error_of(path, [BOMB])

    def test_parquet_is_read_like_csv(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'tables'")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "people.parquet"
        columns = {"UserID": [1.0, 2.0, 3.0], "bomb": [5, None, 7], "sex": ["f", None, "m"]}
        parquet.write_table(pyarrow.table(columns), path)
        read = choices.read(path, [BOMB])
        assert read.rows == [
            Plays("1", {"bomb": 5}, {"sex": "f"}),
            Plays("3", {"bomb": 7}, {"sex": "m"}),
        ]
        text = table(tmp_path, "UserID,bomb,sex\n1,5,f\n2,,\n3,7,m\n")
        assert choices.read(text, [BOMB]).fingerprint == read.fingerprint


class TestLeftOut:
    @pytest.mark.parametrize(
        ("cell", "reason"),
        [
            ("half", "not a number"),
            ("1_0", "not a number"),
            ("٣", "not a number"),
            ("$50", "not a number"),
            ("None", "not a number"),
            ("nan", "not finite"),
            ("inf", "not finite"),
            ("1e999", "not finite"),
            ("33.5", "not a whole number"),
            ("-1", "outside 0 to 100 dollars"),
            ("101", "outside 0 to 100 dollars"),
        ],
    )
    def test_a_bad_cell_is_counted_and_the_rest_of_its_row_kept(self, tmp_path, cell, reason):
        read = choices.read(
            table(tmp_path, f"UserID,dictator,bomb\n1,{cell},50\n2,20,\n"), [DICTATOR, BOMB]
        )
        assert read.left_out.counts == {f"dictator: {reason}": 1}
        assert read.left_out.examples == {f"dictator: {reason}": [f"line 2: {cell!r}"]}
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({20: 1}, {50: 1})

    def test_tidy_rows(self, tmp_path):
        path = table(
            tmp_path,
            "game,participant,choice\ndictator,1,5\ndictator,1,6\nbomb,1,7\ndictator,,5\n"
            "dicatator,2,5\ndictator,3,\ndictator,4\ndictator,5,6,7\n",
        )
        read = choices.read(path, [DICTATOR, BOMB])
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({5: 1}, {7: 1})
        assert read.left_out.counts == {
            "dictator: second choice of the same participant": 1,
            "row: no participant": 1,
            "row: unknown game": 1,
            "dictator: no answer": 1,
            "row: wrong number of cells": 2,
        }
        assert "line 6: 'dicatator'" in choices.describe(read)
        assert "row: wrong number of cells: 2 (line 8:" in choices.describe(read)

    def test_five_of_a_kind_are_shown_and_all_are_counted(self, tmp_path):
        rows = "".join(f"{n},{'x' * 200}\n" for n in range(9))
        read = choices.read(table(tmp_path, f"UserID,bomb\n{rows}a,1\n"), [BOMB])
        (shown,) = read.left_out.examples.values()
        assert read.left_out.counts == {"bomb: not a number": 9}
        assert [line.split(":")[0] for line in shown] == [f"line {n}" for n in range(2, 7)]
        assert all(len(line) < 80 for line in shown)

    def test_they_are_those_of_the_whole_table_in_every_split(self, tmp_path):
        rows = "".join(f"{n},{'x' if n % 3 else n}\n" for n in range(90))
        path = table(tmp_path, f"UserID,bomb\n{rows}")
        assert {
            part(path, [BOMB], split).left_out.counts["bomb: not a number"] for split in SPLITS
        } == {60}


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "the file is empty"),
            ("\ufeff", "the file is empty"),
            ("\n\n", "the file is empty"),
            (",,\n1,2,3\n", "no header"),
            ("UserID,dictator,bomb\n", "no choice of dictator, bomb can be used"),
            ("UserID,dictator,bomb\n1,,\n", "no choice of dictator, bomb can be used"),
            ("UserID,dictator,bomb\n1,x,\n", "left out, dictator: not a number: 1 (line 2: 'x')"),
            ("UserID,dictator\n1,5\n", "missing column 'bomb'; expected 'dictator' (dictator)"),
            ("UserID,dictater\n1,5\n", "found 'UserID', 'dictater'; expected 'dictator' (dicta"),
            ("dictator,bomb\n1,5\n", "the header has 'dictator', 'bomb'; it should have 'UserID'"),
            ("UserID dictator bomb\n1 5 5\n", "the header has 'UserID dictator bomb'; it should"),
            ("game,participant,chioce\n", "'game', 'participant', 'choice'"),
            ("UserID,bomb,bomb,dictator\n1,5,5,5\n", "column named twice: 'bomb'"),
            ("UserID,bomb,Bomb,dictator\n1,5,5,5\n", "column named twice: 'bomb', 'Bomb'"),
            ('UserID,dictator,bomb\n1,"5,5\n', "check its quotes"),
            (b"PK\x03\x04\x00\x00", "export it as CSV"),
            ("UserID,dictator\n1,5\n".encode("utf-16"), "save it as UTF-8"),
        ],
    )
    def test_a_table_that_cannot_be_used_says_why(self, tmp_path, content, says):
        assert says in error_of(table(tmp_path, content))

    def test_a_table_that_is_not_there(self, tmp_path):
        assert error_of(tmp_path / "joint.csv").endswith("joint.csv: no such file")
        assert "cannot be read" in error_of(tmp_path)

    def test_a_split_with_nobody_in_it(self, tmp_path):
        path = table(tmp_path, "UserID,bomb\n0,5\n")
        empty = next(s for s in SPLITS[1:] if s != split_of("0"))
        assert f"in the {empty} split" in error_of(path, [BOMB], split=empty)
        path = table(tmp_path, "game,choice,count\nbomb,5,1\n")
        assert "in the test split" in error_of(path, [BOMB], split="test")

    def test_no_games_or_an_unknown_split(self, tmp_path):
        path = table(tmp_path, "UserID,bomb\n0,5\n")
        assert "no games asked for" in error_of(path, [])
        assert "unknown split 'dev'" in error_of(path, [BOMB], split="dev")


def test_choices_are_read_without_a_model_and_without_jax():
    code = "import sys, befm_jax.data.choices; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators_are_read_and_decimal_commas_are_not_guessed(tmp_path, mark):
    content = f"UserID{mark}dictator{mark}bomb\n1{mark}20{mark}50\n2{mark}1,5{mark}3\n"
    read = choices.read(table(tmp_path, content), [DICTATOR, BOMB])
    assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({20: 1}, {50: 1, 3: 1})
    assert read.left_out.examples == {
        "dictator: not a number: it has a comma; write 1000 or 0.5": ["line 3: '1,5'"]
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_marks_and_quotes_make_no_difference(tmp_path, end, mark):
    lines = ['"UserID","dictator",bomb', '1,"20",50', "", "2,x,"]
    read = choices.read(table(tmp_path, mark + end.join(lines)), [DICTATOR, BOMB])
    assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({20: 1}, {50: 1})
    assert read.left_out.examples == {"dictator: not a number": ["line 4: 'x'"]}
