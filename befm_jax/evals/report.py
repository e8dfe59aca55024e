"""Reports of results: an HTML page, a picture for a slide, a table for the terminal.

Everything is rendered from `Results`: any tasks, any respondents.  Names, prompts and answers are
untrusted text of models and data files; the page escapes them and loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2

from befm_jax import files
from befm_jax.errors import printable
from befm_jax.evals import charts
from befm_jax.evals.evaluate import UNIFORM
from befm_jax.evals.measures import MEASURES
from befm_jax.evals.results import (
    WARN_OUTSIDE,
    WITHHOLD_OUTSIDE,
    Distribution,
    Figure,
    Results,
)
from befm_jax.evals.sensitivity import verdict

_MOST_PICTURES = 24
_MOST_ON_SLIDE = 13
_MOST_ROWS_IN_TERMINAL = 24
_LONGEST_LIST = 8
_DIGITS = {"points": 2, "nats": 2}

DEFINITIONS: Mapping[str, str] = {
    "points": "What lies along a scale is in points: the range of an answer set is 100 of them, so "
    "that figures with different units can be averaged. On a scale of 0 to 20 dollars one point is "
    "0.2 dollars.",
    "interval": "95 % bootstrap interval. Where persons are known, they are resampled with all "
    "their answers, if there are five or more; a histogram's people are resampled within it, and "
    "so are a sampled respondent's answers. Percentiles are shifted by the bootstrap's own bias, "
    "since resamples are noisier than the sample, and clipped to the figure's range. It is the "
    "interval of the figure against this number of people, not of the distance to the whole "
    "population.",
    "floor": "The expected score of a perfect model against as many people. For a histogram: its "
    "own distribution against people drawn from it (for a sampled respondent, as many draws of "
    "it); too low for log score, total variation and Jensen-Shannon below some 2,000 people, since "
    "an answer that nobody gave is not impossible. Where persons are known: the respondent against "
    "answers drawn from its own prediction for each of them.",
    "other people": "The score of other people: two samples of as many people each, drawn from the "
    "people's histogram; mean.",
    "worth so many people": "How many people, if asked, would be as close to everybody as the "
    "respondent is: the mean difference of two people's answers over the respondent's energy "
    "distance, since a sample of k people has on average a k-th of that difference as its own. "
    "No more may be claimed than the lower end of the interval.",
    "skill": "(uniform - figure) / (uniform - floor): 0 no better than answering at random, 1 as "
    "good as a perfect model; above 1 is noise.",
    "outside": "Probability, or share of drawn answers, outside the answer set or unreadable; "
    f"figures are of what is inside. From {WARN_OUTSIDE:.0%} on a figure has a warning, from "
    f"{WITHHOLD_OUTSIDE:.0%} on it is left out of headlines and ladders.",
    "ends after its answer": "How often a turn ends right after an answer of the set is written. "
    "Where it continues, the output may be outside the set.",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: a part of a task, or a measure, and the figures of each respondent."""

    label: str
    main: Figure
    by_respondent: Mapping[str, Figure]


@dataclass(frozen=True)
class PublishedRow:
    """A figure of a published leaderboard, as the leaderboard has it.

    Attributes:
        id: its name in the leaderboard's data.
        name: what the leaderboard calls it.
        metric: what the leaderboard calls its measure.
        level: "individual" or "distribution".
        figures: each respondent's, in the leaderboard's unit.
    """

    id: str
    name: str
    metric: str
    level: str
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class Picture:
    """One chart with its figures."""

    distribution: Distribution
    panel: charts.Panel
    row: Row
    others: Mapping[str, Figure]


