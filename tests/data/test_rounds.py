"""Games in rounds: five layouts, what came after a choice, and what can't be used."""

import pytest

from befm_jax.data import rounds
from befm_jax.data.rounds import Decision
from befm_jax.errors import DataError
from tests.conftest import SHARED

PUBLIC_GOODS = (
    "session,participant,group_size,multiplier,contribution_type,framing,chat,punishment,reward,"
    "rounds_shown,round,contribution,group_total,others_seen,gain"
)
DAL_BO = "treatment,id,game,period,choice,other.choice"
FUDENBERG = "treatment,id,game,period,last.choice,last.other,choice,bc,error"
MOBLAB = "UserID,Role,Round,totalRound,move,Total,roundResult,gameType"


def read(tmp_path, header, *lines):
    path = tmp_path / "rounds.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return rounds.read(path)


class TestPublicGoods:
    def test_a_person_is_a_row_with_the_rounds_in_order(self, tmp_path):
        one = "s1,p1,7,3.8,variable,opt_in,0,1,0"
        rows = read(
            tmp_path, PUBLIC_GOODS, f"{one},,2,20,101,6,55", f"{one},,1,10,83,6,",
            "s2,p2,4,2,all_or_nothing,opt_out,1,0,1,12,1,20,60,3,10",
        )  # fmt: skip
        first, second = rows.rows
        assert first.decisions == (
            Decision(1, 1, 10, after={"total": 83, "others": 6, "gain": None}),
            Decision(1, 2, 20, after={"total": 101, "others": 6, "gain": 55}),
        )
        assert first.design == {
            "group_size": 7, "multiplier": 3.8, "rounds": None, "all_or_nothing": False,
            "opt_out": False, "chat": False, "punishment": True, "reward": False,
        }  # fmt: skip
        assert (first.person, first.group, first.setting) == ("p1", "s1", "variable, opt_in")
        assert first.labels["punishment"] == "yes"
        assert second.answers.names == ("Nothing", "Everything")
        assert second.decisions[0].choice == 1
        assert (second.design["rounds"], second.design["opt_out"]) == (12, True)

    def test_what_can_not_be_used_is_counted_by_reason(self, tmp_path):
        good = "s,p,7,3.8,variable,opt_in,0,0,0,,1,10,83,6,55"
        rows = read(
            tmp_path, PUBLIC_GOODS, good, good, good.replace(",10,", ",21,"),
            good.replace(",10,", ",x,"), good.replace("variable", "some"),
            good.replace("3.8", "nan"), good.replace(",1,10", ",0,10"), good.replace(",p,", ",,"),
            good.replace("opt_in", "opt_out"), good.replace("variable", "all_or_nothing"),
            good.replace(",0,0,0,", ",0,2,0,"), "s,p",
        )  # fmt: skip
        assert rows.left_out.counts == {
            "row: second choice in a round": 1,
            "contribution: outside 0 to 20 coins": 1,
            "contribution: not a number": 1,
            "row: a design that can't be": 3,
            "row: no round": 1,
            "row: no participant or session": 1,
            "row: the person is in another design, too": 1,
            "contribution: outside Nothing, Everything": 1,
            "row: wrong number of cells": 1,
        }
        assert len(rows.rows[0].decisions) == 1

    def test_a_design_is_in_one_split_with_all_its_groups(self, tmp_path):
        lines = [
            f"s{n},p{n},{2 + n % 50},3.8,variable,opt_in,0,0,0,,1,10,83,6,55" for n in range(500)
        ]
        rows = read(tmp_path, PUBLIC_GOODS, *lines)
        parts = {name: rows.part(name).rows for name in ("train", "validation", "test")}
        assert sum(map(len, parts.values())) == 500
        designs = [{row.labels["design"] for row in part} for part in parts.values()]
        assert len(set.union(*designs)) == sum(map(len, designs)) == 50


