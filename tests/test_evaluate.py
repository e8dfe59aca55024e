"""Whom a model is compared with, and what is said where it may have seen them."""

import pytest

import befm_jax
from befm_jax import files
from befm_jax.data import choices, games
from befm_jax.data.responses import Sampled
from befm_jax.errors import DataError, InUseError, UserError
from befm_jax.evaluate import held_out, how_recorded
from befm_jax.respondents.recorded import Recorded
from befm_jax.tasks import sources

HEAD = "game,participant,choice\n"
ROWS = [f"public_goods,{person},{person % 21}\n" for person in range(300)]


@pytest.fixture
def source(tmp_path):
    """Everybody of a table of three hundred people."""
    return of(tmp_path, "people.csv", ROWS)


def of(folder, name, rows):
    (folder / name).write_text(HEAD + "".join(rows))
    (found,) = sources.select("games", [games.get("public_goods")], str(folder / name))
    return found


def trained_on(source, seed=0):
    return {"sources": [source.part("train", seed).record()]}


def people(source):
    return {row.person for row in source.rows.rows}


def test_everybody_of_a_table_that_the_model_has_not_seen(source):
    found, warning = held_out(source, {}, None, None)
    assert people(found) == people(source)
    assert warning == ""


def test_the_test_split_of_a_table_that_it_was_trained_on(source):
    found, warning = held_out(source, trained_on(source, seed=3), None, None)
    assert people(found) == people(source.part("test", 3))
    assert not people(found) & people(source.part("train", 3))
    assert warning == ""


def test_answers_of_nobody_knows_whom_are_compared_with_everybody_and_a_warning(source):
    """Such as a choices.csv that was moved without its choices.csv.json."""
    found, warning = held_out(source, None, None, None)
    assert people(found) == people(source)
    assert "may have been trained on these people" in warning


def test_a_table_that_was_saved_again_is_the_same_people(source, tmp_path):
    """Other line ends, another order, a row more, ids as pandas writes them."""
    rows = [row.replace(",", ".0,", 2).replace(".0,", ",", 1) for row in reversed(ROWS)]
    again = of(tmp_path, "again.csv", [*rows, "public_goods,9999,3\n"])
    found, warning = held_out(again, trained_on(source), None, None)
    assert not people(found) & people(source.part("train"))
    assert warning == ""


def test_counts_in_which_trained_people_may_be_are_warned_of(source, tmp_path):
    """They do not say who was counted, so a bar more makes another table of them."""

    def counted(name, more=""):
        bars = "".join(f"public_goods,{value},9\n" for value in range(20))
        (tmp_path / name).write_text(f"game,choice,count\n{bars}{more}")
        return sources.select("games", [games.get("public_goods")], str(tmp_path / name))[0]

    bars, again = counted("bars.csv"), counted("again.csv", "public_goods,20,1\n")
    found, warning = held_out(bars, trained_on(bars), None, None)
    assert (found.rows.split, warning) == ("test", "")
    for learnt, compared in ((bars, again), (source, bars), (bars, source)):
        _, warning = held_out(compared, trained_on(learnt), None, None)
        assert f"may be among those of {learnt.table}" in warning
    (reference,) = sources.select("games", [games.get("public_goods")])
    assert held_out(bars, trained_on(reference), None, None)[1] == ""


def test_the_reference_is_its_test_split():
    (reference,) = sources.select("games", [games.get("public_goods")])
    found, _ = held_out(reference, {}, None, None)
    counts = choices.histograms(found.rows, [games.get("public_goods")])["public_goods"]
    expected = choices.histograms(reference.part("test").rows, [games.get("public_goods")])
    assert counts.sum() == expected["public_goods"].sum() > 0


def test_embedded_questions_are_all_asked_unless_the_model_was_trained_on_some():
    (questions,) = sources.select("knowledge/choice", [])
    found, _ = held_out(questions, {}, None, None)
    assert found.rows.rows == questions.rows.rows
    found, warning = held_out(questions, trained_on(questions), None, None)
    assert found.rows.split == "test"
    assert warning == ""


