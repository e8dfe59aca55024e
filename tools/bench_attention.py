"""Forest attention against attention with a dense mask, forward and backward.

Three layouts of rows: people's choices in seven games as token trees (`games`), unrelated texts
packed behind each other (`texts`), and one text a row (`causal`).  The peer is
`jax.nn.dot_product_attention` with a boolean mask of every pair of slots, made beforehand.  Before
anything is timed both give the mixed values and the gradients of queries, keys and values; they
must be equal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
import bench_models
import jax
import jax.numpy as jnp
import numpy as np
from bench_report import Bench, Goal
from bench_sides import Found, Side, take_turns

from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded, Forest
from befm_jax.data.pipeline import encode
from befm_jax.llama import tiny
from befm_jax.llama.attention import ForestAttention

LAYOUTS = ("games", "texts", "causal")
SLOTS = {"cpu": 1024, "gpu": 4096}
# Lengths of packed texts, in tokens: those of abstracts.
SHORTEST, LONGEST = 150, 500
CALLS = 5
EQUAL = {"float32": 1e-5, "bfloat16": 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--slots", type=int, help="slots a row; default: 1024, 4096 on a GPU")
    parser.add_argument("--rows", type=int, default=2, help="rows of a call")


def run(arguments: argparse.Namespace) -> Bench:
    """Lays out the rows, lets both sides take turns, and compares."""
    at = bench_models.where(arguments)
    slots = arguments.slots or SLOTS[at.device]
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for layout in LAYOUTS:
            forest = _lay_out(layout, slots, arguments.rows)
            np.save(directory / f"{layout}.npy", forest.end)
        given = {"directory": made, "dtype": at.dtype, "shape": at.shape}
        found = take_turns(
            {
                "ours": Side("bench_attention.OfForests", given),
                "peer": Side("bench_attention.Dense", given),
            },
            arguments.rounds,
            at.device,
        )
        difference = max(_difference(directory, layout) for layout in LAYOUTS)
    ratio = {layout: found.ratio(layout) for layout in LAYOUTS}
    slowest = min(ratio.values(), key=lambda one: one.median)
    return Bench(
        "attention: forests against a dense mask, forward and backward",
        {
            "rows": arguments.rows,
            "slots a row": slots,
            **at.as_settings(),
            "rounds": arguments.rounds,
        },
        _with_preparation(found),
        ratio,
        [
            Goal("the least of the ratios", slowest.median, 1.0, "times", at_least=True),
            Goal("relative difference of values and gradients", difference, EQUAL[at.dtype], ""),
        ],
        [f"seconds are those of a forward and backward pass, the mean of {CALLS}"],
    )


def _with_preparation(found: Found) -> dict[str, list[dict[str, Any]]]:
    """Runs, and how long each layout's program took to compile."""
    before = {f"{name}, compiling": [figures] for name, figures in found.prepared.items()}
    return found.runs | before


def _difference(directory: Path, layout: str) -> float:
    """The largest difference of an array of one side from the other's, over the latter's norm."""
    with (
        np.load(directory / f"ours_{layout}.npz") as ours,
        np.load(directory / f"peer_{layout}.npz") as peer,
    ):
        return max(
            float(np.linalg.norm(ours[name] - peer[name]) / np.linalg.norm(peer[name]))
            for name in peer
        )


def _lay_out(layout: str, slots: int, rows: int) -> Forest:
    """Rows of the layout; where it has fewer they are repeated, where it has more cut off."""
    if layout == "games":
        examples = bench_data.game_examples()
        tokenizer = tiny.train_tokenizer(bench_data.texts(examples))
        paths = encode(examples, tokenizer)
    else:
        random = np.random.default_rng(0)
        lengths = [slots] * rows if layout == "causal" else _lengths(random, slots * rows)
        paths = [_text(random, min(length, slots)) for length in lengths]
    built = forests.build(paths, slots).forest
    return Forest(*(np.resize(array, (rows, slots)) for array in built))


def _lengths(random: np.random.Generator, tokens: int) -> list[int]:
    found: list[int] = []
    while sum(found) < tokens:
        found.append(int(random.integers(SHORTEST, LONGEST)))
    return found


def _text(random: np.random.Generator, length: int) -> Encoded:
    tokens = random.integers(0, 1 << 30, length).tolist()
    return Encoded.of(tokens[:1], tokens[1:])


class _Attending:
    """One side: the same queries, keys, values and gradients on both."""

    side = ""

    def __init__(self, directory: str, dtype: str, shape: str) -> None:
        config = bench_models.SHAPES[shape]
        self._directory, self._calls = Path(directory), {}
        for layout in LAYOUTS:
            end = np.load(self._directory / f"{layout}.npy")
            heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
            heads.append(config.num_attention_heads)
            arrays = [
                jax.random.normal(
                    jax.random.key(number),
                    (*end.shape, count, config.head_dim),
                    jnp.dtype(dtype),
                )
                for number, count in enumerate(heads)
            ]
            self._calls[layout] = self._both_ways(self._attention(end), *arrays)

    def _attention(self, end: np.ndarray) -> Callable[..., Any]:
        """What mixes values, given queries, keys and values."""
        raise NotImplementedError

    def _both_ways(
        self, attention: Callable[..., Any], query: Any, key: Any, value: Any, gradient: Any
    ) -> Callable[[], Any]:
        def compute(query: Any, key: Any, value: Any, gradient: Any) -> Any:
            mixed, back = jax.vjp(attention, query, key, value)
            return mixed, *back(gradient)

        compiled = jax.jit(compute)
        return lambda: jax.block_until_ready(compiled(query, key, value, gradient))

    def prepare(self) -> dict[str, Any]:
        """Compiles, and writes what comes out."""
        found = {}
        for layout, call in self._calls.items():
            since = time.perf_counter()
            arrays = call()
            found[layout] = time.perf_counter() - since
            names = ("mixed", "query", "key", "value")
            wide: dict[str, Any] = {
                name: np.asarray(array, np.float32)
                for name, array in zip(names, arrays, strict=True)
            }
            np.savez(self._directory / f"{self.side}_{layout}.npz", **wide)
        return found

    def round(self) -> dict[str, Any]:
        """Mean seconds of a few calls, layout by layout."""
        found = {}
        for layout, call in self._calls.items():
            since = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[layout] = (time.perf_counter() - since) / CALLS
        return found


class OfForests(_Attending):
    """This project's side."""

    side = "ours"

    def _attention(self, end: np.ndarray) -> Callable[..., Any]:
        strategy = ForestAttention(jnp.asarray(end))
        return lambda query, key, value: strategy(query, key, value)[0]


class Dense(_Attending):
    """What users would pick: JAX's own attention with a mask."""

    side = "peer"

    def _attention(self, end: np.ndarray) -> Callable[..., Any]:
        slot = np.arange(end.shape[1])
        query, key = slot[None, :, None], slot[None, None, :]
        visible = jnp.asarray((key <= query) & (query <= end[:, None, :]))[:, None]
        return lambda query, key, value: jax.nn.dot_product_attention(
            query, key, value, mask=visible, implementation="xla"
        )