class TestDilemmas:
    def test_the_other_choice_is_that_of_the_same_round(self, tmp_path):
        rows = read(
            tmp_path, DAL_BO, "D75R40,3,63,2,d,c", "D75R40,3,63,1,c,d", "D75R40,3,70,1,d,",
            "D9R40,3,63,3,c,c", "D75R40,3,63,4,x,c", "D75R40,,63,4,c,c",
        )  # fmt: skip
        (row,) = rows.rows
        assert row.decisions == (
            Decision(63, 1, 0, after={"own": 0, "other": 1}),
            Decision(63, 2, 1, after={"own": 1, "other": 0}),
            Decision(70, 1, 1),
        )
        assert row.answers.names == ("Push", "Pull")
        assert row.design == {
            "reward": 40, "sucker": 12, "temptation": 50, "penalty": 25,
            "continuation": 0.75, "error": 0,
        }  # fmt: skip
        assert row.setting == "continuation 0.75, reward 40"
        assert rows.left_out.counts == {
            "row: a treatment that can't be": 1,
            "choice: not c or d": 1,
            "row: no id, game or period": 1,
        }

    def test_what_a_round_came_to_is_in_the_line_of_the_next(self, tmp_path):
        rows = read(
            tmp_path, FUDENBERG, "1,7,2,1,,,c,1.5,0.125", "1,7,2,2,d,c,c,1.5,0.125",
            "1,7,3,1,,,d,1.5,0.125", "1,8,2,2,c,c,c,1.5,0.125",
        )  # fmt: skip
        first, second = rows.rows
        assert first.decisions == (
            Decision(2, 1, 0, after={"own": 1, "other": 0}),  # carried out wrongly
            Decision(2, 2, 0),
            Decision(3, 1, 1),
        )
        assert first.design == {
            "reward": 1, "sucker": -2, "temptation": 3, "penalty": 0,
            "continuation": 0.875, "error": 0.125,
        }  # fmt: skip
        assert second.decisions == (Decision(2, 2, 0),)


class TestSeveralStudies:
    HEADER = "data,version,sequence,period,me,other_previous"
    VERSIONS = (
        "data,version,stochastic_payoffs,continuation,infinite,continuous_time,error,R,S,T,P,longest",
        "DF,6,0,0.5,1,0,0.0,0.12,0.0,0.228,0.078,9",
        "DB,23,0,0.5,0,0,0.0,0.275,0.0,0.45,0.125,2",
        "BR,2,1,1.0,0,0,0.0,0.1,0.0,0.17,0.07,10",
        "FO,19,0,0.875,0,1,0.0,0.0625,0.0,0.1125,0.05,8",
    )

    def read(self, tmp_path, *lines, versions=VERSIONS):
        (tmp_path / "versions.csv").write_text("\n".join(versions) + "\n")
        return read(tmp_path, self.HEADER, *lines)

    def test_a_sequence_is_a_person_and_a_version_a_design(self, tmp_path):
        rows = self.read(
            tmp_path, "DF,6,1,2,d,d", "DF,6,1,1,c,", "DB,23,1,1,d,", "DF,6,2,1,c,",
        )  # fmt: skip
        first, finite, _ = rows.rows
        assert first.decisions == (
            Decision(1, 1, 0, after={"own": 0, "other": 1}),
            Decision(1, 2, 1),
        )
        assert first.design == {
            "reward": 0.12, "sucker": 0, "temptation": 0.228, "penalty": 0.078,
            "continuation": 0.5, "error": 0,
        }  # fmt: skip
        assert first.labels == {"design": "DF 6", "study": "DF"}
        assert (finite.person, finite.design["rounds"]) == ("23/1", 2)
        # Nobody knows whose a sequence is: a design is in one part with all of them.
        designs = [
            {row.labels["design"] for row in rows.rows if rows.within(row, split, 0)}
            for split in ("train", "validation", "test")
        ]
        assert sorted(name for part in designs for name in part) == ["DB 23", "DF 6"]

    def test_what_can_not_be_used_is_counted_by_reason(self, tmp_path):
        good = "DF,6,1,1,c,"
        rows = self.read(
            tmp_path, good, good, "BR,2,1,1,c,", "FO,19,1,1,c,", "XX,99,1,1,c,", "DF,6,1,2,x,c",
            "DF,6,,1,c,",
        )  # fmt: skip
        assert rows.left_out.counts == {
            "row: second choice in a round": 1,
            "row: a version with random payoffs or continuous time, or an unknown one": 3,
            "choice: not c or d": 1,
            "row: no sequence or period": 1,
        }

    def test_versions_are_needed_beside_it(self, tmp_path):
        with pytest.raises(DataError, match=r"versions.csv"):
            read(tmp_path, self.HEADER, "DF,6,1,1,c,")
        versions = self.VERSIONS[0], "DF,6,0,half,1,0,0.0,0.12,0.0,0.228,0.078,9"
        with pytest.raises(DataError, match=r"versions.csv:2: continuation is 'half'; it must be"):
            self.read(tmp_path, "DF,6,1,1,c,", versions=versions)


