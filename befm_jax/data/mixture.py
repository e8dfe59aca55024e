"""The batches of a run: rows of several families of data, dealt out by seed and step.

A family's rows are persons, papers or single observations.  Whole rows are dealt to a step, so that
what a row's examples share is computed once.  Which rows a step has follows from the seed and its
number alone: nothing else has to be kept to go on where a run stopped, and only a step's own rows
are ever read and encoded.  Of several processes each encodes the rows of its own devices.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from befm_jax.data.forest import Encoded, LeftOut, Report
from befm_jax.data.items import Example
from befm_jax.data.pipeline import Batch, Conversation, Encoder, Ids, encode, lay_out
from befm_jax.errors import DataError, unknown

# The cache of encoded conversations holds up to this many token ids: all of the games fit.
_CACHED_IDS = 1 << 20

# The step is compiled for every length of rows.  A sample of the run's steps is laid out first:
# about `_SAMPLED_ROWS` rows of data, in 4 to 16 steps.  The range of lengths that they need is
# divided into `_LENGTHS` equal ratios, each within `_GROWTH`.
_SAMPLED_ROWS, _SAMPLED_STEPS, _LENGTHS = 2048, (4, 16), 3
_GROWTH = (0.03, 0.3)

# Takes a value that JSON keeps, and returns every process's.
AllGather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Family:
    """One kind of data in a mixture.

    Attributes:
        name: what messages call it.
        rows: one a person, paper or observation; random access is all that is asked.
        examples: the examples of one row; what is drawn comes from the generator alone.
        fingerprint: tells other rows apart, for runs that go on.
        weight: its share of the loss beside the other families'; None: every learnt token counts
            alike.  All families have one, or none has.
        visits: how often a row comes in one epoch of the run.
        every_step: whether all rows come in every step, beside the `rows_per_step` of the others:
            counts of whole populations, which cost little.
    """

    name: str
    rows: Sequence[Any]
    examples: Callable[[Any, np.random.Generator], Iterable[Example]]
    fingerprint: str
    weight: float | None = None
    visits: float = 1.0
    every_step: bool = False


def one_by_one(family: Family) -> Family:
    """The same family dealt by observations: every one of an example's weight is a row of its own.

    An example of whole weight `n` is `n` rows; one of a fractional weight is one row, with it.
    All examples are held in memory, and examples of one row no longer share their beginning.
    """
    examples = [
        example
        for number, row in enumerate(family.rows)
        for example in family.examples(row, np.random.default_rng((0, number)))
    ]
    whole = [float(example.weight).is_integer() for example in examples]
    counts = [
        int(one.weight) if all_of_it else 1 for one, all_of_it in zip(examples, whole, strict=True)
    ]
    owner = np.repeat(np.arange(len(examples)), counts)

    def observation(number: int, rng: np.random.Generator) -> Iterator[Example]:
        example = examples[number]
        yield replace(example, weight=1.0) if whole[number] else example

    return replace(family, rows=cast(Sequence[Any], owner), examples=observation)


@dataclass(frozen=True)
class Source:
    """What a batch was made of, over all processes, for reports and error messages.

    `pairs`: of a slot and one that it sees; `slots_read`: slots at which a token is read;
    `projected`: at how many slots the vocabulary is projected.
    """

    step: int
    epoch: float
    rows: int
    report: Report
    pairs: int
    slots_read: int
    projected: int

    def __str__(self) -> str:
        return f"epoch {self.epoch:.2f}, {self.rows:,} rows"


class Mixture:
    """The batches of a training run, by step.

    A run goes `epochs` times through every family's rows (times its `visits`), shuffled anew each
    time, in as few steps as have at most `rows_per_step` rows, dealt evenly.  With `rows_per_step`
    at 0 an epoch is one step.

    `slots` is the longest row of a forest; `parts` over how many devices a batch's rows are laid
    out.  Of several processes one encodes the rows that are `shard_index` modulo `shard_count`, and
    `parts` counts its own devices; `all_gather` is called by all of them for the same steps in the
    same order, so that their batches have one shape.

    Each family's weights are scaled in every step so that its share of the loss is its `weight`,
    whatever the length of its answers.

    Raises:
        DataError: no rows, or weights that can't be.
    """

    def __init__(
        self,
        families: Sequence[Family],
        encoder: Encoder,
        *,
        slots: int,
        epochs: int,
        rows_per_step: int = 0,
        seed: int = 0,
        parts: int = 1,
        shard_index: int = 0,
        shard_count: int = 1,
        all_gather: AllGather = lambda value: [value],
    ) -> None:
        self.families = [family for family in families if len(family.rows)]
        if not self.families:
            raise DataError("nothing to learn from: no rows in any family of data")
        _check_weights(self.families)
        self._slots, self._parts, self._seed, self._epochs = slots, parts, seed, epochs
        self._shard_index, self._shard_count = shard_index, shard_count
        self._all_gather = all_gather
        # Rows of each family that come in the whole run.
        self._visits = [
            max(1, round(epochs * family.visits * len(family.rows))) for family in self.families
        ]
        dealt = sum(
            visits
            for family, visits in zip(self.families, self._visits, strict=True)
            if not family.every_step
        )
        several = rows_per_step > 0 and dealt > 0
        self.steps_per_epoch = math.ceil(dealt / epochs / rows_per_step) if several else 1
        self.steps = epochs * self.steps_per_epoch
        self._encoder = encoder
        self._cache: dict[Conversation, Ids] = {}
        self._cached_ids = 0
        self._draws = functools.lru_cache(maxsize=2 * len(self.families))(self._start_of_draws)
        self._shuffled = functools.lru_cache(maxsize=2 * len(self.families))(self._permutation)
        self._last: tuple[tuple[Any, ...], tuple[Batch, Report]] | None = None

    @property
    def rows(self) -> int:
        """How many rows there are, of all families."""
        return sum(len(family.rows) for family in self.families)

    @property
    def fingerprint(self) -> str:
        """A hash of what is learnt and how it is dealt."""
        parts = [
            (one.name, one.fingerprint, len(one.rows), one.weight, one.visits, one.every_step)
            for one in self.families
        ]
        return hashlib.sha256(repr((parts, self.steps_per_epoch)).encode()).hexdigest()

    def dealt(self, step: int) -> list[list[int]]:
        """The numbers of each family's rows in a step."""
        return [
            [row for _, row in self._laps(number, step)] for number in range(len(self.families))
        ]

    def _laps(self, family: int, step: int) -> Iterator[tuple[int, int]]:
        """A family's rows in a step, each with how often the family was gone through before."""
        size, visits = len(self.families[family].rows), self._visits[family]
        if self.families[family].every_step:
            yield from ((step, row) for row in range(size))
            return
        first, last = (visits * at // self.steps for at in (step, step + 1))
        for visit in range(first, last):
            lap, place = divmod(visit, size)
            yield lap, int(self._shuffled(family, lap)[place])

    def __getitem__(self, step: int) -> tuple[Batch, Source]:
        """The batch of an optimiser step, counted from 0 over all epochs.

        Raises:
            DataError: nothing of the step's rows can be learnt from at this row length; says why.
        """
        conversations, rows = self._encoded(step)
        batch, report = self._laid_out(self._scaled(conversations), step)
        micro_batches, _, slots = batch.forest.tokens.shape
        of_all = self._from_shards(
            (
                (micro_batches, slots, batch.reads.token.shape[2]),
                (batch.pairs(report.slots_used), batch.slots_read(), batch.projected()),
                (report.observations, report.tokens_apart, report.slots_used),
                dict(report.left_out),
            )
        )
        shapes, counts, totals, left_out = zip(*of_all, strict=True)
        batch = batch.padded(*np.max(shapes, axis=0).tolist())
        report = functools.reduce(
            operator.add,
            (
                Report(placed, apart, used, batch.forest.tokens.size, _left_out(reasons))
                for (placed, apart, used), reasons in zip(totals, left_out, strict=True)
            ),
        )
        if not report.observations:
            reasons = report.reasons() or "no examples"
            raise DataError(f"nothing to learn from at {self._slots} slots a row: {reasons}")
        epoch = (step + 1) * self._epochs / self.steps
        return batch, Source(step, epoch, rows, report, *np.sum(counts, axis=0).tolist())

    def _encoded(self, step: int) -> tuple[list[list[Encoded]], int]:
        """This shard's conversations of a step, by family; how many rows all shards have."""
        examples: list[Example] = []
        family_ends: list[int] = []
        rows = 0
        bits = np.random.PCG64()
        rng = np.random.Generator(bits)
        for number, family in enumerate(self.families):
            for lap, row in self._laps(number, step):
                if rows % self._shard_count == self._shard_index:
                    # Draws are a row's own in its lap, whatever else is in the step.
                    bits.state = self._draws(number, lap)
                    bits.advance(row << 64)
                    examples += family.examples(family.rows[row], rng)
                rows += 1
            family_ends.append(len(examples))
        encoded = encode(examples, self)
        bounds = itertools.pairwise([0, *family_ends])
        return [encoded[start:stop] for start, stop in bounds], rows

    @functools.cached_property
    def _growth(self) -> float:
        """Of the ladder of lengths of rows: the more the steps of the run differ, the coarser."""
        if self.steps_per_epoch == 1:
            return _GROWTH[0]
        needed = []
        sampled = _SAMPLED_ROWS * self.steps // sum(self._visits)
        sampled = int(np.clip(sampled, *_SAMPLED_STEPS))
        for step in np.unique(np.linspace(0, self.steps - 1, sampled).round()).astype(int):
            made = [one for family in self._encoded(int(step))[0] for one in family]
            batch, _ = lay_out(
                made, slots=self._slots, parts=self._parts, seed=self._seed, growth=0.0
            )
            needed.append(batch.forest.tokens.size)
        shards = self._from_shards(needed)
        spread = np.max(shards) / np.min(shards)
        return float(np.clip(spread ** (1 / _LENGTHS) - 1, *_GROWTH))

    def _laid_out(self, scaled: Sequence[Encoded], step: int) -> tuple[Batch, Report]:
        # Where every row is in every step and nothing is drawn, batches are one and the same.
        key = tuple(sorted(scaled)) if self.steps_per_epoch == 1 else None
        if key is not None and self._last is not None and self._last[0] == key:
            return self._last[1]
        seed = self._seed + (step if key is None else 0)
        laid_out = lay_out(
            scaled, slots=self._slots, parts=self._parts, seed=seed, growth=self._growth
        )
        self._last = None if key is None else (key, laid_out)
        return laid_out

    def _from_shards(self, value: Any) -> list[Any]:
        """Every shard's value, in order; several processes may hold the same shard."""
        gathered = dict(self._all_gather((self._shard_index, value)))
        return [gathered[index] for index in range(self._shard_count)]

    def encode_batch(self, conversations: Iterable[Conversation]) -> list[Ids]:
        """The encoder's, with a cache for conversations that come in every epoch."""
        wanted = list(conversations)
        new = [one for one in dict.fromkeys(wanted) if one not in self._cache]
        ids = dict(zip(new, self._encoder.encode_batch(new), strict=True))
        found = [ids[one] if one in ids else self._cache[one] for one in wanted]
        more = sum(len(one) for one, _ in ids.values())
        if self._cached_ids + more <= _CACHED_IDS:
            self._cache |= ids
            self._cached_ids += more
        return found

    def ahead(self, start: int, stop: int) -> Iterator[tuple[Batch, Source]]:
        """The batches from one step to another; each is made while the one before is in use."""
        with ThreadPoolExecutor(1, "data") as pool:
            coming = pool.submit(self.__getitem__, start) if start < stop else None
            for step in range(start, stop):
                assert coming is not None
                batch = coming.result()
                coming = pool.submit(self.__getitem__, step + 1) if step + 1 < stop else None
                yield batch

    def _permutation(self, family: int, lap: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, family, lap))
        return rng.permutation(len(self.families[family].rows))

    def _start_of_draws(self, family: int, lap: int) -> Any:
        """The state of the bit generator before the draws of row 0."""
        return np.random.PCG64((self._seed, family, lap)).state

    def _scaled(self, conversations: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """All families' conversations, scaled so that each has its share of the loss.

        The loss is a mean over all learnt tokens, of which a family has `own` of `total`.  A
        family that is not in every step has as much more where it is.
        """
        own = [sum(one.reads * one.observations for one in made) for made in conversations]
        if self.families[0].weight is None:
            return [one for made in conversations for one in made]
        own = np.sum(self._from_shards(own), axis=0).tolist()
        total, scaled = sum(own), []
        for family, visits, made, tokens in zip(
            self.families, self._visits, conversations, own, strict=True
        ):
            scale = 1.0
            if family.weight is not None and tokens:
                share = family.weight / sum(one.weight or 0.0 for one in self.families)
                presence = 1.0 if family.every_step else min(1.0, visits / self.steps)
                scale = share / presence * total / tokens
            scaled += [one._replace(scale=one.scale * scale) for one in made]
        return scaled


def weighted(families: Iterable[Family], shares: Mapping[str, float]) -> list[Family]:
    """Families with their shares of the loss, by name; as they are where no shares are given.

    Raises:
        DataError: a share of a family that is not there, or a family without one.
    """
    listed = list(families)
    known = [family.name for family in listed]
    for name in shares:
        if name not in known:
            raise DataError(f"data.weights: {unknown('family', name, known)}")
    return [replace(family, weight=shares.get(family.name)) for family in listed]


def _left_out(reasons: Mapping[str, Sequence[Any]]) -> dict[str, LeftOut]:
    return {reason: LeftOut(*counts) for reason, counts in reasons.items()}


def _check_weights(families: Sequence[Family]) -> None:
    given = [family for family in families if family.weight is not None]
    if given and len(given) < len(families):
        missing = next(family.name for family in families if family.weight is None)
        raise DataError(f"{missing}: weight is missing; all families have one, or none has")
    for family in families:
        if family.weight is not None and not (math.isfinite(family.weight) and family.weight > 0):
            raise DataError(f"{family.name}: weight is {family.weight!r}; it must be above 0")
        if not (math.isfinite(family.visits) and family.visits > 0):
            raise DataError(f"{family.name}: visits is {family.visits!r}; it must be above 0")
