"""Options: every field is checked, a misspelt one is answered with the near ones."""

import dataclasses
import json
import os
import runpy
from pathlib import Path

import pytest

from befm_jax import config
from befm_jax.config import Config, ConfigError, Model

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def test_the_defaults_are_the_papers_recipe_and_valid():
    settings = Config()
    config.validate(settings)
    optimizer = settings.optimizer
    assert (optimizer.epochs, optimizer.learning_rate, optimizer.warmup_fraction) == (3, 1e-4, 0.1)
    assert settings.model.dtype == "bfloat16"


def test_every_rule_is_about_a_field_that_exists():
    assert set(config._RULES) <= {name for name, _ in config.fields(Config())}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trained", "some"),
        ("model.dtype", "float16"),
        ("model.quantize", "int4"),
        ("data.slots", 1),
        ("data.rows_per_step", -1),
        ("seed", 2**32),
        ("seed", -1),
        ("lora.alpha", 10**309),
        ("lora.rank", 0),
        ("lora.dropout", 1.0),
        ("lora.targets", "q_proj,k_prj"),
        ("lora.targets", ""),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.warmup_fraction", 1.5),
        ("evaluation.split", "train"),
        ("model.scratch.width", 100),
        ("model.scratch.key_value_heads", 3),
    ],
)
def test_an_impossible_value_is_named_with_what_it_may_be(name, value):
    settings = Config()
    *path, last = name.split(".")
    part = settings
    for step in path:
        part = getattr(part, step)
    setattr(part, last, value)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.") + ".*must be|must.*" + last):
        config.validate(settings)


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--config.optimizer.learning_rat=1", "optimizer.learning_rate"),
        ("--config.learning_rate=1", "optimizer.learning_rate"),
        ("--config.lora.rnak=1", "lora.rank"),
        ("--config.sed=1", "seed"),
    ],
)
def test_a_misspelt_field_is_answered_with_the_near_ones(argument, near):
    with pytest.raises(ConfigError, match=near.replace(".", r"\.")):
        config.check_arguments([argument])


def test_right_fields_pass():
    for arguments in (
        [f"--config={QUICKSTART}", "--config.lora.rank=4", "--workdir=x"],
        ["--config", QUICKSTART, "--", "--config.no=1"],
    ):
        assert config.check_arguments(arguments) == arguments


def test_configs_that_come_with_the_package_are_named_without_a_path():
    shipped = str(config.SHIPPED / "quickstart.py")
    assert os.path.samefile(shipped, QUICKSTART)
    assert config.check_arguments(["--config=quickstart"]) == [f"--config={shipped}"]
    assert config.check_arguments(["--config", "quickstart"]) == ["--config", shipped]
    with pytest.raises(ConfigError, match=r"no such file; by name: .*8b_gpu, .*quickstart"):
        config.check_arguments(["--config=quickstar"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_that_ships_is_valid(path):
    config.validate(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nosuchmodule", r"config\.py:1: ModuleNotFoundError"),
        ("def get_config(: pass", "SyntaxError"),
        ("x = 1", r"has no get_config\(\)"),
        ("def get_config():\n    return 3", "gives a int, not a Config"),
        (
            "from befm_jax.config import Config\n\n\ndef get_config():\n"
            "    return Config(wrkdir='x')",
            r"config\.py:5: TypeError.*did you mean workdir",
        ),
    ],
)
def test_a_config_file_that_can_not_be_used_is_answered_with_its_line(tmp_path, content, message):
    (tmp_path / "config.py").write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.check_arguments([f"--config={tmp_path / 'config.py'}"])


def test_rounded_weights_are_not_trained():
    settings = Config(trained="all", model=Model(quantize="int8"))
    with pytest.raises(ConfigError, match=r"model\.quantize is 'int8'; with trained 'all'"):
        config.validate(settings)
    config.validate(dataclasses.replace(settings, trained="adapter"))


def test_nothing_to_learn_from_is_refused():
    settings = Config()
    settings.data.games = ""
    with pytest.raises(ConfigError, match="nothing to learn"):
        config.validate(settings)


@pytest.mark.parametrize("arguments", [["--config=none.py"], ["--config", "none.py"], ["--config"]])
def test_a_config_file_that_is_not_there_is_named(arguments):
    with pytest.raises(ConfigError, match="no such file"):
        config.check_arguments(arguments)


def test_a_run_goes_on_under_another_checkpoint_interval_but_not_another_seed(tmp_path):
    settings = Config()
    config.save(settings, tmp_path / "config.json")
    settings.checkpoints.every = 7
    settings.evaluation.participants = 3
    config.check_same(settings, tmp_path / "config.json")
    settings.seed = 5
    with pytest.raises(ConfigError, match="seed was 0, now 5"):
        config.check_same(settings, tmp_path / "config.json")


def test_the_saved_config_is_plain_json(tmp_path):
    config.save(Config(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["lora"]["rank"] == 8


def test_shares_of_the_loss_are_read_by_family():
    data = config.Data(weights="games=1, survey/next=2.5,a=b.jsonl=1")
    assert config.weights(data) == {"games": 1.0, "survey/next": 2.5, "a=b.jsonl": 1.0}
    assert config.weights(config.Data()) == {}
    for entry in ("games", "games=", "=1", "games=0", "games=-1", "games=nan", "games=inf"):
        with pytest.raises(ConfigError, match=f"data.weights: {entry!r} is no share of the loss"):
            config.weights(config.Data(weights=entry))
