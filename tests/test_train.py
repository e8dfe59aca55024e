"""A whole small run, in process: what it leaves behind, and what interruption does not change."""

import json
import math
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import befm_jax
from befm_jax import checksums, files, models
from befm_jax import train as training
from befm_jax.adapters import peft
from befm_jax.config import (
    Checkpoints,
    Config,
    ConfigError,
    Data,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Scratch,
)
from befm_jax.data import choices, games, literature
from befm_jax.data.examples import write_chat
from befm_jax.data.items import Example
from befm_jax.data.pipeline import encode, lay_out
from befm_jax.distributed import processes
from befm_jax.errors import InUseError, NoModelError, UserError
from befm_jax.evals import report, results
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf
from befm_jax.llama import tiny as llama_scratch
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.tasks import sources
from befm_jax.training import restarts, setup
from befm_jax.training.metrics import Log, NonFiniteLossError
from befm_jax.training.step import make_loss, train_all

GAMES = "public_goods,trust_banker"


def tiny(workdir, **changes) -> Config:
    scratch = Scratch(
        width=32, layers=1, heads=2, key_value_heads=1, feed_forward=48,
        steps=4, answers_per_step=64,
    )  # fmt: skip
    return replace(
        Config(
            workdir=str(workdir),
            mesh=Mesh(data=1),
            model=Model(dtype="float32", remat=False, scratch=scratch),
            data=Data(games=GAMES, slots=2048, rows_per_step=1000),
            lora=Lora(rank=2, alpha=4.0),
            optimizer=Optimizer(epochs=1, learning_rate=1e-2),
            checkpoints=Checkpoints(every=5),
            evaluation=Evaluation(participants=100, resamples=100),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return training.train(tiny(tmp_path_factory.mktemp("run")))


def lines(workdir, phase):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["phase"] == phase and "loss" in line]


def reported(workdir, game="public_goods"):
    """The tuned model's shares as the results have them: asked together with other games."""
    found = results.read(workdir / "results.json").distributions
    (one,) = (one for one in found if one.respondent == "tuned" and one.where == {"game": game})
    return one.model


def test_a_run_leaves_everything_behind(run):
    for name in ("config.json", "metrics.jsonl", "results.json", "report.html", "populations.png"):
        assert (run / name).stat().st_size > 0, name
    for phase in ("base", "tune"):
        assert list((run / "tensorboard" / phase).iterdir())
    assert (run / "base" / "model.safetensors").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    steps = lines(run, "tune")
    assert [line["step"] for line in steps] == list(range(1, 15))  # 13,228 observations
    for line in steps:
        assert line["tokens_saved"] > 0.5
        assert line["observations_per_second"] > 0
        assert math.isfinite(line["loss"] + line["gradient_norm"] + line["learning_rate"])


def test_results_hold_base_and_tuned_in_the_documented_places(run):
    found = results.read(run / "results.json")
    assert found.main == "tuned"
    for which in ("base", "tuned", "tuned, sampled"):
        mean = found.figure("games", "wasserstein", which)
        assert mean.ci95[0] <= mean.value <= mean.ci95[1]
        assert mean.ceiling > 0
        assert set(mean.beside) >= {"uniform", "median", "pooled", "training_people"}
        by_game = found.select("games", "wasserstein", which)[1:]
        assert {one.where["game"] for one in by_game} == set(GAMES.split(","))
    how = found.tasks["games"]["how"]["tuned, sampled"]
    assert (how["temperature"], how["top_k"], how["top_p"], how["n"]) == (1.0, 0, 1.0, 100)
    assert "Public goods" in report.summary(found)


def test_draws_that_all_miss_the_answers_leave_what_was_read_exactly(run, tmp_path):
    """Weights as they are drawn write no answer in any of a few draws."""
    settings = tiny(tmp_path, evaluation=Evaluation(participants=3, resamples=50))
    base = befm_jax.load(run / "base")
    shape = llama_config.read(run / "base")
    mute = replace(base, params=llama_scratch.init_params(shape, 0, embedding_scale=0.5))
    everybody = sources.configured(GAMES, "", "")
    found = training.compare(settings, base, mute, everybody)
    assert "no item to compare" in found.extra["not_compared"]["tuned, sampled"]
    assert list(found.respondents) == ["tuned", "base"]
    report.write(found, tmp_path)
    assert "no item to compare tuned, sampled" in (tmp_path / "report.html").read_text()


def test_the_directory_loads_as_the_tuned_model(run):
    tuned = befm_jax.load(run)
    base = befm_jax.load(run / "base")
    with_adapter = befm_jax.load(run / "base", adapter=run / "adapter")
    shares = tuned.distribution("public_goods").shares
    np.testing.assert_allclose(shares, reported(run), rtol=1e-5)
    np.testing.assert_array_equal(shares, with_adapter.distribution("public_goods").shares)
    assert np.abs(shares - base.distribution("public_goods").shares).max() > 1e-3


def test_a_population_is_its_seed_and_follows_the_exact_distribution(run):
    engine = befm_jax.load(run)
    game = games.get("public_goods")
    first, again, other = (engine.simulate(game, 400, seed=seed) for seed in (1, 1, 2))
    assert first.choices == again.choices != other.choices
    assert len(first.choices) == 400
    exact = engine.distribution(game)
    counted = first.response
    assert counted.draws == 400
    assert counted.outside == pytest.approx(exact.outside, abs=0.12)
    for text, choice in zip(first.texts, first.choices, strict=True):
        position = game.answers.parse(text).position
        assert choice == (None if position is None else game.values[position])


def test_what_comes_after_an_answer_is_seen_by_scores_and_draws_alike(run, tmp_path):
    """People who leave it at their answer, and people who do not: three in five."""
    (_, system), (_, user) = games.get("public_goods").prompt()
    spoken = {"[5]": 3.0, "[8]": 3.0, "[5] or so": 2.0, "[20] of [20], or [8]": 2.0}
    people = [Example.of(system, user, answer, weight) for answer, weight in spoken.items()]
    write_chat(tmp_path / "people.jsonl", people)
    shutil.copytree(run / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [0], "top_k": 1}')
    config = tiny(tmp_path / "run", trained="all")
    config.model.path = str(tmp_path / "base")
    config.data.games, config.data.examples = "", str(tmp_path / "people.jsonl")
    config.data.rows_per_step = 0
    config.optimizer.epochs = 100
    engine = befm_jax.load(training.train(config))
    assert 0 in engine.tokenizer.stop_ids  # what the base says of itself goes with the model
    assert engine.origin["ignored_generation_config"] == {"top_k": 1}
    exact = engine.distribution("public_goods").ends_after_answer
    assert exact == pytest.approx(0.6, abs=0.05)
    drawn = engine.simulate("public_goods", 2000, seed=3).response.ends_after_answer
    assert drawn == pytest.approx(exact, abs=4 * (0.25 / 1500) ** 0.5)


def test_results_say_what_the_model_read_and_how_often_its_turns_end(run):
    found = results.read(run / "results.json")
    reference = AutoTokenizer.from_pretrained(run / "base")
    (_, system), (_, user) = games.get("public_goods").prompt()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    ids = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for which in ("base", "tuned", "tuned, sampled"):
        model = found.respondents[which]["description"]
        assert model["first_prompt"]["item"] == "public_goods"
        assert model["first_prompt"]["ids"] == ids
        assert model["first_prompt"]["text"] == reference.decode(ids)
        assert model["chat_template"]["sha256"] == befm_jax.load(run).tokenizer.template_hash
    exact = befm_jax.load(run).distribution("public_goods").ends_after_answer
    tuned = found.figure("games", "wasserstein", "tuned", {"game": "public_goods"})
    assert tuned.ends_after_answer == pytest.approx(exact, rel=1e-5)


def test_a_run_refuses_its_adapter_under_another_template(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    template = tmp_path / "run" / "base" / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + "{# mine #}")
    with pytest.raises(UserError, match=r"base/chat_template\.jinja has .* bytes"):
        befm_jax.load(tmp_path / "run")
    (tmp_path / "run" / checksums.FILE).unlink()
    assert befm_jax.load(tmp_path / "run")  # it writes the same
    template.write_text(text.replace("\n\n", "\n"))
    with pytest.raises(UserError, match=r"chat_template_hash\.json: the adapter was trained with"):
        befm_jax.load(tmp_path / "run")
    assert befm_jax.load(tmp_path / "run", force_template=True)


def test_a_run_refuses_its_adapter_on_another_base(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    whole = befm_jax.load(tmp_path / "run").origin
    assert whole["adapter_base"] == "the one that the adapter was trained on"
    (tmp_path / "run" / checksums.FILE).unlink()  # it was changed on purpose
    path = tmp_path / "run" / "base" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"rope_theta": 20_000.0}))
    with pytest.raises(UserError, match="the adapter was trained on another base"):
        befm_jax.load(tmp_path / "run")
    assert befm_jax.load(tmp_path / "run", force_base=True)


