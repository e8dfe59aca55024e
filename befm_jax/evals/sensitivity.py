"""Figures of questions that are asked twice, the second time with something changed.

See `befm_jax.tasks.sensitivity`.  Nobody's answers are compared with: a respondent is compared with
itself.  Of its answers to the unchanged question the change makes some wrong; a figure is the share
of these that are not given any more, or how much of the way to where they belong they have moved on
a scale.  So a question whose old answers happen to be right after the
change as well says little, and weighs little.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Num

from befm_jax.data.items import AnswerSet, Item
from befm_jax.data.responses import Response
from befm_jax.errors import DataError
from befm_jax.evals import measures, resampling
from befm_jax.evals.measures import Answered, Floats, Measure
from befm_jax.evals.results import Distribution, Evaluation, Figure, outside_remark
from befm_jax.tasks import Task

# Below this, most of what the change makes wrong stays: the respondent does not read it.
READS = 0.5
Responses = Mapping[str, Response]
Pair = tuple[Item, Item]


def is_check(task: Task) -> bool:
    """Whether a task's figures are those of this module."""
    return all(measures.get(name).level == "check" for name in task.measures)


def evaluate(
    task: Task,
    items: Sequence[Item],
    responses: Responses,
    *,
    respondent: str,
    beside: Mapping[str, Responses] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """How far a respondent's answers follow each change: 0 as before, 1 as the change demands.

    Args:
        task: one of `befm_jax.tasks.sensitivity`.
        items: its items, the changed ones with the notes that are described there.
        responses: the respondent's, by item id.
        respondent: its name.
        beside: responses of others, by name.
        resamples: number of bootstrap resamples; questions are resampled.
        seed: seed of the resamples.

    Returns:
        Figures of the task (the mean over changes), of each change and of each question.  The note
        of a change that the respondent goes on as before at says that it does not read it.

    Raises:
        DataError: no question that was answered with the change and without.
    """
    (measure,) = (measures.get(name) for name in task.measures)
    asked, skipped = _pairs(items, responses)
    pairs = [pair for pair in asked if not any(responses[item.id].empty for item in pair)]
    if not pairs:
        reasons = "; ".join(f"{reason}: {len(ids)}" for reason, ids in skipped.items())
        raise DataError(f"{task.name}: {respondent} answered no question twice ({reasons})")
    sums = {respondent: _sums(measure, pairs, responses)}
    for name, theirs in (beside or {}).items():
        if all(item.id in theirs for pair in pairs for item in pair):
            sums[name] = _sums(measure, pairs, theirs)
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    resampled = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), resamples)
    labels = [changed.labels for _, changed in pairs]

    def figure(where: Mapping[str, str]) -> Figure:
        own = [at for at, of in enumerate(labels) if where.items() <= of.items()]
        by_change = [
            [at for at in own if labels[at]["change"] == change]
            for change in dict.fromkeys(labels[at]["change"] for at in own)
        ]
        values = {
            name: float(_mean(measure, one, np.ones(len(pairs)), by_change))
            for name, one in sums.items()
        }
        value, ends = values.pop(respondent), None
        if len(own) >= resampling.ENOUGH_CLUSTERS:
            replicates = _mean(measure, sums[respondent], resampled, by_change)
            ends = resampling.interval(value, replicates, measure)
        items_asked = {
            item.id for pair in asked if where.items() <= pair[1].labels.items() for item in pair
        }
        answered = [responses[id] for id in sorted(items_asked)]
        stops = [one.ends_after_answer for one in answered if one.ends_after_answer is not None]
        outside = float(np.mean([one.outside for one in answered]))
        known = bool(np.isfinite(value))
        found = Figure(
            task=task.name,
            measure=measure.name,
            level=measure.level,
            respondent=respondent,
            where=dict(where),
            value=value if known else None,
            ci95=ends,
            floor=None,
            ceiling=None,
            skill=None,
            items=len(own),
            people=float(len(own)),
            outside=outside,
            unread=sum(one.unread for one in answered),
            unit=measure.unit,
            draws=sum(one.draws for one in answered),
            ends_after_answer=float(np.mean(stops)) if stops else None,
            beside={name: own if np.isfinite(own) else None for name, own in values.items()},
        )
        what = where.get("change", "")
        unknown = (
            f"shows nothing of {f'the {what}' if what else 'it'}: the change makes hardly any of "
            "its answers wrong"
        )
        remarks = verdict(found) if known else unknown, outside_remark(outside)
        return replace(found, note="; ".join(filter(None, remarks)))

    wheres = [{label: of[label]} for label in (task.average, *task.groups) for of in labels]
    figures = [figure({}), *map(figure, {tuple(w.items()): w for w in wheres}.values())]
    distributions = list(_distributions(task, pairs, responses, respondent))
    return Evaluation(task, respondent, figures, distributions, skipped, resamples, seed)


