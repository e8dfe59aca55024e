"""People: tables of choices, what is left out of them, splits, and the embedded reference."""

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
from befm_jax.data.choices import People
from befm_jax.errors import DataError

SEVEN = games.select(
    "dictator,ultimatum_proposer,ultimatum_responder,trust_investor,trust_banker,public_goods,bomb"
)
DICTATOR, BOMB, PUSH_PULL = games.select("dictator,bomb,push_pull")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "human_histograms.py"


def table(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def chosen(someone: People, game: games.Game) -> dict[int, int]:
    counts = someone.counts[game.id]
    return {int(v): int(n) for v, n in zip(game.values, counts, strict=True) if n}


def error_of(path: Path, wanted=(DICTATOR, BOMB), **options) -> str:
    with pytest.raises(DataError) as caught:
        choices.read_people(path, wanted, **options)
    return str(caught.value)


class TestRealTable:
    def test_counts_are_those_of_a_plain_loop(self, moblab_csv):
        read = choices.read_people(moblab_csv, SEVEN)
        assert read.excluded == {}
        with moblab_csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for game in SEVEN:
            expected = Counter(float(row[game.reference]) for row in rows if row[game.reference])
            assert chosen(read, game) == expected

    def test_the_embedded_reference_is_what_the_tool_makes_of_it(self, moblab_csv):
        specification = importlib.util.spec_from_file_location("human_histograms", TOOL)
        tool = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(tool)
        read = choices.read_people(moblab_csv, SEVEN)
        embedded = resources.files("befm_jax.data.reference") / choices.REFERENCE_FILE
        assert tool.render(read, SEVEN) == embedded.read_text(encoding="utf-8")
        reference = choices.reference(SEVEN)
        assert reference.fingerprint == read.fingerprint
        for game in SEVEN:
            np.testing.assert_array_equal(reference.counts[game.id], read.counts[game.id])

    def test_the_splits_by_participant_add_up_to_the_whole(self, moblab_csv):
        whole = choices.read_people(moblab_csv, SEVEN)
        parts = [choices.load(moblab_csv, SEVEN, name) for name in choices.SPLITS[1:]]
        for game in SEVEN:
            total = sum(part.counts[game.id] for part in parts)
            np.testing.assert_array_equal(total, whole.counts[game.id])
            assert parts[0].n(game.id) / whole.n(game.id) == pytest.approx(0.8, abs=0.03)

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
        read = choices.read_people(path, SEVEN)
        assert read.excluded == {
            "dictator: not a number": 1,
            "bomb: outside 0 to 100 boxes": 1,
            "public_goods: outside 0 to 20 dollars": 1,
            "trust_investor: not finite": 1,
            "row: no participant": 1,
            "row: wrong number of cells": 1,
        }
        assert read.examples_of_excluded["dictator: not a number"] == ("line 55015: 'half'",)
        assert sum(read.n(game.id) for game in SEVEN) == 65_596


class TestReference:
    def test_it_has_the_published_number_of_choices(self):
        reference = choices.reference()
        assert sum(reference.n(game.id) for game in SEVEN) == 65_596
        assert reference.games == [game.id for game in SEVEN]
        assert set(reference.counts) == set(games.ids())
        assert {game.id: reference.n(game.id) for game in SEVEN} == {
            "dictator": 8236,
            "ultimatum_proposer": 4195,
            "ultimatum_responder": 4195,
            "trust_investor": 13471,
            "trust_banker": 1251,
            "public_goods": 15285,
            "bomb": 18963,
        }

    def test_a_users_wording_of_a_game_has_the_same_people(self):
        reworded = dataclasses.replace(DICTATOR, id="dictator_short", instructions=lambda **_: "?")
        counts = choices.reference([reworded]).counts["dictator_short"]
        np.testing.assert_array_equal(counts, choices.reference([DICTATOR]).counts["dictator"])

    def test_other_answers_than_those_of_the_people_are_an_error(self):
        small = dataclasses.replace(DICTATOR, parameters={"endowment": 10})
        with pytest.raises(DataError, match="0 to 10 dollars, but those of its human reference"):
            choices.reference([small])

    def test_a_game_without_human_data_alone_is_an_error(self):
        with pytest.raises(DataError, match="no choice of push_pull can be used"):
            choices.load("", [PUSH_PULL])

    def test_counts_cannot_be_written_over(self):
        with pytest.raises(ValueError, match="read-only"):
            choices.reference().counts["bomb"][0] = 1


class TestDrawnSplit:
    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=20).map(lambda n: np.array(n, np.int64)),
        st.integers(0, 2**32),
    )
    def test_the_parts_add_up_and_have_their_sizes(self, counts, seed):
        whole = People("hypothesis", {"g": counts})
        parts = {name: whole.draw_split(name, seed).counts["g"] for name in choices.SPLITS[1:]}
        np.testing.assert_array_equal(sum(parts.values()), counts)
        assert all((part >= 0).all() for part in parts.values())
        assert abs(int(parts["test"].sum()) - counts.sum() / 10) <= 0.5
        assert int(parts["validation"].sum()) == int(parts["test"].sum())

    def test_it_is_a_function_of_the_seed_and_the_game_alone(self):
        one = choices.load("", [DICTATOR, BOMB], "test", seed=3)
        other = choices.load("", [BOMB], "test", seed=3)
        np.testing.assert_array_equal(one.counts["bomb"], other.counts["bomb"])
        assert (one.counts["bomb"] != choices.load("", [BOMB], "test", 4).counts["bomb"]).any()
        assert one.split == "test"

    def test_games_are_drawn_independently(self):
        same = np.full(50, 20, np.int64)
        drawn = People("made up", {"one": same, "two": same}).draw_split("test").counts
        assert (drawn["one"] != drawn["two"]).any()

    def test_a_part_is_not_split_again(self):
        with pytest.raises(DataError, match="are the test split already"):
            choices.load("", [BOMB], "test").draw_split("train")
        with pytest.raises(DataError, match="unknown split 'trian': did you mean 'train'"):
            choices.load("", [BOMB], "trian")


