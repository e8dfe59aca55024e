"""Batches of token forests whose order is a pure function of seed and step.

Nothing but the step number has to be kept to go on where a run stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from befm_jax.data import forest as forests
from befm_jax.data.examples import Example
from befm_jax.data.forest import Forest, Path, Reads, Report
from befm_jax.errors import DataError


class Encoder(Protocol):
    """What turns messages into token ids (`llama.tokenizer.Tokenizer`)."""

    def prompt(self, system: str, user: str) -> tuple[int, ...]:
        """Ids up to where the answer begins."""

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of the answer and its end-of-turn token."""


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

    def parents(self) -> int:
        """At how many slots a token is read."""
        return int(self._columns().sum())

    def projected(self) -> int:
        """At how many slots the vocabulary is projected: in every row as many as in the fullest."""
        columns = self._columns()
        return int(columns.max(axis=1).sum()) * columns.shape[1]

    def _columns(self) -> np.ndarray:
        """How many columns of `reads` each row of each micro-batch uses, `[M, B]`."""
        used: np.ndarray = np.where(self.forest.weight > 0, self.reads.column + 1, 0).max(axis=2)
        return used


@dataclass(frozen=True)
class Source:
    """What a batch was made of, for reports and error messages."""

    epoch: int
    step_of_epoch: int
    report: Report

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, batch {self.step_of_epoch + 1} of that epoch"


def encode(examples: Sequence[Example], encoder: Encoder) -> list[Path]:
    """Examples as token paths; a prompt or an answer that many have is rendered once."""
    prompt, answer = (
        lru_cache(maxsize=None)(encoder.prompt),
        lru_cache(maxsize=None)(encoder.answer),
    )
    return [Path(prompt(one.system, one.user), answer(one.answer), one.weight) for one in examples]


def pool(mine: Sequence[Path], gather: Callable[[np.ndarray], list[np.ndarray]]) -> list[Path]:
    """The paths of all processes, of which each has those of its `examples.Share`, in their order.

    `gather` gives the int32 numbers of every process, in the order of the processes
    (`transfer.all_gather`).  Prompts and answers that many paths have go through it once.
    """
    every = [_from_numbers(numbers) for numbers in gather(_as_numbers(mine))]
    paths: list[Path] = [Path((), ())] * sum(map(len, every))
    for part, theirs in enumerate(every):
        paths[part :: len(every)] = theirs
    return paths


def _as_numbers(paths: Sequence[Path]) -> np.ndarray:
    """Paths as int32 numbers: how many texts and paths, then the lengths and tokens of the texts,
    then which two texts each path is of, and its weight's two halves.
    """
    texts = list(dict.fromkeys(text for path in paths for text in (path.prompt, path.answer)))
    number = {text: at for at, text in enumerate(texts)}
    parts = [
        [len(texts), len(paths)],
        [len(text) for text in texts],
        [token for text in texts for token in text],
        [number[text] for path in paths for text in (path.prompt, path.answer)],
        np.array([path.weight for path in paths], np.float64).view(np.int32),
    ]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _from_numbers(numbers: np.ndarray) -> list[Path]:
    """The way back from `_as_numbers`."""
    texts, paths = numbers[:2].tolist()
    lengths, rest = np.split(numbers[2:], [texts])
    tokens, members, weights = np.split(rest, [lengths.sum(), lengths.sum() + 2 * paths])
    ends = np.cumsum(lengths)
    found = [
        tuple(tokens[end - length : end].tolist())
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    return [
        Path(found[prompt], found[answer], weight)
        for (prompt, answer), weight in zip(
            members.reshape(-1, 2).tolist(), weights.copy().view(np.float64).tolist(), strict=True
        )
    ]


class ForestBatches:
    """The batches of a training run.

    An epoch goes through every observation once.  With `observations_per_step` at 0 the whole
    epoch is one step; otherwise the observations are shuffled by seed and epoch and dealt out
    without replacement, evenly over as few steps as hold at most so many each.  A path of
    whole-number weight counts as that many observations; one of fractional weight is drawn as
    one, with its weight.

    `slots` is the row length, `rows` the rows that are computed together, rounded up to a multiple
    of `parts`, which is how many devices share them: a step with more rows has several
    micro-batches.  Where steps differ, the number of micro-batches (or of rows, if one is enough)
    is rounded up to a power of two, so that few shapes are ever compiled.

    `fingerprint` is a hash of all that is learnt: token ids and weights.

    Raises:
        DataError: nothing is left to learn from at this row length; says why.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        slots: int,
        rows: int,
        epochs: int,
        observations_per_step: int = 0,
        seed: int = 0,
        parts: int = 1,
    ) -> None:
        whole = forests.build(paths, slots, seed=seed)
        self.report = whole.report
        if not whole.report.observations:
            reasons = whole.report.reasons() or "no examples"
            raise DataError(f"nothing to learn from at {slots} slots a row: {reasons}")
        self._paths = [
            path for path, place in zip(paths, whole.places, strict=True) if place is not None
        ]
        self._slots, self._seed, self._parts = slots, seed, parts
        self.rows = rows_together(rows, parts)
        self._per_step = observations_per_step
        self._whole = whole
        counts = [
            int(path.weight) if float(path.weight).is_integer() else 1 for path in self._paths
        ]
        self._owner = np.repeat(np.arange(len(counts)), counts)
        self.steps_per_epoch = (
            math.ceil(len(self._owner) / observations_per_step) if observations_per_step else 1
        )
        self.steps = epochs * self.steps_per_epoch
        content = sorted((path.prompt, path.answer, path.weight) for path in self._paths)
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()
        self._full_batch = lru_cache(maxsize=1)(lambda: self._layout(whole.forest))

    def __getitem__(self, step: int) -> tuple[Batch, Source]:
        """The batch of an optimiser step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if not self._per_step:
            return self._full_batch(), Source(epoch, within, self._whole.report)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._owner)
        drawn = np.array_split(order, self.steps_per_epoch)[within]
        members, counts = np.unique(drawn, return_counts=True)
        chosen = []
        for member, count in zip(members.tolist(), counts.tolist(), strict=True):
            path = self._paths[member]
            weight = count if float(path.weight).is_integer() else path.weight
            chosen.append(path._replace(weight=weight))
        built = forests.build(chosen, self._slots, seed=self._seed + step)
        return self._layout(built.forest), Source(epoch, within, built.report)

    def _layout(self, forest: Forest) -> Batch:
        """Rows padded and cut into micro-batches, with the places where tokens are read."""
        needed = len(forest.tokens)
        micro = math.ceil(needed / self.rows)
        rows = math.ceil(needed / micro)
        if self._per_step:
            micro = _power_of_two(micro)
            rows = self.rows if micro > 1 else min(self.rows, _power_of_two(rows))
        rows = rows_together(rows, self._parts)
        padded = forests.pad_rows(forest, micro * rows)
        reads = forests.reads(padded)

        def fold(array: np.ndarray) -> np.ndarray:
            return array.reshape(micro, rows, *array.shape[1:])

        return Batch(Forest(*map(fold, padded)), Reads(*map(fold, reads)))


def rows_together(rows: int, parts: int) -> int:
    """`rows`, rounded up so that `parts` devices share them evenly."""
    return math.ceil(rows / parts) * parts


def _power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
