"""Log-probabilities of a forest's reads, with logits computed in chunks of slots.

A token's log-probability is read at the slot before it.  The vocabulary is large (128,256 for
Llama 3), so that the logits of all slots may be larger than everything else in a step: they are
computed for some hundred slots at a time and freed.  Columns of `Reads` that no row uses cost
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from befm_jax.data.forest import Forest, Reads
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.linear import ShardingRules, after, placed
from befm_jax.llama.model import Llama, Params, hidden_states, logical_axes, vocabulary_logits

# Most slots per chunk on a device, over all its rows: enough for an efficient matrix product (512
# FLOPs a byte of bfloat16 weights; a TPU v5e has 240), and few, since the last chunk is computed to
# its end.  Fewer for a vocabulary of which they would have more than `_LOGITS` logits (256 MB).
_COLUMNS = 512
_LOGITS = 2**26

_Sum = TypeVar("_Sum")


class TokenScores(NamedTuple):
    """Scores of every read of a forest.

    `log_probs` [B, M] float32: `log p(token | slot and its ancestors)`; `greedy` [B, M]: whether
    the token is the argmax (of equals, the lowest id is).  0 and False for padding.
    """

    log_probs: Float[Array, "B M"]
    greedy: Bool[Array, "B M"]


def token_scores(model: Llama, params: Params, forest: Forest, reads: Reads) -> TokenScores:
    """Scores of every read."""
    hidden, reads = _hidden(model, params, forest, reads)
    head, size = vocabulary_head(model, params, hidden), _columns_at_once(model, hidden)

    def visit(columns: _Columns, scores: TokenScores) -> TokenScores:
        logits = vocabulary_logits(model, head, columns.hidden)
        log_probs = columns.log_probs(logits)
        greedy = columns.at_reads(jnp.argmax(logits, axis=-1)) == columns.token
        return TokenScores(
            jnp.where(columns.here, log_probs, scores.log_probs),
            jnp.where(columns.here, greedy, scores.greedy),
        )

    shape = reads.token.shape
    zeros = TokenScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    return _for_each_chunk(visit, zeros, hidden, reads, size)


def log_likelihood(model: Llama, params: Params, forest: Forest, reads: Reads) -> Float[Array, ""]:
    """`sum(weight * log p(token | slot and its ancestors))` of all reads; differentiable.

    The forward pass computes each chunk's gradient along with its logits, so that logits are
    neither kept for the backward pass nor recomputed; the vocabulary projection gets a gradient
    only where it is trained.
    """
    hidden, reads = _hidden(model, params, forest, reads)
    return _log_likelihood(model, _stored_head(params), hidden, reads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_likelihood(
    model: Llama, stored: Params, hidden: Float[Array, "B N D"], reads: Reads
) -> Float[Array, ""]:
    head = vocabulary_head(model, stored, hidden)

    def visit(columns: _Columns, total: Array) -> Array:
        return total + columns.log_likelihood(model, head, columns.hidden)

    size = _columns_at_once(model, hidden)
    return _for_each_chunk(visit, jnp.zeros(()), hidden, reads, size)


def _with_gradient(
    model: Llama, stored: Any, hidden: Any, reads: Any
) -> tuple[Float[Array, ""], tuple[Any, Any]]:
    """The value, and the gradients of the head (None if it is not trained) and of `hidden`."""
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(stored, is_leaf=_is_primal))
    stored, hidden, reads = jax.tree.map(
        lambda leaf: leaf.value, (stored, hidden, reads), is_leaf=_is_primal
    )
    head, head_vjp = jax.vjp(lambda stored: vocabulary_head(model, stored, hidden), stored)

    def visit(columns: _Columns, carry: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
        total, d_head, d_hidden = carry
        score = partial(columns.log_likelihood, model)
        if trained:
            value, (d_chunk, d_columns) = jax.value_and_grad(score, (0, 1))(head, columns.hidden)
            d_head = jax.tree.map(jnp.add, d_head, d_chunk)
        else:
            value, d_columns = jax.value_and_grad(score, 1)(head, columns.hidden)
        # Every slot that is read has one column; padding columns are slot 0 and add zeros to it.
        d_hidden = jax.vmap(lambda row, slots, d_row: row.at[slots].add(d_row))(
            d_hidden, columns.slots, d_columns
        )
        return total + value, d_head, d_hidden

    init = (
        jnp.zeros(()),
        jax.tree.map(jnp.zeros_like, head) if trained else None,
        jnp.zeros_like(hidden),
    )
    size = _columns_at_once(model, hidden)
    total, d_head, d_hidden = _for_each_chunk(visit, init, hidden, reads, size)
    if not trained:
        return total, (None, d_hidden)
    (d_stored,) = head_vjp(d_head)
    # The layers' backward pass starts after the collectives of the vocabulary's gradient.
    done, *_ = jax.tree.leaves(d_stored)
    return total, (d_stored, after(model.layout, d_hidden, done, "rows", "slots", "features"))


def _backward(model: Llama, gradients: tuple[Any, Any], cotangent: Array) -> tuple[Any, Any, None]:
    del model
    d_stored, d_hidden = jax.tree.map(lambda leaf: leaf * cotangent.astype(leaf.dtype), gradients)
    return d_stored, d_hidden, None


_log_likelihood.defvjp(_with_gradient, _backward, symbolic_zeros=True)


class _Columns(NamedTuple):
    """A chunk of the columns of `Reads`, and the reads there.

    `slots` [B, C]: the slots of the columns; `hidden` [B, C, D]: their hidden states; `here`
    [B, M]: which reads are in this chunk; `column` [B, M]: each read's column within the chunk (0
    elsewhere); `token`, `weight` [B, M]: those of the reads.
    """

    slots: Int[Array, "B C"]
    hidden: Float[Array, "B C D"]
    here: Bool[Array, "B M"]
    column: Int[Array, "B M"]
    token: Int[Array, "B M"]
    weight: Float[Array, "B M"]

    def at_reads(self, values: Shaped[Array, "B C"]) -> Shaped[Array, "B M"]:
        """Each read's value from its column; arbitrary for reads outside the chunk."""
        return jnp.take_along_axis(values, self.column, axis=1)

    def log_probs(self, logits: Float[Array, "B C V"]) -> Float[Array, "B M"]:
        """Log-probability of every read here; arbitrary elsewhere."""
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # By row, under vmap: a sharded batch then needs no communication.
        token_logits = jax.vmap(lambda logits, column, token: logits[column, token])(
            logits, self.column, self.token
        )
        return token_logits - self.at_reads(normaliser)

    def log_likelihood(self, model: Llama, head: Params, hidden: Array) -> Float[Array, ""]:
        """The weighted sum over the reads here."""
        log_probs = self.log_probs(vocabulary_logits(model, head, hidden))
        return jnp.sum(jnp.where(self.here, self.weight * log_probs, 0.0))


