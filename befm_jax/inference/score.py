"""Exact log-probabilities of answers: no sampling noise and no parsing.

The answers of one prompt are the leaves of one token tree, so the prompt is computed once.  Every
prompt is scored by itself, in rows whose length depends on it alone: what else is scored in the
same call can't move a bit of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from befm_jax.data import forest as forests
from befm_jax.data.forest import Forest, Path, Reads
from befm_jax.errors import UserError
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import Llama, Params, hidden_states, vocabulary_logits

LONGEST_ROW = 8192


class RowTooShortError(UserError):
    """A prompt and answer that do not fit in the longest row that is scored."""


def edge_log_probs(
    model: Llama, params: Params, forest: Forest, reads: Reads
) -> Float[Array, "B N"]:
    """`log p(token | ancestors)` of every weighted slot (0 elsewhere), float32.

    The vocabulary projection runs once per distinct parent of a weighted slot, nowhere else.
    """
    attention = ForestAttention(jnp.asarray(forest.end))
    hidden, _ = hidden_states(model, params, forest.tokens, forest.depth, attention)
    at_parents = jnp.take_along_axis(hidden, jnp.asarray(reads.slots)[:, :, None], axis=1)
    logits = vocabulary_logits(model, params, at_parents)
    row = jnp.arange(forest.tokens.shape[0])[:, None]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits[row, reads.column, forest.tokens] - normaliser[row, reads.column]
    return jnp.where(forest.weight > 0, log_probs, 0.0)


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
    built = forests.build(paths, LONGEST_ROW)
    if built.report.left_out:
        reasons = built.report.reasons()
        raise RowTooShortError(f"answers that can't be scored: {reasons} ({LONGEST_ROW} tokens)")
    # Trees end in answers, so behind the last weighted slot there is only padding to cut off.
    used = int(np.nonzero(built.forest.weight)[1].max()) + 1
    forest = Forest(*(array[:, : bucket(used)] for array in built.forest))
    run = _edge_log_probs(model)
    rows = []
    for row in range(len(forest.tokens)):
        one = Forest(*(array[row : row + 1] for array in forest))
        rows.append(run(params, one, forests.reads(one)))
    found = np.concatenate([np.asarray(row) for row in rows])
    return forests.path_log_probs(forest, found, built.places)


def bucket(length: int) -> int:
    """The row length for so many slots: 64 times a power of two, or 1.5 times that."""
    size = 64
    while size < length:
        size = size * 3 // 2 if (size & (size - 1)) == 0 else size * 4 // 3
    return min(size, LONGEST_ROW)


@lru_cache(maxsize=8)
def _edge_log_probs(model: Llama) -> Callable[[Params, Forest, Reads], Array]:
    return jax.jit(lambda params, forest, reads: edge_log_probs(model, params, forest, reads))