def test_a_changed_byte_of_any_file_that_a_model_is_read_from_is_named(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    paths = [copied / "run.json", *(copied / "base").iterdir(), *(copied / "adapter").iterdir()]
    assert len(paths) > 7
    for path in paths:
        content = bytearray(path.read_bytes())
        for place in (0, len(content) // 2, len(content) - 1):
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{re.escape(str(path))} is not as it was written"):
                models.resolve_model(copied)
            content[place] ^= 1
        path.write_bytes(content)
    models.resolve_model(copied)
    (copied / checksums.FILE).unlink()
    models.resolve_model(copied)


def test_a_second_run_in_the_same_directory_is_kept_out(tmp_path):
    with (
        files.in_use(tmp_path / ".lock", tmp_path),
        pytest.raises(InUseError, match=r"is in use by process \d+ on "),
    ):
        training.train(tiny(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_held_out_people_are_no_training_people(run):
    chosen = games.select(GAMES)
    (everybody,) = sources.configured(GAMES, "", "")
    learnt, held_out = (everybody.part(split).rows for split in ("train", "test"))
    whole, learnt, held_out = (
        choices.histograms(rows, chosen) for rows in (everybody.rows, learnt, held_out)
    )
    for name in GAMES.split(","):
        assert (whole[name] - learnt[name] - held_out[name] >= 0).all()
        assert learnt[name].sum() > 7 * held_out[name].sum()


class Interrupted(Exception):
    """Stands for a power cut."""


@pytest.fixture
def power_cut(monkeypatch):
    """Runs a config until a step of a phase is dispatched, and no further."""
    log_step = Log.step

    def cut(config, at_phase, at_step):
        def interrupt(self, step, metrics, source):
            log_step(self, step, metrics, source)
            if (self._phase, step) == (at_phase, at_step):
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(Log, "step", interrupt)
            with pytest.raises(Interrupted):
                training.train(config)

    return cut


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(run, tmp_path, power_cut):
    power_cut(tiny(tmp_path), "tune", 8)
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / restarts.RESTARTS).exists()
    with pytest.raises(NoModelError, match=r"without a tuned model.* step 5 \(tune\); give its"):
        befm_jax.load(tmp_path)
    training.train(tiny(tmp_path))
    assert not (tmp_path / restarts.RESTARTS).exists()
    shape = llama_config.read(run / "base")
    whole, resumed = (peft.load(path / "adapter", shape) for path in (run, tmp_path))
    for one, other in zip(
        jax.tree.leaves(whole.weights), jax.tree.leaves(resumed.weights), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert [line["step"] for line in lines(tmp_path, "tune")] == list(range(1, 15))
    assert [line["loss"] for line in lines(tmp_path, "tune")] == [
        line["loss"] for line in lines(run, "tune")
    ]


@pytest.mark.parametrize(
    ("phase", "step", "trained", "dropout"),
    [("base", 3, "all", 0.0), ("tune", 8, "adapter", 0.3)],
)
def test_interruption_anywhere_changes_no_bit(tmp_path, power_cut, phase, step, trained, dropout):
    def settings(directory):
        config = tiny(directory, trained=trained)
        config.checkpoints.every = 2
        config.lora.dropout = dropout
        return config

    power_cut(settings(tmp_path / "cut"), phase, step)
    training.train(settings(tmp_path / "cut"))
    training.train(settings(tmp_path / "whole"))
    for folder in ("base", "adapter", "tuned"):
        for path in (tmp_path / "whole" / folder).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "cut" / folder / path.name).read_bytes()


def test_a_run_that_never_comes_to_its_next_checkpoint_is_not_started_for_ever(
    tmp_path, power_cut, monkeypatch
):
    monkeypatch.setattr(restarts, "PATIENCE", 2)
    # Nothing is there; the base is, and then step 5 of tuning.
    for at_step in (3, 6, 7, 7):
        power_cut(tiny(tmp_path), "tune", at_step)
    with pytest.raises(
        restarts.NoProgressError, match=r"started 2 times, .*then delete .*restarts\.json and start"
    ):
        training.train(tiny(tmp_path))
    (tmp_path / "restarts.json").unlink()
    power_cut(tiny(tmp_path), "tune", 8)


def test_data_that_changed_behind_its_path_is_refused(tmp_path, power_cut):
    table = tmp_path / "people.csv"
    config = tiny(tmp_path / "run")
    config.data.humans = str(table)
    config.data.games = "public_goods"
    config.data.rows_per_step = 20
    table.write_text("game,choice,count\npublic_goods,5,200\npublic_goods,20,100\n")
    power_cut(config, "tune", 8)
    table.write_text("game,choice,count\npublic_goods,0,200\npublic_goods,20,100\n")
    with pytest.raises(ConfigError, match="data changed since this run began"):
        training.train(config)


def test_a_game_that_changed_while_the_base_was_made_is_refused(tmp_path, power_cut):
    """The config names the file only; what stands in it is what is learnt."""
    config = tiny(tmp_path / "run")
    config.checkpoints.every = 1
    power_cut(config, "base", 2)
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text())
    kept["base"]["data"] = "that of another wording"
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"data changed .*\(base\)"):
        training.train(config)


def test_a_mistake_before_anything_is_trained_is_not_for_ever(tmp_path):
    config = tiny(tmp_path)
    config.data.examples = "nope.jsonl"
    with pytest.raises(UserError, match=r"nope\.jsonl"):
        training.train(config)
    config.data.examples = ""
    restarts.start_or_resume(config)


def test_another_config_in_the_same_directory_is_refused(run):
    changed = tiny(run)
    changed.lora.rank = 3
    with pytest.raises(ConfigError, match=r"lora\.rank was 2, now 3"):
        training.train(changed)


def test_a_diverging_loss_stops_with_step_source_and_checkpoint(tmp_path, monkeypatch):
    def explode(peak, steps, warmup_fraction):
        return lambda step: jnp.where(step < 7, 1e-2, 1e30)

    config = tiny(tmp_path)
    config.model.scratch.steps = 1
    monkeypatch.setattr(setup.optimizers, "schedule", explode)
    told = r"tune, step (9|10): .*epoch 0\.[67]\d, .* rows.*last good checkpoint is that of step 5"
    with pytest.raises(NonFiniteLossError, match=told):
        training.train(config)
    assert not (tmp_path / "results.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints" / "tune").iterdir()] == ["5"]


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    config = tiny(tmp_path)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteLossError, match="no checkpoint before it"):
        training.train(config)


