"""Respondents compared with people: what is recorded of those whom the baselines know."""

import pytest

import befm_jax
from befm_jax.data import games
from befm_jax.data.responses import Exact, Sampled
from befm_jax.evals import report
from befm_jax.evals.results import Results
from befm_jax.llama import hf
from befm_jax.respondents import baselines, comparing
from befm_jax.tasks import play, sources
from tests.helpers.small import game_tokenizer, small_model


@pytest.mark.parametrize(
    ("split", "learnt", "known"),
    [
        ("test", "train", []),
        ("all", "all", ["median", "mode", "pooled", "training_people"]),
        ("all", "train", ["median", "mode", "pooled", "training_people"]),
        ("train", "train", ["median", "mode", "pooled", "training_people"]),
    ],
)
def test_baselines_that_are_fitted_on_the_compared_people_are_named(split, learnt, known):
    (everybody,) = sources.select("games", [games.get("public_goods")])
    results = Results()
    comparing.compare(
        results,
        everybody.part(split),
        everybody.part(learnt),
        [("uniform", baselines.fit("uniform", [], "game"), Exact())],
        resamples=20,
        seed=0,
    )
    assert results.people["games"]["in_sample"] == known
    # Those, and those alone, reproduce the compared people.
    (figure,) = results.select("games", "wasserstein", where={})
    assert (figure.beside["training_people"] < 1e-9) == (split == learnt)


def test_a_model_plays_and_goes_on_from_what_it_has_answered(tmp_path):
    """A small model in people's place; then from its responses alone, without it."""
    (tmp_path / "rounds.csv").write_text(
        "treatment,id,game,period,choice,other.choice\n"
        + "".join(f"D75R40,{n},1,{at},{'dc'[n % 3 > at]},c\n" for n in range(4) for at in (1, 2))
    )
    (people,) = sources.select(f"play/people={tmp_path / 'rounds.csv'}", [])
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    hf.save(tmp_path / "model", model.config, params)
    tokenizer.save(tmp_path / "model")
    engine = befm_jax.load(tmp_path / "model")

    class Absent:
        name = engine.name
        describe = staticmethod(engine.describe)

        def respond(self, items, how):
            raise AssertionError(f"{len(items)} items are asked again")

    folders = []
    for number, respondent in enumerate((engine, Absent())):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in folders and folders[0].glob("*.responses.jsonl"):
            (folder / file.name).write_bytes(file.read_bytes())
        results = Results()
        asked = [("model", respondent, Exact())]
        comparing.compare(results, people, people, asked, resamples=50, seed=3, folder=folder)
        report.write(results, folder)
        folders.append(folder)
    first, again = (folder / "model.play_people.trajectories.jsonl" for folder in folders)
    assert first.read_text() == again.read_text()
    _, found = play.read(first)
    assert [len(one.moves) for one in found] == [4] * 8
    moves = [m for one in found for m in one.moves if m.who == play.RESPONDENT]
    figure = results.figure("play/people", "cooperation", "model")
    of_opponents = results.select("play/people", "cooperation", where=None)[1:3]
    assert figure.value == pytest.approx(sum(one.value for one in of_opponents) / 2)
    assert figure.items == len(moves) == 24
    assert figure.outside > 0.9
    # In round 1 one of four people cooperates, in round 2 none.
    assert figure.ceiling == pytest.approx(0.125)
    assert set(figure.beside) == {
        *("always_cooperate", "always_defect", "tit_for_tat", "generous_tit_for_tat"),
        *("equilibrium", "uniform"),
    }
    page = (folders[1] / "report.html").read_text()
    assert '<th scope="col" class="n">choices</th>' in page
    assert "people of rounds.csv" not in page


def test_a_played_tasks_questions_are_those_of_all_rounds():
    (source,) = sources.select("play/public_goods", [])
    found, how = comparing.questions(source.limited(1), Sampled(50), seed=0)
    episodes = source.limited(1).episodes(0)
    assert how == Sampled(1)
    seats = sum(q.who == play.RESPONDENT for one in episodes for q in one.questions())
    assert len(found) == 10 * seats > len(source.limited(1).items()) / 2
    assert len({item.id for item in found}) == len(found)


def test_a_name_that_means_another_thing_in_another_task_has_both_definitions():
    results = Results()
    for task, definition in (("games", "One."), ("play", "Two."), ("games", "One.")):
        comparing._define(results, task, {"level_1": definition})
    assert results.beside == {"level_1": "One. In play: Two."}
