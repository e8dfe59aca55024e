"""Runs of several real processes on this machine, and a small config for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from befm_jax.data import choices, games
from befm_jax.data.examples import write_chat
from befm_jax.tasks.games import item_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from befm_jax.config import Checkpoints, Config, Data, Lora, Model, Optimizer, Scratch

def get_config():
    return Config(
        model=Model(dtype="float32", remat=False, scratch=Scratch(
            width=32, layers=2, heads=4, key_value_heads=2, feed_forward=48)),
        data=Data(games="", examples={examples!r}, slots=1536, rows_per_step=6),
        lora=Lora(rank=2, alpha=4.0),
        optimizer=Optimizer(epochs={epochs}, learning_rate=1e-2),
        checkpoints=Checkpoints(every=3),
    )
"""


def write_config(folder: Path, epochs: int = 2) -> Path:
    """A config that learns some people's choices as examples of one's own: no game, no report."""
    chosen = games.select("dictator,public_goods")
    held_out = choices.part(choices.read("", chosen), "test")
    counts = choices.histograms(held_out, chosen)
    kept = [one for game in chosen for one in item_of(game, counts[game.id]).examples()]
    write_chat(folder / "choices.jsonl", kept)
    path = folder / "config.py"
    path.write_text(CONFIG.format(examples=str(folder / "choices.jsonl"), epochs=epochs))
    return path


GAME = """
from befm_jax.config import Checkpoints, Config, Data, Evaluation, Model, Optimizer, Scratch

def get_config():
    return Config(
        trained="all",
        model=Model(dtype="float32", remat=False, scratch=Scratch(
            width=32, layers=2, heads=4, key_value_heads=2, feed_forward=48,
            steps=24, answers_per_step=51)),
        data=Data(games="dictator", slots=1024, rows_per_step=2000),
        optimizer=Optimizer(epochs=2, learning_rate=1e-2),
        checkpoints=Checkpoints(every=2, use="best"),
        evaluation=Evaluation(participants=20, resamples=200),
    )
"""


def write_game_config(folder: Path) -> Path:
    """A config that trains every parameter on a game, takes the best checkpoint, and reports."""
    path = folder / "config.py"
    path.write_text(GAME)
    return path


def pod(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in so many processes; all must end well."""
    running = start_pod(processes, *command)
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, out + err
    return subprocess.CompletedProcess(running.args, 0, out, err)


def start_pod(processes: int, *command: str) -> subprocess.Popen[str]:
    """Starts Python with these arguments in so many processes, as `launch/local_pod.py` does.

    A first argument that begins with `--grace` is the pod's.
    """
    own = [word for word in command[:1] if word.startswith("--grace")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "local_pod.py"), f"--processes={processes}",
         "--devices-per-process=1", *own, "--", sys.executable, *command[len(own) :]],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """What processes of a run are given here: the suite's compiled programs, no eight devices."""
    import jax

    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "PYTHONPATH": str(ROOT),
    }


def losses(workdir: Path) -> dict[int, float]:
    """The loss of every step that a run has logged, by its number; of the last that it did so."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
