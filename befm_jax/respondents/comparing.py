"""Respondents compared with people on a task: asked, with a progress bar, and evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from befm_jax.data.items import Item
from befm_jax.data.responses import Exact, How, Respondent, Response, ResponseFile
from befm_jax.distributed import processes
from befm_jax.errors import DataError
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.results import Results
from befm_jax.respondents import baselines
from befm_jax.tasks.sources import Source

Asked = tuple[str, Respondent, How]


def ask(
    respondent: Respondent, items: Sequence[Item], how: How, path: Path | None = None
) -> dict[str, Response]:
    """Every item's response; of several processes the first shows a progress bar.

    With `path` each response is written to that `responses.jsonl` as it is done, and only what is
    missing there is asked for.

    Raises:
        DataError: see `Respondent.respond` and `ResponseFile`.
    """
    each: Iterable[Response]
    if path is None:
        each = respondent.respond(items, how)
    else:
        each = ResponseFile(path, respondent.describe(), how).complete(respondent, items, how)
    bar = tqdm(
        each, desc=respondent.name, unit="item", total=len(items), disable=not processes.is_first()
    )
    return {response.item: response for response in bar}


def beside(
    items: Sequence[Item], training: Sequence[Item], question: str
) -> dict[str, Mapping[str, Response]]:
    """What each baseline that can answer these items answers, fitted on training people.

    `question`: the label that items which ask the same question share.
    """
    found: dict[str, Mapping[str, Response]] = {}
    for name in baselines.DEFINITIONS:
        fitted = baselines.fit(name, training, question)
        served = [item for item in items if fitted.serves(item)]
        if served:
            found[name] = {one.item: one for one in fitted.respond(served, Exact())}
    return found


def compare(
    results: Results,
    held_out: Source,
    learnt: Source,
    asked: Sequence[Asked],
    *,
    resamples: int,
    seed: int,
    folder: Path | None = None,
    warning: str = "",
) -> None:
    """Adds to results what every respondent scores on one task.

    Args:
        results: what is added to.
        held_out: the task and the people who are compared with.
        learnt: the people whom the baselines are fitted on.
        asked: names, respondents and how each is asked.
        resamples: of the bootstrap.
        seed: of the resamples.
        folder: where `responses.jsonl` of each respondent is kept; None: nowhere.
        warning: what a reader must know before the figures of the respondents.

    Raises:
        DataError: an exact respondent, or one without answers here, that cannot be compared.
            Draws that all miss the answer sets, as a model that has learnt little may give, are
            told of in `results.extra`.
    """
    items = held_out.items()
    others = beside(items, learnt.items(), held_out.task.average)
    results.beside.update({name: baselines.DEFINITIONS[name] for name in others})
    results.people[held_out.task.name] = held_out.record() | {
        "left_out": dict(held_out.rows.left_out.counts)
    }
    for name, respondent, how in asked:
        path = None if folder is None else folder / f"{_file_name(name)}.responses.jsonl"
        serves = getattr(respondent, "serves", None)
        asked_of = items if serves is None else [item for item in items if serves(item)]
        responses = ask(respondent, asked_of, how, path)
        try:
            found = evaluate(
                held_out.task,
                items,
                responses,
                respondent=name,
                beside=others,
                resamples=resamples,
                seed=seed,
            )
        except DataError as error:
            if not responses or all(response.exact for response in responses.values()):
                raise
            results.extra.setdefault("not_compared", {})[name] = str(error)
            continue
        results.add(found, _description(respondent, items), how, warning)


def _description(respondent: Respondent, items: Sequence[Item]) -> dict[str, Any]:
    """What a respondent says of itself, and the first prompt as a model of ours reads it."""
    first_prompt = getattr(respondent, "first_prompt", None)
    shown = {} if first_prompt is None else {"first_prompt": first_prompt(items)}
    return respondent.describe() | shown


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
