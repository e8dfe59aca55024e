"""Small random models of ours, and real game prompts in their tokens, for tests."""

import dataclasses
from functools import lru_cache

import numpy as np

from befm_jax.data import choices, games
from befm_jax.data.forest import Encoded
from befm_jax.data.items import Example, Message
from befm_jax.data.mixture import Family, Mixture
from befm_jax.data.pipeline import encode
from befm_jax.llama import tiny
from befm_jax.llama.config import LlamaConfig, RopeScaling
from befm_jax.llama.model import Llama
from befm_jax.tasks.games import item_of

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
        text
        for game in chosen
        for text in (*(message.text for message in game.prompt()), game.answers.written[1])
    )


def real_paths(seed: int = 0, observations: int = 40) -> list[Encoded]:
    """Real people's choices in real prompts: a draw from the embedded reference."""
    chosen = [games.get(name) for name in games.ids()]
    counts = choices.histograms(choices.read("", chosen), chosen)
    examples = [one for game in chosen for one in item_of(game, counts[game.id]).examples()]
    weights = np.array([example.weight for example in examples])
    drawn = np.random.default_rng(seed).multinomial(observations, weights / weights.sum())
    picked = [
        dataclasses.replace(example, weight=float(count))
        for example, count in zip(examples, drawn, strict=True)
        if count
    ]
    return encode(picked, game_tokenizer())


def random_paths(seed: int, count: int = 24, vocabulary: int = 97) -> list[Encoded]:
    """Random tries: a few prompts, some inside others, with answers that share beginnings."""
    random = np.random.default_rng(seed)
    stem = tuple(random.integers(2, vocabulary, 12).tolist())
    paths = []
    for _ in range(count):
        prompt = stem[: random.integers(3, 12)] + tuple(random.integers(2, 5, 2).tolist())
        answer = (*random.integers(2, 5, random.integers(1, 5)).tolist(), 1)
        paths.append(Encoded.of(prompt, answer, float(random.integers(1, 9))))
    return paths


def prompt_and_answer(one: Encoded) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two parts of a conversation of one learnt span."""
    ((start, stop),) = one.learnt
    return one.ids[:start], one.ids[start:stop]


def random_conversations(seed: int, count: int = 24, vocabulary: int = 97) -> list[Encoded]:
    """Random conversations with many spans, at the start and the end too, of positive and negative
    worth and none; some inside others."""
    random = np.random.default_rng(seed)
    stem = tuple(random.integers(2, 6, 40).tolist())
    found = []
    for _ in range(count):
        ids = stem[: random.integers(3, 20)] + tuple(random.integers(2, vocabulary, 9).tolist())
        edges = np.sort(random.choice(np.arange(1, len(ids) + 1), 6, replace=False)).tolist()
        if random.random() < 0.5:
            edges[0], edges[-1] = 1, len(ids)
        spans = tuple(zip(edges[::2], edges[1::2], strict=True))
        scale = float(random.choice([1.0, 0.25, 0.0, -0.5]))
        found.append(Encoded(ids, spans, float(random.integers(1, 9)), scale))
    return found


def asked(system: str, user: str) -> tuple[Message, ...]:
    """The messages of a question; an empty `system` is none."""
    given = (Message("system", system),) if system else ()
    return (*given, Message("user", user))


def mixture_of(conversations: list[Encoded], **options) -> Mixture:
    """The batches of a run on conversations that are encoded already, one a row."""

    class Known:
        def encode_batch(self, wanted):
            found = [conversations[int(messages[-1].text)] for messages, _ in wanted]
            return [(one.ids, one.learnt) for one in found]

    def examples(number, rng):
        yield Example.of("", "number", str(number), conversations[number].observations)

    family = Family("known", range(len(conversations)), examples, "")
    return Mixture([family], Known(), **options)