@dataclass(frozen=True)
class Section:
    """A task's section of the page.

    Attributes:
        name: the task's name.
        task: its entry in the results.
        main: the respondent that it is about.
        headline: the first measure, of all of the task.
        measures: every measure of all of the task.
        values: the first measure of each value that is averaged over.
        groups: the first measure of each group, by label.
        details: every measure of each value, by the value's title.
        counts: what `Figure.people` counts: "people"; "choices" in a task that is played,
            "questions" in a check of sensitivity, "arms" of published contrasts.
        in_sample: baselines that are fitted on the compared people themselves.
        ladder: all respondents and references that can be compared, best first.
        withheld: why respondents are not in it, a sentence each.
        worth: how many people each respondent is worth, a sentence each.
        pictures: one per value.
        hidden_pictures: the number of values without a picture.
        findings: what a respondent does not read, a sentence each.
    """

    name: str
    task: Mapping[str, Any]
    main: str
    headline: Row
    measures: list[Row]
    values: list[Row]
    groups: Mapping[str, list[Row]]
    details: Mapping[str, list[Row]]
    counts: str
    in_sample: Sequence[str]
    ladder: list[dict[str, Any]]
    withheld: list[str]
    worth: list[str]
    pictures: list[Picture]
    hidden_pictures: int
    findings: list[str]


def write(results: Results, folder: Path | str) -> None:
    """Writes results.json, figures.csv, report.html and, for closed answers, populations.png.

    Each file is written atomically; creates the folder.

    Raises:
        ValueError: as `Results.write`; no figures.
    """
    page, picture = html(results), slide(results)
    results.write(folder)
    files.write(Path(folder) / "report.html", page.encode())
    if picture is not None:
        content = BytesIO()
        picture.savefig(content)
        files.write(Path(folder) / "populations.png", content.getvalue())


def html(results: Results) -> str:
    """The page: the main table, a section per task, what was left out, settings.

    Raises:
        ValueError: no figures.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number, "span": span, "percent": percent, "digits": digits, "own": own_unit,
        "unit": unit, "best": best,
    }  # fmt: skip
    source = resources.files("befm_jax.evals").joinpath("report_template.html")
    by_task = sections(results)
    if not by_task:
        raise ValueError("results: no figures to report")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        results=results,
        sections=by_task,
        published=published(results),
        main=results.main,
        others=[name for name in results.respondents if name != results.main],
        uniform=UNIFORM,
        definitions=DEFINITIONS,
        prompts=list(_prompts(results)),
        settings=list(_settings(results)),
        warn=WARN_OUTSIDE,
        withhold=WITHHOLD_OUTSIDE,
        colours={
            "people": charts.PEOPLE_COLOUR,
            "model": charts.MODEL_COLOUR,
            "base": charts.BASE_COLOUR,
        },
    )


def sections(results: Results) -> list[Section]:
    """The tasks that have figures, in their order."""
    return [_section(results, name) for name in results.tasks if results.select(task=name)]


def published(results: Results) -> list[PublishedRow]:
    """The figures of a published leaderboard that the tasks measure, individual ones first."""
    rows = []
    for task, known in results.tasks.items():
        for one in known.get("published", []):
            figures = {
                figure.respondent: _scaled(figure, one["per"])
                for figure in results.select(task, one["measure"], where={})
            }
            level = known["measures"][one["measure"]]["level"]
            rows.append(PublishedRow(one["id"], one["name"], one["metric"], level, figures))
    return sorted(rows, key=lambda row: row.level != "individual")


def _scaled(figure: Figure, per: float) -> Figure:
    value, ends = figure.value, figure.ci95
    return replace(
        figure,
        value=None if value is None else value * per,
        ci95=None if ends is None else (ends[0] * per, ends[1] * per),
    )


def _section(results: Results, name: str) -> Section:
    answered = dict.fromkeys(figure.respondent for figure in results.select(task=name))
    main = results.main if results.main in answered else next(iter(answered))
    task = results.tasks[name]
    average, known = task["average"], list(task["measures"])
    drawn = {
        (one.respondent, *one.where.items()): one for one in results.distributions
        if one.task == name
    }  # fmt: skip
    by_key = {
        (one.measure, one.respondent, *one.where.items()): one for one in results.select(name)
    }
    wheres = list({tuple(one.where.items()): None for one in results.select(name, "", main)})

    def row(label: str, measure: str, where: tuple[tuple[str, str], ...]) -> Row:
        everybody = {who: by_key.get((measure, who, *where)) for who in answered}
        there = {who: figure for who, figure in everybody.items() if figure is not None}
        return Row(label, there[main], there)

    def title(where: tuple[tuple[str, str], ...]) -> str:
        one = drawn.get((main, *where))
        return one.title if one else where[0][1]

    values = [
        where for where in wheres
        if where and where[0][0] == (average or "item") and where[0][0] not in task["groups"]
    ]  # fmt: skip
    groups: dict[str, list[Row]] = {label: [] for label in task["groups"]}
    for where in wheres:
        if where and where[0][0] in groups:
            groups[where[0][0]].append(row(where[0][1], known[0], where))
    pictured = [where for where in values or [()] if (main, *where) in drawn]
    base = _base(results, answered, main)
    headline = row("mean" if values else name, known[0], ())
    in_sample = results.people.get(name, {}).get("in_sample", [])
    return Section(
        name=name,
        task=task,
        main=main,
        headline=headline,
        measures=[row(measure, measure, ()) for measure in known],
        values=[row(title(where), known[0], where) for where in values],
        groups={label: rows for label, rows in groups.items() if rows},
        details={
            title(where): [row(measure, measure, where) for measure in known] for where in values
        },
        counts=_counts(task, headline.main),
        in_sample=in_sample,
        ladder=_ladder(headline, task["measures"][known[0]]["better"], main, in_sample),
        withheld=_withheld(headline),
        worth=[
            sentence
            for own in row("", "energy", ()).by_respondent.values()
            if (sentence := worth_people(own))
        ]
        if "energy" in known
        else [],
        pictures=[
            Picture(
                drawn[(main, *where)],
                charts.panel(
                    drawn[(main, *where)],
                    {
                        who: drawn[(who, *where)].model
                        for who in (base, main)
                        if (who, *where) in drawn
                    },
                ),
                row(title(where), known[0], where),
                {measure: row(measure, measure, where).main for measure in known},
            )
            for where in pictured[:_MOST_PICTURES]
        ],
        hidden_pictures=max(0, len(pictured) - _MOST_PICTURES),
        findings=[
            f"{figure.respondent} {what} ({_named(figure.measure)} {number(figure.value)})"
            for figure in results.select(name)
            if figure.level == "check" and not withheld(figure) and (what := verdict(figure))
        ],
    )


def _counts(task: Mapping[str, Any], headline: Figure) -> str:
    """What `Figure.people` counts in a task."""
    measure = MEASURES.get(headline.measure)
    if measure is not None and measure.note == "published":
        return "arms"
    if task["cluster"] == "episode":
        return "choices"
    return "questions" if headline.level == "check" else "people"


def _base(results: Results, answered: Mapping[str, Any], main: str) -> str:
    """The respondent whose outline is drawn with the main one's; "" for none."""
    return next((name for name in results.respondents if name in answered and name != main), "")


