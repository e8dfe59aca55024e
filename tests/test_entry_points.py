"""The three commands as a user types them, in processes of their own."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from befm_jax import files
from befm_jax.evals import report, results
from tests.helpers import behaviorbench_files

ROOT = Path(__file__).resolve().parents[1]
COMMAND_CACHE = str(Path(tempfile.gettempdir()) / f"befm_jax_commands_{os.getuid()}")
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": os.environ.get("BEFM_TEST_CACHE", COMMAND_CACHE),
}
CONFIG = """
from befm_jax.config import Config, Data, Evaluation, Lora, Model, Optimizer, Scratch

def get_config():
    scratch = Scratch(
        width=32, layers=1, heads=2, key_value_heads=1, feed_forward=48, steps=30,
        answers_per_step=64, learning_rate=1e-2,
    )
    return Config(
        model=Model(dtype="float32", remat=False, scratch=scratch),
        data=Data(slots=4096, rows_per_step=0),
        lora=Lora(rank=4),
        optimizer=Optimizer(epochs=3, learning_rate=1e-2),
        evaluation=Evaluation(participants=50, resamples=200),
    )
"""


def command(module, *flags, fails=0, **variables):
    """Runs `python -m befm_jax.MODULE`; returns what it printed after its first line.

    `fails`: its exit code; True: 2.
    """
    found = subprocess.run(
        [sys.executable, "-m", f"befm_jax.{module}", *map(str, flags)],
        cwd=ROOT, env=ENVIRONMENT | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    printed = found.stdout + found.stderr
    assert found.returncode == (2 if fails is True else fails), printed
    if fails:
        assert "Traceback" not in printed
    assert found.stderr.startswith(f"befm {module}: starting\n")
    return printed.replace(f"befm {module}: starting\n", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("commands")
    (directory / "config.py").write_text(CONFIG)
    printed = command(
        "train", "--config", directory / "config.py", "--workdir", directory / "run",
        "--config.lora.rank=2",
    )  # fmt: skip
    assert "page:" in printed
    assert json.loads((directory / "run" / "config.json").read_text())["lora"]["rank"] == 2
    return directory / "run"


@pytest.fixture(scope="module")
def choices(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "choices.csv"
    printed = command(
        "simulate", "--model", run, "--games", "all", "--participants", 40, "--seed", 0,
        "--out", out,
    )  # fmt: skip
    assert "public_goods" in printed
    return out


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_simulate_writes_one_row_a_participant_and_says_how(choices):
    found = rows(choices)
    assert list(found[0]) == ["game", "participant", "choice"]
    assert set(Counter(row["game"] for row in found).values()) == {40}
    assert {row["participant"] for row in found} == {str(number) for number in range(40)}
    how = json.loads(choices.with_name("choices.csv.json").read_text())
    assert how["answers"] == {
        "mode": "sampled", "n": 40, "seed": 0,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 16,
    }  # fmt: skip


def test_simulate_writes_the_exact_distribution(run, tmp_path):
    out = tmp_path / "distribution.csv"
    # Into a file that is there: what stood beside it was of the answers before.
    out.write_text("game,choice,probability\ndictator,0,1\n")
    (tmp_path / "distribution.csv.json").write_text('{"fingerprint": "of others"}')
    printed = command(
        "simulate", "--model", run, "--games", "dictator,bomb", "--exact", "--out", out
    )  # fmt: skip
    found = rows(out)
    assert list(found[0]) == ["game", "choice", "probability"]
    for game in ("dictator", "bomb"):
        mass = [float(row["probability"]) for row in found if row["game"] == game]
        assert len(mass) == 101
        assert 0 < sum(mass) <= 1 + 1e-6
    assert printed.count("stops after an answer: ") == 2
    model = json.loads((tmp_path / "distribution.csv.json").read_text())["model"]
    assert model["first_prompt"]["item"] == "dictator"
    assert model["first_prompt"]["text"].startswith("<|begin_of_text|><|start_header_id|>system")
    printed = command("evaluate", "--answers", out, "--out", tmp_path, "--resamples", 200)
    found = results.read(tmp_path / "results.json")
    assert found.respondents[found.main]["description"]["respondent"] == model
    assert found.figure("games", "wasserstein", found.main).ends_after_answer is None


def test_devices_share_the_answers_and_files_say_so(run, choices, tmp_path):
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    out = tmp_path / "choices.csv"
    flags = ["--model", run, "--games", "bomb"]
    command("simulate", *flags, "--participants", 40, "--devices", 2, "--out", out, **two)
    assert rows(out) == [row for row in rows(choices) if row["game"] == "bomb"]
    for file, mesh in ((choices, "one device"), (out, "data 2")):
        made = json.loads(file.with_name("choices.csv.json").read_text())
        assert made["model"]["mesh"] == mesh
    scored = ["--resamples", 200, "--out", tmp_path]
    command("evaluate", *flags, *scored, "--devices", 2, **two)
    (respondent,) = results.read(tmp_path / "results.json").respondents.values()
    assert respondent["description"]["mesh"] == "data 2"
    printed = command("simulate", *flags, "--devices", 3, "--out", out, fails=True, **two)
    assert printed == "error: devices is 3; it must be 1 to 2: cpu (cpu)\n"


def test_a_models_own_settings_and_another_template_are_answered(run, tmp_path):
    shutil.copytree(run / "base", tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": 0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("\n\n", "\n"))
    flags = [
        "--model", tmp_path / "model", "--adapter", run / "adapter", "--games", "dictator",
        "--participants", 3, "--out", tmp_path / "x.csv",
    ]  # fmt: skip
    printed = command("simulate", *flags, fails=True)
    assert printed.startswith("error: ")
    assert "trained with another chat template" in printed
    assert "--force_template" in printed
    printed = command("simulate", *flags, "--force_template")
    assert printed.count("ignored: temperature 0.6, top_p 0.9, do_sample True") == 1
    made = json.loads((tmp_path / "x.csv.json").read_text())
    del settings["eos_token_id"]
    assert made["model"]["ignored_generation_config"] == settings
    assert made["model"]["chat_template"]["adapter"].startswith("forced")
    assert made["answers"]["temperature"] == 1.0


def test_a_game_of_ones_own_is_simulated_from_its_file(run, tmp_path):
    from befm_jax.data import games

    source = games.__doc__.split('which `select("my_games.py")` loads:')[1]
    (tmp_path / "my_games.py").write_text(
        "\n".join(line.removeprefix("    ") for line in source.splitlines())
    )
    out, own = tmp_path / "own.csv", tmp_path / "my_games.py"
    command("simulate", "--model", run, "--games", own, "--exact", "--out", out)
    assert {row["game"] for row in rows(out)} == {"coin_gift"}
    people = tmp_path / "people.csv"
    people.write_text("game,choice,count\ncoin_gift,0,30\ncoin_gift,5,60\n")
    flags = ["--answers", out, "--out", tmp_path / "scored", "--resamples", 200]
    assert "--games takes .py files" in command("evaluate", *flags, fails=True)
    assert "Coin gift" in command("evaluate", *flags, "--games", own, "--humans", people)


def test_a_task_of_ones_own_trains_is_scored_and_stands_in_the_report(run, tmp_path):
    """The README's file, and three hundred made-up commuters."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in readme.split("```python\n") if block.startswith("# commute.py"))
    source = code.split("```")[0]
    assert len(source.strip().splitlines()) <= 35
    (tmp_path / "commute.py").write_text(source)
    ways, cities = ("Bus", "Bike", "Car"), ("Ulm", "Bern")
    people = [f"{n},{ways[n * n % 3]},{cities[n % 2]}" for n in range(300)]
    (tmp_path / "trips.csv").write_text("\n".join(["id,way,city", *people, "7.0,Boat,Ulm"]) + "\n")
    task = f"{tmp_path / 'commute.py'}={tmp_path / 'trips.csv'}"
    printed = command(
        "train", "--config", run.parent / "config.py", "--workdir", tmp_path / "run",
        f"--config.data.tasks={task}", "--config.data.games=public_goods",
    )  # fmt: skip
    assert "left out, " in printed  # the boat
    found = results.read(tmp_path / "run" / "results.json")
    assert set(found.tasks) == {"games", "commute"}
    for city in ("Ulm", "Bern"):
        figure = found.figure("commute", "log_score", "tuned", {"city": city})
        assert figure.people > 0
        assert figure.ci95[0] <= figure.value <= figure.ci95[1]
    whole = found.figure("commute", "accuracy", "tuned")
    assert whole.beside["training_people"] is not None
    assert "commute" in (tmp_path / "run" / "report.html").read_text()
    # Those who were kept apart in training are who it is compared with.
    command(
        "evaluate", "--model", tmp_path / "run", "--tasks", task, "--out", tmp_path / "scored",
        "--resamples", 200,
    )  # fmt: skip
    again = results.read(tmp_path / "scored" / "results.json")
    (figure,) = again.select("commute", "accuracy", again.main, {})
    assert figure.people == whole.people
    assert figure.value == pytest.approx(whole.value, abs=1e-4)
    kept = list((tmp_path / "scored").glob("*.responses.jsonl"))
    assert len(kept) == 1
    assert len(kept[0].read_text().splitlines()) == 1 + whole.people


