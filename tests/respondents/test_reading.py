"""A model that was trained to ignore the endowment is named, and one that was not is not."""

import jax
import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.config import Config, Model, Optimizer
from befm_jax.data.games import AnswerSet, Game
from befm_jax.data.items import Example
from befm_jax.data.mixture import Family, Mixture
from befm_jax.data.responses import Exact
from befm_jax.distributed import mesh as meshes
from befm_jax.evals import report
from befm_jax.evals.results import Results
from befm_jax.llama import tiny
from befm_jax.respondents import comparing
from befm_jax.respondents.engine import Engine
from befm_jax.tasks import sources
from befm_jax.training import loop, setup
from befm_jax.training.metrics import Watch
from tests.helpers.small import small_model

GAME = Game(
    id="gift", title="Gift", roles=("giver",), role="giver", parameters={"endowment": 10},
    answers_of=lambda endowment: AnswerSet.numbers(range(endowment + 1), "dollars"),
    instructions=lambda endowment: f"You have ${endowment}. How many of them do you give?",
    payoff_of=lambda given, endowment: endowment - given,
    equilibrium_of=lambda endowment: 0,
    system="",
)  # fmt: skip
ENDOWMENTS = (10, 8, 6, 4, 2)


def taught(folder, answers_at) -> Engine:
    """A small model after training on what `answers_at` gives for each endowment, from the start.

    `answers_at`: from an endowment to numbers of people by answer.
    """
    games = [GAME.with_parameters(endowment=endowment) for endowment in ENDOWMENTS]
    examples = [
        Example.of("", game.user, GAME.answers.written[answer], people)
        for game in games
        for answer, people in answers_at(int(game.parameters["endowment"])).items()
    ]
    asked = [item.prompt[-1].text for item in items()]
    tokenizer = tiny.train_tokenizer([*asked, "[10]"], pieces=60)
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    mixture = Mixture(
        [Family("taught", examples, lambda example, rng: (example,), "")],
        tokenizer, slots=512, epochs=120,
    )  # fmt: skip
    settings = Config(workdir=str(folder), trained="all", model=Model(dtype="float32", remat=False),
                      optimizer=Optimizer(learning_rate=5e-3))  # fmt: skip
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    made = setup.of(settings, model.config, params, mesh, mixture.steps)
    params = loop.run(settings, made, mixture, None, params, {}, Watch())
    return Engine(model, params, tokenizer, {"path": folder.name}, None)


def items():
    return list(tasks.get("sensitivity").items(GAME, sources.DEFAULT, np.random.default_rng(0)))


def ignoring(endowment):
    return {4: 1, 5: 2, 6: 1}


def reading(endowment):
    return {0: 1, endowment // 2: 3}


def test_the_model_that_ignores_the_endowment_is_named(tmp_path):
    found = Results()
    (source,) = sources.select("sensitivity", [GAME])
    engines = [taught(tmp_path / what.__name__, what) for what in (ignoring, reading)]
    asked = [(engine.name, engine, Exact()) for engine in engines]
    comparing.compare(found, source, source, asked, resamples=100, seed=0, folder=tmp_path)
    endowment = {
        one.respondent: one for one in found.figures if one.where == {"change": "endowment"}
    }  # fmt: skip
    assert endowment["ignoring"].value == pytest.approx(0.0, abs=0.1)
    assert endowment["ignoring"].note.startswith("does not read the endowment: ")
    assert endowment["reading"].value == pytest.approx(1.0, abs=0.1)
    assert endowment["reading"].note == ""
    summary = report.summary(found)
    assert "ignoring does not read the endowment" in summary
    assert "reading does not read the endowment" not in summary