def _ladder(row: Row, better: str, main: str, in_sample: Sequence[str]) -> list[dict[str, Any]]:
    """Respondents and references with comparable figures, best first; bar widths in per cent."""
    if better not in ("low", "high"):
        return []
    figure = row.main
    steps: list[dict[str, Any]] = [
        {"label": "a perfect model (floor)", "value": figure.floor, "kind": "reference"},
        {"label": "other people (ceiling)", "value": figure.ceiling, "kind": "people"},
    ]
    steps += [
        {"label": name, "value": value, "kind": "reference"}
        for name, value in figure.beside.items()
        if name not in row.by_respondent and name not in in_sample
    ]
    steps += [
        {
            "label": name,
            "value": own.value,
            "kind": "model" if name == main else "base",
            "ci95": own.ci95,
        }
        for name, own in row.by_respondent.items()
        if not withheld(own)
    ]
    known = [step for step in steps if step["value"] is not None]
    known.sort(key=_value, reverse=better == "high")
    longest = max((abs(_value(step)) for step in known), default=0.0) or 1.0
    return [
        {"ci95": None, **step, "width": round(100 * max(_value(step), 0.0) / longest, 2)}
        for step in known
    ]


def _withheld(row: Row) -> list[str]:
    """A sentence for each respondent whose figure is withheld."""
    return [
        f"{name} is withheld: {percent(own.outside)} of its answers are outside the answer sets, "
        "and its figure is of the rest"
        for name, own in row.by_respondent.items()
        if withheld(own)
    ]


