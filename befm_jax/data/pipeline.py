"""From examples to a batch: encoded, laid out as token forests, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded, Forest, Reads, Report
from befm_jax.data.items import Example, Message

# A conversation, and `(message, start, stop)` of what is learnt in it, in characters.
Conversation = tuple[Sequence[Message], Sequence[tuple[int, int, int]]]
# Its ids, and `(start, stop)` of what is learnt in them.
Ids = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


class Encoder(Protocol):
    """What turns messages into token ids (`llama.tokenizer.Tokenizer`)."""

    def encode_batch(self, conversations: Iterable[Conversation]) -> list[Ids]:
        """Ids of each conversation, and where in them the learnt tokens are."""


class Batch(NamedTuple):
    """What one optimiser step sees: `M` micro-batches of `B` rows of `N` slots.

    `forest` and `reads` are those of `befm_jax.data.forest` with a leading axis `M`.
    """

    forest: Forest
    reads: Reads

    def pairs(self, used: int) -> int:
        """Pairs of a slot and one that it sees (itself, an ancestor), of its `used` slots."""
        # Padding sees itself alone.
        depth = self.forest.depth
        return int((depth + 1).sum()) - (depth.size - used)

    def slots_read(self) -> int:
        """At how many slots a token is read."""
        return int(self._columns().sum())

    def projected(self) -> int:
        """At how many slots the vocabulary is projected: in every row as many as in the fullest."""
        columns = self._columns()
        return int(columns.max(axis=1).sum()) * columns.shape[1]

    def padded(self, micro_batches: int, slots: int, width: int) -> Batch:
        """The same batch, padded to `[micro_batches, B, slots]` and `width` reads a row."""
        have, parts, long = self.forest.tokens.shape
        if (micro_batches, slots, width) == (have, long, self.reads.token.shape[2]):
            return self
        flat = (Forest(*map(_unfold, self.forest)), Reads(*map(_unfold, self.reads)))
        return _folded(*forests.pad(*flat, micro_batches * parts, slots, width), parts)

    def _columns(self) -> np.ndarray:
        """How many columns of `reads` each row of each micro-batch uses, `[M, B]`."""
        used: np.ndarray = self.reads.column.max(axis=2) + 1
        return used


def encode(examples: Sequence[Example], encoder: Encoder) -> list[Encoded]:
    """Examples as token ids."""
    made = encoder.encode_batch((one.messages, one.spans) for one in examples)
    return [
        Encoded(*ids_and_learnt, one.weight)
        for ids_and_learnt, one in zip(made, examples, strict=True)
    ]


def lay_out(
    conversations: Sequence[Encoded],
    *,
    slots: int,
    parts: int,
    seed: int,
    growth: float = forests.GROWTH,
) -> tuple[Batch, Report]:
    """A batch of conversations: rows of at most `slots` slots, `parts` of them in a micro-batch.

    `parts` is how many devices share the rows.  See `forest.build` for the rest.
    """
    built = forests.build(conversations, slots, parts=parts, seed=seed, growth=growth)
    return _folded(built.forest, built.reads, parts), built.report


def _folded(forest: Forest, reads: Reads, parts: int) -> Batch:
    def fold(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, parts, *array.shape[1:])

    return Batch(Forest(*map(fold, forest)), Reads(*map(fold, reads)))


def _unfold(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[2:])