def _for_each_chunk(
    visit: Callable[[_Columns, _Sum], _Sum],
    init: _Sum,
    hidden: Float[Array, "B N D"],
    reads: Reads,
    size: int,
) -> _Sum:
    """`visit` folded over chunks of `size` columns, up to the last column that any row uses."""
    column = jnp.asarray(reads.column)
    columns = jnp.max(column) + 1
    padding = -reads.slots.shape[1] % size
    slots = jnp.pad(jnp.asarray(reads.slots), ((0, 0), (0, padding)))

    def chunk(number: Array, carry: _Sum) -> _Sum:
        here = column // size == number  # -1, padding, is in no chunk
        at = jax.lax.dynamic_slice_in_dim(slots, number * size, size, axis=1)
        return visit(
            _Columns(
                at,
                jnp.take_along_axis(hidden, at[:, :, None], axis=1),
                here,
                jnp.where(here, column % size, 0),
                jnp.asarray(reads.token),
                jnp.asarray(reads.weight),
            ),
            carry,
        )

    return jax.lax.fori_loop(0, (columns + size - 1) // size, chunk, init)


def columns_at_once(
    vocab_size: int, rows: int, slots: int, layout: ShardingRules | None = None
) -> int:
    """The number of columns of `Reads` in a chunk, for a vocabulary of this size."""
    if layout is not None:
        rows = -(-rows // layout.parts("rows"))
        vocab_size = -(-vocab_size // layout.parts("each_logit"))
    most = max(1, min(_COLUMNS, _LOGITS // vocab_size) // rows)
    # Equal chunks, so that the last one of a row that is read everywhere is full.
    return -(-slots // -(-slots // most))


def _columns_at_once(model: Llama, hidden: Float[Array, "B N D"]) -> int:
    rows, slots, _ = hidden.shape
    return columns_at_once(model.config.vocab_size, rows, slots, model.layout)


def _hidden(
    model: Llama, params: Params, forest: Forest, reads: Reads
) -> tuple[Float[Array, "B N D"], Reads]:
    """Hidden states, and the reads with a data dependency on them (`linear.after`)."""
    attention = ForestAttention(jnp.asarray(forest.end), model.layout)
    hidden, _ = hidden_states(model, params, forest.tokens, forest.depth, attention)
    column: Any = after(model.layout, jnp.asarray(reads.column), hidden, "rows", "slots")
    return hidden, reads._replace(column=column)


def vocabulary_head(model: Llama, params: Params, done: Float[Array, "*D"] | None = None) -> Params:
    """The parameters of the vocabulary projection, sharded by vocabulary alone.

    Gathered once for all chunks, after `done`, the result of the loop over layers in the same
    program (`linear.after`).
    """
    ((name, stored),) = _stored_head(params).items()
    weight = stored["weight"]
    if done is not None:
        weight = after(model.layout, weight, done, *logical_axes((name, "weight")))
    if name == "embed_tokens":
        # Columns are gathered over `fsdp` before an all-to-all with rows over `tensor`.
        weight = placed(model.layout, weight, "embedding_rows", "each_embedding_width")
    weight = placed(model.layout, weight, "each_logit", "features")
    return {name: stored | {"weight": weight}}


def _stored_head(params: Params) -> Params:
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
