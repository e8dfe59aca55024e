"""Weak scaling: a step of 1, 2 and 4 processes on this machine, with as many rows for each.

Every process gets the same rows a step, of text that shares nothing, so that a step would take the
same time if each had a machine of its own and the network cost nothing.  Here all share the cores:
what is seen is what processes, collectives (gloo) and the loop cost beside that.  `ratio` is the
time of a step of one process over that of N; with C cores for one process to use, no more than
C/N can be expected where one process keeps them all busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import Bench, Ratio

from befm_jax.data.examples import write_chat
from befm_jax.data.items import Example

ROOT = Path(__file__).resolve().parents[1]
SLOTS, ROWS, STEPS, SKIPPED = 256, 2, 12, 4
WORDS_OF_A_ROW = 110
CONFIG = """
from befm_jax.config import Checkpoints, Config, Data, Lora, Model, Optimizer, Scratch

def get_config():
    return Config(
        model=Model(dtype="float32", remat=False, scratch=Scratch(width=256, feed_forward=768)),
        data=Data(games="", examples={examples!r}, slots={slots}, rows_per_step={rows}),
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(epochs=1),
        checkpoints=Checkpoints(every=10_000),
    )
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")


def run(arguments: argparse.Namespace) -> Bench:
    """Runs the training command in so many processes, in turn."""
    counts = sorted({1, *arguments.processes})
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    runs: dict[str, list[dict[str, Any]]] = {f"{count} processes": [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for count in counts:
                found = step_seconds(Path(folder) / f"{number}-{count}", count)
                seconds[count].append(found["seconds"])
                runs[f"{count} processes"].append(found)
    return Bench(
        name="processes",
        settings={"rows a process": ROWS, "slots": SLOTS, "steps": STEPS, "cores": os.cpu_count()},
        runs=runs,
        ratio={
            f"{count} processes": Ratio.of(seconds[count], seconds[1])
            for count in counts
            if count > 1
        },
    )


def step_seconds(folder: Path, processes: int) -> dict[str, float]:
    """Medians over the steps of a run, the first few left out: seconds, and what they went to."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    words = [f"w{number}" for number in range(200)]
    texts = [" ".join(draw.choice(words, WORDS_OF_A_ROW)) for _ in range(ROWS * processes * STEPS)]
    write_chat(folder / "texts.jsonl", [Example.of("", text[:20], text[20:]) for text in texts])
    config = folder / "config.py"
    config.write_text(
        CONFIG.format(examples=str(folder / "texts.jsonl"), slots=SLOTS, rows=ROWS * processes)
    )
    subprocess.run(
        [sys.executable, str(ROOT / "launch" / "local_pod.py"), f"--processes={processes}",
         "--devices-per-process=1", "--", sys.executable, "-m", "befm_jax.train",
         f"--config={config}", f"--workdir={folder / 'run'}"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    logged = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, logged) if "loss" in line][SKIPPED:]
    names = ("seconds", "seconds_data", "seconds_device", "tokens_per_second")
    return {name: statistics.median(step[name] for step in steps) for name in names}
