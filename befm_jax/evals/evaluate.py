"""Compares a respondent's responses to a task's items with people: figures with intervals.

Items are of two kinds, and a task may have both:

- items of persons: the label `task.cluster` identifies the person, or the item is one observation
  and a cluster of its own (a question with its key).  The bootstrap resamples clusters, the same
  for every item, measure, group and respondent;
- histograms of anonymous people: resampled each within itself.

Within a value of the label `task.average` every person has equal weight; in the mean over its
values every value has.  Without such a label each histogram is a value, and so are all persons
together.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from befm_jax.data.items import AnswerSet, FreeText, Item
from befm_jax.data.responses import Response
from befm_jax.errors import DataError
from befm_jax.evals import measures, resampling, text_measures
from befm_jax.evals.measures import Answered, Floats, Measure, Side, Sums
from befm_jax.evals.resampling import ClusterSums, Resampled
from befm_jax.evals.results import (
    Distribution,
    Evaluation,
    Figure,
    outside_remark,
)
from befm_jax.tasks import Task

UNIFORM = "uniform"
Responses = Mapping[str, Response]


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
    """Compares a respondent with people on every item that both have answered.

    Args:
        task: the measures, average, clusters and groups.
        items: the task's items.
        responses: the respondent's, by item id.
        respondent: its name.
        beside: responses of others, by name; their figures have no intervals.  "uniform" is the
            zero of skill.
        resamples: number of bootstrap resamples, at least 2.
        seed: seed of the resamples.  A histogram's depend on its id alone, those of persons on the
            task and the number of its clusters, so they are the same for all respondents.

    Returns:
        Figures of the task, of each value of `task.average`, and of each value of each of
        `task.groups`; undefined values are None, with a note.

    Raises:
        DataError: no item that can be compared; a response that does not fit its item; responses
            of which some are exact and some drawn; an unknown measure.
        ValueError: a negative seed, or fewer than two resamples.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; it must be at least 2")
    task_measures = [measures.get(name) for name in task.measures]
    skipped: dict[str, list[str]] = {}
    answered = []
    clusters = 0
    for item, people, cluster in _with_clusters(task, items):
        clusters = max(clusters, cluster + 1)
        reason = _not_compared(item, people, responses.get(item.id))
        if reason:
            skipped.setdefault(reason, []).append(item.id)
        if reason in ("", _NOTHING_INSIDE):
            answered.append(_Joined(item, responses[item.id], people, cluster, not reason))
    compared = [joined for joined in answered if joined.inside]
    if not compared:
        reasons = "; ".join(f"{reason}: {len(ids)}" for reason, ids in skipped.items())
        raise DataError(f"{task.name}: no item to compare {respondent} with people on ({reasons})")
    if len({joined.response.exact for joined in compared}) > 1:
        raise DataError(
            f"{respondent}: some responses are exact and some drawn; evaluate each kind separately"
        )
    few = _of_few(task, compared)
    for joined in (joined for joined in answered if joined.item.labels.get(task.average) in few):
        reason = f"fewer than {task.least} people of its {task.average}"
        skipped.setdefault(reason, []).append(joined.item.id)
    answered = [joined for joined in answered if joined.item.labels.get(task.average) not in few]
    parts = [_Part({}, task.average, answered)]
    for label in task.groups:
        members: dict[str, list[_Joined]] = {}
        for joined in answered:
            if label in joined.item.labels:
                members.setdefault(joined.item.labels[label], []).append(joined)
        parts += [_Part({label: value}, task.average, own) for value, own in members.items()]
    parts = [part for part in parts if part.leaves]
    run = _Run(task, respondent, beside or {}, task_measures, resamples, seed)
    run.resample(parts, clusters)
    figures = []
    for part in parts:
        figures += run.figures(part.where, part, part.leaves, part.replicates[:, part.present])
        for leaf in part.leaves:
            if leaf.replicates is not None:
                figures += run.figures(leaf.where, part, [leaf], leaf.replicates[:, leaf.present])
    distributions = list(run.distributions(parts[0].leaves))
    return Evaluation(task, respondent, figures, distributions, skipped, resamples, seed)


_NOTHING_INSIDE = "nothing answered is in the answer set"


class _Joined(NamedTuple):
    """An item with its response.

    Attributes:
        item: the item.
        response: the respondent's.
        people: the number of observations in the target.
        cluster: the index of the person; -1: a histogram of anonymous people.
        inside: whether it can be compared: some answer is in the answer set.
    """

    item: Item
    response: Response
    people: float
    cluster: int
    inside: bool


