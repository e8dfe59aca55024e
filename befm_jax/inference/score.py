"""Exact log-probabilities of answers: no sampling noise and no parsing.

The answers of one prompt are leaves of one token tree, so the prompt is computed once.  A *group*,
such as the answers of one prompt, is scored in one of two ways:

- packed (`each_packed`): consecutive groups share rows, and shared prefixes of their prompts are
  computed once.  The packing depends on the order of groups alone, and changes a result by float
  rounding at most.
- one by one (`each_group`): a group has its own rows, whose length depends on it alone, so that
  other groups do not change a bit of its result.  With several rows at a time, rounding does.
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
from befm_jax.inference import checks
from befm_jax.llama import linear
from befm_jax.llama.log_probs import TokenScores, token_scores
from befm_jax.llama.model import Llama, Params

# Tokens of context before the last one that is scored.  That last one is only predicted, but has a
# slot too: a row is longer by one step of the bucket lengths.
LONGEST_CONTEXT = 8192
LONGEST_ROW = LONGEST_CONTEXT + 64
# Slots per row of packed groups, unless one needs more.
ROW = 1024


class RowTooShortError(UserError):
    """A prompt and answer of more than `LONGEST_ROW` tokens."""


class Scores(NamedTuple):
    """A model's scores of a group of answers.

    `log_probs` [A] float64: log-probability of each complete answer given its prompt;
    `stem_log_probs` [A] float64: the same without the answer's last token (0 for one token);
    `greedy` [A]: whether greedy decoding would have written it.
    """

    log_probs: Float64[np.ndarray, " A"]
    stem_log_probs: Float64[np.ndarray, " A"]
    greedy: Bool[np.ndarray, " A"]


@dataclass(frozen=True)
class AnswerDistribution:
    """A model's exact distribution over an answer set.

    `log_probs` [A] float64: log-probability of each answer, its end-of-turn token included;
    `stem_log_probs` [A] float64: the same without the end-of-turn token.
    """

    log_probs: Float64[np.ndarray, " A"]
    stem_log_probs: Float64[np.ndarray, " A"]

    @property
    def outside(self) -> float:
        """Probability of any output that is not an answer of the set, token for token.

        The same characters in another tokenization count as outside too.
        """
        return max(0.0, 1.0 - float(np.exp(self.log_probs).sum()))

    @property
    def probabilities(self) -> Float64[np.ndarray, " A"]:
        """The distribution given that the answer is one of the set; sums to one."""
        shifted = np.exp(self.log_probs - self.log_probs.max())
        return shifted / shifted.sum()

    @property
    def ends_after_answer(self) -> float:
        """Probability that the turn ends after an answer of the set is written.

        Where one answer is a prefix of another (`1` and `10`), continuing is correct too, and this
        underestimates the model.  Where a token spans the end of the answer (`],`), the output is
        another text, and counts as outside.
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

    Answers must end with the end-of-turn token; then none is a prefix of another, their
    probabilities sum to at most one, and the rest is `outside`.  Questions are packed.

    Raises:
        RowTooShortError: a prompt with an answer is longer than `LONGEST_ROW` tokens.
        UserError: a token without an embedding, or results that are not finite.
    """
    groups = ([Encoded.of(prompt, ids) for ids in answer_ids] for prompt, answer_ids in questions)
    # Groups may be done out of order.
    done: dict[int, AnswerDistribution] = {}
    next_group = 0
    for number, scores in each_packed(model, params, groups):
        done[number] = AnswerDistribution(scores.log_probs, scores.stem_log_probs)
        while next_group in done:
            yield done.pop(next_group)
            next_group += 1


def log_probs(
    model: Llama, params: Params, answers: Sequence[Encoded]
) -> Float64[np.ndarray, " A"]:
    """`log p(learnt tokens | their context)` of every conversation, as one group.

    Raises:
        RowTooShortError: a conversation is longer than `LONGEST_ROW` tokens.
    """
    _, scores = next(each_group(model, params, [answers]))
    return scores.log_probs


def each_group(
    model: Llama, params: Params, groups: Iterable[Sequence[Encoded]], rows: int = 1
) -> Iterator[tuple[int, Scores]]:
    """Scores groups one by one; yields each group's index and scores when they are done.

    Up to `rows` rows of one length are a batch, per data-parallel device, but no more slots than
    the longest row has, so that memory does not depend on `rows`.  The last batch is padded with
    empty rows, so that it needs no further compilation; where it is the only one, it has no more
    rows than it needs.

    Raises:
        ValueError: `rows` is below 1.
        RowTooShortError: a conversation is longer than `LONGEST_ROW` tokens.
        UserError: a token without an embedding, or results that are not finite.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    laid_out = (_lay_out([(number, group)], LONGEST_ROW) for number, group in enumerate(groups))
    return _scored(model, params, laid_out, rows)


