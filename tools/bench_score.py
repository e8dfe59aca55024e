"""What a model would answer in seven games: read exactly, against sampled and parsed answers.

befm_jax scores every answer of every game once (`Engine.respond`).  The peer draws
`--answers` answers a game by transformers' `generate` with `num_return_sequences`, in batches of
the quickest size, no longer than the longest answer that a game allows, and parses the texts.  It
draws `--peer-answers` of them; `whole` is the time of all, in proportion.  befm_jax is done in a
tenth of a second at the smallest shape: it scores again for `--seconds`, and `whole` is the mean.

Before anything is timed, both give the log-probabilities of the first, the middle and the last
answer of every game, the peer by a plain forward pass; they must be equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_data
import bench_models
import jax.numpy as jnp
from bench_report import Bench, Goal
from bench_sides import Side, take_turns

from befm_jax.data.games import Game
from befm_jax.data.responses import Exact
from befm_jax.inference import score
from befm_jax.llama.model import Llama
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import ResolvedModel
from befm_jax.respondents.engine import Engine
from befm_jax.tasks.games import item_of

GOAL = 300.0
PEER_ANSWERS = {"tiny": 250, "100m": 16, "8b": 1000}
BATCH_SIZES = {"tiny": [25, 125, 250], "100m": [4, 16], "8b": [125, 250, 500]}
# Of log-probabilities in float32; in bfloat16 their difference is shown only.
EQUAL = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--answers", type=int, default=1000, help="sampled answers a game")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long ours scores a round")
    parser.add_argument("--peer-answers", type=int, help="how many of them the peer really draws")
    parser.add_argument(
        "--peer-batches", type=int, nargs="+", help="batch sizes that the peer tries"
    )


def run(arguments: argparse.Namespace) -> Bench:
    """Makes the checkpoint, lets both sides take turns, and compares."""
    at = bench_models.where(arguments)
    drawn = min(arguments.answers, arguments.peer_answers or PEER_ANSWERS[at.shape])
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        texts = bench_data.texts(bench_data.game_examples())
        tokenizer = bench_models.make(directory, at, texts)
        questions = {game.id: _question(game, tokenizer) for game in bench_data.seven_games()}
        longest = max(question["longest"] for question in questions.values())
        (directory / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        same = bench_models.has_weights(directory)
        common = {"directory": made, "dtype": at.dtype}
        found = take_turns(
            {
                "ours": Side("bench_score.Ours", common | {"seconds": arguments.seconds}),
                "peer": Side(
                    "bench_peers.Answers",
                    common
                    | {
                        "device": at.device,
                        "with_weights": same,
                        "batch_sizes": arguments.peer_batches or BATCH_SIZES[at.shape],
                        "answers": arguments.answers,
                        "drawn": drawn,
                        "new_tokens": longest,
                    },
                ),
            },
            arguments.rounds,
            at.device,
        )
    ratio = found.ratio("whole")
    goals = [Goal("against the peer", ratio.median, GOAL, "times", at_least=True)]
    if same:
        ours, peer = (found.prepared[side]["log_probs"] for side in ("ours", "peer"))
        difference = max(
            abs(one - other)
            for name in questions
            for one, other in zip(ours[name], peer[name], strict=True)
        )
        checked = f"log-probabilities of answers differ by at most {difference:.1e}"
        if at.dtype == "float32":
            goals.append(Goal("difference of log-probabilities", difference, EQUAL, ""))
    else:
        checked = "answers not compared: each side drew its own weights on the device"
    return Bench(
        f"score: exact distributions against {arguments.answers:,} sampled answers a game",
        {
            "games": len(questions),
            **at.as_settings(),
            "rounds": arguments.rounds,
        },
        found.with_preparation(),
        {"all games": ratio},
        goals,
        [
            *found.said(),
            f"the peer drew {drawn:,} answers a game of {longest} tokens at the most; `whole` is "
            f"its time for {arguments.answers:,}, in proportion",
            checked,
        ],
    )


def _question(game: Game, tokenizer: Tokenizer) -> dict[str, Any]:
    written = [list(tokenizer.answer(text)) for text in game.answers.written]
    return {
        "prompt": list(tokenizer.prompt(game.prompt())),
        "checked": [written[0], written[len(written) // 2], written[-1]],
        "longest": max(map(len, written)),
    }


class Ours:
    """This project's side."""

    def __init__(self, directory: str, dtype: str, seconds: float) -> None:
        self._seconds = seconds
        path = Path(directory)
        config, params = bench_models.load(path, dtype)
        model = Llama(config, dtype=jnp.dtype(dtype))
        tokenizer = Tokenizer.load(path)
        self._engine = Engine(model, params, tokenizer, {}, ResolvedModel(path, directory))
        self._items = [item_of(game) for game in bench_data.seven_games()]
        self._questions = json.loads((path / "questions.json").read_text(encoding="utf-8"))

    def prepare(self) -> dict[str, Any]:
        """Log-probabilities of some answers; compiles every program."""
        since = time.perf_counter()
        engine = self._engine
        asked = [(one["prompt"], one["checked"]) for one in self._questions.values()]
        scored = score.each_answers(engine.model, engine.params, asked)
        self.round()
        return {
            "seconds": time.perf_counter() - since,
            "log_probs": {
                name: one.log_probs.tolist()
                for name, one in zip(self._questions, scored, strict=True)
            },
        }

    def round(self) -> dict[str, Any]:
        """Every answer of every game, scored again and again; `whole` is the mean of once."""
        answers = times = 0
        since = time.perf_counter()
        while True:
            each = self._engine.respond(self._items, Exact())
            answers += sum(len(found.shares) for found in each)
            times += 1
            seconds = time.perf_counter() - since
            if seconds >= self._seconds:
                return {"answers": answers, "seconds": seconds, "whole": seconds / times}
