"""Exact log-probabilities of answers: no sampling noise and no parsing.

The answers of one prompt are the leaves of one token tree, so the prompt is computed once.  Every
prompt has rows to itself, whose length depends on it alone.  Computed one at a time, as they are
by default, what else is scored in the same call can't move a bit of its result; several at a time
(`rows`), it moves by float rounding.  Devices that share rows have as many each: one at a time is
one on each of them, and no bit moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float64

from befm_jax.data import forest as forests
from befm_jax.data.forest import Forest, Path, Reads
from befm_jax.errors import UserError
from befm_jax.llama import linear
from befm_jax.llama.log_probs import TokenScores, token_scores
from befm_jax.llama.model import Llama, Params

# Tokens that a model reads before the last one that it is asked for.  That last one is only
# predicted, but has a slot too: a row is longer by the step that lengths are rounded up to.
LONGEST_CONTEXT = 8192
LONGEST_ROW = LONGEST_CONTEXT + 64


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
    probabilities add up to at most one, and the rest is `outside`.

    Raises:
        RowTooShortError: a prompt with an answer is longer than `LONGEST_ROW` tokens.
    """
    groups = (
        [Path(tuple(prompt), tuple(ids)) for ids in answer_ids] for prompt, answer_ids in questions
    )
    # Where several devices have a row each, one prompt may be done before another.
    done: dict[int, AnswerDistribution] = {}
    next_one = 0
    for number, scores in each_group(model, params, groups):
        done[number] = AnswerDistribution(scores.log_probs, scores.stem_log_probs)
        while next_one in done:
            yield done.pop(next_one)
            next_one += 1


def log_probs(model: Llama, params: Params, paths: Sequence[Path]) -> Float64[np.ndarray, " A"]:
    """`log p(answer | prompt)` of every path; paths that begin alike share the computation.

    Raises:
        RowTooShortError: a path is longer than `LONGEST_ROW` tokens.
    """
    _, scores = next(each_group(model, params, [paths]))
    return scores.log_probs


def each_group(
    model: Llama, params: Params, groups: Iterable[Sequence[Path]], rows: int = 1
) -> Iterator[tuple[int, Scores]]:
    """Scores groups of paths; yields each group's number and scores when they are done.

    A group, such as the answers of one prompt, has rows to itself, in which paths that begin
    alike share the computation.  Up to `rows` rows of one length are computed together, on every
    device that shares rows, but no more slots than the longest row has, so that memory does not
    depend on `rows`.  Rows of padding fill up what is left over at the end, so that nothing is
    compiled for that.

    Raises:
        ValueError: `rows` is below 1.
        RowTooShortError: a path is longer than `LONGEST_ROW` tokens.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    begun = None
    for batch in _batches(groups, rows, linear.parts(model.layout, "rows")):
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
class _Group:
    """A group's rows, what has been found of them (`log_probs`, `missed` [B, N]), what has not."""

    number: int
    forest: Forest
    places: tuple[tuple[int, int], ...]
    log_probs: np.ndarray
    missed: np.ndarray
    rows_to_come: int

    def scores(self) -> Scores:
        """The sums along the group's paths."""
        last = tuple(np.transpose(self.places))
        before = (last[0], self.forest.parent[last])
        log_probs = forests.path_sums(self.forest, self.log_probs)
        missed = forests.path_sums(self.forest, self.missed)
        return Scores(log_probs[last], log_probs[before], missed[last] == 0)


class _Batch(NamedTuple):
    """Rows of groups that are computed together, `rows` of them with those of padding."""

    members: list[tuple[_Group, int]]
    rows: int


class _Begun(NamedTuple):
    """A batch whose scores the device is at work on."""

    batch: _Batch
    found: TokenScores


def _batches(groups: Iterable[Sequence[Path]], rows: int, shared: int) -> Iterator[_Batch]:
    """The groups' rows, those of one length together, as soon as there are enough of them.

    `shared`: how many devices share them.
    """
    waiting: dict[int, list[tuple[_Group, int]]] = {}
    for number, paths in enumerate(groups):
        group = _lay_out(number, paths)
        length = group.forest.tokens.shape[1]
        together = _together(length, rows, shared)
        for row in range(len(group.forest.tokens)):
            members = waiting.setdefault(length, [])
            members.append((group, row))
            if len(members) == together:
                yield _Batch(waiting.pop(length), together)
    for length, members in waiting.items():
        yield _Batch(members, _together(length, rows, shared))


def _lay_out(number: int, paths: Sequence[Path]) -> _Group:
    built = forests.build(paths, LONGEST_ROW)
    if built.report.left_out:
        reasons = built.report.reasons()
        raise RowTooShortError(f"answers that can't be scored: {reasons} ({LONGEST_ROW} tokens)")
    # Trees end in answers, so behind the last weighted slot there is only padding to cut off.
    used = int(np.nonzero(built.forest.weight)[1].max()) + 1
    length = min(bucket(used), LONGEST_ROW)
    forest = Forest(*(array[:, :length] for array in built.forest))
    shape = forest.tokens.shape
    places = tuple(place for place in built.places if place is not None)
    return _Group(
        number, forest, places, np.zeros(shape, np.float32), np.zeros(shape, bool), shape[0]
    )


def _together(length: int, rows: int, shared: int) -> int:
    """How many rows of a length are computed together, `shared` evenly by so many devices."""
    return max(1, min(rows, LONGEST_ROW // length)) * shared


def _begin(model: Llama, params: Params, batch: _Batch) -> _Begun:
    """Has the device compute a batch; waits for nothing."""
    rows = [[array[row] for array in group.forest] for group, row in batch.members]
    forest = forests.pad_rows(Forest(*map(np.stack, zip(*rows, strict=True))), batch.rows)
    return _Begun(batch, _edge_scores(model)(params, forest, forests.reads(forest)))


def _finish(begun: _Begun) -> Iterator[tuple[int, Scores]]:
    """Waits for a batch; yields the groups that are complete with it."""
    log_probs, greedy = np.asarray(begun.found.log_probs), np.asarray(begun.found.greedy)
    for at, (group, row) in enumerate(begun.batch.members):
        group.log_probs[row] = log_probs[at]
        group.missed[row] = ~greedy[at]
        group.rows_to_come -= 1
        if not group.rows_to_come:
            yield group.number, group.scores()


@lru_cache(maxsize=8)
def _edge_scores(model: Llama) -> Callable[[Params, Forest, Reads], TokenScores]:
    # Every process gets all scores.
    return jax.jit(
        lambda params, forest, reads: token_scores(model, params, forest, reads),
        out_shardings=linear.sharding(model.layout),
        compiler_options=linear.compiler_options(model.layout),
    )