@pytest.mark.parametrize(
    ("split", "seed", "reason"),
    [("all", None, "'all'"), ("train", None, "'train'"), ("test", 1, "split seed 0, not 1")],
)
def test_people_who_may_have_been_seen_are_warned_of(source, split, seed, reason):
    _, warning = held_out(source, trained_on(source), split, seed)
    assert reason in warning
    assert held_out(source, {}, split, seed)[1] == ""


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], r"trained_on is \[\]; it must have a list of sources"),
        ({"sources": {}}, "trained_on is .* it must have a list of sources"),
        ({"sources": ["a.csv"]}, r"trained_on.sources\[0\].fingerprint is None"),
        ({"split_seed": "0"}, r"trained_on.sources\[0\].split_seed is '0'; .* int"),
        ({"split_seed": -1}, "split_seed is -1"),
        ({"sketch": "xyz"}, "sketch is 'xyz'"),
    ],
)
def test_what_a_model_was_trained_on_is_checked_before_people_are_held_out(source, found, says):
    written = trained_on(source)
    assert sources.trained_on({"trained_on": written}, "run.json") == written
    assert sources.trained_on({}, "run.json") == {}
    if isinstance(found, dict) and "sources" not in found:
        found = {"sources": [written["sources"][0] | found]}
    with pytest.raises(DataError, match=f"^run.json: .*{says}"):
        sources.trained_on({"trained_on": found}, "run.json")


def test_how_answers_were_sampled_is_read_beside_them(tmp_path):
    path = tmp_path / "choices.csv"
    path.write_text(HEAD + "public_goods,0,5\n")
    beside = tmp_path / "choices.csv.json"
    beside.write_text('{"answers": {"mode": "sampled", "n": 5, "temperature": 0.5}}')
    assert how_recorded(Recorded(path)) == Sampled(5, temperature=0.5)
    beside.write_text('{"answers": {"mode": "sampled", "n": "5"}}')
    with pytest.raises(DataError, match=r"choices\.csv: how it was sampled: n is '5'"):
        how_recorded(Recorded(path))


def test_a_task_that_reads_a_table_asks_for_one(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from befm_jax.data.rows import Rows\nfrom befm_jax.tasks import Task, register\n"
        "register(Task('mine', lambda *_: iter(()), 'mine', ('crps',), read=Rows.of))\n"
    )
    with pytest.raises(DataError, match="task mine: it reads a table; give mine=PATH"):
        sources.select(str(tmp_path / "mine.py"), [])


def test_it_is_called_from_python_with_a_file_of_answers(tmp_path, capsys):
    people, answers = tmp_path / "people.csv", tmp_path / "answers.csv"
    people.write_text(HEAD + "".join(ROWS))
    answers.write_text(HEAD + "".join(f"public_goods,{n},{(n * 7) % 21}\n" for n in range(200)))
    results = befm_jax.evaluate(
        answers, games="public_goods", humans=str(people), resamples=100, out=tmp_path / "out"
    )
    figure = results.figure("games", "wasserstein", "answers")
    assert figure.people == 300
    assert "may have been trained on these people" in capsys.readouterr().err
    assert "answers is worth" in repr(results)
    assert results._repr_html_().startswith("<iframe srcdoc=")
    table = results.to_pandas()
    assert table.loc[0, "value"] == pytest.approx(figure.value)
    assert results.plot() is not None
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(DataError, match="unknown game 'dictatr'"):
        befm_jax.evaluate(answers, games="dictatr")
    again = {
        "games": "public_goods",
        "humans": str(people),
        "resamples": 100,
        "out": tmp_path / "out",
    }
    with pytest.raises(UserError, match=r"results\.json exists; name another"):
        befm_jax.evaluate(answers, **again)
    with (
        files.in_use(tmp_path / "out" / ".lock", tmp_path),
        pytest.raises(InUseError, match="is in use by process"),
    ):
        befm_jax.evaluate(answers, **again, overwrite=True)
    assert befm_jax.evaluate(answers, **again, overwrite=True).figures == results.figures