def worth_people(figure: Figure) -> str:
    """How many people a respondent is worth, as a sentence; "" where that is not known."""
    if figure.worth_people is None or withheld(figure):
        return ""
    k, low, high = (
        None if one is None else f"{one:,.0f}" if one >= 10.0 else f"{one:.1f}"
        for one in figure.worth_people
    )
    if low is None:
        return ""
    if k is None or high is None:
        return (
            f"{figure.respondent} is worth at least {low} people: these people don't show a "
            "difference from everybody"
        )
    return f"{figure.respondent} is worth {k} people ({low} to {high})"


def _value(step: Mapping[str, Any]) -> float:
    return float(step["value"])


def slide(results: Results) -> charts.Figure | None:
    """The picture for a slide, of the first task with closed answers, or None."""
    for section in sections(results):
        if not section.pictures:
            continue
        base = _base(results, section.headline.by_respondent, section.main)
        cells = []
        for picture in section.pictures[:_MOST_ON_SLIDE]:
            theirs = [
                one.model for one in results.distributions
                if (one.task, one.respondent, one.where)
                == (section.name, base, picture.distribution.where)
            ]  # fmt: skip
            figure = picture.row.main
            value = "withheld" if withheld(figure) else number(figure.value, 1)
            caption = f"{_named(figure.measure)} {value}"
            if figure.ceiling is not None:
                caption += f", other people {number(figure.ceiling, 1)}"
            if warned(figure):
                caption += f"\n{percent(figure.outside)} outside the answer set"
            cells.append(charts.Cell(picture.distribution, theirs[0] if theirs else None, caption))
        lines = [
            f"{section.name}: {_named(section.headline.main.measure)}, {section.headline.label}"
        ]
        for step in section.ladder:
            if step["kind"] == "reference" and step["label"] != UNIFORM:
                continue
            ends = f" ({span(step['ci95'], 1)})" if step["ci95"] else ""
            lines.append(f"{step['label']}: {number(step['value'], 1)}{ends}")
        lines += [
            f"{name}: withheld, {percent(own.outside)} outside"
            for name, own in section.headline.by_respondent.items()
            if withheld(own)
        ]
        return charts.slide(cells, section.main, base, lines)
    return None


def summary(results: Results) -> str:
    """The tables that an entry point prints: each task's first measure, value by value."""
    missing = results.extra.get("not_compared", {})
    return "\n\n".join(
        [
            *(_table(results, section) for section in sections(results)),
            *_published_table(results),
            *(f"{name} is not compared: {why}" for name, why in missing.items()),
        ]
    )


def _table(results: Results, section: Section) -> str:
    headline = section.headline.main
    others = [name for name in section.headline.by_respondent if name != section.main]
    shown = [*others, section.main]
    heads = [section.task["average"] or "", section.counts]
    heads += [head for name in shown for head in (name, "outside")]
    table = [[*heads, "95 % interval", "other people"]]
    for row in [*section.values[:_MOST_ROWS_IN_TERMINAL], section.headline]:
        cells = [row.label, f"{row.main.people:g}"]
        for name in shown:
            own = row.by_respondent.get(name)
            value = "–" if own is None else "withheld" if withheld(own) else number(own.value)
            cells += [value, "–" if own is None else percent(own.outside) + " !" * warned(own)]
        interval = "–" if withheld(row.main) else span(row.main.ci95)
        table.append([*cells, interval, number(row.main.ceiling)])
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    better = best(section.task["measures"][headline.measure]["better"])
    heading = f"{section.name}: {_named(headline.measure)} in {unit(headline)}"
    lines = ["; ".join(filter(None, (heading, better)))]
    for cells in table:
        line = [cells[0].ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join(line).rstrip())
    more = len(section.values) - _MOST_ROWS_IN_TERMINAL
    if more > 0:
        lines.append(f"{more} more are in figures.csv")
    if any(warned(own) for own in section.headline.by_respondent.values()):
        lines.append("! figures are of the answers inside the answer sets alone")
    lines += section.withheld
    lines += section.worth
    lines += section.findings
    for who, reasons in section.task["skipped"].items():
        lines += [
            f"{who}: {entry['items']} items left out, {reason} ({', '.join(entry['first'])})"
            for reason, entry in reasons.items()
        ]
    return "\n".join(map(printable, lines))