class TestAssign:
    def test_shares_are_eighty_ten_ten(self):
        shares = Counter(choices.assign(str(n)) for n in range(20_000))
        assert shares["train"] / 20_000 == pytest.approx(0.8, abs=0.01)
        assert shares["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
        assert shares["test"] / 20_000 == pytest.approx(0.1, abs=0.01)

    def test_a_change_of_these_moves_people_between_the_splits_of_published_runs(self):
        assert [choices.assign(str(n)) for n in range(6)] == [
            *("test", "train", "train", "test", "train", "train")
        ]
        assert any(choices.assign(str(n), 1) != choices.assign(str(n), 0) for n in range(20))

    def test_someone_is_in_one_split_in_every_layout(self, tmp_path):
        wide = "UserID,dictator,bomb\n" + "".join(f"p{n},{n % 100},{n % 50}\n" for n in range(300))
        tidy = "game,participant,choice\n" + "".join(
            f"dictator,p{n},{n % 100}\nbomb,p{n},{n % 50}\n" for n in range(300)
        )
        for split in choices.SPLITS:
            one = choices.read_people(table(tmp_path, wide), [DICTATOR, BOMB], split, seed=5)
            other = choices.read_people(table(tmp_path, tidy), [DICTATOR, BOMB], split, seed=5)
            for id in ("dictator", "bomb"):
                np.testing.assert_array_equal(one.counts[id], other.counts[id])
            assert one.n("dictator") == one.n("bomb")


class TestLayouts:
    def test_moblab_an_empty_cell_is_a_game_not_played(self, tmp_path):
        path = table(tmp_path, "UserID,bomb,dictator,other\n1,50,,x\n2, 60 ,30.0,\n3,,,\n")
        read = choices.read_people(path, [DICTATOR, BOMB, PUSH_PULL])
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({30: 1}, {50: 1, 60: 1})
        assert read.n("push_pull") == 0
        assert read.excluded == {}
        assert read.games == ["dictator", "bomb"]
        assert read.source == "table.csv (MobLab layout)"

    def test_tidy_choices_may_be_words_for_named_actions(self, tmp_path):
        path = table(
            tmp_path,
            'game,participant,choice\n"push_pull",1,Pull\npush_pull,2,push\npush_pull,3,1\nbomb,3,9\n',
        )
        read = choices.read_people(path, [PUSH_PULL])
        assert chosen(read, PUSH_PULL) == {0: 1, 1: 2}
        # A registered game that was not asked for is passed over; an unknown one is counted.
        assert read.excluded == {}

    def test_histograms_are_read_whole_and_split_by_a_draw(self, tmp_path):
        path = table(tmp_path, "choice,count,game\n0,40,bomb\n50,60,bomb\n7,0,bomb\n")
        whole = choices.read_people(path, [BOMB])
        assert chosen(whole, BOMB) == {0: 40, 50: 60}
        parts = [choices.load(path, [BOMB], name, seed=1) for name in choices.SPLITS[1:]]
        assert [part.n("bomb") for part in parts] == [80, 10, 10]
        np.testing.assert_array_equal(sum(p.counts["bomb"] for p in parts), whole.counts["bomb"])

    def test_a_histogram_counts_what_it_leaves_out(self, tmp_path):
        path = table(
            tmp_path,
            "game,choice,count\nbomb,1,5\nbomb,1,6\nbomb,2,-1\nbomb,3,few\nbomb,4,1.5\n"
            "bomb,500,1\nbmob,1,1\nbomb,5\n",
        )
        read = choices.read_people(path, [BOMB])
        assert chosen(read, BOMB) == {1: 5}
        assert read.excluded == {
            "bomb: choice listed before": 1,
            "bomb: count is not a whole number of people": 3,
            "bomb: outside 0 to 100 boxes": 1,
            "row: unknown game": 1,
            "row: wrong number of cells": 1,
        }
        path = table(tmp_path, "game,choice,count\nbomb,1,999999999\nbomb,2,999999999\n")
        assert "1,999,999,998 people" in error_of(path, [BOMB])


class TestExclusions:
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
        read = choices.read_people(
            table(tmp_path, f"UserID,dictator,bomb\n1,{cell},50\n2,20,\n"), [DICTATOR, BOMB]
        )
        assert read.excluded == {f"dictator: {reason}": 1}
        assert read.examples_of_excluded == {f"dictator: {reason}": (f"line 2: {cell!r}",)}
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({20: 1}, {50: 1})

    def test_tidy_rows(self, tmp_path):
        path = table(
            tmp_path,
            "game,participant,choice\ndictator,1,5\ndictator,1,6\nbomb,1,7\ndictator,,5\n"
            "dicatator,2,5\ndictator,3,\ndictator,4\ndictator,5,6,7\n",
        )
        read = choices.read_people(path, [DICTATOR, BOMB])
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({5: 1}, {7: 1})
        assert read.excluded == {
            "dictator: second choice of the same participant": 1,
            "row: no participant": 1,
            "row: unknown game": 1,
            "dictator: no choice": 1,
            "row: wrong number of cells": 2,
        }
        assert "line 6: 'dicatator'" in read.describe()
        assert "row: wrong number of cells: 2 (line 8:" in read.describe()

    def test_a_participant_who_comes_twice_is_counted_once_a_game(self, tmp_path):
        path = table(tmp_path, "UserID,dictator,bomb\n1,5,\n1,6,7\n1,8,\n")
        read = choices.read_people(path, [DICTATOR, BOMB])
        assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({5: 1}, {7: 1})
        assert read.excluded == {"dictator: second choice of the same participant": 2}

    def test_five_of_a_kind_are_shown_and_all_are_counted(self, tmp_path):
        rows = "".join(f"{n},{'x' * 200}\n" for n in range(9))
        read = choices.read_people(table(tmp_path, f"UserID,bomb\n{rows}a,1\n"), [BOMB])
        (shown,) = read.examples_of_excluded.values()
        assert read.excluded == {"bomb: not a number": 9}
        assert [line.split(":")[0] for line in shown] == [f"line {n}" for n in range(2, 7)]
        assert all(len(line) < 80 for line in shown)

    def test_they_are_those_of_the_whole_table_in_every_split(self, tmp_path):
        rows = "".join(f"{n},{'x' if n % 3 else n}\n" for n in range(90))
        path = table(tmp_path, f"UserID,bomb\n{rows}")
        assert {
            choices.read_people(path, [BOMB], split).excluded["bomb: not a number"]
            for split in choices.SPLITS
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
            ("UserID;dictator;bomb\n1;5;5\n", "separated by commas"),
            ("game,participant,chioce\n", "'game', 'participant', 'choice'"),
            ("UserID,bomb,bomb\n1,5,5\n", "column named twice: 'bomb'"),
            ('UserID,dictator,bomb\n1,5,"5\n2,6,6\n', "table.csv:2: not a CSV row"),
            (b"UserID,dictator,bomb\n1,5,5\n\xff\n", "table.csv:3: not UTF-8 text"),
            (b"PK\x03\x04\x00\x00", "NUL bytes"),
            ("UserID,dictator\n1,5\n".encode("utf-16"), "not UTF-8 text"),
        ],
    )
    def test_a_table_that_cannot_be_used_says_why(self, tmp_path, content, says):
        assert says in error_of(table(tmp_path, content))

    def test_a_table_that_is_not_there(self, tmp_path):
        assert error_of(tmp_path / "joint.csv").endswith("joint.csv: no such file")
        assert "cannot be read" in error_of(tmp_path)

    def test_a_split_with_nobody_in_it(self, tmp_path):
        path = table(tmp_path, "UserID,bomb\n0,5\n")
        empty = next(s for s in choices.SPLITS[1:] if s != choices.assign("0"))
        assert f"in the {empty} split" in error_of(path, [BOMB], split=empty)

    def test_no_games_or_an_unknown_split(self, tmp_path):
        path = table(tmp_path, "UserID,bomb\n0,5\n")
        assert "no games asked for" in error_of(path, [])
        assert "unknown split 'dev'" in error_of(path, [BOMB], split="dev")


