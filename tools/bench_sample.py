"""A population from one prompt: befm_jax against transformers' `generate`.

`--participants` answers of exactly `--new-tokens` tokens each to one prompt of `--prompt` tokens,
at temperature 1, nothing cut off.  No answer ends early: befm_jax is given a stop id that no token
has, the peer is told to go on.  The peer's batches are of the quickest size; it draws
`--peer-participants`, and `whole` is the time of all, in proportion.  `step` is the time that one
more token for everybody takes: a run with `--new-tokens`, less one with a single token.

`--quantize int8` lets a third side take turns: befm_jax with its linears in eight bits.

On an accelerator a step is held against the time that reading the weights once would take at the
bandwidth of a large copy in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_data
import bench_limits
import bench_models
import jax
import jax.numpy as jnp
import numpy as np
from bench_report import Bench, Goal
from bench_sides import Found, Side, take_turns

from befm_jax.inference.sample import Sampling, population
from befm_jax.llama import int8
from befm_jax.llama.model import Llama

GOAL, BANDWIDTH = 5.0, 70.0
PARTICIPANTS = {"cpu": 1000, "gpu": 256}
NEW_TOKENS = {"cpu": 16, "gpu": 64}
PEER_PARTICIPANTS = {"tiny": 1000, "100m": 64, "8b": 256}
BATCH_SIZES = {"tiny": [32, 125, 500], "100m": [8, 32], "8b": [64, 128, 256]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--participants", type=int, help="default: 1000; 256 on a GPU")
    parser.add_argument("--peer-participants", type=int, help="how many the peer really draws")
    parser.add_argument("--prompt", type=int, default=250, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, help="default: 16; 64 on a GPU")
    parser.add_argument(
        "--quantize", choices=("no", "int8"), default="no", help="int8: also with rounded weights"
    )
    parser.add_argument(
        "--peer-batches", type=int, nargs="+", help="batch sizes that the peer tries"
    )


def run(arguments: argparse.Namespace) -> Bench:
    """Makes the checkpoint, lets the sides take turns, and compares."""
    at = bench_models.where(arguments)
    participants = arguments.participants or PARTICIPANTS[at.device]
    drawn = min(participants, arguments.peer_participants or PEER_PARTICIPANTS[at.shape])
    new_tokens = arguments.new_tokens or NEW_TOKENS[at.device]
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        texts = bench_data.texts(bench_data.game_examples())
        tokenizer = bench_models.make(directory, at, texts)
        prompt = np.random.default_rng(0).integers(0, tokenizer.vocab_size, arguments.prompt)
        same = bench_models.has_weights(directory)
        common = {
            "directory": made,
            "device": at.device,
            "dtype": at.dtype,
            "prompt": prompt.tolist(),
            "participants": participants,
            "new_tokens": new_tokens,
        }
        sides = {"ours": Side("bench_sample.Population", common | {"quantize": "no"})}
        if arguments.quantize != "no":
            sides["ours int8"] = Side("bench_sample.Population", common | {"quantize": "int8"})
        sides["peer"] = Side(
            "bench_peers.Population",
            common
            | {
                "with_weights": same,
                "batch_sizes": arguments.peer_batches or BATCH_SIZES[at.shape],
                "drawn": drawn,
            },
        )
        found = take_turns(sides, arguments.rounds, at.device)
    ratio = {
        f"{side}, {what}": found.ratio(what, side)
        for side in sides
        if side != "peer"
        for what in ("whole", "step")
    }
    if "ours int8" in sides:
        ratio["int8 against ours as stored, step"] = found.ratio("step", "ours int8", "ours")
    goals = [Goal("against the peer", ratio["ours, whole"].median, GOAL, "times", at_least=True)]
    if at.device == "gpu":
        share = statistics.median(one["of the bandwidth"] for one in found.runs["ours"])
        goals.append(Goal("of the measured bandwidth", share, BANDWIDTH, "%", at_least=True))
    if same and at.dtype == "float32":
        ours, peer = (found.prepared[side]["greedy"] for side in ("ours", "peer"))
        equal = sum(one == other for one, other in zip(ours, peer, strict=True))
        goals.append(
            Goal("greedy tokens equal to the peer's", equal, new_tokens, "", at_least=True)
        )
    return Bench(
        f"sample: {participants:,} participants of one prompt, against transformers' generate",
        {
            "prompt": f"{arguments.prompt} tokens",
            "new tokens": new_tokens,
            **at.as_settings(),
            "rounds": arguments.rounds,
        },
        found.with_preparation(),
        ratio,
        goals,
        [
            *found.said(),
            *_bandwidth_in_words(found),
            f"the peer drew {drawn:,}; `whole` is its time for {participants:,}, in proportion",
        ],
    )


def _bandwidth_in_words(found: Found) -> list[str]:
    lines = []
    for side, prepared in found.prepared.items():
        if "weights" in prepared:
            each = ", ".join(f"{one['of the bandwidth']:.1f} %" for one in found.runs[side])
            lines.append(
                f"{side}: {prepared['weights']:,} bytes of weights are read a step; at the "
                f"measured {prepared['bandwidth'] / 1e9:,.1f} GB a second that would take "
                f"{prepared['weights'] / prepared['bandwidth']:.4f} s: {each} of the step"
            )
    return lines


class Population:
    """This project's side."""

    def __init__(
        self,
        directory: str,
        device: str,
        dtype: str,
        prompt: list[int],
        participants: int,
        new_tokens: int,
        quantize: str,
    ) -> None:
        config, params = bench_models.load(Path(directory), dtype)
        self._params = int8.quantize(params) if quantize == "int8" else params
        self._model = Llama(config, dtype=jnp.dtype(dtype))
        self._prompt, self._device = prompt, device
        self._participants, self._new_tokens = participants, new_tokens
        self._seed = 0

    def prepare(self) -> dict[str, Any]:
        """Greedy tokens to compare; compiles; measures the bandwidth."""
        since = time.perf_counter()
        self._bandwidth = bench_limits.copy_bandwidth(self._device)
        # Of the embeddings, where they are not the vocabulary's projection too, a few rows.
        whole = dict(self._params)
        if not self._model.config.tie_word_embeddings:
            del whole["embed_tokens"]
        self._weights = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
        greedy = self._draw(1, Sampling(temperature=0.0, max_new_tokens=self._new_tokens))
        self.round()
        return {
            "seconds": time.perf_counter() - since,
            "greedy": greedy[0].tolist(),
            "weights": self._weights,
            "bandwidth": self._bandwidth,
        }

    def round(self) -> dict[str, Any]:
        """Draws one token for everybody, then as many as are asked for."""
        first, seconds = (self._timed(tokens) for tokens in (1, self._new_tokens))
        step = (seconds - first) / (self._new_tokens - 1)
        return {
            "participants": self._participants,
            "seconds": seconds,
            "whole": seconds,
            "step": step,
            "of the bandwidth": 100 * self._weights / self._bandwidth / step,
        }

    def _timed(self, new_tokens: int) -> float:
        since = time.perf_counter()
        self._draw(self._participants, Sampling(max_new_tokens=new_tokens))
        return time.perf_counter() - since

    def _draw(self, participants: int, sampling: Sampling) -> Any:
        self._seed += 1
        draws = population(
            self._model,
            self._params,
            self._prompt,
            participants,
            stop_ids=(self._model.config.vocab_size,),  # no token has it
            seed=self._seed,
            sampling=sampling,
        )
        assert draws.tokens.shape == (participants, sampling.max_new_tokens)
        assert not draws.stopped.any()
        return draws.tokens
