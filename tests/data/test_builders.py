"""Data sets on disk hold what their tables hold: the same rows, splits and items."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from befm_jax.data import builders, games
from befm_jax.data.builders.__main__ import main
from befm_jax.data.builders.row_texts import row_of, texts_of
from befm_jax.data.matrix_games import Game, Player, Trial
from befm_jax.errors import DataError
from befm_jax.tasks import sources
from tests.conftest import SHARED

pytest.importorskip("tensorflow_datasets")
CODES = [f"{trait}{number}" for trait in "ACENO" for number in range(1, 6)]
GAMBLES = "Problem,Feedback,n,Ha,pHa,La,Hb,pHb,Lb,LotShapeB,LotNumB,Amb,Corr,bRate"
PAYOFFS = "AC_you,AC_other,AD_you,AD_other,BC_you,BC_other,BD_you,BD_other"


def people(number, line):
    return [line(n, np.random.default_rng(n)) for n in range(number)]


def tables():
    """By kind: the suffix of a table's name, its lines, and the tasks that read it."""
    public_goods = (
        "session,participant,group_size,multiplier,contribution_type,framing,chat,punishment,"
        "reward,rounds_shown,round,contribution,group_total,others_seen,gain"
    )
    yield "plays", ".csv", ["UserID,dictator,bomb,age band,weight", "x,101,5,,1", *people(
        60, lambda n, rng: f"{n},{rng.integers(101)},{rng.integers(101) if n % 3 else ''},é,2"
    )], ["games", "games/person", "games/across"]  # fmt: skip
    yield "rounds", ".csv", [public_goods, *people(
        60, lambda n, rng: f"s{n // 4},p{n},4,{1 + n / 20:g},variable,opt_in,0,1,0,,1,"
        f"{rng.integers(21)},60,3,{'' if n % 2 else 10}"
    ), "s,p,4,2,all_or_nothing,opt_out,1,0,1,12,1,20,60,3,10"], [
        "rounds/next", "rounds/first"
    ]  # fmt: skip
    yield "matrix_games", ".csv", [f"participant,trial,{PAYOFFS},choice", *people(
        90, lambda n, rng: f"{n // 3},{n},{','.join(map(str, rng.integers(0, 9, 8)))},{'AB'[n % 2]}"
    ), "1,1,1,1,1,1,1,1,1,nan,A"], ["games/matrix"]  # fmt: skip
    yield "bomb_risk", ".csv", ["study,id,age,gender,country,treatment,boxes,choice", *people(
        40, lambda n, rng: f"S,{n},{n},{n % 2},Austria,,100,{rng.integers(101)}"
    )], ["games/bomb_risk"]  # fmt: skip
    yield "gambles", ".csv", [GAMBLES, *people(
        60, lambda n, rng: f"{n},True,9,{n},.95,-1,8,.5,-5,{n % 4},{1 + n % 5},False,{n % 3 - 1},.3"
    )], ["games/risky"]  # fmt: skip
    yield "logs", ".jsonl", people(60, lambda n, rng: json.dumps(
        {"person": n // 3, "time": 100 - n, "prompt": f"«{n}»?", "answer": "ja"}
        | {"options": ["ja", "nein"], "question": "q", "labels": {"sex": "f"}} if n % 2 else
        {"person": f"x{n}", "time": n, "messages": [{"role": "system", "content": "s"}, {"role":
        "user", "content": "a\nb"}, {"role": "assistant", "content": "«c»"}]}
    )), ["logs/choice", "logs/text"]  # fmt: skip
    yield "questionnaires", ".csv", [",".join(["age", "gender", *CODES]), *people(
        40, lambda n, rng: f"{n + 10},{n % 2 + 1}," + ",".join(map(str, rng.integers(0, 7, 25)))
    )], ["survey/next", "survey/masked", "survey/groups", "survey/traits"]  # fmt: skip
    yield "workflows", ".jsonl", people(40, lambda n, rng: json.dumps(
        {"title": f"Paper {n // 2}", "context": f"c{n}", "method": "m" * (n % 2), "year": 1990 + n}
    )), ["workflow/steps"]  # fmt: skip
    yield "abstracts", ".jsonl", people(40, lambda n, rng: json.dumps(
        {"title": f"«Paper» {n}", "abstract": f"We  study {n}." * (n % 5 > 0)}
    )), ["literature/title"]  # fmt: skip


TABLES = {kind: (suffix, lines, names) for kind, suffix, lines, names in tables()}


def written(tmp_path, kind):
    suffix, lines, _ = TABLES[kind]
    path = tmp_path / f"table{suffix}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def built(tmp_path, kind):
    table = written(tmp_path, kind)
    return table, str(builders.build(kind, table, tmp_path / "data", "dictator,bomb"))


def shown(items):
    """All that is in items; arrays compare element by element only as lists."""
    return [
        (one.id, one.prompt, one.answers, np.asarray(one.target).tolist(), one.labels, one.notes)
        for one in items
    ]


@pytest.mark.parametrize("kind", TABLES)
def test_tasks_ask_the_same_of_a_data_set_as_of_its_table(tmp_path, kind):
    table, folder = built(tmp_path, kind)
    asked = games.select("dictator,bomb")
    for name in TABLES[kind][2]:
        (raw,) = sources.select(f"{name}={table}", asked)
        (stored,) = sources.select(f"{name}={folder}", asked)
        assert list(stored.rows.rows) == list(raw.rows.rows)
        assert {**stored.record(), "table": table} == raw.record()
        assert stored.rows.left_out == raw.rows.left_out
        assert stored.seen_by({"sources": [raw.record()]}) == raw.record()
        for split in ("all", "train", "validation", "test"):
            same = [one.part(split, 3).items(5, most=100) for one in (stored, raw)]
            assert shown(same[0]) == shown(same[1])
            assert same[0]


def test_every_kind_is_tested():
    assert set(TABLES) == set(builders.KINDS)


def test_the_same_choices_where_only_one_game_is_asked_for(tmp_path):
    table, folder = built(tmp_path, "plays")
    asked = games.select("bomb")
    (raw,) = sources.select("games/person", asked, table)
    (stored,) = sources.select("games/person", asked, folder)
    assert len(stored.rows.rows) == 41
    assert list(stored.rows.rows) == list(raw.rows.rows)
    assert stored.rows.fingerprint == raw.rows.fingerprint
    with pytest.raises(DataError, match="no choice of guessing"):
        sources.select("games", games.select("guessing"), folder)


def test_rows_are_sequences(tmp_path):
    _, folder = built(tmp_path, "bomb_risk")
    rows = builders.read(folder, "bomb_risk").rows
    assert (len(rows), rows[-1].person, [row.person for row in rows[2:4]]) == (40, "39", ["2", "3"])
    with pytest.raises(IndexError):
        rows[40]


def test_the_command_says_what_was_read_and_what_was_not(tmp_path, capsys):
    table = written(tmp_path, "matrix_games")
    arguments = ["matrix_games", table, "--out", str(tmp_path / "data")]
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "30 rows from table.csv (2x2 games)",
        "left out, row: a payoff is not a finite number: 1 (line 92: )",
        str(tmp_path / "data/befm_games/matrix_games/1.0.0"),
    ]
    assert main(arguments) == 2
    assert "there is a data set already" in capsys.readouterr().err