def each_packed(
    model: Llama, params: Params, groups: Iterable[Sequence[Encoded]]
) -> Iterator[tuple[int, Scores]]:
    """Scores groups packed; yields each group's index and scores when they are done.

    Raises:
        RowTooShortError: a conversation is longer than `LONGEST_ROW` tokens.
        UserError: a token without an embedding, or results that are not finite.
    """
    laid_out = (_lay_out(window, slots) for window, slots in _windows(groups))
    return _scored(model, params, laid_out, LONGEST_ROW // ROW)


def _windows(
    groups: Iterable[Sequence[Encoded]],
) -> Iterator[tuple[list[tuple[int, Sequence[Encoded]]], int]]:
    """Groups that are packed together, with their indices, and the length of their rows.

    A window has about `LONGEST_ROW` slots, not counting what a group shares with the one before.
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
        longest = max(longest, *(len(encoded.ids) for encoded in group))
        before = group[0].ids
    if window:
        yield window, _row(longest, slots)


def _own_slots(group: Sequence[Encoded], before: tuple[int, ...]) -> int:
    """An estimate of the slots that a group adds after a conversation whose prefix it may share."""
    first = group[0]
    shared = forests.shared(before, first.ids[: first.learnt[0][0]])
    answers = sum(len(encoded.ids) - encoded.learnt[0][0] for encoded in group)
    return first.learnt[0][0] - shared + answers


def _row(longest: int, slots: int) -> int:
    """The length of a window's rows: `ROW`, less where all fits, more where a group needs it."""
    return min(LONGEST_ROW, max(bucket(longest), min(ROW, bucket(slots))))


def _scored(
    model: Llama, params: Params, laid_out: Iterable[_LaidOut], rows: int
) -> Iterator[tuple[int, Scores]]:
    dispatched = None
    for batch in _batches(laid_out, rows, linear.parts(model.layout, "rows")):
        # The next batch is laid out and dispatched while this one is computed.
        before, dispatched = dispatched, _dispatch(model, params, batch)
        if before is not None:
            yield from _finish(params, before)
    if dispatched is not None:
        yield from _finish(params, dispatched)


def bucket(length: int) -> int:
    """The padded length for `length` slots: 64 times a power of two, or 1.5 times that."""
    size = 64
    while size < length:
        size = size * 3 // 2 if (size & (size - 1)) == 0 else size * 4 // 3
    return size


@dataclass
class _LaidOut:
    """Rows of some groups, with the results so far (`log_probs`, `missed` [B, M]).

    `places`: the places of each group's conversations, by the group's index.
    """

    forest: Forest
    reads: Reads
    places: dict[int, tuple[Place, ...]]
    log_probs: np.ndarray
    missed: np.ndarray
    pending_rows: int

    def scores(self) -> Iterator[tuple[int, Scores]]:
        """The sums over the reads of each group's conversations."""
        for number, places in self.places.items():
            by_token = [self.log_probs[at.row, at.reads].astype(np.float64) for at in places]
            yield (
                number,
                Scores(
                    np.array([tokens.sum() for tokens in by_token]),
                    np.array([tokens[:-1].sum() for tokens in by_token]),
                    ~np.array([self.missed[at.row, at.reads].any() for at in places]),
                ),
            )


class _Batch(NamedTuple):
    """Rows that are computed together, `rows` of them with padding."""

    members: list[tuple[_LaidOut, int]]
    rows: int


class _Dispatched(NamedTuple):
    """A batch with its asynchronous scores."""

    batch: _Batch
    scores: TokenScores


def _batches(laid_out: Iterable[_LaidOut], rows: int, shared: int) -> Iterator[_Batch]:
    """Batches of rows of one shape, each as soon as it is full.

    `shared`: over how many devices rows are sharded.
    """
    waiting: dict[tuple[int, int], list[tuple[_LaidOut, int]]] = {}
    full: set[tuple[int, int]] = set()
    for groups in laid_out:
        shape = (groups.forest.tokens.shape[1], groups.reads.token.shape[1])
        size = _batch_rows(shape[0], rows, shared)
        for row in range(len(groups.forest.tokens)):
            members = waiting.setdefault(shape, [])
            members.append((groups, row))
            if len(members) == size:
                full.add(shape)
                yield _Batch(waiting.pop(shape), size)
    for shape, members in waiting.items():
        # Padded to the rows of the program that is there; where there is none, as few as it needs.
        needed = -(-len(members) // shared) * shared
        yield _Batch(members, _batch_rows(shape[0], rows, shared) if shape in full else needed)


def _lay_out(groups: Sequence[tuple[int, Sequence[Encoded]]], slots: int) -> _LaidOut:
    """Groups with their indices, packed into rows of at most `slots` slots."""
    built = forests.build([encoded for _, group in groups for encoded in group], slots)
    if built.report.left_out:
        reasons = built.report.reasons()
        raise RowTooShortError(f"answers can't be scored: {reasons} ({LONGEST_ROW} tokens)")
    # Every slot is an ancestor of one that is read: after the last of these is only padding.
    length = min(bucket(int(built.reads.slots.max()) + 1), slots)
    forest = Forest(*(array[:, :length] for array in built.forest))
    width = bucket(int((built.reads.column >= 0).sum(axis=1).max()))
    reads = built.reads
    places = iter([place for place in built.places if place is not None])
    shape = (len(forest.tokens), width)
    return _LaidOut(
        forest,
        Reads(
            reads.slots[:, :length],
            _of_width(reads.column, width, -1),
            *(_of_width(array, width, 0) for array in reads[2:]),
        ),
        {number: tuple(itertools.islice(places, len(group))) for number, group in groups},
        np.zeros(shape, np.float32),
        np.zeros(shape, bool),
        shape[0],
    )


def _of_width(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    """An array of reads, truncated or padded to `width` per row."""
    if array.shape[1] >= width:
        return array[:, :width]
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _batch_rows(length: int, rows: int, shared: int) -> int:
    """The number of rows of this length in a batch over `shared` devices."""
    return max(1, min(rows, LONGEST_ROW // length)) * shared


def _dispatch(model: Llama, params: Params, batch: _Batch) -> _Dispatched:
    """Dispatches a batch's computation without waiting for it."""

    def stacked(name: str) -> tuple[np.ndarray, ...]:
        rows = [[array[row] for array in getattr(groups, name)] for groups, row in batch.members]
        return tuple(map(np.stack, zip(*rows, strict=True)))

    forest, reads = forests.pad(Forest(*stacked("forest")), Reads(*stacked("reads")), batch.rows)
    for ids in (forest.tokens, reads.token):
        checks.check_ids(ids, model.config.vocab_size)
    return _Dispatched(batch, _token_scores(model)(params, forest, reads))


def _finish(params: Params, dispatched: _Dispatched) -> Iterator[tuple[int, Scores]]:
    """Waits for a batch; yields the groups that it completes."""
    log_probs = np.asarray(dispatched.scores.log_probs)
    if not np.isfinite(log_probs).all():
        raise checks.non_finite(params)
    greedy = np.asarray(dispatched.scores.greedy)
    for at, (groups, row) in enumerate(dispatched.batch.members):
        groups.log_probs[row] = log_probs[at]
        groups.missed[row] = ~greedy[at]
        groups.pending_rows -= 1
        if not groups.pending_rows:
            yield from groups.scores()


@lru_cache(maxsize=8)
def _token_scores(model: Llama) -> Callable[[Params, Forest, Reads], TokenScores]:
    # Scores are replicated, so that every process has all of them.
    return jax.jit(
        lambda params, forest, reads: token_scores(model, params, forest, reads),
        out_shardings=linear.sharding(model.layout),
        compiler_options=linear.compiler_options(model.layout),
    )
