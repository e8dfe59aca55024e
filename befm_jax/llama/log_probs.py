"""Log-probabilities of a forest's weighted tokens, a few vocabulary projections at a time.

A token's log-probability is read at its parent.  The vocabulary is large (128,256 for Llama 3), so
that the logits of all parents may be larger than everything else in a step: they are made for some
hundred parents at a time, used, and forgotten.  Columns of `Reads` that no token is read at cost
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
from befm_jax.llama.linear import Layout, after, placed
from befm_jax.llama.model import Llama, Params, hidden_states, logical_axes, vocabulary_logits

# Parents whose logits exist at one time on a device, over all its rows: enough for a good product.
# Of large vocabularies fewer, so that these logits are at most `_LOGITS` (float32: 256 MB).
_PARENTS = 2048
_LOGITS = 2**26

_Sum = TypeVar("_Sum")


class TokenScores(NamedTuple):
    """What a model makes of every weighted slot of a forest, given the slot's ancestors.

    `log_probs` [B, N] float32: `log p(token | ancestors)`, 0 elsewhere; `greedy` [B, N]: whether
    no token is likelier there (of equals, the lowest id counts), False elsewhere.
    """

    log_probs: Float[Array, "B N"]
    greedy: Bool[Array, "B N"]


def token_scores(model: Llama, params: Params, forest: Forest, reads: Reads) -> TokenScores:
    """Scores of every weighted slot."""
    hidden, forest = _hidden(model, params, forest)
    head, size = vocabulary_head(model, params, hidden), _columns_at_once(model, forest)

    def meet(columns: _Columns, found: TokenScores) -> TokenScores:
        logits = vocabulary_logits(model, head, columns.hidden)
        log_probs = columns.log_probs(logits)
        greedy = columns.at_parents(jnp.argmax(logits, axis=-1)) == columns.tokens
        return TokenScores(
            jnp.where(columns.here, log_probs, found.log_probs),
            jnp.where(columns.here, greedy, found.greedy),
        )

    shape = forest.tokens.shape
    nothing = TokenScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    return _each(meet, nothing, hidden, forest, reads, size)


def log_likelihood(model: Llama, params: Params, forest: Forest, reads: Reads) -> Float[Array, ""]:
    """`sum(weight * log p(token | ancestors))` of a forest, to be differentiated.

    The gradient is taken where the logits are made, so that they are neither kept for the backward
    pass nor made a second time; the vocabulary projection gets one only where it is trained.
    """
    hidden, forest = _hidden(model, params, forest)
    return _log_likelihood(model, _stored_head(params), hidden, forest, reads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_likelihood(
    model: Llama, stored: Params, hidden: Float[Array, "B N D"], forest: Forest, reads: Reads
) -> Float[Array, ""]:
    head = vocabulary_head(model, stored, hidden)

    def meet(columns: _Columns, total: Array) -> Array:
        return total + columns.log_likelihood(model, head, columns.hidden)

    size = _columns_at_once(model, forest)
    return _each(meet, jnp.zeros(()), hidden, forest, reads, size)


def _with_gradient(
    model: Llama, stored: Any, hidden: Any, forest: Any, reads: Any
) -> tuple[Float[Array, ""], tuple[Any, Any]]:
    """The value, and the gradients of what is differentiated (None for a head that is not)."""
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(stored, is_leaf=_is_primal))
    stored, hidden, forest, reads = jax.tree.map(
        lambda leaf: leaf.value, (stored, hidden, forest, reads), is_leaf=_is_primal
    )
    head, given_back = jax.vjp(lambda stored: vocabulary_head(model, stored, hidden), stored)

    def meet(columns: _Columns, found: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
        total, d_head, d_hidden = found
        score = partial(columns.log_likelihood, model)
        if trained:
            value, (slope, at_parents) = jax.value_and_grad(score, (0, 1))(head, columns.hidden)
            d_head = jax.tree.map(jnp.add, d_head, slope)
        else:
            value, at_parents = jax.value_and_grad(score, 1)(head, columns.hidden)
        # Every parent has one column; those of padding stand for slot 0 and add zeros to it.
        d_hidden = jax.vmap(lambda whole, slots, some: whole.at[slots].add(some))(
            d_hidden, columns.slots, at_parents
        )
        return total + value, d_head, d_hidden

    start = (
        jnp.zeros(()),
        jax.tree.map(jnp.zeros_like, head) if trained else None,
        jnp.zeros_like(hidden),
    )
    total, d_head, d_hidden = _each(
        meet, start, hidden, forest, reads, _columns_at_once(model, forest)
    )
    if not trained:
        return total, (None, d_hidden)
    (d_stored,) = given_back(d_head)
    # The backward pass of the layers comes after what is sent for the vocabulary's gradient.
    done, *_ = jax.tree.leaves(d_stored)
    return total, (d_stored, after(model.layout, d_hidden, done, "rows", "slots", "features"))


def _pull(model: Llama, found: tuple[Any, Any], slope: Array) -> tuple[Any, Any, None, None]:
    del model
    d_stored, d_hidden = jax.tree.map(lambda leaf: leaf * slope.astype(leaf.dtype), found)
    return d_stored, d_hidden, None, None


_log_likelihood.defvjp(_with_gradient, _pull, symbolic_zeros=True)


class _Columns(NamedTuple):
    """Some columns of `Reads`, and the slots that are read there.

    `slots` [B, C]: the parents; `hidden` [B, C, D]: their hidden states; `here` [B, N]: which
    slots are read in these columns; `column` [B, N]: in which (0 elsewhere); `tokens`, `weight`
    [B, N]: those of the forest.
    """

    slots: Int[Array, "B C"]
    hidden: Float[Array, "B C D"]
    here: Bool[Array, "B N"]
    column: Int[Array, "B N"]
    tokens: Int[Array, "B N"]
    weight: Float[Array, "B N"]

    def at_parents(self, figures: Shaped[Array, "B C"]) -> Shaped[Array, "B N"]:
        """Every slot's own of the figures of these columns; anything where it has none."""
        return jnp.take_along_axis(figures, self.column, axis=1)

    def log_probs(self, logits: Float[Array, "B C V"]) -> Float[Array, "B N"]:
        """Log-probability of every slot that is read here; anything elsewhere."""
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # Row by row: a batch that is cut over devices then stays where it is.
        chosen = jax.vmap(lambda logits, column, token: logits[column, token])(
            logits, self.column, self.tokens
        )
        return chosen - self.at_parents(normaliser)

    def log_likelihood(self, model: Llama, head: Params, hidden: Array) -> Float[Array, ""]:
        """The weighted sum over the slots that are read here."""
        log_probs = self.log_probs(vocabulary_logits(model, head, hidden))
        return jnp.sum(jnp.where(self.here, self.weight * log_probs, 0.0))