def verdict(figure: Figure) -> str:
    """What a figure says that its respondent does not read, to follow its name; "" for nothing.

    Where there is an interval, all of it must be below `READS`.
    """
    change, value = figure.where.get("change", ""), figure.value
    if not change or value is None or (figure.ci95 or (value, value))[1] >= READS:
        return ""
    asked = "1 question" if figure.items == 1 else f"{figure.items} questions"
    return (
        f"does not read the {change}: in {asked} its answers go {max(0.0, value):.0%} of the way "
        "that the change demands"
    )


def _pairs(items: Sequence[Item], responses: Responses) -> tuple[list[Pair], dict[str, list[str]]]:
    """The unchanged and the changed item of each question with both responses.

    Also which are in no figure, and why; pairs of which an answer is empty are in both.
    """
    by_id = {item.id: item for item in items}
    pairs: list[Pair] = []
    skipped: dict[str, list[str]] = {}
    for item in items:
        if "changed_from" not in item.notes:
            continue
        pair = by_id[item.notes["changed_from"]], item
        if any(one.id not in responses for one in pair):
            skipped.setdefault("no response", []).append(item.id)
            continue
        pairs.append(pair)
        if any(responses[one.id].empty for one in pair):
            skipped.setdefault("nothing answered is in the answer set", []).append(item.id)
    return pairs, skipped


def _sums(measure: Measure, pairs: Sequence[Pair], responses: Responses) -> Floats:
    """`[P, K]` what the measure sums over the questions."""
    columns = []
    for pair in pairs:
        shares = np.array([responses[item.id].shares for item in pair])
        answered = Answered(None, shares, np.zeros_like(shares), items=pair)
        columns.append(measure.sums(answered).columns.sum(0))
    return np.array(columns)


def _mean(
    measure: Measure,
    sums: Float64[np.ndarray, "P K"],
    weights: Num[np.ndarray, "... P"],
    by_change: Sequence[Sequence[int]],
) -> Floats:
    """`[...]` the mean over changes of which the measure is known; NaN where there is none."""
    of_change = np.array(
        [
            measures.follows_change(weights[..., own] @ sums[own], weights[..., own].sum(-1))
            for own in by_change
        ]
    )
    known = np.isfinite(of_change)
    number = known.sum(0)
    total = np.where(known, of_change, 0.0).sum(0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _distributions(
    task: Task, pairs: Sequence[Pair], responses: Responses, respondent: str
) -> Iterator[Distribution]:
    """The answers to every question, as it is and changed; of people there are none."""
    for item in {item.id: item for pair in pairs for item in pair}.values():
        assert isinstance(item.answers, AnswerSet)
        yield Distribution(
            task.name,
            respondent,
            {"question": item.labels.get("question", item.id)},
            str(item.notes.get("title", item.id)),
            item.answers.unit,
            list(item.answers.names),
            None if item.answers.values is None else list(item.answers.values),
            [0.0] * len(item.answers),
            responses[item.id].shares.tolist(),
        )
