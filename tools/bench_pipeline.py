"""Data: what reading and encoding cost before the first step and beside the others.

`encode`: rows a second, of texts of some 100 tokens: ours reads, encodes and lays out the steps of
a run from a chat file; the peer is `datasets.map` with the same tokenizer, batched.
`start`: `befm_jax.train` on files of `--rows` rows, until a few steps are done: the time to the
first step, peak memory, and from the second step on the share of the time that devices wait.
`slots`: slots computed in an epoch over the tokens of the same observations one by one, in steps of
16 and 64 rows, padding included, and for how many shapes the step is compiled.
`dealing`: questionnaires dealt by person and one answer at a time, as many observations a step:
the loss on other people after the same observations, for three seeds.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_data
import bench_models
import jax
import numpy as np
from bench_models import Where
from bench_report import Bench, Goal, Ratio
from bench_sides import Side, take_turns

from befm_jax.data import examples as example_files
from befm_jax.data.items import Example, Message
from befm_jax.data.mixture import Family, Mixture, one_by_one
from befm_jax.data.pipeline import Encoder
from befm_jax.llama import config as llama_config
from befm_jax.llama import tiny
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.respondents.engine import fitting_tokenizer
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("encode", "start", "slots", "dealing")
WORDS_A_ROW, ROWS_PER_STEP, SLOTS, STEPS = 90, 64, 4096, 4
# Of `dealing`: an ordinary step, and epochs after which the loss has settled.
PEOPLE_PER_STEP, DEALT_EPOCHS = 16, 16
# Of the slots: questionnaires share most, sessions are longer than the other rows.
MOST_SLOTS = {"questionnaires": 0.2, "repeated games": 1.1, "abstracts": 1.1}
MOST_SLOTS_OF_MANY = {"abstracts": 1.05}
CONFIG = """
from befm_jax.config import Checkpoints, Config, Data, Lora, Model, Optimizer

def get_config():
    return Config(
        model=Model(path={model!r}, dtype="float32", remat=False),
        data=Data(games="", examples={examples!r}, slots={slots}, rows_per_step={rows_per_step}),
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(epochs=1),
        checkpoints=Checkpoints(every=1_000_000),
    )
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], metavar="N")
    parser.add_argument("--shape", choices=("tiny", "100m"), default="100m", help="for `start`")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both sides of `encode`")
    parser.add_argument("--encoded", type=int, default=10_000, help="rows of a round of `encode`")
    parser.add_argument("--people", type=int, default=48, help="people of `dealing` and `slots`")
    parser.add_argument("--shared", type=Path, default=bench_data.SHARED)


def run(arguments: argparse.Namespace) -> Bench:
    """Runs the parts that are wanted."""
    runs: dict[str, list[dict[str, Any]]] = {}
    ratio: dict[str, Ratio] = {}
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if "encode" in arguments.parts:
            found = _encode(folder, arguments)
            runs |= found
            ratio["rows a second"] = Ratio.of(
                *([run["seconds"] for run in found[side]] for side in ("ours", "peer"))
            )
            goals.append(
                Goal("rows a second", ratio["rows a second"].median, 1.0, "times", at_least=True)
            )
        if "start" in arguments.parts:
            started = [_start(folder, rows, arguments.shape) for rows in sorted(arguments.rows)]
            runs |= {f"start, {run['rows']:,} rows": [run] for run in started}
            few, many = started[0], started[-1]
            later = 100 * (many["seconds"] / few["seconds"] - 1)
            waits = max(run["waits"] for run in started)
            goals += [
                Goal("the first step comes later with all rows by", later, 20.0, "%"),
                Goal("peak memory is more by", many["megabytes"] - few["megabytes"], 300.0, "MB"),
                Goal("devices wait for data from the second step on", waits, 5.0, "% of the time"),
            ]
        if "slots" in arguments.parts:
            for name, rows in _data_sets(arguments.shared, 16 * arguments.people).items():
                for rows_per_step in (16, 64):
                    one = _slots(rows, rows_per_step)
                    runs[f"{name}, {rows_per_step} rows a step"] = [one]
                    most = MOST_SLOTS[name]
                    if rows_per_step == 64:
                        most = MOST_SLOTS_OF_MANY.get(name, most)
                    label = f"{name}, {rows_per_step} rows a step"
                    goals += [
                        Goal(f"slots a token, {label}", one["slots a token"], most, ""),
                        Goal(f"shapes, {label}", one["shapes"], 8, ""),
                    ]
        if "dealing" in arguments.parts:
            for seed in range(3):
                by_row, apart = _dealing(arguments.shared, arguments.people, seed)
                runs[f"dealing, seed {seed}"] = [{"by person": by_row, "one by one": apart}]
                goals.append(
                    Goal(f"loss by person less one by one, seed {seed}", by_row - apart, 0.01, "")
                )
    return Bench(
        "data",
        {"words a row": WORDS_A_ROW, "rows a step": ROWS_PER_STEP, "slots": SLOTS},
        runs,
        ratio,
        goals,
    )


