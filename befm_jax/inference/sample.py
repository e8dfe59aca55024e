"""A population from one prompt: one prefill, then everyone answers side by side.

Every participant draws with a key of their own, made from the seed and their number: an answer
does not depend on who else is asked, nor (but for float rounding) on how many at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from befm_jax.inference.kv_cache import Cache, Decode, KeysValues, Prefill
from befm_jax.inference.score import bucket
from befm_jax.llama.model import Llama, Params, hidden_states, vocabulary_logits

# Participants who are decoded together.
AT_A_TIME = 1024
# Tokens that are drawn between two looks of a caller's `ended`.
LOOK_EVERY = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    The default draws from the model's own distribution.  A `temperature` below 1, `top_k` or
    `top_p` narrow a population and so measure themselves; 0 is greedy.  They are never taken from
    a model's `generation_config.json`, and every output says what they were.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, for output files."""
        return asdict(self)


@dataclass(frozen=True)
class Draws:
    """Sampled continuations.

    `tokens` [n, T] int32; `lengths` [n]: how many of a row are the answer, without the stop
    token; `stopped` [n]: false where the answer ran into `max_new_tokens`.  An answer that `ended`
    closed is stopped too, behind the last token that was drawn when it was looked at.
    """

    tokens: Int32[np.ndarray, "n T"]
    lengths: Int32[np.ndarray, " n"]
    stopped: Bool[np.ndarray, " n"]


def population(
    model: Llama,
    params: Params,
    prompt: Sequence[int],
    participants: int,
    *,
    stop_ids: Sequence[int],
    seed: int = 0,
    sampling: Sampling | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
) -> Draws:
    """`participants` answers to one prompt, whose keys and values are computed once.

    `ended` is shown the tokens of an answer so far, every `LOOK_EVERY` tokens, and says whether
    the answer is over: for ends that no single token marks.  The draws are the same with and
    without it, up to where it saw an end.

    Raises:
        ValueError: an empty prompt, no participants, or no stop token.
    """
    if not prompt or participants < 1 or not stop_ids:
        raise ValueError("a prompt, at least one participant and at least one stop id are needed")
    sampling = sampling or Sampling()
    padded = np.zeros((1, bucket(len(prompt))), np.int32)
    padded[0, : len(prompt)] = prompt
    together = min(AT_A_TIME, 1 << (participants - 1).bit_length())
    length = jnp.int32(len(prompt))
    stops = tuple(sorted(set(stop_ids)))
    prefix, first_logits = _prefill(model)(params, padded, length)
    begin, go_on = programs(model, sampling, stops)
    key = jax.random.key(seed)
    steps = sampling.max_new_tokens
    look = steps if ended is None else LOOK_EVERY
    found = []
    for start in range(0, participants, together):
        numbers = jnp.arange(start, start + together)
        state = begin(prefix, first_logits, key, numbers)
        for limit in range(look, steps + look, look):
            state = go_on(params, prefix, length, key, numbers, state, jnp.int32(min(limit, steps)))
            if ended is None or limit >= steps or bool(state.done.all()):
                break
            done, so_far = np.array(state.done), np.asarray(state.tokens)[:, :limit]
            done[~done] = [ended(row.tolist()) for row in so_far[~done]]
            state = state._replace(done=jnp.asarray(done))
        found.append(np.asarray(state.tokens))
    tokens = np.concatenate(found)[:participants]
    stop = np.isin(tokens, stops)
    stopped = np.any(stop, axis=1)
    lengths = np.where(stopped, stop.argmax(axis=1), tokens.shape[1]).astype(np.int32)
    return Draws(tokens, lengths, stopped)


def next_token(logits: Float[Array, "n V"], keys: Array, sampling: Sampling) -> Int[Array, " n"]:
    """One token a row: greedy at temperature 0, else a draw from what top-k and top-p leave.

    Top-k keeps the k likeliest tokens (and any that tie with the last of them); top-p then keeps
    the likeliest whose preceding probability is below p, so never fewer than one.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        last = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < last, -jnp.inf, scaled)
    if sampling.top_p < 1:
        ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, ordered, jnp.inf)
        scaled = jnp.where(scaled < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, scaled)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


@lru_cache(maxsize=8)
def _prefill(model: Llama) -> Callable[..., tuple[KeysValues, Array]]:
    def prefill(params: Params, tokens: Array, length: Array) -> tuple[KeysValues, Array]:
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, state = hidden_states(model, params, tokens, positions, Prefill())
        last = jax.lax.dynamic_slice_in_dim(hidden[0], length - 1, 1)
        return state, vocabulary_logits(model, params, last)

    return jax.jit(prefill)


class _Answers(NamedTuple):
    """Where `n` answers stand: what the decoding loop carries, and what it goes on from.

    `written`: tokens drawn so far, the same for all; `done` [n]; `tokens` [n, T], stop tokens
    where nothing is drawn (yet); `last` [n]: the token whose keys and values come next; `suffix`:
    the keys and values of the tokens before it.
    """

    written: Array
    done: Array
    tokens: Array
    last: Array
    suffix: KeysValues


@lru_cache(maxsize=8)
def programs(
    model: Llama, sampling: Sampling, stop_ids: tuple[int, ...]
) -> tuple[Callable[..., _Answers], Callable[..., _Answers]]:
    """How answers begin, and the decoding loop up to a limit of tokens.

    `(prefix, logits, key, numbers) -> answers` and
    `(params, prefix, length, key, numbers, answers, limit) -> answers`.  The limit is no part of
    the program, so that a caller can look at the answers on the way and go on from there.
    """
    steps = sampling.max_new_tokens
    stops = np.asarray(stop_ids, np.int32)

    def everyones(key: Array, numbers: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    def draw(keys: Array, logits: Array, written: Array) -> Array:
        return next_token(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, written), sampling)

    def begin(prefix: KeysValues, logits: Array, key: Array, numbers: Array) -> _Answers:
        people = numbers.shape[0]
        layers, _, _, heads, width = prefix.keys.shape
        room = jnp.zeros((layers, people, steps, heads, width), prefix.keys.dtype)
        logits = jnp.broadcast_to(logits, (people, logits.shape[-1]))
        first = draw(everyones(key, numbers), logits, jnp.int32(0))
        tokens = jnp.full((people, steps), stops[0], jnp.int32).at[:, 0].set(first)
        suffix = KeysValues(room, jnp.zeros_like(room))
        return _Answers(jnp.int32(1), jnp.isin(first, stops), tokens, first, suffix)

    def go_on(
        params: Params,
        prefix: KeysValues,
        length: Array,
        key: Array,
        numbers: Array,
        answers: _Answers,
        limit: Array,
    ) -> _Answers:
        keys = everyones(key, numbers)

        def unfinished(answers: _Answers) -> Array:
            return (answers.written < limit) & ~jnp.all(answers.done)

        def advance(answers: _Answers) -> _Answers:
            written, done, tokens, last, suffix = answers
            positions = jnp.full((len(numbers), 1), length + written - 1)
            attention = Decode(length, written - 1)
            hidden, suffix = hidden_states(
                model, params, last[:, None], positions, attention, Cache(prefix, suffix)
            )
            logits = vocabulary_logits(model, params, hidden[:, 0])
            token = jnp.where(done, stops[0], draw(keys, logits, written))
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, written))
            return _Answers(written + 1, done | jnp.isin(token, stops), tokens, token, suffix)

        final: _Answers = jax.lax.while_loop(unfinished, advance, answers)
        return final

    return jax.jit(begin), jax.jit(go_on, donate_argnames="answers")
