"""A small base model made from nothing, for runs without a checkpoint.

It is taught to answer every question in the right form, and every answer equally often: a base
without any idea of people.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from befm_jax import checksums
from befm_jax.config import Config
from befm_jax.data import games
from befm_jax.data.items import AnswerSet, Example, Item
from befm_jax.data.mixture import Family, Mixture
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes
from befm_jax.llama import tiny
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import damage_named
from befm_jax.tasks import sources
from befm_jax.tasks.games import item_of
from befm_jax.training import loop, outputs
from befm_jax.training import setup as setups
from befm_jax.training.metrics import Watch

# Rows of each family that the tokenizer is trained on, at most.
TOKENIZER_ROWS = 10_000
# The model is taught uniform answers to the first questions of so many rows of each task, at most:
# later ones of a row repeat all before them.
TASK_ROWS, ROW_ITEMS = 25, 4


def make_base(
    settings: Config, families: Sequence[Family], directory: Path, mesh: Mesh, watch: Watch
) -> None:
    """Writes a small model that answers uniformly; its tokenizer is of the families' texts, too.

    Every device of the run holds the whole model.  Without any question to answer its weights stay
    as they were drawn.
    """
    scratch, seed = settings.model.scratch, settings.seed
    examples = uniform_answers(settings)
    answer_texts = (message.text for example in examples for message in example.messages)
    # Every process makes the same tokenizer.
    tokenizer = tiny.train_tokenizer(
        [*answer_texts, *sources.texts(families, TOKENIZER_ROWS)], scratch.pieces
    )
    shape = shape_of(settings, tokenizer)
    params = tiny.init_params(shape, seed, scratch.embedding_scale)
    if examples:
        steps_per_epoch = math.ceil(len(examples) / scratch.answers_per_step)
        replicated = Mesh(mesh.devices.reshape(mesh.shape["slice"], -1, 1, 1), meshes.AXES)
        mixture = Mixture(
            [Family("uniform answers", examples, lambda example, rng: (example,), "")],
            tokenizer,
            slots=settings.data.slots,
            epochs=math.ceil(scratch.steps / steps_per_epoch),
            rows_per_step=scratch.answers_per_step,
            seed=seed,
            **setups.sharding_of("base", replicated),
        )
        setup = setups.from_nothing(settings, shape, replicated, mixture.steps)
        params = loop.run(settings, setup, mixture, None, params, {}, Watch(board=watch.board))
    outputs.write_model(directory, shape, params, tokenizer)
    if processes.is_first():
        with damage_named(directory.parent):
            checksums.add(directory.parent, [directory.name])


def shape_of(settings: Config, tokenizer: Tokenizer) -> LlamaConfig:
    """The configured sizes, with the tokenizer's vocabulary."""
    scratch = settings.model.scratch
    return LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=scratch.width,
        intermediate_size=scratch.feed_forward,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.key_value_heads,
        head_dim=scratch.width // scratch.heads,
        max_position_embeddings=settings.data.slots,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.stop_ids,
    )


def uniform_answers(settings: Config) -> list[Example]:
    """Every answer to every game, and to some questions of the other tasks, equally often.

    Every question counts alike, however many answers it has.
    """
    selected = games.select(settings.data.games) if settings.data.games else []
    items = [item_of(game) for game in selected]
    data = settings.data
    for source in sources.select(data.tasks, selected, data.humans, data.wording):
        rows = source.rows.rows[:TASK_ROWS]
        some = replace(source, rows=replace(source.rows, rows=rows))
        items += some.items(per_row=ROW_ITEMS)
    return [example for item in items for example in _uniformly(item)]


def _uniformly(item: Item) -> Iterator[Example]:
    if isinstance(item.answers, AnswerSet):
        shares = np.full(len(item.answers), 1 / len(item.answers))
        yield from replace(item, target=shares).examples()
