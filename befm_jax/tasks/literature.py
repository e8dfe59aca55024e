"""The tasks of papers' titles and abstracts.

- `literature/abstract`: the abstract from the title, for training;
- `literature/title`: the title from the abstract.

Both need "abstracts" (`befm_jax.data.literature`); papers are what is resampled.  Figures by year
stand beside those of all: what was published before a model was made, it may have read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from befm_jax.data.items import FreeText, Item
from befm_jax.data.literature import Paper
from befm_jax.data.responses import Sampled
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording


def abstract(row: Paper, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """A paper's abstract, from its title."""
    prompt = wording("literature/abstract", title=row.title)
    labels, notes = {**row.labels, "person": row.id}, {"given": row.title}
    yield Item(row.id, prompt, FreeText(512), (row.abstract,), labels, notes)


def title(row: Paper, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """A paper's title, from its abstract."""
    prompt = wording("literature/title", abstract=row.abstract)
    labels, notes = {**row.labels, "person": row.id}, {"given": row.abstract}
    yield Item(row.id, prompt, FreeText(64), (row.title,), labels, notes)


_LITERATURE = partial(
    Task,
    needs="abstracts",
    measures=("rouge1", "rougeL", "chrf"),
    groups=("year",),
    how=Sampled(1),
)
register(_LITERATURE("literature/abstract", abstract))
register(_LITERATURE("literature/title", title))