def test_all_parameters_can_be_trained(tmp_path):
    config = tiny(tmp_path, trained="all")
    config.data.games = "public_goods"
    config.data.rows_per_step = 0
    config.optimizer.epochs = 20
    training.train(config)
    steps = lines(tmp_path, "tune")
    assert steps[-1]["loss"] < steps[0]["loss"]
    shares = befm_jax.load(tmp_path).distribution("public_goods").shares
    np.testing.assert_allclose(shares, reported(tmp_path), rtol=1e-5)


def test_examples_of_ones_own_are_learnt_without_any_game(tmp_path):
    told = [Example.of("", "What colour is the sky?", "Blue.", 30.0),
            Example.of("", "What colour is grass?", "Green.", 30.0)]  # fmt: skip
    write_chat(tmp_path / "told.jsonl", told)
    config = tiny(tmp_path / "run")
    config.data = Data(games="", examples=str(tmp_path / "told.jsonl"), slots=128, rows_per_step=0)
    config.optimizer = Optimizer(epochs=5, learning_rate=1e-2)
    workdir = training.train(config)
    assert lines(workdir, "tune")[-1]["loss"] < lines(workdir, "tune")[0]["loss"]
    assert not (workdir / "results.json").exists()


def test_transformers_and_peft_read_what_a_run_leaves(run):
    """The exact distribution, answer by answer, by other people's code from the same files."""
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    game = games.get("public_goods")
    (_, system), (_, user) = game.prompt()
    expected = []
    for written in game.answers.written:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": written},
        ]
        given = len(
            tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
        )
        ids = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, given - 1 : -1]
        expected.append(float(log_probs.gather(1, ids[0, given:, None]).sum().exp()))
    found = befm_jax.load(run).distribution(game)
    np.testing.assert_allclose(found.shares * (1 - found.outside), expected, rtol=1e-3)