def test_behaviorbench_is_learnt_and_fills_the_leaderboards_table(run, tmp_path):
    """A made-up directory of its layout: a part of each task's persons is kept apart."""
    folder, out = tmp_path / "benchmark", tmp_path / "scored"
    behaviorbench_files.write(folder, 40)
    task = f"behaviorbench={folder}"
    command(
        "train", "--config", run.parent / "config.py", "--workdir", tmp_path / "run",
        f"--config.data.tasks={task}", "--config.data.games=",
    )  # fmt: skip
    flags = ["--model", tmp_path / "run", "--tasks", task, "--out", out, "--resamples", 100]
    printed = command("evaluate", *flags, "--people", 8)
    assert "The published leaderboard's figures" in printed
    found = results.read(out / "results.json")
    rows = report.published(found)
    assert len(rows) == 25
    undefined = [row.id for row in rows if row.figures[found.main].value is None]
    assert undefined == ["wf_bleurt"]
    assert {found.people[name]["split"] for name in found.tasks} == {"test"}
    # A damaged file is one line that names it.
    damaged = folder / "big_five" / "demo_pred_age" / "test.jsonl"
    damaged.write_text(damaged.read_text() + "{")
    printed = command("evaluate", *flags, "--overwrite", fails=True)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {damaged}:41: not JSON")


