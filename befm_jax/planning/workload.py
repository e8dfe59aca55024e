"""How much a step of a config has to compute: from its data, or from what the planner is told."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from befm_jax import config
from befm_jax.config import Config, ConfigError
from befm_jax.data import examples as example_files
from befm_jax.data.forest import rung
from befm_jax.data.items import Message
from befm_jax.data.mixture import Mixture
from befm_jax.data.pipeline import Encoder
from befm_jax.llama import config as llama_config
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.published import PUBLISHED
from befm_jax.tasks import sources

# Roughly what Llama 3's tokenizer makes one token of: a word with the space before it, up to three
# digits, a run of other signs.
_PIECE = re.compile(r" ?[^\W\d_]+|\d{1,3}|[^\w\s]+|\s+|_+")
# Tokens that a chat template puts around a message, and its longest word that is one token.
_AROUND, _LONGEST_WORD = 5, 10


@dataclass(frozen=True)
class Workload:
    """What the steps of a run are; figures of a step are means.

    A step is compiled for `micro_batches` of `rows` rows of `slots` slots.  Of those slots `used`
    hold tokens, which see `pairs` others in all, and the vocabulary is projected at `reads` of
    them.  `source` says in words what this was counted from.
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
        """Slots a step, padding included."""
        return self.micro_batches * self.rows * self.slots


class Pieces:
    """A stand-in for a tokenizer that is not here: about as many tokens, of no meaning."""

    def encode(
        self, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """One id a piece, in the order of a chat template; see `Tokenizer.encode`."""
        last = len(messages) - 1
        wanted = spans or ((last, 0, len(messages[last].text)),)
        ids: list[int] = []
        learnt: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            ids += range(_AROUND)
            done = 0
            for _, start, stop in (span for span in wanted if span[0] == number):
                ids += _pieces(message.text[done:start])
                begun, done = len(ids), stop
                ids += _pieces(message.text[start:stop])
                # The end of the turn is one more piece.
                ids += [_AROUND] if stop == len(message.text) else []
                learnt.append((begun, len(ids)))
            ids += _pieces(message.text[done:])
        return tuple(ids), tuple(learnt)


def from_data(settings: Config, parts: int, shape: LlamaConfig) -> Workload:
    """From the forests of the config's own data, tokenized by the model's tokenizer if it is here.

    `parts`: how many devices share the rows of a micro-batch.

    Raises UserError for data that can't be read; see `befm_jax.train`.
    """
    data, encoder, tokenizer = settings.data, *_encoder(settings, shape)
    everybody = sources.configured(data.games, data.humans, data.tasks)
    learnt = [source.part("train", data.split_seed) for source in everybody]
    mixture = Mixture(
        [
            *sources.families(learnt, data.rows_per_step, data.one_by_one),
            *map(example_files.family, config.names(data.examples)),
        ],
        encoder,
        slots=data.slots,
        epochs=settings.optimizer.epochs,
        rows_per_step=data.rows_per_step,
        seed=settings.seed,
        parts=parts,
    )
    # Steps are dealt out evenly: a few tell of all.
    looked_at = [mixture[step] for step in range(min(4, mixture.steps))]
    largest = max((batch for batch, _ in looked_at), key=lambda batch: batch.forest.tokens.size)
    micro_batches, rows, slots = largest.forest.tokens.shape
    sources_read = [source for _, source in looked_at]
    return Workload(
        steps=mixture.steps,
        micro_batches=micro_batches,
        rows=rows,
        slots=slots,
        used=float(np.mean([source.report.slots_used for source in sources_read])),
        pairs=float(np.mean([source.pairs for source in sources_read])),
        reads=float(np.mean([source.projected for source in sources_read])),
        observations=float(np.mean([source.report.observations for source in sources_read])),
        source=f"{mixture.rows:,} rows of the config's data, {tokenizer}",
    )


def from_figures(
    settings: Config, parts: int, observations: float, slots_per_observation: float
) -> Workload:
    """Of so many rows of data that take so many slots each; every slot is taken to be learnt."""
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
        source=f"{observations:,.0f} observations of {slots_per_observation:g} slots each, as told",
    )


def _encoder(settings: Config, shape: LlamaConfig) -> tuple[Encoder, str]:
    directory = Path(settings.model.path)
    if settings.model.path and any(directory.glob("tokenizer*")):
        from befm_jax.respondents.engine import fitting_tokenizer

        return fitting_tokenizer(directory, shape), "by its tokenizer"
    return Pieces(), "tokens estimated from words (the tokenizer is not here)"


def _pieces(text: str) -> list[int]:
    found = []
    for piece in _PIECE.findall(text):
        parts = range(0, len(piece), _LONGEST_WORD)
        found += [_AROUND + 1 + _id(piece[at : at + _LONGEST_WORD]) for at in parts]
    return found


def _id(piece: str) -> int:
    return zlib.crc32(piece.encode()) % 2**30


def shape_of(settings: Config) -> LlamaConfig:
    """The shape of the config's model: from its directory, or as its owner published it.

    Raises:
        ConfigError: neither is here.
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
        f"model.path is {path!r}; a plan needs a directory with a config.json, or one of {known}"
    )