def _not_compared(item: Item, people: float, response: Response | None) -> str:
    """The reason why an item is not compared; "" if it is.

    Raises:
        DataError: a response with another number of answers.
    """
    if not people:
        return "no people to compare with"
    if response is None:
        return "no response"
    if isinstance(item.answers, FreeText):
        return "" if response.texts else "no text"
    if response.weights is None:
        return "a text where an answer of a set is needed"
    if len(response.weights) != len(item.answers):
        raise DataError(
            f"item {item.id}: has {len(item.answers)} answers, but its response "
            f"{len(response.weights)} weights"
        )
    return "" if response.weights.any() else _NOTHING_INSIDE


def _of_few(task: Task, compared: Sequence[_Joined]) -> set[str]:
    """The values of `task.average` with fewer people than `task.least`.

    Raises:
        DataError: all of them.
    """
    people: dict[str, float] = {}
    for joined in compared:
        value = joined.item.labels.get(task.average, "")
        people[value] = people.get(value, 0.0) + joined.people
    few = {value for value, number in people.items() if number < task.least}
    if len(few) == len(people):
        raise DataError(f"{task.name}: no {task.average} with {task.least} people or more")
    return few


def _observations(item: Item) -> float:
    """The number of observations in an item's target; 1 for reference texts.

    1, too, for an arm of a published effect, of which nobody's answers are known.
    """
    if isinstance(item.target, np.ndarray):
        return float(item.target.sum())
    return 1.0 if item.target or _is_arm(item) else 0.0


def _is_arm(item: Item) -> bool:
    return item.target is None and "published" in item.notes


def _with_clusters(task: Task, items: Iterable[Item]) -> Iterator[tuple[Item, float, int]]:
    """Each item with its observations and the index of its cluster; -1 for histograms.

    Unanswered items have indices too, so that all respondents have the same resamples.
    """
    numbers: dict[tuple[str, str], int] = {}
    for item in items:
        people = _observations(item)
        if task.cluster in item.labels:
            cluster = numbers.setdefault((task.cluster, item.labels[task.cluster]), len(numbers))
        elif people <= 1.0:
            cluster = numbers.setdefault(("", item.id), len(numbers))
        else:
            cluster = -1
        yield item, people, cluster


def _answered(joined: Sequence[_Joined]) -> Answered:
    """Joined items of one answer set, or arms of effects, as arrays."""
    items = tuple(one.item for one in joined)
    exact, answers = joined[0].response.exact, items[0].answers
    if isinstance(answers, FreeText):
        empty = np.zeros((len(items), 0))
        texts = tuple(one.response.texts for one in joined)
        references = tuple(tuple(map(str, item.target or ())) for item in items)
        return Answered(None, empty, empty, exact, items, texts, references)
    if _is_arm(items[0]):
        padded = np.zeros((len(items), max(len(item.answers) for item in items)))  # type: ignore[arg-type]
        for row, one in zip(padded, joined, strict=True):
            shares = np.asarray(one.response.weights)
            row[: len(shares)] = shares
        return Answered(None, padded, np.ones((len(items), 1)), exact, items)
    model = np.concatenate([np.asarray(one.response.weights) for one in joined])
    target = np.concatenate([np.asarray(item.target) for item in items])
    shape = len(items), len(answers)
    values = None if answers.values is None else np.array(answers.values)
    return Answered(values, model.reshape(shape), target.reshape(shape), exact, items)


def _why_not(measure: Measure, joined: Sequence[_Joined], persons: bool) -> str:
    """The reason why a measure is undefined for some items; "" if it is defined."""
    answers = joined[0].item.answers
    answers_are_closed = isinstance(answers, AnswerSet)
    if answers_are_closed == (measure.name in text_measures.NAMES):
        return f"it is a measure of {'texts' if answers_are_closed else 'closed answers'}"
    if lacking := text_measures.without(measure.name):
        return lacking
    if measure.note and any(measure.note not in one.item.notes for one in joined):
        return f"it needs {measure.note} in the notes of items"
    if _is_arm(joined[0].item) and measure.note != "published":
        return "nobody's answers are known"
    if measure.ordered and isinstance(answers, AnswerSet) and answers.values is None:
        return "the answers have no order"
    return "" if persons or measure.kernel else "it needs answers person by person"


