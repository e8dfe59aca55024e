"""The tasks of research workflows: each step of a paper from the steps before it.

- `workflow/idea`: the key idea, from the context;
- `workflow/method`, `workflow/outcome`, `workflow/impact`, `workflow/title`: likewise, each from
  all before it in this order, as they really are;
- `workflow/steps`: all of them, a paper's steps as one conversation, which is learnt in one pass.

A paper's first known part is given; a step that nobody described is neither asked nor given.  What
several people wrote of a step are references of equal standing, of which later steps are given the
first.  All need "workflows" (`befm_jax.data.literature`); papers are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from befm_jax.data.items import FreeText, Item, Message
from befm_jax.data.literature import ASPECTS, Paper
from befm_jax.data.responses import Sampled
from befm_jax.tasks import Task, register
from befm_jax.tasks.wording import Wording

# Tokens of an answer, where they are not 256.
_LONGEST = {"title": 64}
# The names of the steps that are not those of the aspects.
_STEP_OF = {"key_idea": "idea"}


def steps(row: Paper, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
    """Every known step of a paper, each after those before it."""
    given, *asked = (part for part in (*ASPECTS, "title") if part in row.aspects or part == "title")
    texts = {**row.aspects, "title": (row.title,)}
    name, before = given.replace("_", " ").capitalize(), texts[given][0]
    conversation: tuple[Message, ...] = ()
    for part in asked:
        step = _STEP_OF.get(part, part)
        question = wording(f"workflow/{step}")[-1].text
        if conversation:
            conversation = (*conversation, Message("user", question))
        else:
            conversation = wording("workflow/opening", part=name, text=before, question=question)
        labels = {**row.labels, "person": row.id, "step": step}
        answers, notes = FreeText(_LONGEST.get(step, 256)), {"given": before}
        yield Item(f"{row.id}/{step}", conversation, answers, texts[part], labels, notes)
        before = texts[part][0]
        conversation = (*conversation, Message("assistant", before))


def _only(
    step: str, definition: str
) -> Callable[[Paper, Wording, np.random.Generator], Iterator[Item]]:
    """The items of one step; `definition` is for reports."""

    def items(row: Paper, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
        return (item for item in steps(row, wording, rng) if item.labels["step"] == step)

    items.__doc__ = definition
    return items


_WORKFLOW = partial(Task, needs="workflows", measures=("rouge1", "rougeL", "chrf"), how=Sampled(1))
for _step, _definition in (
    ("idea", "The key idea of a paper, from its context."),
    ("method", "The method of a paper, from its context and key idea."),
    ("outcome", "The outcome of a paper, from its context, key idea and method."),
    ("impact", "The projected impact of a paper, from its context, key idea, method and outcome."),
    ("title", "The title of a paper, from its context, key idea, method, outcome and impact."),
):
    register(_WORKFLOW(f"workflow/{_step}", _only(_step, _definition)))
register(_WORKFLOW("workflow/steps", steps, average="step"))
