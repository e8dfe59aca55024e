"""Small random models of ours, and real game prompts in their tokens, for tests."""

import dataclasses
from functools import lru_cache

import numpy as np

from befm_jax.data import choices, games
from befm_jax.data.forest import Path
from befm_jax.data.pipeline import encode
from befm_jax.llama import tiny
from befm_jax.llama.config import LlamaConfig, RopeScaling
from befm_jax.llama.model import Llama

SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    eos_token_id=(1,),
)


def small_model(seed: int = 0, **fields):
    """A model and its parameters; embeddings large enough that its choices are not uniform."""
    config = dataclasses.replace(SMALL, **fields)
    return Llama(config), tiny.init_params(config, seed, embedding_scale=0.5)


@lru_cache(maxsize=1)
def game_tokenizer():
    """The tiny tokenizer of all games' texts."""
    chosen = [games.get(name) for name in games.ids()]
    return tiny.train_tokenizer(
        text for game in chosen for text in (*game.prompt(), game.answers.format(1))
    )


def real_paths(seed: int = 0, observations: int = 40) -> list[Path]:
    """Real people's choices in real prompts: a draw from the embedded reference."""
    chosen = [games.get(name) for name in games.ids()]
    examples = choices.examples(choices.reference(chosen), chosen)
    weights = np.array([example.weight for example in examples])
    drawn = np.random.default_rng(seed).multinomial(observations, weights / weights.sum())
    picked = [
        dataclasses.replace(example, weight=float(count))
        for example, count in zip(examples, drawn, strict=True)
        if count
    ]
    return encode(picked, game_tokenizer())


def random_paths(seed: int, count: int = 24, vocabulary: int = 97) -> list[Path]:
    """Random tries: a few prompts, some inside others, with answers that share beginnings."""
    random = np.random.default_rng(seed)
    stem = tuple(random.integers(2, vocabulary, 12).tolist())
    paths = []
    for _ in range(count):
        prompt = stem[: random.integers(3, 12)] + tuple(random.integers(2, 5, 2).tolist())
        answer = (*random.integers(2, 5, random.integers(1, 5)).tolist(), 1)
        paths.append(Path(prompt, answer, float(random.integers(1, 9))))
    return paths
