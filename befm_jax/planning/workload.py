"""The sizes of a config's training steps: from its data, or from given figures."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from befm_jax import config
from befm_jax.config import Config, ConfigError
from befm_jax.data import examples as example_files
from befm_jax.data.forest import rung
from befm_jax.data.items import Message
from befm_jax.data.mixture import Mixture, weighted
from befm_jax.data.pipeline import Conversation, Encoder, Ids
from befm_jax.llama import config as llama_config
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.published import PUBLISHED
from befm_jax.tasks import sources

# An approximation of Llama 3's tokens: a word with the space before it, up to three digits, a run
# of other characters.
_PIECE = re.compile(r" ?[^\W\d_]+|\d{1,3}|[^\w\s]+|\s+|_+")
# Tokens that a chat template adds around a message, and the longest word that is one token.
_AROUND, _LONGEST_WORD = 5, 10


@dataclass(frozen=True)
class Workload:
    """The sizes of a run's steps; `used` to `observations` are means per step.

    A step is compiled for `micro_batches` of `rows` rows of `slots` slots.  `used` slots hold
    tokens, with `pairs` visible query-key pairs and `reads` vocabulary projections.  `source`
    describes where the figures are from.
    """

    steps: int
    micro_batches: int
    rows: int
    slots: int
    used: float
    pairs: float
    reads: float
    observations: float
    source: str

    @property
    def computed(self) -> int:
        """Slots per step, padding included."""
        return self.micro_batches * self.rows * self.slots


class Pieces:
    """A substitute for a missing tokenizer: about as many tokens, with arbitrary ids."""

    def encode_batch(self, conversations: Iterable[Conversation]) -> list[Ids]:
        """One id per piece, in the order of a chat template; see `Tokenizer.encode`."""
        return [self._encode(messages, spans) for messages, spans in conversations]

    def _encode(self, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]]) -> Ids:
        last = len(messages) - 1
        spans = spans or ((last, 0, len(messages[last].text)),)
        ids: list[int] = []
        learnt: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            ids += range(_AROUND)
            done = 0
            for _, start, stop in (span for span in spans if span[0] == number):
                ids += _pieces(message.text[done:start])
                first, done = len(ids), stop
                ids += _pieces(message.text[start:stop])
                # The end of the turn is one more piece.
                ids += [_AROUND] if stop == len(message.text) else []
                learnt.append((first, len(ids)))
            ids += _pieces(message.text[done:])
        return tuple(ids), tuple(learnt)


def from_data(settings: Config, parts: int, shape: LlamaConfig) -> Workload:
    """The workload of the config's own data, tokenized by the model's tokenizer if available.

    `parts`: over how many devices the rows of a micro-batch are sharded.

    Raises UserError for data that can't be read; see `befm_jax.train`.
    """
    data, encoder, tokenizer = settings.data, *_encoder(settings, shape)
    all_sources = sources.configured(data.games, data.humans, data.tasks, data.wording)
    training = [
        source.part("train", data.split_seed).limited(data.people) for source in all_sources
    ]
    shares = config.weights(data)
    of_tasks = sources.families(training, data.rows_per_step, data.one_by_one, shares)
    of_files = map(example_files.family, config.names(data.examples))
    mixture = Mixture(
        weighted([*of_tasks, *of_files], shares),
        encoder,
        slots=data.slots,
        epochs=settings.optimizer.epochs,
        rows_per_step=data.rows_per_step,
        seed=settings.seed,
        parts=parts,
    )
    # Data are spread evenly over steps: a few are representative.
    steps = [mixture[step] for step in range(min(4, mixture.steps))]
    largest = max((batch for batch, _ in steps), key=lambda batch: batch.forest.tokens.size)
    micro_batches, rows, slots = largest.forest.tokens.shape
    return Workload(
        steps=mixture.steps,
        micro_batches=micro_batches,
        rows=rows,
        slots=slots,
        used=float(np.mean([source.report.slots_used for _, source in steps])),
        pairs=float(np.mean([source.pairs for _, source in steps])),
        reads=float(np.mean([source.projected for _, source in steps])),
        observations=float(np.mean([source.report.observations for _, source in steps])),
        source=f"{mixture.rows:,} rows of the config's data, {tokenizer}",
    )


def from_figures(
    settings: Config, parts: int, observations: float, slots_per_observation: float
) -> Workload:
    """The workload of a number of observations of equal length; every slot counts as learnt."""
    data = settings.data
    per_step = min(data.rows_per_step or observations, observations)
    used = per_step * slots_per_observation
    micro_batches = math.ceil(used / (parts * data.slots))
    steps = settings.optimizer.epochs * math.ceil(observations / per_step)
    return Workload(
        steps=steps,
        micro_batches=micro_batches,
        rows=parts,
        slots=min(data.slots, rung(math.ceil(used / micro_batches / parts))),
        used=used,
        pairs=used * (min(slots_per_observation, data.slots) + 1) / 2,
        reads=used,
        observations=per_step,
        source=f"{observations:,.0f} observations of {slots_per_observation:g} slots each (flags)",
    )


def _encoder(settings: Config, shape: LlamaConfig) -> tuple[Encoder, str]:
    directory = Path(settings.model.path)
    if settings.model.path and any(directory.glob("tokenizer*")):
        from befm_jax.respondents.engine import fitting_tokenizer

        return fitting_tokenizer(directory, shape), "by its tokenizer"
    return Pieces(), "tokens estimated from words (no tokenizer found)"


def _pieces(text: str) -> list[int]:
    ids = []
    for piece in _PIECE.findall(text):
        parts = range(0, len(piece), _LONGEST_WORD)
        ids += [_AROUND + 1 + _id(piece[at : at + _LONGEST_WORD]) for at in parts]
    return ids


def _id(piece: str) -> int:
    return zlib.crc32(piece.encode()) % 2**30


def shape_of(settings: Config) -> LlamaConfig:
    """The shape of the config's model: from its directory, or from `PUBLISHED`.

    Raises:
        ConfigError: neither is known.
        UnsupportedModelError: see `llama.config.read`.
    """
    path = settings.model.path
    if path and Path(path).is_dir():
        return llama_config.read(Path(path))
    name = path.split("@")[0]
    if name in PUBLISHED:
        return PUBLISHED[name]
    known = ", ".join(PUBLISHED)
    raise ConfigError(
        f"model.path is {path!r}; it must be a directory with a config.json, or one of {known}"
    )