def test_a_table_that_can_not_be_read_leaves_nothing_behind(tmp_path, capsys):
    table = written(tmp_path, "bomb_risk")
    assert main(["questionnaires", table, "--out", str(tmp_path / "data")]) == 2
    assert "table.csv:1: columns of no questionnaire" in capsys.readouterr().err
    assert not list(tmp_path.glob("data/**/*.array_record*"))
    assert not builders.is_data_set(tmp_path / "data/befm_surveys/questionnaires/1.0.0")


def test_counts_of_people_have_no_persons(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("game,choice,count\nbomb,5,7\n")
    with pytest.raises(DataError, match="do not say who chose what"):
        builders.build("plays", str(path), tmp_path)


class TestDamage:
    def test_another_kind_is_refused(self, tmp_path):
        _, folder = built(tmp_path, "bomb_risk")
        with pytest.raises(DataError, match="a data set of bomb_risk; it must be one of question"):
            sources.select(f"survey/next={folder}", ())

    @pytest.mark.parametrize("name", ["metadata.json", "features.json", "dataset_info.json"])
    def test_a_file_that_says_nothing(self, tmp_path, name):
        _, folder = built(tmp_path, "bomb_risk")
        (tmp_path / "data/befm_games/bomb_risk/1.0.0" / name).write_text("{}")
        with pytest.raises(DataError, match="not a data set that befm_jax wrote, or damaged"):
            builders.read(folder, "bomb_risk")

    def test_bytes_that_changed(self, tmp_path):
        _, folder = built(tmp_path, "bomb_risk")
        (shard,) = tmp_path.glob("data/**/*.array_record*")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        shard.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            list(builders.read(folder, "bomb_risk").rows)


def test_texts_of_a_row_are_read_back():
    row = Player("é\n", (Trial("1", Game(((0.1, 1e300), (-0.0, 3)), ((1, 2), (3, 4))), 1),))
    texts = texts_of(row)
    assert texts["person"] == "é\n"
    assert json.loads(texts["trials"])[0]["game"]["own"] == [[0.1, 1e300], [-0.0, 3]]
    assert row_of(Player, texts) == row
    assert repr(row_of(Player, texts)) == repr(row)


def test_nothing_else_imports_tensorflow_datasets():
    code = (
        "import sys, befm_jax.tasks.sources\n"
        "print({'tensorflow_datasets', 'array_record', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "set()\n"


def test_the_real_questionnaires(tmp_path):
    path = SHARED / "bigfive_bfi" / "bfi.csv"
    if not path.exists():
        pytest.skip("needs ../shared/data/bigfive_bfi, absent here")
    short = tmp_path / "bfi.csv"
    with path.open(newline="") as file, short.open("w", newline="") as copy:
        csv.writer(copy).writerows(row for _, row in zip(range(300), csv.reader(file)))  # noqa: B905
    raw = builders.KINDS["questionnaires"].read(str(short), "")
    stored = builders.read(builders.build("questionnaires", str(short), tmp_path), "questionnaires")
    assert list(stored.rows) == raw.rows
    assert stored.left_out == raw.left_out
