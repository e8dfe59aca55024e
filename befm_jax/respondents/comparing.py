"""Asks respondents the items of a task, with a progress bar, and compares them with people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from befm_jax.data.items import Item
from befm_jax.data.responses import Exact, How, Respondent, Response, ResponseFile, Sampled
from befm_jax.distributed import processes
from befm_jax.errors import DataError
from befm_jax.evals import play as played
from befm_jax.evals import sensitivity
from befm_jax.evals.evaluate import UNIFORM, evaluate
from befm_jax.evals.results import Results
from befm_jax.respondents import baselines, strategies
from befm_jax.tasks import Task, play, repeated
from befm_jax.tasks.sources import Source

NamedRespondent = tuple[str, Respondent, How]
# Baselines are fitted on at most this number of items: 2,000 people's 50 answers each.
_TRAINING_ITEMS = 100_000


def ask(
    respondent: Respondent, items: Sequence[Item], how: How, path: Path | None = None
) -> dict[str, Response]:
    """Every item's response, by the item's id; process 0 shows a progress bar.

    With `path` each response is written to that `responses.jsonl` as it is done, and only items
    that are missing there are asked.

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
    items: Sequence[Item], training: Sequence[Item], task: Task
) -> dict[str, Mapping[str, Response]]:
    """The responses of the baselines to the items that they can answer, by baseline and item.

    `training`: the task's items that they are fitted on.
    """
    by_baseline: dict[str, Mapping[str, Response]] = {}
    for name in baselines.DEFINITIONS:
        fitted = baselines.fit(name, training, task.average, task.groups)
        served = [item for item in items if fitted.serves(item)]
        if served:
            responses = fitted.respond(served, Exact())
            by_baseline[name] = {response.item: response for response in responses}
    return by_baseline


def compare(
    results: Results,
    held_out: Source,
    learnt: Source,
    asked: Sequence[NamedRespondent],
    *,
    resamples: int,
    seed: int,
    folder: Path | None = None,
    warning: str = "",
) -> None:
    """Adds every respondent's figures on one task to results.

    Args:
        results: the results to extend.
        held_out: the task, and the people to compare with.
        learnt: the people on whom the baselines are fitted.
        asked: respondents with their names and how each is asked.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples, and of what is drawn in a task that is played.
        folder: the directory of `RESPONDENT.TASK.responses.jsonl`, since ids of items are unique in
            a task alone, and of a played task's `RESPONDENT.TASK.trajectories.jsonl`; None: not
            written.
        warning: printed before the respondents' figures.

    Raises:
        DataError: a respondent that can't be compared, if it is exact or without answers.  One
            whose draws are all outside the answer sets, as an undertrained model's may be, is noted
            in `results.extra` instead.
    """
    if held_out.task.episodes is not None:
        _compare_played(results, held_out, asked, resamples, seed, folder, warning)
        return
    evaluated = sensitivity.evaluate if sensitivity.is_check(held_out.task) else evaluate
    items, training = held_out.items(), learnt.items(most=_TRAINING_ITEMS)
    others = beside(items, training, held_out.task)
    _define(results, held_out.task.name, {name: baselines.DEFINITIONS[name] for name in others})
    known = held_out.rows.split in ("all", learnt.rows.split)
    results.people[held_out.task.name] = held_out.record() | {
        "left_out": dict(held_out.rows.left_out.counts),
        "in_sample": [name for name in others if known and name in baselines.FITTED],
    }
    for name, respondent, how in asked:
        file = f"{file_name(name)}.{file_name(held_out.task.name)}.responses.jsonl"
        path = None if folder is None else folder / file
        serves = getattr(respondent, "serves", None)
        served = items if serves is None else [item for item in items if serves(item)]
        responses = ask(respondent, served, how, path)
        try:
            evaluation = evaluated(
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
        results.add(evaluation, _description(respondent, items), how, warning)


def questions(held_out: Source, how: How, seed: int) -> tuple[list[Item], How]:
    """The questions of a task, and how each is asked.

    Of a task that is played: those which somebody who answers uniformly would be asked, as many and
    as long as the respondent's.
    """
    if held_out.task.episodes is None:
        return held_out.items(), how
    listed = _Listed(strategies.ALL[UNIFORM], [])
    who: dict[str, Respondent] = {**strategies.ALL, play.RESPONDENT: listed}
    play.play(who, held_out.episodes(seed), Exact(), seed)
    return listed.items, replace(how, n=1) if isinstance(how, Sampled) else how


def _compare_played(
    results: Results,
    held_out: Source,
    asked: Sequence[NamedRespondent],
    resamples: int,
    seed: int,
    folder: Path | None,
    warning: str,
) -> None:
    """As `compare`, for a task that is played: strategies are its baselines."""
    task = held_out.task
    openings = held_out.items()

    def game(respondent: Respondent, how: How) -> list[play.Trajectory]:
        who = {**strategies.ALL, play.RESPONDENT: respondent}
        return play.play(who, held_out.episodes(seed), how, seed)

    others = {
        name: game(strategy, Exact())
        for name, strategy in strategies.ALL.items()
        if all(map(strategy.serves, openings))
    }
    _define(results, task.name, {name: strategies.DEFINITIONS[name] for name in others})
    results.people[task.name] = held_out.record() | {
        "left_out": dict(held_out.rows.left_out.counts),
        "in_sample": [],
    }
    people = played.People.of(repeated.observed(held_out.rows.rows))
    for name, respondent, asked_how in asked:
        # One move at a time is drawn.
        how = replace(asked_how, n=1) if isinstance(asked_how, Sampled) else asked_how
        stem = f"{file_name(name)}.{file_name(task.name)}"
        path = None if folder is None else folder / f"{stem}.responses.jsonl"
        trajectories = game(_Kept(respondent, path), how)
        if folder is not None:
            file = folder / f"{stem}.trajectories.jsonl"
            play.write(file, trajectories, respondent.describe(), how)
        evaluation = played.evaluate(
            task,
            trajectories,
            respondent=name,
            people=people,
            beside=others,
            sampled=isinstance(how, Sampled),
            resamples=resamples,
            seed=seed,
        )
        results.add(evaluation, _description(respondent, openings), how, warning)


def _define(results: Results, task: str, definitions: Mapping[str, str]) -> None:
    """Adds definitions of what stands beside figures; a name may mean another thing elsewhere."""
    for name, definition in definitions.items():
        before = results.beside.setdefault(name, definition)
        if definition not in before:
            results.beside[name] = f"{before} In {task}: {definition}"


@dataclass(frozen=True)
class _Listed:
    """A respondent whose questions are listed."""

    respondent: Respondent
    items: list[Item]

    @property
    def name(self) -> str:
        return self.respondent.name

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        self.items.extend(items)
        yield from self.respondent.respond(items, how)

    def describe(self) -> dict[str, Any]:
        return self.respondent.describe()


@dataclass(frozen=True)
class _Kept:
    """A respondent that is asked with `ask`: what it has answered before is in a file."""

    respondent: Respondent
    path: Path | None

    @property
    def name(self) -> str:
        return self.respondent.name

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        yield from ask(self.respondent, items, how, self.path).values()

    def describe(self) -> dict[str, Any]:
        return self.respondent.describe()


def _description(respondent: Respondent, items: Sequence[Item]) -> dict[str, Any]:
    """A respondent's metadata, with the first prompt of an engine."""
    first_prompt = getattr(respondent, "first_prompt", None)
    prompt = {} if first_prompt is None else {"first_prompt": first_prompt(items)}
    return respondent.describe() | prompt


def file_name(name: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