def test_a_checkpoint_of_ones_own_is_tuned_in_bfloat16(run, tmp_path):
    shape, params = hf.load(run / "base", dtype=jnp.bfloat16)
    hf.save(tmp_path / "model", shape, params)
    Tokenizer.load(run / "base").save(tmp_path / "model")
    config = tiny(tmp_path / "run")
    config.model.path = str(tmp_path / "model")
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.data.rows_per_step = 0
    config.optimizer.epochs = 5
    workdir = training.train(config)
    steps = lines(workdir, "tune")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert not (workdir / "base").exists()
    tuned = befm_jax.load(workdir)
    assert tuned.origin["dtype"] == "bfloat16"
    shares = tuned.distribution("public_goods").shares
    np.testing.assert_allclose(shares, reported(workdir), atol=0.05)  # packed otherwise
    # Half the bits, the same population.
    wide = befm_jax.load(workdir, dtype="float32").distribution("public_goods").shares
    assert 0.5 * np.abs(wide - shares).sum() < 0.05


def test_a_run_remembers_what_it_computed_in(tmp_path):
    config = tiny(tmp_path)
    config.model.dtype, config.model.quantize = "bfloat16", "int8"
    config.optimizer.epochs = 1
    config.data.rows_per_step = 0
    training.train(config)  # its base is stored whole, in float32
    tuned = befm_jax.load(tmp_path)
    described = results.read(tmp_path / "results.json").respondents["tuned"]["description"]
    shares = tuned.distribution("public_goods").shares
    np.testing.assert_allclose(shares, reported(tmp_path), atol=0.05)  # packed otherwise
    for field, value, other in (("dtype", "bfloat16", "float32"), ("quantize", "int8", "no")):
        assert tuned.origin[field] == described[field] == value
        unlike = befm_jax.load(tmp_path, **{field: other})
        assert unlike.origin[field] == other
        assert not np.allclose(unlike.distribution("public_goods").shares, shares, rtol=1e-6)