class _Leaf:
    """The items of one value of the label that is averaged over.

    Attributes:
        where: the value, as in `Figure`; {} without a label.
        answered: every item with a target and a response.
        compared: those that can be compared.
        people: their observations.
        tables: items of clusters, one list per answer set; arms of effects are one list.
        histograms: items of anonymous people.
        sums: each table's, of the respondent.
        points: `[M]` figures of every respondent, by name.
        references: `[M, 2]` floors and ceilings.
        replicates: `[M, R]`, where the leaf is reported by itself.
        present: `[R]` whether a resample is not empty.
    """

    present: NDArray[np.bool_]
    sums: list[_TableSums]
    points: dict[str, Floats]
    references: Floats
    replicates: Floats | None = None

    def __init__(self, where: Mapping[str, str], answered: Sequence[_Joined]) -> None:
        self.where, self.answered = where, answered
        self.compared = [one for one in answered if one.inside]
        self.people = sum(one.people for one in self.compared)
        self.histograms = [one for one in self.compared if one.cluster < 0]
        tables: dict[AnswerSet | FreeText | None, list[_Joined]] = {}
        for one in self.compared:
            if one.cluster >= 0:
                # FreeText sets with different max_tokens are one table, and so are all arms.
                answers = one.item.answers
                key = FreeText() if isinstance(answers, FreeText) else answers
                tables.setdefault(None if _is_arm(one.item) else key, []).append(one)
        self.tables = list(tables.values())

    @cached_property
    def outside(self) -> float:
        """Share of answers outside the answer sets."""
        return _weighted([(one.people, one.response.outside) for one in self.answered])

    @cached_property
    def people_spread(self) -> float:
        """E|Y - Y'| of two people's answers in points, where every answer set has an order."""
        spreads = []
        for table in (*self.tables, *([one] for one in self.histograms)):
            answered = _answered(table)
            assert answered.values is not None
            people = Side("people", answered.values, answered.target.sum(0), exact=False)
            spreads.append((float(answered.people.sum()), 2.0 * float(people.spread)))
        return _weighted(spreads)

    @cached_property
    def ends_after_answer(self) -> float | None:
        """The share of answers after which the turn ends, or None where unknown."""
        known = [
            (one.people, one.response.ends_after_answer)
            for one in self.answered
            if one.response.ends_after_answer is not None
        ]
        return _weighted(known) if known else None


class _Part:
    """A task's items, or those of one group, by the values that are averaged over.

    Attributes:
        where: the group; {}: all items.
        all_leaves: all values.
        leaves: the values with items that can be compared.
        replicates: `[M, R]` of the mean over leaves.
        present: `[R]` whether a resample is not empty.
    """

    replicates: Floats
    present: NDArray[np.bool_]

    def __init__(self, where: Mapping[str, str], average: str, answered: Sequence[_Joined]) -> None:
        self.where = where
        by_value: dict[tuple[str, str], list[_Joined]] = {}
        for one in answered:
            key = ("", "")
            if average:
                key = (average, one.item.labels.get(average, ""))
            elif one.cluster < 0:
                key = ("item", one.item.id)
            by_value.setdefault(key, []).append(one)
        self.all_leaves = [
            _Leaf({label: value} if label else {}, own) for (label, value), own in by_value.items()
        ]
        self.leaves = [leaf for leaf in self.all_leaves if leaf.compared]


