"""Exact log-probabilities of answers: no sampling noise and no parsing.

The answers of one prompt are leaves of one token tree, so the prompt is computed once.  A *group*,
such as the answers of one prompt, is scored in one of two ways:

- packed (`each_packed`): groups that follow one another share rows, and what their prompts share
  is computed once.  Which of them are together follows from their order alone, and moves a result
  by float rounding at most.
- one by one (`each_group`): a group has rows to itself, whose length depends on it alone, so that
  what else is scored can't move a bit of its result.  Several rows at a time it moves by rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float64

from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded, Forest, Place, Reads
from befm_jax.errors import UserError
from befm_jax.llama import linear
from befm_jax.llama.log_probs import TokenScores, token_scores
from befm_jax.llama.model import Llama, Params

# Tokens that a model reads before the last one that it is asked for.  That last one is only
# predicted, but has a slot too: a row is longer by the step that lengths are rounded up to.
LONGEST_CONTEXT = 8192
LONGEST_ROW = LONGEST_CONTEXT + 64
# Slots of a row of packed groups, where none needs more.
ROW = 1024


class RowTooShortError(UserError):
    """A prompt and answer that do not fit in the longest row that is scored."""


class Scores(NamedTuple):
    """What a model makes of a group of answers.

    `log_probs` [A] float64: log-probability of each whole answer given its prompt;
    `stem_log_probs` [A] float64: the same without the answer's last token (0 where that is all);
    `greedy` [A]: whether greedy decoding would have written it.
    """

    log_probs: Float64[np.ndarray, " A"]
    stem_log_probs: Float64[np.ndarray, " A"]
    greedy: Bool[np.ndarray, " A"]


@dataclass(frozen=True)
class AnswerDistribution:
    """A model's exact distribution over an answer set.

    `log_probs` [A] float64: log-probability of each whole answer, its end of turn included;
    `stem_log_probs` [A] float64: the same without the last token, the end of the turn.
    """

    log_probs: Float64[np.ndarray, " A"]
    stem_log_probs: Float64[np.ndarray, " A"]

    @property
    def outside(self) -> float:
        """Probability of anything that is not an answer of the set, written as the set writes it.

        The same characters cut into other tokens count as outside too.
        """
        return max(0.0, 1.0 - float(np.exp(self.log_probs).sum()))

    @property
    def probabilities(self) -> Float64[np.ndarray, " A"]:
        """The distribution given that the answer is one of the set; sums to one."""
        shifted = np.exp(self.log_probs - self.log_probs.max())
        return shifted / shifted.sum()

    @property
    def ends_after_answer(self) -> float:
        """Probability that the turn ends right there, once an answer of the set is written.

        Where one answer begins another (`1` and `10`), going on is right too, and this is lower
        than a model deserves.  Where a token spans the end of the answer (`],`), another text was
        written, and counts as outside.
        """
        highest = self.stem_log_probs.max()
        ended = np.exp(self.log_probs - highest).sum() / np.exp(self.stem_log_probs - highest).sum()
        return min(1.0, float(ended))


def each_answers(
    model: Llama,
    params: Params,
    questions: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
) -> Iterator[AnswerDistribution]:
    """The model's distribution over the answers of each `(prompt ids, answers' ids)`, in order.

    Answers must end with the end-of-turn token; then none is the beginning of another, their
    probabilities add up to at most one, and the rest is `outside`.  Questions are packed.

    Raises:
        RowTooShortError: a prompt with an answer is longer than `LONGEST_ROW` tokens.
    """
    groups = ([Encoded.of(prompt, ids) for ids in answer_ids] for prompt, answer_ids in questions)
    # One window's rows may be done before another's.
    done: dict[int, AnswerDistribution] = {}
    next_one = 0
    for number, scores in each_packed(model, params, groups):
        done[number] = AnswerDistribution(scores.log_probs, scores.stem_log_probs)
        while next_one in done:
            yield done.pop(next_one)
            next_one += 1


def log_probs(
    model: Llama, params: Params, answers: Sequence[Encoded]
) -> Float64[np.ndarray, " A"]:
    """`log p(what is learnt | what is before it)` of every conversation, as one group.

    Raises:
        RowTooShortError: one is longer than `LONGEST_ROW` tokens.
    """
    _, scores = next(each_group(model, params, [answers]))
    return scores.log_probs


def each_group(
    model: Llama, params: Params, groups: Iterable[Sequence[Encoded]], rows: int = 1
) -> Iterator[tuple[int, Scores]]:
    """Scores groups one by one; yields each one's number and scores when they are done.

    Up to `rows` rows of one length are computed together, on every device that shares rows, but no
    more slots than the longest row has, so that memory does not depend on `rows`.  Rows of padding
    fill up what is left over at the end, so that nothing is compiled for that.

    Raises:
        ValueError: `rows` is below 1.
        RowTooShortError: a conversation is longer than `LONGEST_ROW` tokens.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    laid_out = (_lay_out([(number, group)], LONGEST_ROW) for number, group in enumerate(groups))
    return _scored(model, params, laid_out, rows)


def each_packed(
    model: Llama, params: Params, groups: Iterable[Sequence[Encoded]]
) -> Iterator[tuple[int, Scores]]:
    """Scores groups packed; yields each one's number and scores when they are done.

    Raises:
        RowTooShortError: a conversation is longer than `LONGEST_ROW` tokens.
    """
    laid_out = (_lay_out(window, slots) for window, slots in _windows(groups))
    return _scored(model, params, laid_out, LONGEST_ROW // ROW)


def _windows(
    groups: Iterable[Sequence[Encoded]],
) -> Iterator[tuple[list[tuple[int, Sequence[Encoded]]], int]]:
    """Groups that are packed together, with their numbers; and the length of their rows.

    As many as take some `LONGEST_ROW` slots, by what each shares with the one before.
    """
    window: list[tuple[int, Sequence[Encoded]]] = []
    longest = slots = 0
    before: tuple[int, ...] = ()
    for number, group in enumerate(groups):
        own = _own_slots(group, before)
        if window and slots + own > LONGEST_ROW:
            yield window, _row(longest, slots)
            window, longest, slots = [], 0, 0
            own = _own_slots(group, ())
        window.append((number, group))
        slots += own
        longest = max(longest, *(len(one.ids) for one in group))
        before = group[0].ids
    if window:
        yield window, _row(longest, slots)


def _own_slots(group: Sequence[Encoded], before: tuple[int, ...]) -> int:
    """About how many slots a group adds behind a conversation whose beginning it may share."""
    first = group[0]
    shared = forests.shared(before, first.ids[: first.learnt[0][0]])
    answers = sum(len(one.ids) - one.learnt[0][0] for one in group)
    return first.learnt[0][0] - shared + answers


def _row(longest: int, slots: int) -> int:
    """The length of a window's rows: `ROW`, fewer where all fits, more where one needs it."""
    return min(LONGEST_ROW, max(bucket(longest), min(ROW, bucket(slots))))


def _scored(
    model: Llama, params: Params, laid_out: Iterable[_LaidOut], rows: int
) -> Iterator[tuple[int, Scores]]:
    begun = None
    for batch in _batches(laid_out, rows, linear.parts(model.layout, "rows")):
        # What comes next is laid out and begun while this is computed.
        before, begun = begun, _begin(model, params, batch)
        if before is not None:
            yield from _finish(before)
    if begun is not None:
        yield from _finish(begun)


def bucket(length: int) -> int:
    """The length that so many slots are padded to: 64 times a power of two, or 1.5 times that."""
    size = 64
    while size < length:
        size = size * 3 // 2 if (size & (size - 1)) == 0 else size * 4 // 3
    return size


@dataclass
class _LaidOut:
    """Rows of some groups, what has been found of them (`log_probs`, `missed` [B, M]), what not.

    `places`: for each group by its number, where its conversations are.
    """

    forest: Forest
    reads: Reads
    places: dict[int, tuple[Place, ...]]
    log_probs: np.ndarray
    missed: np.ndarray
    rows_to_come: int

    def scores(self) -> Iterator[tuple[int, Scores]]:
        """The sums over the reads of each group's conversations."""
        for number, places in self.places.items():
            found = [self.log_probs[at.row, at.reads].astype(np.float64) for at in places]
            yield (
                number,
                Scores(
                    np.array([one.sum() for one in found]),
                    np.array([one[:-1].sum() for one in found]),
                    ~np.array([self.missed[at.row, at.reads].any() for at in places]),
                ),
            )


class _Batch(NamedTuple):
    """Rows that are computed together, `rows` of them with those of padding."""

    members: list[tuple[_LaidOut, int]]
    rows: int


class _Begun(NamedTuple):
    """A batch whose scores the device is at work on."""

    batch: _Batch
    found: TokenScores


def _batches(laid_out: Iterable[_LaidOut], rows: int, shared: int) -> Iterator[_Batch]:
    """The rows, those of one shape together, as soon as there are enough of them.

    `shared`: how many devices share them.
    """
    waiting: dict[tuple[int, int], list[tuple[_LaidOut, int]]] = {}
    for one in laid_out:
        shape = (one.forest.tokens.shape[1], one.reads.token.shape[1])
        together = _together(shape[0], rows, shared)
        for row in range(len(one.forest.tokens)):
            members = waiting.setdefault(shape, [])
            members.append((one, row))
            if len(members) == together:
                yield _Batch(waiting.pop(shape), together)
    for (length, _), members in waiting.items():
        yield _Batch(members, _together(length, rows, shared))


def _lay_out(groups: Sequence[tuple[int, Sequence[Encoded]]], slots: int) -> _LaidOut:
    """Numbered groups in rows of at most `slots` slots."""
    built = forests.build([one for _, group in groups for one in group], slots)
    if built.report.left_out:
        reasons = built.report.reasons()
        raise RowTooShortError(f"answers that can't be scored: {reasons} ({LONGEST_ROW} tokens)")
    # Every slot leads to one that is read: behind the last of them there is only padding.
    length = min(bucket(int(built.reads.slots.max()) + 1), slots)
    forest = Forest(*(array[:, :length] for array in built.forest))
    most = bucket(int((built.reads.column >= 0).sum(axis=1).max()))
    reads = built.reads
    places = iter([place for place in built.places if place is not None])
    shape = (len(forest.tokens), most)
    return _LaidOut(
        forest,
        Reads(
            reads.slots[:, :length],
            _of_width(reads.column, most, -1),
            *(_of_width(array, most, 0) for array in reads[2:]),
        ),
        {number: tuple(itertools.islice(places, len(group))) for number, group in groups},
        np.zeros(shape, np.float32),
        np.zeros(shape, bool),
        shape[0],
    )


def _of_width(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    """An array of reads with padding cut off or added, to so many a row."""
    if array.shape[1] >= width:
        return array[:, :width]
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _together(length: int, rows: int, shared: int) -> int:
    """How many rows of a length are computed together, `shared` evenly by so many devices."""
    return max(1, min(rows, LONGEST_ROW // length)) * shared


def _begin(model: Llama, params: Params, batch: _Batch) -> _Begun:
    """Has the device compute a batch; waits for nothing."""

    def stacked(name: str) -> tuple[np.ndarray, ...]:
        rows = [[array[row] for array in getattr(one, name)] for one, row in batch.members]
        return tuple(map(np.stack, zip(*rows, strict=True)))

    forest, reads = forests.pad(Forest(*stacked("forest")), Reads(*stacked("reads")), batch.rows)
    return _Begun(batch, _token_scores(model)(params, forest, reads))


def _finish(begun: _Begun) -> Iterator[tuple[int, Scores]]:
    """Waits for a batch; yields the groups that are complete with it."""
    log_probs, greedy = np.asarray(begun.found.log_probs), np.asarray(begun.found.greedy)
    for at, (one, row) in enumerate(begun.batch.members):
        one.log_probs[row] = log_probs[at]
        one.missed[row] = ~greedy[at]
        one.rows_to_come -= 1
        if not one.rows_to_come:
            yield from one.scores()


@lru_cache(maxsize=8)
def _token_scores(model: Llama) -> Callable[[Params, Forest, Reads], TokenScores]:
    # Every process gets all scores.
    return jax.jit(
        lambda params, forest, reads: token_scores(model, params, forest, reads),
        out_shardings=linear.sharding(model.layout),
        compiler_options=linear.compiler_options(model.layout),
    )