def test_a_run_with_an_adapter_is_no_model_to_tune(run, tmp_path):
    config = tiny(tmp_path)
    config.model.path = str(run)
    with pytest.raises(ConfigError, match=r"model\.path is .*, a training run; export"):
        training.train(config)


def test_rows_longer_than_the_models_positions_are_refused(run, tmp_path):
    config = tiny(tmp_path / "run")
    config.model.path = str(shutil.copytree(run / "base", tmp_path / "model"))
    config.data.slots = 2049  # positions of a base made here are the slots that it learnt at
    with pytest.raises(ConfigError, match=r"data\.slots is 2049; it must be at most 2048"):
        training.train(config)


def test_an_adapter_of_another_depth_is_refused(run, tmp_path):
    adapter = peft.load(run / "adapter", llama_config.read(run / "base"))
    deeper = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), adapter)
    peft.save(tmp_path, deeper, "elsewhere")
    with pytest.raises(UserError, match="the model has"):
        befm_jax.load(run / "base", adapter=tmp_path)


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(run, tmp_path):
    shutil.copytree(run / "base", tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    extra = fields["added_tokens"][-1] | {"content": "<x>", "special": False}
    extra["id"] = len(fields["model"]["vocab"]) + 50
    fields["added_tokens"].append(extra)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"ids up to \d+; the model has embeddings of \d+"):
        befm_jax.load(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_run_file_that_was_cut_off_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        befm_jax.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, tmp_path, power_cut, capsys):
    config = tiny(tmp_path)
    config.checkpoints.every = 3
    power_cut(config, "tune", 8)
    for path in (tmp_path / "checkpoints" / "tune" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    training.train(config)
    said = capsys.readouterr()
    assert "checkpoints/tune/6: this checkpoint is damaged" in said.err
    assert "tune: going on from the checkpoint of step 3" in said.out
    assert [line["loss"] for line in lines(tmp_path, "tune")] == [
        line["loss"] for line in lines(run, "tune")
    ]


@pytest.fixture
def undoing(monkeypatch):
    """A rate that from step 9 on undoes what was learnt: the best is not the last."""
    monkeypatch.setattr(
        setup.optimizers,
        "schedule",
        lambda peak, steps, warmup: lambda step: jnp.where(step < 8, 1e-2, -3e-2),
    )


def validation_losses(workdir) -> dict[int, float]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in found if "validation_loss" in line}


