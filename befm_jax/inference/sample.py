"""A population from one prompt: one prefill, then everyone answers side by side.

Every participant draws with a key of their own, made from the seed and their number: an answer
does not depend on who else is asked, nor (but for float rounding) on how many at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from befm_jax.inference.kv_cache import Cache, Decode, KeysValues, Prefill
from befm_jax.llama.model import Llama, Params, hidden_states, vocabulary_logits

# Participants who are decoded together.
AT_A_TIME = 1024


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
    token; `stopped` [n]: false where the answer ran into `max_new_tokens`.
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
) -> Draws:
    """`participants` answers to one prompt, whose keys and values are computed once.

    Raises:
        ValueError: an empty prompt, no participants, or no stop token.
    """
    if not prompt or participants < 1 or not stop_ids:
        raise ValueError("a prompt, at least one participant and at least one stop id are needed")
    sampling = sampling or Sampling()
    padded = np.zeros((1, 64 * math.ceil(len(prompt) / 64)), np.int32)
    padded[0, : len(prompt)] = prompt
    together = min(AT_A_TIME, 1 << (participants - 1).bit_length())
    length = jnp.int32(len(prompt))
    stops = tuple(sorted(set(stop_ids)))
    prefix, first_logits = _prefill(model)(params, padded, length)
    run = _decode(model, sampling, stops)
    key = jax.random.key(seed)
    found = []
    for start in range(0, participants, together):
        numbers = jnp.arange(start, start + together)
        found.append(run(params, prefix, length, first_logits, key, numbers))
    tokens = np.concatenate([np.asarray(chunk) for chunk in found])[:participants]
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


@lru_cache(maxsize=8)
def _decode(model: Llama, sampling: Sampling, stop_ids: tuple[int, ...]) -> Callable[..., Array]:
    """The decoding loop: `(params, prefix, length, logits, key, numbers) -> tokens [n, T]`."""
    steps = sampling.max_new_tokens

    def decode(
        params: Params, prefix: KeysValues, length: Array, logits: Array, key: Array, numbers: Array
    ) -> Array:
        people = numbers.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        layers, _, _, heads, width = prefix.keys.shape
        room = jnp.zeros((layers, people, steps, heads, width), prefix.keys.dtype)
        stops = jnp.asarray(stop_ids, jnp.int32)

        def draw(logits: Array, written: Array) -> Array:
            return next_token(
                logits, jax.vmap(jax.random.fold_in, (0, None))(keys, written), sampling
            )

        def unfinished(carry: Any) -> Array:
            written, done = carry[0], carry[1]
            return (written < steps) & ~jnp.all(done)

        def advance(carry: Any) -> Any:
            written, done, tokens, last, suffix = carry
            positions = jnp.full((people, 1), length + written - 1)
            attention = Decode(length, written - 1)
            hidden, suffix = hidden_states(
                model, params, last[:, None], positions, attention, Cache(prefix, suffix)
            )
            logits = vocabulary_logits(model, params, hidden[:, 0])
            token = jnp.where(done, stops[0], draw(logits, written))
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, written))
            return written + 1, done | jnp.isin(token, stops), tokens, token, suffix

        first = draw(jnp.broadcast_to(logits, (people, logits.shape[-1])), jnp.int32(0))
        tokens = jnp.full((people, steps), stops[0], jnp.int32).at[:, 0].set(first)
        start = (jnp.int32(1), jnp.isin(first, stops), tokens, first, KeysValues(room, room))
        finished: Any = jax.lax.while_loop(unfinished, advance, start)
        return finished[2]

    return jax.jit(decode)
