"""Training an adapter: token forests against PEFT's step on padded batches.

Both sides have the same random checkpoint, the same LoRA adapter of rank 16 on all linears, the
same examples, and AdamW at the same learning rate behind the same clipping.  Before anything is
timed, both take the gradient of the same few observations; the two must be equal.

`--data moblab`: people's choices in seven games, the whole table.  `bigfive`: questionnaires, one
answer an item, the prompt says who answers.  `literature`: abstracts learnt whole after their
titles.  Of the last two a random `--sample` of respondents or abstracts is taken, the same for
both.  `packed`: random rows of `--slots` tokens with nothing to share and nothing to pad.

What is compared is observations a second.  A step of befm_jax takes `--rows_per_step` respondents
or abstracts, as a run does, or all of them at once (0); `--config` takes that, the length of rows
and remat from a config.  One of the peer takes a batch of observations of like length, of the
quickest size.  Each round steps for `--seconds`; steps that have begun are finished.  `--model`
trains a checkpoint in place of a random one.

Utilisation counts what LoRA needs: the forward pass and the activations' gradient (4 operations a
token and weight, the vocabulary's projection only where something is learnt; 12 a pair of tokens
that see each other and attention feature; 6 a token and adapter weight).  What is computed again in
the backward pass is not counted.  It is held against a large matrix product of the same run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

import bench_data
import bench_limits
import bench_models
import jax
import jax.numpy as jnp
import numpy as np
from bench_data import Data
from bench_models import Where
from bench_report import Bench, Goal, Ratio
from bench_sides import Found, Side, take_turns
from safetensors.numpy import load_file

from befm_jax.adapters import peft
from befm_jax.config import Config
from befm_jax.data.forest import Encoded
from befm_jax.data.items import Example
from befm_jax.data.mixture import Family, Mixture
from befm_jax.data.pipeline import Conversation, Ids, encode, lay_out
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.errors import UserError
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps


class Setting(NamedTuple):
    """What this project's side tries, as the peer tries batch sizes.

    `rows`: how many are computed together on a device; `remat`: whether layers are computed again
    in the backward pass; `each_core`: whether a CPU is one device for every core, or one in all.
    """

    rows: int
    remat: bool
    each_core: bool

    def __str__(self) -> str:
        """In words, for the report."""
        said = "1 row at once" if self.rows == 1 else f"{self.rows} rows at once"
        said += ", layers computed again" if self.remat else ""
        return said + (", a device for every core" if self.each_core else "")


PACKED = "packed"
GOALS = {"moblab": 1000.0, "bigfive": 5.0, "literature": 1.1, PACKED: 1.5}
# With some rows a step less is shared than with all at once.
GOALS_BY_STEPS = {"bigfive": 5.0, "literature": 1.05}
UTILISATION = 50.0
# Respondents, abstracts or rows that are learnt from, where `--sample` does not say.
SAMPLES = {
    "tiny": {"moblab": 0, "bigfive": 64, "literature": 256, PACKED: 8},
    "100m": {"moblab": 0, "bigfive": 4, "literature": 64, PACKED: 4},
    "8b": {"moblab": 0, "bigfive": 64, "literature": 64, PACKED: 8},
}
SLOTS = {"moblab": 640, "bigfive": 640, "literature": 1536, PACKED: 4096}
OURS = {
    "cpu": [Setting(1, False, False), Setting(1, False, True)],
    "gpu": [
        Setting(1, False, False),
        Setting(2, False, False),
        Setting(2, True, False),
        Setting(4, True, False),
    ],
}
BATCH_SIZES = {"tiny": [4, 16, 64], "100m": [1, 4, 16], "8b": [1, 2, 4]}
CHECKPOINTING = {"cpu": [False], "gpu": [False, True]}
LEARNING_RATE = 1e-4
CHECKED = 8
# More than are ever gone through, and the steps of the first that are compiled for at the start.
EPOCHS, LOOKED_AT = 100_000, 40
# In float32; in bfloat16 the two round differently, and their difference is shown only.  Rounding
# adds up over the layers: four in a model made here, thirty or more in a checkpoint.
EQUAL, EQUAL_OF_CHECKPOINTS = 1e-4, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--data", choices=tuple(GOALS), help="default: moblab; packed on a GPU")
    parser.add_argument("--sample", type=int, help="respondents, abstracts or rows")
    parser.add_argument("--slots", type=int, help="tokens a row of a forest")
    parser.add_argument("--rows_per_step", type=int, help="rows of data a step (default: all)")
    parser.add_argument("--config", help="a config file, of which slots and rows a step are taken")
    parser.add_argument("--model", type=File, help="folder of a checkpoint to train")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long a round lasts")
    parser.add_argument(
        "--shared", type=File, default=bench_data.SHARED, help="folder of the tables"
    )
    parser.add_argument(
        "--peer-batches", type=int, nargs="+", help="batch sizes that the peer tries"
    )


def run(arguments: argparse.Namespace) -> Bench:
    """Makes checkpoint and examples, lets both sides take turns, and compares."""
    at = bench_models.where(arguments)
    name = arguments.data or ("moblab" if at.device == "cpu" else PACKED)
    sample = arguments.sample or SAMPLES[at.shape][name]
    ours, settings = OURS[at.device], None
    if arguments.config:
        settings = config_file(arguments.config)
        ours = [Setting(1, settings.model.remat, len(jax.devices()) > 1)]
    data = settings.data if settings else None
    slots = arguments.slots or (data.slots if data else SLOTS[name])
    rows_per_step = arguments.rows_per_step
    if rows_per_step is None:
        rows_per_step = data.rows_per_step if data else 0
    with tempfile.TemporaryDirectory() as made:
        directory = File(made)
        said = _write(directory, name, sample, slots, at, arguments)
        same = bench_models.has_weights(directory)
        common = {
            "directory": made,
            "device": at.device,
            "dtype": at.dtype,
            "seconds": arguments.seconds,
        }
        found = take_turns(
            {
                "ours": Side(
                    "bench_train.Forests",
                    common | {"slots": slots, "settings": ours, "rows_per_step": rows_per_step},
                    each_core=any(setting.each_core for setting in ours),
                ),
                "peer": Side(
                    "bench_peers.Training",
                    common
                    | {
                        "with_weights": same,
                        "batch_sizes": arguments.peer_batches or BATCH_SIZES[at.shape],
                        "checkpointing": CHECKPOINTING[at.device],
                        "learning_rate": LEARNING_RATE,
                    },
                ),
            },
            arguments.rounds,
            at.device,
        )
        difference = _difference(directory) if same else None
    for runs in found.runs.values():
        for one in runs:
            one["observations a second"] = one["observations"] / one["seconds"]
            one["tokens a second"] = one["tokens"] / one["seconds"]
    ratio = Ratio.of(
        *([1 / one["observations a second"] for one in found.runs[side]] for side in found.runs)
    )
    return Bench(
        f"train on {name}: forests against PEFT and transformers",
        at.as_settings()
        | {
            "rank": bench_models.RANK,
            "slots a row": slots,
            "rows a step": rows_per_step or "all",
            "rounds": arguments.rounds,
        },
        found.with_preparation(),
        {"observations a second": ratio},
        _goals(found, name, at, ratio, difference, arguments),
        [f"data: {said}", *found.said(), *_utilisation_in_words(found), *_checked(difference, at)],
    )


def _goals(
    found: Found,
    name: str,
    at: Where,
    ratio: Ratio,
    difference: float | None,
    arguments: argparse.Namespace,
) -> list[Goal]:
    by_steps = arguments.rows_per_step or arguments.config
    bound = (GOALS_BY_STEPS if by_steps else GOALS).get(name, 1.0)
    equal = EQUAL_OF_CHECKPOINTS if arguments.model else EQUAL
    goals = [Goal("against the peer", ratio.median, bound, "times", at_least=True)]
    if difference is not None and at.dtype == "float32":
        goals.append(Goal("relative difference of the gradients", difference, equal, ""))
        ours, peer = (found.prepared[side]["loss"] for side in ("ours", "peer"))
        goals.append(Goal("relative difference of the loss", abs(ours / peer - 1), equal, ""))
    if at.device == "gpu" and name == PACKED:
        share = statistics.median(one["utilisation"] for one in found.runs["ours"])
        goals.append(Goal("of the matrix-product peak", share, UTILISATION, "%", at_least=True))
    return goals


def _checked(difference: float | None, at: Where) -> list[str]:
    if difference is None:
        return ["gradients not compared: each side drew its own weights on the device"]
    if at.dtype == "float32":
        return []
    return [f"gradients of {CHECKED} observations differ by {difference:.1e} of their norm"]


def _utilisation_in_words(found: Found) -> list[str]:
    each = ", ".join(f"{one['utilisation']:.1f} %" for one in found.runs["ours"])
    peak = found.prepared["ours"]["peak"] / 1e12
    return [f"ours, of the matrix-product peak of {peak:,.2f} tera-operations a second: {each}"]


def _write(
    directory: File, name: str, sample: int, slots: int, at: Where, arguments: argparse.Namespace
) -> str:
    """Writes checkpoint, adapter, `rows.json` and `checked.json`; says what the data are."""

    def make(texts: list[str]) -> Tokenizer:
        if arguments.model:
            return bench_models.link(directory, arguments.model)
        return bench_models.make(directory, at, texts)

    if name == PACKED:
        make(bench_data.texts(bench_data.game_examples()))
        vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
        drawn = np.random.default_rng(0).integers(0, vocabulary, (sample, slots)).tolist()
        rows = [[Encoded.of(ids[:1], ids[1:])] for ids in drawn]
        checked, said = rows[0], f"{sample} random rows of {slots} tokens"
    else:
        data: Data = bench_data.READERS[name](arguments.shared, sample, 0)
        tokenizer = make(bench_data.texts(data.examples))
        rows = [encode(row, tokenizer) for row in data.rows]
        checked = encode(bench_data.one_by_one(data.examples, CHECKED, 0), tokenizer)
        said = data.said
    kept = [[path for path in row if _fits(path, slots)] for row in rows]
    left_out = sum(map(len, rows)) - sum(map(len, kept))
    kept = [row for row in kept if row]
    checked = [path for path in checked if _fits(path, slots)]
    if not (kept and checked):
        raise UserError(f"--slots {slots}: too short for what is learnt from")
    if left_out:
        said += f"; left out on both sides, longer than a row: {left_out}"
    (directory / "rows.json").write_text(json.dumps(kept), encoding="utf-8")
    (directory / "checked.json").write_text(json.dumps(checked), encoding="utf-8")
    return said


def _fits(one: Encoded, slots: int) -> bool:
    return bool(one.learnt) and len(one.ids) <= slots


def _difference(directory: File) -> float:
    """Norm of the difference of both sides' gradients, over the norm of the peer's."""
    ours = load_file(directory / "ours_gradient" / peft.WEIGHTS)
    peer = load_file(directory / "peer_gradient.safetensors")
    if set(ours) != set(peer):
        raise UserError(f"the sides trained other weights: {sorted(set(ours) ^ set(peer))[:4]}")
    square = sum(float(np.square(ours[name] - peer[name], dtype=np.float64).sum()) for name in peer)
    whole = sum(float(np.square(peer[name], dtype=np.float64).sum()) for name in peer)
    return float(np.sqrt(square / whole))


class Forests:
    """This project's side."""

    def __init__(
        self,
        directory: str,
        device: str,
        dtype: str,
        slots: int,
        rows_per_step: int,
        settings: list[list[Any]],
        seconds: float,
    ) -> None:
        self._directory, self._device = File(directory), device
        self._dtype = jnp.dtype(dtype)
        self._slots, self._seconds, self._rows_per_step = slots, seconds, rows_per_step
        self._settings = [Setting(*one) for one in settings]
        self._config, self._params = bench_models.load(self._directory, dtype)
        self._optimizer = optimizers.adamw(LEARNING_RATE)

    def prepare(self) -> dict[str, Any]:
        """Writes the gradient of the checked observations; lays out, compiles, picks a setting."""
        since = time.perf_counter()
        self._peak = bench_limits.matmul_peak(self._device, self._dtype)
        found: dict[str, Any] = {"peak": self._peak}
        if bench_models.has_weights(self._directory):
            found["loss"] = self._write_gradient()
        rates, words = {}, []
        for setting in self._settings:
            try:
                compiling = self._set(setting)
                one = self._steps(0.0 if len(self._settings) == 1 else self._seconds / 3)
                rates[setting] = one["observations"] / one["seconds"]
                words.append(
                    f"{setting}: {rates[setting]:,.1f} observations a second, compiled in "
                    f"{compiling:.1f} s"
                )
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                words.append(f"{setting}: out of memory")
        if not rates:
            raise MemoryError("; ".join(words))
        chosen = max(rates, key=lambda setting: rates[setting])
        if len(rates) > 1:
            self._set(chosen)
        report = functools.reduce(operator.add, (source.report for source in self._looked_at))
        return found | {
            "seconds": time.perf_counter() - since,
            "said": f"{len(self._looked_at)} steps take {report.observations:,.0f} observations in "
            f"{report.slots_used:,} slots ({report.tokens_apart:,.0f} tokens one by one), "
            f"{report.slots_computed:,} computed, in {self._shapes} shapes; "
            f"{chosen} ({'; '.join(words)})",
        }

    def round(self) -> dict[str, Any]:
        """Steps for the given time."""
        return self._steps(self._seconds)

    def _set(self, setting: Setting) -> float:
        """Lays out and compiles; returns how long the first step took."""
        since = time.perf_counter()
        devices = jax.devices() if setting.each_core else jax.devices()[:1]
        mesh = meshes.make_mesh(data=len(devices), devices=devices)
        layout = meshes.layout_over(mesh)
        model = Llama(self._config, dtype=self._dtype, remat=setting.remat, layout=layout)
        rows = json.loads((self._directory / "rows.json").read_text(encoding="utf-8"))
        mixture = mixture_of(
            [_encoded(row) for row in rows],
            slots=self._slots * setting.rows,
            rows_per_step=self._rows_per_step,
            epochs=EPOCHS,
            parts=len(devices),
        )
        adapter = self._adapter = peft.load(self._directory / bench_models.ADAPTER, self._config)
        state = steps.init_state(adapter, self._optimizer, seed=0)
        # Where a run has them: the second step would otherwise be compiled again.
        placed = jax.tree.map(lambda _: meshes.everywhere(mesh), state)
        self._state = jax.device_put(state, placed)
        self._base = jax.device_put(self._params, meshes.everywhere(mesh))
        self._mesh = mesh
        self._step = steps.make_train_step(model, self._optimizer, steps.train_adapter, placed)
        self._looked_at, shapes = [], {}
        for number in range(min(mixture.steps_per_epoch, LOOKED_AT)):
            batch, source = mixture[number]
            self._looked_at.append(source)
            shapes[*batch.forest.tokens.shape, *batch.reads.token.shape] = (batch, source)
        self._shapes = len(shapes)
        # One step of each shape compiles it.
        self._batches = itertools.chain(shapes.values(), mixture.ahead(0, mixture.steps))
        for _ in shapes:
            self._steps(0.0)
        return time.perf_counter() - since

    def _steps(self, seconds: float) -> dict[str, Any]:
        observations, slots, flops, since = 0.0, 0, 0.0, time.perf_counter()
        while True:
            batch, source = next(self._batches)
            batch = transfer.put_rows(batch, self._mesh)
            self._state, metrics = self._step(self._state, self._base, batch)
            jax.block_until_ready(metrics.loss)
            observations += source.report.observations
            slots += source.report.slots_used
            flops += operations(
                self._config,
                self._adapter,
                slots=source.report.slots_used,
                pairs=source.pairs,
                reads=source.slots_read,
            )
            passed = time.perf_counter() - since
            if passed >= seconds:
                return {
                    "observations": observations,
                    "tokens": slots,
                    "seconds": passed,
                    "utilisation": 100 * flops / passed / self._peak,
                }

    def _write_gradient(self) -> float:
        model = Llama(self._config, dtype=self._dtype)
        text = (self._directory / "checked.json").read_text(encoding="utf-8")
        checked = _encoded(json.loads(text))
        batch, _ = lay_out(checked, slots=self._slots * len(checked), parts=1, seed=0)
        adapter = peft.load(self._directory / bench_models.ADAPTER, self._config)
        compute = jax.jit(
            lambda base, trained: steps.value_and_gradient(
                model, steps.train_adapter, base, trained, batch, jax.random.key(0)
            )
        )
        loss, gradient = compute(self._params, adapter)
        peft.save(self._directory / "ours_gradient", gradient, str(self._directory))
        return float(loss)