def _write_rows(path: Path, rows: int) -> None:
    """Chat rows of random words, that share nothing; every text is another."""
    draw, words = np.random.default_rng(0), np.array([f"w{number}" for number in range(200)])
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, rows, 10_000):
            drawn = words[draw.integers(0, 200, (min(10_000, rows - begin), WORDS_A_ROW))]
            for row in drawn:
                text = " ".join(row)
                file.write(json.dumps({"user": text[:60], "assistant": text[60:]}) + "\n")


def _model(folder: Path, shape: str) -> Path:
    directory = folder / f"model-{shape}"
    if not directory.exists():
        texts = [" ".join(f"w{number}" for number in range(200))]
        bench_models.make(directory, Where("cpu", shape, "float32"), texts)
    return directory


def _encode(folder: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    _write_rows(folder / "rows.jsonl", arguments.encoded)
    given = {"directory": str(_model(folder, "tiny")), "rows": str(folder / "rows.jsonl")}
    sides = {
        "ours": Side("bench_pipeline.Dealt", given),
        "peer": Side("bench_pipeline.Mapped", given),
    }
    return take_turns(sides, arguments.rounds, "cpu").runs


class Dealt:
    """The steps of a run, one after the other."""

    def __init__(self, directory: str, rows: str) -> None:
        self._directory, self._rows = Path(directory), rows

    def prepare(self) -> dict[str, Any]:
        """Reads the tokenizer."""
        since = time.perf_counter()
        config = llama_config.read(self._directory)
        self._tokenizer = fitting_tokenizer(self._directory, config)
        return {"seconds": time.perf_counter() - since}

    def round(self) -> dict[str, Any]:
        """Every step of an epoch, from the file on."""
        since = time.perf_counter()
        run = Mixture(
            [example_files.family(self._rows)],
            self._tokenizer,
            slots=SLOTS,
            epochs=1,
            rows_per_step=ROWS_PER_STEP,
        )
        tokens = sum(run[step][1].report.tokens_apart for step in range(run.steps))
        return _rate(run.rows, tokens, time.perf_counter() - since)


class Mapped:
    """`datasets.map`, batched, from the file on; nothing is kept from round to round."""

    def __init__(self, directory: str, rows: str) -> None:
        self._directory, self._rows = directory, rows

    def prepare(self) -> dict[str, Any]:
        """Reads the tokenizer."""
        from transformers import AutoTokenizer

        since = time.perf_counter()
        self._tokenizer = AutoTokenizer.from_pretrained(self._directory)
        return {"seconds": time.perf_counter() - since}

    def round(self) -> dict[str, Any]:
        """Every row, its prompt and its answer."""
        import datasets

        def encode(batch: Any) -> Any:
            pairs = zip(batch["user"], batch["assistant"], strict=True)
            return {"ids": self._tokenizer([" ".join(pair) for pair in pairs])["input_ids"]}

        datasets.disable_progress_bars()
        since = time.perf_counter()
        with tempfile.TemporaryDirectory() as cache:
            loaded = datasets.load_dataset(
                "json", data_files=self._rows, split="train", cache_dir=cache
            )
            mapped = loaded.map(encode, batched=True, remove_columns=["user", "assistant"])
            seconds = time.perf_counter() - since
            return _rate(len(mapped), sum(map(len, mapped["ids"])), seconds)


def _rate(rows: int, tokens: float, seconds: float) -> dict[str, Any]:
    return {"rows a second": rows / seconds, "tokens a row": tokens / rows, "seconds": seconds}


def _start(folder: Path, rows: int, shape: str) -> dict[str, Any]:
    """A run that is ended after `STEPS` steps: seconds to the first, memory, waiting."""
    texts, config, workdir = (folder / f"{rows}{name}" for name in (".jsonl", ".py", "-run"))
    _write_rows(texts, rows)
    config.write_text(
        CONFIG.format(
            model=str(_model(folder, shape)),
            examples=str(texts),
            slots=SLOTS,
            rows_per_step=ROWS_PER_STEP,
        )
    )
    command = [sys.executable, "-m", "befm_jax.train", f"--config={config}"]
    since = time.perf_counter()
    with (folder / f"{rows}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    first, done = 0.0, list[str]()
    while process.poll() is None and len(done) < STEPS:
        time.sleep(0.05)
        if (workdir / "metrics.jsonl").is_file():
            # A line that is being written has no end yet.
            done = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        first = first or (time.perf_counter() - since if done else 0.0)
    process.send_signal(signal.SIGTERM)
    _, _, usage = os.wait4(process.pid, 0)
    texts.unlink()
    if len(done) < STEPS:
        raise RuntimeError((folder / f"{rows}.log").read_text()[-3000:])
    later = [json.loads(line) for line in done][1:]
    waited, whole = (sum(step[name] for step in later) for name in ("seconds_data", "seconds"))
    return {
        "rows": rows,
        "seconds": first,
        "megabytes": usage.ru_maxrss / 1024,
        "waits": 100 * waited / whole,
    }


def _data_sets(shared: Path, rows: int) -> dict[str, list[list[Example]]]:
    return {
        "questionnaires": bench_data.bigfive(shared, rows, 0).rows,
        "repeated games": _repeated(shared, rows),
        "abstracts": bench_data.literature(shared, rows, 0).rows,
    }


def _repeated(shared: Path, rows: int) -> list[list[Example]]:
    """Repeated prisoner's dilemmas, a conversation of all rounds for each player."""
    told = "You play a game of several rounds with one other person. Each round both choose at once"
    players: dict[tuple[str, ...], list[dict[str, str]]] = {}
    path = shared / "repeated_pd_collection" / "nay_2016_choices.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            players.setdefault((row["data"], row["version"], row["sequence"]), []).append(row)
    order = np.random.default_rng(0).permutation(len(players))[:rows]
    played = list(players.values())
    return [[_session(f"{told}: [c] or [d].", played[number])] for number in order]


def _session(system: str, rounds: Sequence[dict[str, str]]) -> Example:
    messages = [Message("system", system)]
    for row in rounds:
        before = row["other_previous"] or "nothing yet"
        messages.append(Message("user", f"Round {row['period']}. The other chose {before}."))
        messages.append(Message("assistant", f"[{row['me']}]"))
    spans = tuple((at, 0, len(messages[at].text)) for at in range(2, len(messages), 2))
    return Example(tuple(messages), spans)


def _slots(rows: list[list[Example]], rows_per_step: int) -> dict[str, Any]:
    examples = [example for row in rows for example in row]
    tokenizer = tiny.train_tokenizer(bench_data.texts(examples), 4000)
    run = _mixture(Family("rows", rows, lambda row, rng: row, ""), tokenizer, rows_per_step)
    shapes, tokens, computed, used = set(), 0.0, 0, 0
    for batch, source in run.ahead(0, run.steps):
        shapes.add((*batch.forest.tokens.shape, *batch.reads.token.shape))
        tokens += source.report.tokens_apart
        computed += source.report.slots_computed
        used += source.report.slots_used
    return {
        "slots a token": computed / tokens,
        "padding, %": 100 * (1 - used / computed),
        "shapes": len(shapes),
        "steps": run.steps,
    }


def _mixture(
    family: Family, tokenizer: Encoder, rows_per_step: int, seed: int = 0, epochs: int = 1
) -> Mixture:
    return Mixture(
        [family], tokenizer, slots=SLOTS, epochs=epochs, rows_per_step=rows_per_step, seed=seed
    )


def _dealing(shared: Path, people: int, seed: int) -> tuple[float, float]:
    """The loss on other people after `DEALT_EPOCHS`, dealt by person and one answer at a time."""
    rows = bench_data.bigfive(shared, people + people // 2, seed).rows
    texts = bench_data.texts([example for row in rows for example in row])
    tokenizer = tiny.train_tokenizer(texts, 600)
    learnt, others = (
        Family("people", some, lambda row, rng: row, "") for some in (rows[:people], rows[people:])
    )
    a_step = PEOPLE_PER_STEP
    by_person = _mixture(learnt, tokenizer, a_step, seed, DEALT_EPOCHS)
    apart = one_by_one(learnt)
    by_answer = _mixture(
        apart, tokenizer, round(a_step * len(apart.rows) / people), seed, DEALT_EPOCHS
    )
    shape = bench_models.SHAPES["tiny"]
    held_out, _ = _mixture(others, tokenizer, 0)[0]
    learn = partial(_loss_after, shape, tokenizer, held_out, seed)
    return learn(by_person), learn(by_answer)


def _loss_after(
    shape: LlamaConfig, tokenizer: Tokenizer, held_out: Any, seed: int, run: Mixture
) -> float:
    """Every parameter of a tiny model is trained, from the same random ones."""
    config = bench_models.with_tokenizer(shape, tokenizer)
    optimizer = optimizers.adamw(1e-3)
    model = Llama(config)
    state = steps.init_state(tiny.init_params(config, seed, 0.3), optimizer, seed)
    train_step = steps.make_train_step(model, optimizer, steps.train_all)
    for batch, _ in run.ahead(0, run.steps):
        state, _ = train_step(state, None, jax.device_put(batch))
    return float(steps.make_loss(model, steps.train_all)(state.trained, None, held_out))