def _published_table(results: Results) -> Iterator[str]:
    rows = published(results)
    if not rows:
        return
    names = list(results.respondents)
    table = [["", "", "level", *names]]
    for row in rows:
        own = [row.figures.get(name) for name in names]
        cells = [
            "–" if one is None else "withheld" if withheld(one) else number(one.value, 3)
            for one in own
        ]
        table.append([row.name, row.metric, row.level, *cells])
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = ["The published leaderboard's figures"]
    for cells in table:
        line = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
        line += [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        lines.append("  ".join(line).rstrip())
    lines += [
        f"{row.name}, {row.metric}: {figure.note}"
        for row in rows
        for figure in row.figures.values()
        if figure.value is None
    ]
    yield "\n".join(map(printable, lines))


def warned(figure: Figure) -> bool:
    """Whether the share outside the answer sets is large enough for a warning."""
    return figure.outside >= WARN_OUTSIDE


def withheld(figure: Figure) -> bool:
    """Whether the share outside the answer sets is too large for headlines and ladders."""
    return figure.outside >= WITHHOLD_OUTSIDE


def number(value: float | None, places: int = 2) -> str:
    """A figure as text: a dash for None, never a negative zero."""
    if value is None:
        return "–"
    return f"{round(value, places) + 0.0:.{places}f}"


def span(ends: Sequence[float] | None, places: int = 2) -> str:
    """An interval as text."""
    return "–" if ends is None else f"{number(ends[0], places)} to {number(ends[1], places)}"


def percent(share: float | None) -> str:
    """A share as text: small ones with two significant digits; a dash for None."""
    if share is None:
        return "–"
    share = share if share > 1e-9 else 0.0  # rounding errors
    return f"{100 * share:.2g} %" if 0 < share < 0.0995 else f"{100 * share:.1f} %"


def digits(figure: Figure) -> int:
    """The number of decimals of a figure."""
    return _DIGITS.get(figure.unit, 3)


def own_unit(figure: Figure) -> str:
    """A figure in points, converted to the items' own unit where they have one in common."""
    if figure.value is None or figure.per_point is None:
        return f"{number(figure.value)} {figure.unit}"
    return f"{number(figure.value * figure.per_point)} {figure.own_unit or 'on the scale'}"


def unit(figure: Figure) -> str:
    """A figure's unit; of points also what one is."""
    if figure.unit != "points":
        return figure.unit
    if figure.per_point is None:
        return "points (100: the whole scale)"
    return f"points (1: {figure.per_point:g} {figure.own_unit or 'on the scale'})"


def best(better: str) -> str:
    """What `Measure.better` says of figures, as text; "" where they describe."""
    said = {"low": "smaller is better", "high": "larger is better"}
    return said.get(better, better and f"{better} is best")


def _named(measure: str) -> str:
    return measure.replace("_", " ")


def _prompts(results: Results) -> Iterator[tuple[str, str, str]]:
    """Each respondent's first prompt: the respondent, the item, the text."""
    for name, who in results.respondents.items():
        prompt = who["description"].get("first_prompt")
        # The metadata of recorded answers are not validated.
        if isinstance(prompt, Mapping) and "text" in prompt:
            where = str(prompt.get("item", prompt.get("game", "")))
            yield name, where, str(prompt["text"])


def _settings(results: Results) -> Iterator[tuple[str, str]]:
    """Every field that is not shown elsewhere on the page, as a dotted name and a text."""
    for name in ("created", "command", "versions"):
        yield from _flat(name, results.head[name])
    for name, who in results.respondents.items():
        yield from _flat(name, who)
    for name, task in results.tasks.items():
        yield from _flat(f"{name}.how", task["how"])
    yield from _flat("people", results.people)
    yield from _flat("", results.extra)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    last = name.split(".")[-1]
    if last in ("left_out", "warning") or (last == "first_prompt" and isinstance(value, Mapping)):
        return
    if isinstance(value, Mapping):
        for inner, content in value.items():
            yield from _flat(f"{name}.{inner}".lstrip("."), content)
    elif isinstance(value, list | tuple) and len(value) > _LONGEST_LIST:
        yield name, f"{len(value)} values, in results.json"
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