def _each(
    meet: Callable[[_Columns, _Sum], _Sum],
    found: _Sum,
    hidden: Float[Array, "B N D"],
    forest: Forest,
    reads: Reads,
    size: int,
) -> _Sum:
    """`meet` over `size` columns at a time, as far as any row has columns that are read at."""
    learnt = jnp.asarray(forest.weight) > 0
    column = jnp.asarray(reads.column)
    columns = jnp.max(jnp.where(learnt, column + 1, 0))
    spare = -reads.slots.shape[1] % size
    slots = jnp.pad(jnp.asarray(reads.slots), ((0, 0), (0, spare)))

    def some(number: Array, found: _Sum) -> _Sum:
        here = learnt & (column // size == number)
        parents = jax.lax.dynamic_slice_in_dim(slots, number * size, size, axis=1)
        return meet(
            _Columns(
                parents,
                jnp.take_along_axis(hidden, parents[:, :, None], axis=1),
                here,
                jnp.where(here, column % size, 0),
                jnp.asarray(forest.tokens),
                jnp.asarray(forest.weight),
            ),
            found,
        )

    return jax.lax.fori_loop(0, (columns + size - 1) // size, some, found)


def columns_at_once(words: int, rows: int, slots: int, layout: Layout | None = None) -> int:
    """How many columns of `Reads` meet a vocabulary of so many words at a time."""
    if layout is not None:
        rows = -(-rows // layout.parts("rows"))
        words = -(-words // layout.parts("each_logit"))
    return max(1, min(slots, min(_PARENTS, _LOGITS // words) // rows))


def _columns_at_once(model: Llama, forest: Forest) -> int:
    rows, slots = forest.tokens.shape
    return columns_at_once(model.config.vocab_size, rows, slots, model.layout)


def _hidden(model: Llama, params: Params, forest: Forest) -> tuple[Float[Array, "B N D"], Forest]:
    """Hidden states, and the forest with weights that are counted after them (`linear.after`)."""
    attention = ForestAttention(jnp.asarray(forest.end), model.layout)
    hidden, _ = hidden_states(model, params, forest.tokens, forest.depth, attention)
    weight: Any = after(model.layout, jnp.asarray(forest.weight), hidden, "rows", "slots")
    return hidden, forest._replace(weight=weight)


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