def operations(
    config: LlamaConfig, adapter: Any, *, slots: float, pairs: float, reads: float
) -> float:
    """What a LoRA step needs, in additions and multiplications; the module says what is counted.

    Of `slots` that hold a token, `pairs` of a slot and one that it sees, and `reads` slots where
    the vocabulary is projected.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linears = layers * (2 * width * (queries + keys) + 3 * width * config.intermediate_size)
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.weights))
    return (
        slots * (4 * linears + 6 * trained)
        + 4 * reads * width * config.vocab_size
        + 12 * pairs * queries * layers
    )


def config_file(path: str) -> Config:
    """What `get_config` of a config file returns."""
    spec = importlib.util.spec_from_file_location("bench_config", path)
    if spec is None or spec.loader is None or not File(path).is_file():
        raise UserError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings: Config = module.get_config()
    return settings


def mixture_of(rows: Sequence[Sequence[Encoded]], **options: Any) -> Mixture:
    """The batches of a run on rows of conversations that are encoded already."""

    class Known:
        def encode_batch(self, conversations: Iterable[Conversation]) -> list[Ids]:
            places = [json.loads(messages[-1].text) for messages, _ in conversations]
            return [(rows[row][at].ids, rows[row][at].learnt) for row, at in places]

    def examples(row: int, rng: Any) -> Iterator[Example]:
        for at, one in enumerate(rows[row]):
            yield Example.of("", "encoded", json.dumps([row, at]), one.observations)

    family = Family("encoded", range(len(rows)), examples, "")
    return Mixture([family], Known(), **options)


def _encoded(row: list[Any]) -> list[Encoded]:
    """Of JSON."""
    return [
        Encoded(tuple(ids), tuple(map(tuple, learnt)), observations, scale)
        for ids, learnt, observations, scale in row
    ]