def test_evaluate_a_file_of_answers_needs_no_jax(choices, tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise ImportError('no jax here')")
    printed = command(
        "evaluate", "--answers", choices, "--out", tmp_path, "--resamples", 200,
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert "Dictator" in printed
    found = results.read(tmp_path / "results.json")
    assert found.figure("games", "wasserstein", found.main).value > 0
    assert found.people["games"]["split"] == "test"
    assert (tmp_path / "report.html").is_file()


def test_evaluate_a_model_against_the_real_table(run, moblab_csv, tmp_path):
    printed = command(
        "evaluate", "--model", run, "--tasks", "games", "--humans", moblab_csv,
        "--split", "all", "--out", tmp_path, "--resamples", 200,
    )  # fmt: skip
    assert "65,596 choices" in printed
    assert "warning: " in printed  # the reference was made from that table
    found = results.read(tmp_path / "results.json")
    dictator = found.figure("games", "wasserstein", found.main, {"game": "dictator"})
    assert dictator.people == 8236
    shown = found.respondents[found.main]["description"]["first_prompt"]
    assert shown["item"] == "dictator"


def test_a_damaged_table_is_counted_or_refused(moblab_csv, choices, tmp_path):
    lines = moblab_csv.read_text().splitlines()[:4001]
    damaged = tmp_path / "damaged.csv"
    damaged.write_bytes(
        ("\ufeff" + "\r\n".join([*lines, "1,ten,,,,,,", "2,,101,,,,,", "3,,"]) + "\r\n").encode()
    )
    flags = ["--answers", choices, "--resamples", 200]
    printed = command("evaluate", *flags, "--humans", damaged, "--out", tmp_path / "out")
    assert "dictator: not a number" in printed
    found = results.read(tmp_path / "out" / "results.json")
    assert sum(found.people["games"]["left_out"].values()) == 3

    (tmp_path / "empty.csv").write_text("")
    cut = [line.rsplit(",", 1)[0] for line in lines]
    (tmp_path / "no_bomb.csv").write_text("\n".join(cut))
    for name, message in (
        ("empty.csv", "empty"),
        ("no_bomb.csv", "bomb"),
        ("none.csv", "none.csv"),
    ):
        printed = command(
            "evaluate", *flags, "--humans", tmp_path / name, "--out", tmp_path / "new", fails=True
        )
        assert printed.startswith("error: ")
        assert message in printed


def test_mistakes_get_an_answer_and_no_stack_trace(run, tmp_path):
    config = run.parent / "config.py"
    for module, flags, message in (
        ("train", ["--config", config, "--config.lora.rnak=3"], "did you mean lora.rank"),
        ("train", ["--config", config, "--config.lora.rank=0"], "lora.rank is 0"),
        ("train", ["--config", tmp_path / "none.py"], "none.py"),
        ("simulate", ["--model", run, "--games", "dictatr", "--out", "x"], "'dictator'"),
        ("simulate", ["--model", tmp_path / "no", "--out", "x"], "no such model directory"),
        ("simulate", ["--model", run, "--out", tmp_path], "a directory"),
        ("train", ["--config", config, "--workdir", config], "config.py"),
        ("simulate", ["--model", run, "--ot", "x"], "Unknown command line flag 'ot'"),
        ("simulate", ["--model", run, "--out", "x", "all"], "'all' is not a flag"),
        ("simulate", ["--model", run], "Flag --out must have a value"),
        ("simulate", ["--model", run, "--out", "x", "--participants", "few"], "'few'"),
        ("evaluate", ["--out", tmp_path], "--model or --answers"),
        ("evaluate", ["--answers", "x.csv", "--tasks", "game", "--out", "x"], "'games'"),
    ):
        assert message in command(module, *flags, fails=True)


def test_help_says_how_to_call(run):
    del run  # only so that this comes after the slow start
    printed = subprocess.run(
        [sys.executable, "-m", "befm_jax.simulate", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert "befm simulate --model" in printed
    assert "--participants: simulated participants per game\n    (default: '1000')" in printed


def test_results_are_not_replaced_unasked_and_responses_go_on(choices, tmp_path):
    flags = ["--answers", choices, "--out", tmp_path, "--resamples", 200]
    command("evaluate", *flags)
    before = (tmp_path / "results.json").read_bytes()
    assert "results.json exists; name another --out" in command("evaluate", *flags, fails=True)
    assert (tmp_path / "results.json").read_bytes() == before
    command("evaluate", *flags, "--overwrite")
    (tmp_path / "results.json").unlink()  # as where it was killed
    command("evaluate", *flags)


def test_two_commands_do_not_write_to_one_place(run, choices, tmp_path):
    with files.in_use(tmp_path / ".lock", tmp_path):
        flags = ["--answers", choices, "--out", tmp_path]
        assert "is in use by process" in command("evaluate", *flags, fails=1)
    with files.in_use(tmp_path / ".x.csv.lock", tmp_path / "x.csv"):
        flags = ["--model", run, "--out", tmp_path / "x.csv"]
        assert "x.csv is in use by process" in command("simulate", *flags, fails=1)
    with files.in_use(tmp_path / "run" / ".lock", tmp_path):
        flags = ["--config", run.parent / "config.py", "--workdir", tmp_path / "run"]
        assert "is in use by process" in command("train", *flags, fails=1)


def test_a_full_disk_ends_a_run_in_one_line_that_names_the_file(run, tmp_path):
    """Here no file may be larger than a checkpoint is."""
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    flags = ["--config", run.parent / "config.py", "--workdir", tmp_path / "run"]
    found = subprocess.run(
        [sys.executable, "-c", program, "befm_jax.train", *map(str, flags)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    *_, last = found.stderr.splitlines()
    assert re.match(rf"error: {tmp_path}/run/checkpoints/base/\d+: the checkpoint can't be", last)


def test_ctrl_c_ends_a_command_in_a_line_and_saves_a_run(run, tmp_path):
    def interrupted(module, *flags, when):
        with (tmp_path / "said").open("w+") as file:
            running = subprocess.Popen(
                [sys.executable, "-u", "-m", f"befm_jax.{module}", *map(str, flags)],
                cwd=ROOT, env=ENVIRONMENT, stderr=file, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            while not when((tmp_path / "said").read_text()):
                assert running.poll() is None
                time.sleep(0.02)
            running.send_signal(signal.SIGINT)
            code = running.wait(timeout=200)
        said = (tmp_path / "said").read_text()
        assert "Traceback" not in said
        return code, said

    workdir = tmp_path / "run"
    flags = ["--config", run.parent / "config.py", "--workdir", workdir]
    code, _ = interrupted("train", *flags, when=lambda said: "starting\n" in said)
    assert code == -signal.SIGINT
    log = workdir / "metrics.jsonl"
    code, said = interrupted(
        "train", *flags, "--config.optimizer.epochs=1000",
        when=lambda said: log.is_file() and '"tune"' in log.read_text(),
    )  # fmt: skip
    assert code == 75
    step = max(int(path.name) for path in (workdir / "checkpoints" / "tune").iterdir())
    assert f"stopped: tune: saved at step {step}; run the same command again" in said
    flags = ["--model", run, "--participants", 10**6, "--out", tmp_path / "x.csv"]
    code, said = interrupted("simulate", *flags, when=lambda said: f"{run}:   0%" in said)
    assert code == 75
    assert said.endswith("stopped: nothing is unsaved; run the same command again to resume\n")