@dataclass(eq=False)
class _Run:
    """The state of one evaluation: `M` measures, `R` resamples."""

    task: Task
    respondent: str
    beside: Mapping[str, Responses]
    measures: list[Measure]
    resamples: int
    seed: int
    histograms: dict[str, dict[str, Resampled]] = field(default_factory=dict)

    def rng(self, name: str) -> np.random.Generator:
        """A generator seeded by the seed and a name."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def resample(self, parts: Sequence[_Part], clusters: int) -> None:
        """Fills in every part's replicates, and those of the leaves of the first part."""
        self._resample_histograms([item for leaf in parts[0].leaves for item in leaf.histograms])
        shape = (len(self.measures), self.resamples)
        for leaf in (leaf for part in parts for leaf in part.leaves):
            leaf.sums = [self._sums(table) for table in leaf.tables]
            leaf.references = self._references(leaf)
            leaf.points = {self.respondent: self._points(leaf)}
            for name, responses in self.beside.items():
                leaf.points[name] = self._beside(leaf, responses)
        tables = [[table for leaf in part.leaves for table in leaf.sums] for part in parts]
        sums = [
            ClusterSums(
                [
                    np.array([one.cluster for one in table])
                    for leaf in part.leaves
                    for table in leaf.tables
                ],
                [one.columns for one in of_part],
            )
            for part, of_part in zip(parts, tables, strict=True)
        ]
        for part in parts:
            part.replicates, part.present = np.empty(shape), np.empty(self.resamples, bool)
            for leaf in part.leaves:
                if leaf.where and not part.where:
                    leaf.replicates, leaf.present = np.empty(shape), np.empty(self.resamples, bool)
        everything = iter([(slice(0, self.resamples), np.empty((self.resamples, 0), np.float32))])
        blocks = (
            resampling.draw_clusters(self.rng(self.task.name), clusters, self.resamples)
            if clusters
            else everything
        )
        for rows, weights in blocks:
            for part, own in zip(parts, sums, strict=True):
                of_tables = iter(own.under(weights))
                total = np.zeros((shape[0], rows.stop - rows.start))
                leaves = np.zeros(rows.stop - rows.start)
                for leaf in part.leaves:
                    figures, present = self._of_leaf(leaf, of_tables, rows)
                    # Where a resample holds nobody of a value, the mean is over the others.
                    total += np.where(present, figures, 0.0)
                    leaves += present
                    if leaf.replicates is not None:
                        leaf.replicates[:, rows], leaf.present[rows] = figures, present
                part.present[rows] = leaves > 0
                part.replicates[:, rows] = total / np.maximum(leaves, 1.0)

    def _resample_histograms(self, histograms: Sequence[_Joined]) -> None:
        def compared(one: _Joined) -> dict[str, Resampled]:
            answered = _answered([one])
            return resampling.compare(
                answered.pair.model.values,
                answered.model[0],
                answered.target[0],
                exact=answered.exact,
                resamples=self.resamples,
                rng=self.rng(one.item.id),
                measures=[known for known in self.measures if not _why_not(known, [one], False)],
            )

        # In threads: NumPy releases the GIL.  The longest first, for even load.
        longest_first = sorted(
            histograms, key=lambda one: -np.count_nonzero(np.asarray(one.item.target))
        )
        with ThreadPoolExecutor(os.cpu_count(), "bootstrap") as threads:
            resampled = list(threads.map(compared, longest_first))
        ids = [one.item.id for one in longest_first]
        self.histograms = dict(zip(ids, resampled, strict=True))

    def _of_leaf(
        self, leaf: _Leaf, of_tables: Iterator[list[Floats]], rows: slice
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """A leaf's measures `[M, rows]` in these resamples, and `[rows]` which are not empty."""
        figures = np.zeros((len(self.measures), rows.stop - rows.start))
        people = np.zeros(rows.stop - rows.start)
        for table in leaf.sums:
            sums = next(of_tables)
            number = sums[0][:, 0]
            # An answer set may be absent from a resample in which others of the leaf are present.
            figures += np.where(number > 0.5, number * table.finished(sums, number), 0.0)
            people += number
        for one in leaf.histograms:
            of_item = self.histograms[one.item.id]
            for place, measure in enumerate(self.measures):
                known = of_item.get(measure.name)
                figures[place] += np.nan if known is None else one.people * known.replicates[rows]
            people += one.people
        present = people > 0.5
        return figures / np.where(present, people, 1.0), present

    def _sums(self, table: Sequence[_Joined]) -> _TableSums:
        answered = _answered(table)
        return _TableSums(
            answered,
            [None if _why_not(one, table, True) else one.sums(answered) for one in self.measures],
        )

    def _beside(self, leaf: _Leaf, responses: Responses) -> Floats:
        """A leaf's measures `[M]` of another respondent; NaN where a response is missing."""
        own = []
        for one in leaf.compared:
            response = responses.get(one.item.id)
            if response is None or _not_compared(one.item, one.people, response):
                return np.full(len(self.measures), np.nan)
            own.append(one._replace(response=response))
        theirs = _Leaf(leaf.where, own)
        theirs.sums = [self._sums(table) for table in theirs.tables]
        return self._points(theirs)

    def _points(self, leaf: _Leaf) -> Floats:
        """A leaf's measures `[M]`."""
        total = np.zeros(len(self.measures))
        for table in leaf.sums:
            number = table.answered.people.sum()
            total += number * table.finished([block.sum(0) for block in table.columns], number)
        for one in leaf.histograms:
            pair = _answered([one]).pair
            for place, measure in enumerate(self.measures):
                kernel = None if _why_not(measure, [one], False) else measure.kernel
                total[place] += one.people * kernel(pair)[0] if kernel else np.nan
        return total / leaf.people

    def _references(self, leaf: _Leaf) -> Float64[np.ndarray, "M 2"]:
        """Each measure's floor and ceiling; NaN where unknown."""
        total = np.zeros((len(self.measures), 2))
        unknown = (np.nan, np.nan)
        for table, sums in zip(leaf.tables, leaf.sums, strict=True):
            known = [one for one in self.measures if not _why_not(one, table, True)]
            rng = self.rng(f"{self.task.name}/{table[0].item.id}/{len(table)}")
            points = resampling.reference_points(rng, sums.answered, known)
            for place, measure in enumerate(self.measures):
                ends = points.get(measure.name, unknown)
                total[place] += sums.answered.people.sum() * np.array(ends)
        for one in leaf.histograms:
            of_item = self.histograms[one.item.id]
            for place, measure in enumerate(self.measures):
                own = of_item.get(measure.name)
                ends = (own.floor, own.ceiling) if own else unknown
                total[place] += one.people * np.array(ends)
        return total / leaf.people

    def figures(
        self,
        where: Mapping[str, str],
        part: _Part,
        leaves: Sequence[_Leaf],
        replicates: Float64[np.ndarray, "M R"],
    ) -> list[Figure]:
        """The figures of some leaves of a part: each measure's mean over them.

        `replicates` are those of the non-empty resamples.
        """
        values = np.mean([leaf.points[self.respondent] for leaf in leaves], 0)
        references = np.mean([leaf.references for leaf in leaves], 0)
        beside = {name: np.mean([leaf.points[name] for leaf in leaves], 0) for name in self.beside}
        compared = [one for leaf in leaves for one in leaf.compared]
        histograms = sum(len(leaf.histograms) for leaf in leaves)
        every = part.all_leaves if where == part.where else leaves
        counted = _counted(every)
        own_unit, span = _own_unit(compared)
        clusters = len({one.cluster for one in compared})
        too_few = ""
        if clusters < resampling.ENOUGH_CLUSTERS and not histograms:
            labelled = any(self.task.cluster in one.item.labels for one in compared)
            too_few = f"{clusters} ({self.task.cluster if labelled else 'item'})"
        remarks = []
        if histograms > 1:
            remarks.append(
                "people are resampled item by item, as if nobody were in two of them: histograms "
                "do not identify people"
            )
        answered = sum(len(leaf.answered) for leaf in every)
        if answered > len(compared):
            remarks.append(
                f"{answered - len(compared)} of {answered} items are not in it: {_NOTHING_INSIDE}"
            )
        if remark := outside_remark(counted["outside"]):
            remarks.append(remark)
        figures = []
        for place, measure in enumerate(self.measures):
            value = float(values[place])
            floor, ceiling = (float(end) for end in references[place])
            ends = None if too_few else resampling.interval(value, replicates[place], measure)
            reasons = [_why_not(measure, own, True) for leaf in leaves for own in leaf.tables]
            reasons += [
                _why_not(measure, [one], False) for leaf in leaves for one in leaf.histograms
            ]
            why = "; ".join(sorted(set(reasons) - {""}))
            note = _undefined(measure, value, ends, why, too_few)
            others = {name: _finite(own[place]) for name, own in beside.items()}
            worth = None
            if measure.name == "energy" and np.isfinite(value):
                spread = float(np.mean([leaf.people_spread for leaf in leaves]))
                # People who all answer alike are no measure.
                worth = _worth_people(spread, value, ends) if spread > 0.0 else None
            figures.append(
                Figure(
                    task=self.task.name,
                    measure=measure.name,
                    level=measure.level,
                    respondent=self.respondent,
                    where=dict(where),
                    value=_finite(value),
                    ci95=ends,
                    floor=_finite(floor),
                    ceiling=_finite(ceiling),
                    skill=_skill(measure, value, floor, others.get(UNIFORM)),
                    items=len(compared),
                    people=sum(leaf.people for leaf in leaves),
                    note="; ".join([*note, *remarks]),
                    unit=measure.unit,
                    own_unit=own_unit if measure.ordered and measure.unit == "points" else "",
                    per_point=span / 100.0
                    if span and measure.ordered and measure.unit == "points"
                    else None,
                    worth_people=worth,
                    beside=others,
                    **counted,
                )
            )
        return figures

    def distributions(self, leaves: Sequence[_Leaf]) -> Iterator[Distribution]:
        """The distribution of each leaf with one answer set, for charts."""
        for leaf in leaves:
            answers = {one.item.answers for one in leaf.compared}
            first = leaf.compared[0].item.answers
            if len(answers) > 1 or isinstance(first, FreeText) or _is_arm(leaf.compared[0].item):
                continue
            model, people = np.split(_answered(leaf.compared).histograms.sum(0), 2)
            titles = {str(one.item.notes.get("title", "")) for one in leaf.compared}
            name = next(iter(leaf.where.values()), self.task.name)
            yield Distribution(
                self.task.name,
                self.respondent,
                dict(leaf.where),
                (titles.pop() if len(titles) == 1 else "") or name,
                first.unit,
                list(first.names),
                None if first.values is None else list(first.values),
                people.tolist(),
                (model / model.sum()).tolist(),
            )


class _TableSums:
    """Every measure's sums of one table; columns shared by measures are stored once.

    Attributes:
        answered: the table.
        columns: blocks `[I, K]`, the first of them its people.
    """

    def __init__(self, answered: Answered, sums: Sequence[Sums | None]) -> None:
        self.answered = answered
        self._sums = sums
        self.columns: list[Floats] = [answered.people[:, None]]
        self._block: dict[int, int] = {}
        for one in sums:
            if one is not None and id(one.columns) not in self._block:
                self._block[id(one.columns)] = len(self.columns)
                self.columns.append(one.columns)

    def finished(self, sums: Sequence[Floats], people: Floats) -> Floats:
        """The measures `[M, ...]` of the summed columns."""
        undefined = np.full(np.shape(people), np.nan)
        return np.array(
            [
                undefined if one is None else one.finish(sums[self._block[id(one.columns)]], people)
                for one in self._sums
            ]
        )


def _weighted(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean of the second numbers, weighted by the first."""
    return sum(n * share for n, share in pairs) / sum(n for n, _ in pairs)


def _counted(leaves: Sequence[_Leaf]) -> dict[str, Any]:
    """A figure's fields on answers outside the answer sets; every leaf has equal weight."""
    ends = [leaf.ends_after_answer for leaf in leaves if leaf.ends_after_answer is not None]
    every = [one.response for leaf in leaves for one in leaf.answered]
    return {
        "outside": float(np.mean([leaf.outside for leaf in leaves])),
        "unread": sum(one.unread for one in every),
        "draws": sum(one.draws for one in every),
        "ends_after_answer": float(np.mean(ends)) if ends else None,
    }


def _own_unit(joined: Sequence[_Joined]) -> tuple[str, float]:
    """The common unit and range of all items; "" and 0 where they differ."""
    sets = {one.item.answers for one in joined}
    units = {
        (one.unit, one.values[-1] - one.values[0])
        for one in sets
        if isinstance(one, AnswerSet) and one.values is not None
    }
    return units.pop() if len(units) == 1 and len(sets) == 1 else ("", 0.0)


def _undefined(measure: Measure, value: float, ends: object, why: str, clusters: str) -> list[str]:
    """The notes on why a figure or its interval is None; `clusters`: how few, "" if enough."""
    if not np.isfinite(value):
        return [f"undefined for these answers: {why or measure.definition}"]
    if ends is not None:
        return []
    if clusters:
        least = resampling.ENOUGH_CLUSTERS
        return [f"no interval: it needs {least} clusters, and this has {clusters}"]
    return ["the figure is undefined in more than 5 % of the resamples, so it has no interval"]


def _worth_people(
    spread: float, energy: float, ends: tuple[float, float] | None
) -> tuple[float | None, float | None, float | None]:
    """How many people, if asked, would be as close to everybody as the respondent: k, low, high.

    A sample of k people has the expected energy distance E|Y - Y'| / k from everybody, so k is
    `spread` / `energy`.  None: so many that it can't be distinguished from everybody; for the low
    end, unknown.
    """
    lowest, highest = ends or (np.nan, np.nan)
    k, low, high = (spread / one if one > 0.0 else None for one in (energy, highest, lowest))
    return k, low, high


def _skill(measure: Measure, value: float, floor: float, uniform: float | None) -> float | None:
    """(uniform - value) / (uniform - floor); None where the floor is no better than uniform."""
    if not measure.skill or uniform is None or not uniform - floor > 1e-9:
        return None
    return _finite((uniform - value) / (uniform - floor))


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None