def test_people_are_read_without_a_model_and_without_jax():
    code = "import sys, befm_jax.data.choices; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_marks_and_quotes_make_no_difference(tmp_path, end, mark):
    lines = ['"UserID","dictator",bomb', '1,"20",50', "", "2,x,"]
    read = choices.read_people(table(tmp_path, mark + end.join(lines)), [DICTATOR, BOMB])
    assert (chosen(read, DICTATOR), chosen(read, BOMB)) == ({20: 1}, {50: 1})
    assert read.examples_of_excluded == {"dictator: not a number": ("line 4: 'x'",)}


class TestExamples:
    def test_they_carry_every_person_once(self):
        train = choices.load("", SEVEN, "train")
        made = choices.examples(train)
        assert sum(example.weight for example in made) == sum(train.n(g.id) for g in SEVEN)
        for game in SEVEN:
            mine = [e for e in made if e.meta["game"] == game.id]
            assert {(e.system, e.user) for e in mine} == {game.prompt()}
            assert {game.answers.parse(e.answer).value: e.weight for e in mine} == chosen(
                train, game
            )

    def test_another_wording_may_be_put_to_the_reader(self):
        train = choices.load("", [BOMB], "train")
        reworded = dataclasses.replace(BOMB, instructions=lambda **_: "How many boxes?")
        assert {e.user for e in choices.examples(train, [reworded])} == {"How many boxes?"}
        with pytest.raises(DataError, match="game bomb: 11 answers, but"):
            choices.examples(train, [BOMB.with_parameters(boxes=10)])
