"""Log-probabilities of what a forest's reads ask for, a few vocabulary projections at a time.

A token's log-probability is read at the slot before it.  The vocabulary is large (128,256 for
Llama 3), so that the logits of all slots that are read may be larger than everything else in a
step: they are made for some hundred slots at a time, used, and forgotten.  Columns of `Reads` that
no row uses cost nothing.
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
from befm_jax.llama.linear import Layout, after, placed
from befm_jax.llama.model import Llama, Params, hidden_states, logical_axes, vocabulary_logits

# Slots whose logits exist at one time on a device, over all its rows: enough for a good product.
# Of large vocabularies fewer, so that these logits are at most `_LOGITS` (float32: 256 MB).
_COLUMNS = 2048
_LOGITS = 2**26

_Sum = TypeVar("_Sum")


class TokenScores(NamedTuple):
    """What a model makes of every read of a forest.

    `log_probs` [B, M] float32: `log p(token | slot and its ancestors)`; `greedy` [B, M]: whether no
    token is likelier there (of equals, the lowest id counts).  0 and False for padding.
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
    nothing = TokenScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    return _each(visit, nothing, hidden, reads, size)


def log_likelihood(model: Llama, params: Params, forest: Forest, reads: Reads) -> Float[Array, ""]:
    """`sum(weight * log p(token | slot and its ancestors))` of all reads, to be differentiated.

    The gradient is taken where the logits are made, so that they are neither kept for the backward
    pass nor made a second time; the vocabulary projection gets one only where it is trained.
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
    return _each(visit, jnp.zeros(()), hidden, reads, size)


def _with_gradient(
    model: Llama, stored: Any, hidden: Any, reads: Any
) -> tuple[Float[Array, ""], tuple[Any, Any]]:
    """The value, and the gradients of what is differentiated (None for a head that is not)."""
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(stored, is_leaf=_is_primal))
    stored, hidden, reads = jax.tree.map(
        lambda leaf: leaf.value, (stored, hidden, reads), is_leaf=_is_primal
    )
    head, given_back = jax.vjp(lambda stored: vocabulary_head(model, stored, hidden), stored)

    def visit(columns: _Columns, found: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
        total, d_head, d_hidden = found
        score = partial(columns.log_likelihood, model)
        if trained:
            value, (slope, d_columns) = jax.value_and_grad(score, (0, 1))(head, columns.hidden)
            d_head = jax.tree.map(jnp.add, d_head, slope)
        else:
            value, d_columns = jax.value_and_grad(score, 1)(head, columns.hidden)
        # Every slot that is read has one column; those of padding are slot 0 and add zeros to it.
        d_hidden = jax.vmap(lambda whole, slots, some: whole.at[slots].add(some))(
            d_hidden, columns.slots, d_columns
        )
        return total + value, d_head, d_hidden

    start = (
        jnp.zeros(()),
        jax.tree.map(jnp.zeros_like, head) if trained else None,
        jnp.zeros_like(hidden),
    )
    total, d_head, d_hidden = _each(visit, start, hidden, reads, _columns_at_once(model, hidden))
    if not trained:
        return total, (None, d_hidden)
    (d_stored,) = given_back(d_head)
    # The backward pass of the layers comes after what is sent for the vocabulary's gradient.
    done, *_ = jax.tree.leaves(d_stored)
    return total, (d_stored, after(model.layout, d_hidden, done, "rows", "slots", "features"))


def _pull(model: Llama, found: tuple[Any, Any], slope: Array) -> tuple[Any, Any, None]:
    del model
    d_stored, d_hidden = jax.tree.map(lambda leaf: leaf * slope.astype(leaf.dtype), found)
    return d_stored, d_hidden, None


_log_likelihood.defvjp(_with_gradient, _pull, symbolic_zeros=True)


class _Columns(NamedTuple):
    """Some columns of `Reads`, and the reads there.

    `slots` [B, C]: the slots that are read at; `hidden` [B, C, D]: their hidden states; `here`
    [B, M]: which reads are in these columns; `column` [B, M]: in which (0 elsewhere); `token`,
    `weight` [B, M]: those of the reads.
    """

    slots: Int[Array, "B C"]
    hidden: Float[Array, "B C D"]
    here: Bool[Array, "B M"]
    column: Int[Array, "B M"]
    token: Int[Array, "B M"]
    weight: Float[Array, "B M"]

    def at_reads(self, values: Shaped[Array, "B C"]) -> Shaped[Array, "B M"]:
        """For every read its own of the values of these columns; anything where it has none."""
        return jnp.take_along_axis(values, self.column, axis=1)

    def log_probs(self, logits: Float[Array, "B C V"]) -> Float[Array, "B M"]:
        """Log-probability of every read here; anything elsewhere."""
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # Row by row: a batch that is sharded then stays where it is.
        chosen = jax.vmap(lambda logits, column, token: logits[column, token])(
            logits, self.column, self.token
        )
        return chosen - self.at_reads(normaliser)

    def log_likelihood(self, model: Llama, head: Params, hidden: Array) -> Float[Array, ""]:
        """The weighted sum over the reads here."""
        log_probs = self.log_probs(vocabulary_logits(model, head, hidden))
        return jnp.sum(jnp.where(self.here, self.weight * log_probs, 0.0))


def _each(
    visit: Callable[[_Columns, _Sum], _Sum],
    found: _Sum,
    hidden: Float[Array, "B N D"],
    reads: Reads,
    size: int,
) -> _Sum:
    """`visit` over `size` columns at a time, as far as any row has columns that are read at."""
    column = jnp.asarray(reads.column)
    columns = jnp.max(column) + 1
    spare = -reads.slots.shape[1] % size
    slots = jnp.pad(jnp.asarray(reads.slots), ((0, 0), (0, spare)))

    def some(number: Array, found: _Sum) -> _Sum:
        here = column // size == number  # -1, padding, is in none
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
            found,
        )

    return jax.lax.fori_loop(0, (columns + size - 1) // size, some, found)


def columns_at_once(vocab_size: int, rows: int, slots: int, layout: Layout | None = None) -> int:
    """How many columns of `Reads` are projected to a vocabulary of this size at a time."""
    if layout is not None:
        rows = -(-rows // layout.parts("rows"))
        vocab_size = -(-vocab_size // layout.parts("each_logit"))
    return max(1, min(slots, min(_COLUMNS, _LOGITS // vocab_size) // rows))


def _columns_at_once(model: Llama, hidden: Float[Array, "B N D"]) -> int:
    rows, slots, _ = hidden.shape
    return columns_at_once(model.config.vocab_size, rows, slots, model.layout)


def _hidden(
    model: Llama, params: Params, forest: Forest, reads: Reads
) -> tuple[Float[Array, "B N D"], Reads]:
    """Hidden states, and the reads with columns that are counted after them (`linear.after`)."""
    attention = ForestAttention(jnp.asarray(forest.end), model.layout)
    hidden, _ = hidden_states(model, params, forest.tokens, forest.depth, attention)
    column: Any = after(model.layout, jnp.asarray(reads.column), hidden, "rows", "slots")
    return hidden, reads._replace(column=column)


def vocabulary_head(model: Llama, params: Params, done: Float[Array, "*D"] | None = None) -> Params:
    """The part of the parameters that the vocabulary projection uses.

    Gathered from the devices that hold rows of it, once for all chunks; after what is `done` by a
    loop over layers in the same program (`linear.after`).
    """
    ((name, stored),) = _stored_head(params).items()
    weight = stored["weight"]
    if done is not None:
        weight = after(model.layout, weight, done, *logical_axes((name, "weight")))
    if name == "embed_tokens":
        # Columns are gathered within `fsdp` before they change hands with rows within `tensor`.
        weight = placed(model.layout, weight, "embedding_rows", "each_embedding_width")
    weight = placed(model.layout, weight, "each_logit", "features")
    return {name: stored | {"weight": weight}}


def _stored_head(params: Params) -> Params:
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