def test_a_stop_between_checkpoints_measures_nothing(tmp_path, monkeypatch, undoing):
    """It would be the best of all steps that have a figure, were it given one."""

    def settings(directory):
        config = tiny(directory)
        config.checkpoints.every, config.checkpoints.use = 5, "best"
        return config

    training.train(settings(tmp_path / "whole"))
    calls = iter(range(1, 100))
    with monkeypatch.context() as patch:
        # Six steps teach the base; then the eighth of tuning.
        patch.setattr(processes, "stop_requested", lambda: next(calls) == 6 + 8)
        with pytest.raises(processes.PreemptedError, match="tune: saved at step 8"):
            training.train(settings(tmp_path / "stopped"))
    training.train(settings(tmp_path / "stopped"))
    whole, stopped = (validation_losses(tmp_path / name) for name in ("whole", "stopped"))
    assert list(whole) == [5, 10, 14]
    assert stopped == whole
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "stopped")
    )
    assert one == other


def test_the_best_checkpoint_can_be_the_tuned_model(tmp_path, undoing):
    config = tiny(tmp_path)
    config.checkpoints.every, config.checkpoints.use = 1, "best"
    training.train(config)
    figures = validation_losses(tmp_path)
    best = min(figures, key=figures.get)
    assert best < 14 == max(figures)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints" / "tune").iterdir())
    assert kept == [best, 13, 14]
    # The loss on validation people, worked out anew from what the run left behind.
    tuned = befm_jax.load(tmp_path)
    (everybody,) = sources.configured(GAMES, "", "")
    items = everybody.part("validation").items()
    people = [example for item in items for example in item.examples()]
    batch, _ = lay_out(encode(people, tuned.tokenizer), slots=2048, parts=1, seed=0)
    loss = make_loss(tuned.model, train_all)(tuned.params, None, batch)
    assert float(loss) == pytest.approx(figures[best], rel=1e-5)


def test_tasks_are_asked_as_they_ask_and_only_populations_are_sampled(tmp_path, monkeypatch):
    (tmp_path / "papers.csv").write_text(
        "title,abstract\n" + "".join(f"Paper {n},Abstract {n}.\n" for n in range(60))
    )
    selected = games.select(GAMES)
    everybody = sources.select(f"games,literature/title={tmp_path / 'papers.csv'}", selected)
    asked = {}

    def compare(results, held_out, learnt, respondents, **options):
        assert held_out.rows.split == "test"
        asked[held_out.task.name] = [(name, type(how).__name__) for name, _, how in respondents]

    monkeypatch.setattr(training.comparing, "compare", compare)
    training.compare(tiny(tmp_path), None, None, everybody)
    assert asked == {
        "games": [("tuned", "Exact"), ("base", "Exact"), ("tuned, sampled", "Sampled")],
        "literature/title": [("tuned", "Sampled"), ("base", "Sampled")],
    }


def test_without_people_to_compare_with_nothing_is_trained(tmp_path):
    path = tmp_path / "papers.csv"
    path.write_text("title,abstract\n" + "".join(f"Paper {n},Abstract.\n" for n in range(30)))
    learnt = literature.read_abstracts(path).part("train").rows
    path.write_text("title,abstract\n" + "".join(f"{one.title},Abstract.\n" for one in learnt))
    settings = tiny(tmp_path / "run")
    settings.data.tasks = f"literature/title={path}"
    with pytest.raises(UserError, match="nobody is in the test split"):
        training.train(settings)
    assert not (tmp_path / "run" / "base").exists()