class TestMobLab:
    def test_a_session_begins_where_rounds_begin_again(self, tmp_path):
        rows = read(
            tmp_path, MOBLAB, "9,player,1,3,50,100,SAFE,bomb_risk",
            "8,player,1,1,3,100,SAFE,bomb_risk", "9,player,2,3,60.0,100,BOMB,bomb_risk",
            "9,player,1,3,0,100,SAFE,bomb_risk", "9.0,player,2,5,7,100,SAFE,bomb_risk",
        )  # fmt: skip
        first, _ = rows.rows
        assert first.decisions == (
            Decision(1, 1, 50, after={"safe": True}),
            Decision(1, 2, 60, after={"safe": False}),
            Decision(2, 1, 0, after={"safe": True}),
            Decision(3, 2, 7, after={"safe": True}),
        )

    def test_an_ultimatum_move_is_two_choices(self, tmp_path):
        kind = ",100,,ultimatum_strategy"
        rows = read(
            tmp_path, MOBLAB, f'1,player,1,1,"[45, 30]"{kind}', f'2,player,1,1,"[-1, -1]"{kind}',
            f'3,player,1,1,"[45]"{kind}', f"4,player,1,1,None{kind}",
        )  # fmt: skip
        (row,) = rows.rows
        assert row.decisions == (Decision(1, 1, 45, "offer"), Decision(1, 1, 30, "limit"))
        assert rows.left_out.counts == {
            "move: outside 0 to 100 dollars": 1,
            "move: not an offer and a limit": 2,
        }

    def test_what_can_not_be_used_is_counted_by_reason(self, tmp_path):
        rows = read(
            tmp_path, MOBLAB, '1,first,1,1,20,100,"[80, 20]",dictator',
            '1,second,2,2,None,100,"[80, 20]",dictator', '2,first,1,1,5,10,"[5, 5]",dictator',
            '2,first,1,1,None,100,"[5, 5]",dictator', "2,first,x,1,1,100,,dictator",
            "2,first,1,1,1,100,,lottery", '3,first,1,1,101,100,"[-1, 101]",dictator',
        )  # fmt: skip
        assert rows.left_out.counts == {
            "row: the recipient, who decides nothing": 1,
            "row: another stake than 100": 1,
            "move: not a number": 1,
            "row: no participant or round": 1,
            "row: unknown gameType": 1,
            "move: outside 0 to 100 dollars": 1,
        }
        assert [row.decisions for row in rows.rows] == [(Decision(1, 1, 20),)]


def test_another_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rounds\.csv:1: columns of no game in rounds: found a, b"):
        read(tmp_path, "a,b", "1,2")
    with pytest.raises(DataError, match="no choice; left out, choice: not c or d: 1"):
        read(tmp_path, DAL_BO, "D75R40,3,63,2,x,c")


REAL = {
    "public_goods/alsobay_2025_rounds.csv.gz": (2_896, 43_520, {}),
    "repeated_pd/dal_bo_frechette_2011.csv": (266, 7_358, {}),
    "repeated_pd/fudenberg_rand_dreber_2012.csv": (384, 13_126, {}),
    "moblab/dictator.csv": (
        8_271,
        20_069,
        {
            "row: the recipient, who decides nothing": 13_260,
            "row: another stake than 100": 2_916,
        },
    ),
    "moblab/ultimatum_strategy.csv": (4_195, 9_696, {"move: outside 0 to 100 dollars": 243}),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_tables(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, absent here")
    rows = rounds.read(path)
    people, decisions, left_out = REAL[name]
    assert rows.left_out.counts == left_out
    assert len(rows.rows) == people
    assert sum(len(row.decisions) for row in rows.rows) == decisions
