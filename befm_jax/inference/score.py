"""Exact log-probabilities of answers: no sampling noise and no parsing.

The answers of one prompt are the leaves of one token tree, so the prompt is computed once.  Every
prompt has rows to itself, whose length depends on it alone.  Computed one at a time, as they are
by default, what else is scored in the same call can't move a bit of its result; several at a time
(`rows`), it moves by float rounding.
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
from befm_jax.inference.edges import EdgeScores, edge_scores
from befm_jax.llama.model import Llama, Params

# Tokens that a model reads before the last one that it is asked for.  That last one is only
# predicted, but has a slot too: a row is longer by the step that lengths are rounded up to.
LONGEST_CONTEXT = 8192
LONGEST_ROW = LONGEST_CONTEXT + 64


class RowTooShortError(UserError):
    """A prompt and answer that do not fit in the longest row that is scored."""


class Scores(NamedTuple):
    """What a model makes of a group of answers.

    `log_probs` [A] float64: log-probability of each whole answer given its prompt; `greedy` [A]:
    whether greedy decoding would have written it.
    """

    log_probs: Float64[np.ndarray, " A"]
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


def answers(
    model: Llama,
    params: Params,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
) -> list[AnswerDistribution]:
    """The model's distribution over the answers of each `(prompt ids, answers' ids)`.

    Answers must end with the end-of-turn token; then none is the beginning of another, their
    probabilities add up to at most one, and the rest is `outside`.

    Raises:
        RowTooShortError: a prompt with an answer is longer than `LONGEST_ROW` tokens.
    """
    found = []
    for prompt, answer_ids in questions:
        whole = [Path(tuple(prompt), tuple(ids)) for ids in answer_ids]
        # Stems are beginnings of paths that are in the tree anyway.
        stems = [path._replace(answer=path.answer[:-1]) for path in whole]
        scored = log_probs(model, params, whole + [path for path in stems if path.answer])
        # Nothing written yet is certain.
        before_end = np.zeros(len(whole))
        before_end[[bool(path.answer) for path in stems]] = scored[len(whole) :]
        found.append(AnswerDistribution(scored[: len(whole)], before_end))
    return found


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
    alike share the computation.  Up to `rows` rows of one length are computed together, but no
    more slots than the longest row has, so that memory does not depend on `rows`.  Rows of
    padding fill up what is left over at the end, so that nothing is compiled for that.

    Raises:
        ValueError: `rows` is below 1.
        RowTooShortError: a path is longer than `LONGEST_ROW` tokens.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    waiting: dict[int, list[tuple[_Group, int]]] = {}
    for number, paths in enumerate(groups):
        group = _lay_out(number, paths)
        length = group.forest.tokens.shape[1]
        together = _together(length, rows)
        for row in range(len(group.forest.tokens)):
            batch = waiting.setdefault(length, [])
            batch.append((group, row))
            if len(batch) == together:
                yield from _compute(model, params, waiting.pop(length), together)
    for length, batch in waiting.items():
        yield from _compute(model, params, batch, _together(length, rows))


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
    places: tuple[tuple[int, int] | None, ...]
    log_probs: np.ndarray
    missed: np.ndarray
    rows_to_come: int

    def scores(self) -> Scores:
        """The sums along the group's paths."""
        return Scores(
            forests.path_sums(self.forest, self.log_probs, self.places),
            forests.path_sums(self.forest, self.missed, self.places) == 0,
        )


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
    return _Group(
        number, forest, built.places, np.zeros(shape, np.float32), np.zeros(shape, bool), shape[0]
    )


def _together(length: int, rows: int) -> int:
    """How many rows of a length are computed together."""
    return max(1, min(rows, LONGEST_ROW // length))


def _compute(
    model: Llama, params: Params, batch: Sequence[tuple[_Group, int]], together: int
) -> Iterator[tuple[int, Scores]]:
    """Computes rows of one length; yields the groups that are complete with them."""
    rows = [[array[row] for array in group.forest] for group, row in batch]
    forest = forests.pad_rows(Forest(*map(np.stack, zip(*rows, strict=True))), together)
    found = _edge_scores(model)(params, forest, forests.reads(forest))
    log_probs, greedy = np.asarray(found.log_probs), np.asarray(found.greedy)
    for at, (group, row) in enumerate(batch):
        group.log_probs[row] = log_probs[at]
        group.missed[row] = ~greedy[at]
        group.rows_to_come -= 1
        if not group.rows_to_come:
            yield group.number, group.scores()


@lru_cache(maxsize=8)
def _edge_scores(model: Llama) -> Callable[[Params, Forest, Reads], EdgeScores]:
    return jax.jit(lambda params, forest, reads: edge_scores(model, params, forest, reads))
