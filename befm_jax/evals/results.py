"""Results: figures with their metadata, as `results.json` and `figures.csv`.

`results.schema.json` beside this module is their schema; `docs/results.md` documents the fields.
"""

from __future__ import annotations

import csv
import datetime
import html
import inspect
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from befm_jax import files
from befm_jax.data.responses import How, how_as_dict
from befm_jax.errors import DataError, UserError
from befm_jax.evals import measures
from befm_jax.tasks import Task

SCHEMA = "befm_jax.results/2"
_SCHEMA_FILE = resources.files("befm_jax.evals").joinpath("results.schema.json")
# A message that quotes a whole list of figures is replaced by the name of the rule.
_LONGEST_MESSAGE = 200
_PACKAGES = ("befm_jax", "jax", "flax", "numpy", "scipy", "transformers")
_IDS_NAMED = 5
# Shares of a respondent's answers outside the answer sets from which its figure has a warning, and
# from which it is left out of headlines and ladders.
WARN_OUTSIDE = 0.05
WITHHOLD_OUTSIDE = 0.5


@dataclass(frozen=True)
class Figure:
    """One measure of one respondent: of a task, or of a part of it.

    Attributes:
        task: the task's name.
        measure: the measure's name.
        level: "individual", "distribution" or "check".
        respondent: the respondent's name.
        where: {}: all of the task; {"game": "bomb"}, {"sex": "female"}: a part.
        value: the figure; None where undefined.
        ci95: its 95 % interval; None where there is none.
        floor: a perfect model's score against as many people; None where unknown.
        ceiling: other people's score; None where unknown.
        skill: (uniform - value) / (uniform - floor); None where undefined.
        items: the number of items.
        people: the number of observations; of a check, of questions; of published contrasts, of
            arms; in a task that is played, of the respondent's own choices.
        outside: share of answers outside the answer sets, over all answered items.
        unread: draws in which no answer could be read.
        note: why a field is None, and other remarks.
        unit: of the figure: "points" (an answer set's range is 100), "share", "nats", ...
        own_unit: the unit of the items' answers: "dollars".
        per_point: one point in `own_unit`; None where items differ, or it does not apply.
        draws: answers drawn; 0 for an exact respondent.
        ends_after_answer: share of answers after which the turn ends; None where unknown.
        worth_people: of an energy distance: the number of people who, if asked, would be as close
            to everybody as the respondent, and the ends of its interval.  None: too many to be
            distinguished from everybody.
        beside: the same figure of other respondents, by name.
    """

    task: str
    measure: str
    level: str
    respondent: str
    where: Mapping[str, str]
    value: float | None
    ci95: tuple[float, float] | None
    floor: float | None
    ceiling: float | None
    skill: float | None
    items: int
    people: float
    outside: float
    unread: int
    note: str = ""
    unit: str = ""
    own_unit: str = ""
    per_point: float | None = None
    draws: int = 0
    ends_after_answer: float | None = None
    worth_people: tuple[float | None, float | None, float | None] | None = None
    beside: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Distribution:
    """A histogram of people and a respondent's shares over the same answers, for a chart.

    Attributes:
        task: the task's name.
        respondent: the respondent's name.
        where: the part of the task, as in `Figure`.
        title: the chart's title.
        unit: the answers' unit.
        answers: the names of the `A` answers.
        values: their `A` values; None where answers have no order.
        people: `A` observations; zeros where nobody was asked.
        model: `A` shares.
    """

    task: str
    respondent: str
    where: Mapping[str, str]
    title: str
    unit: str
    answers: Sequence[str]
    values: Sequence[float] | None
    people: Sequence[float]
    model: Sequence[float]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `befm_jax.evals.evaluate.evaluate`: one task and one respondent.

    Attributes:
        task: the task.
        respondent: the respondent's name.
        figures: of the task first, then of its parts.
        distributions: for charts, one per value of the label that is averaged over.
        skipped: the ids of items that are in no figure, by reason.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.
    """

    task: Task
    respondent: str
    figures: list[Figure]
    distributions: list[Distribution]
    skipped: Mapping[str, list[str]]
    resamples: int
    seed: int


@dataclass(repr=False)
class Results:
    """The content of `results.json`; in a notebook it shows as the report.

    Attributes:
        people: by task, the people compared with: source, split, fingerprint, left_out, in_sample.
        main: the respondent that the report is about; "" for the first one added.
        beside: descriptions of the other respondents in `Figure.beside`, by name.
        extra: further metadata of the run; listed at the end of the report.
        respondents: by name: description, how, warning, first_prompt.
        tasks: by name: definition, measures, average, cluster, groups, published, how, skipped,
            resamples, seed.
        figures: all figures.
        distributions: for charts.
        head: created, command, versions.
    """

    people: dict[str, Any] = field(default_factory=dict)
    main: str = ""
    beside: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    respondents: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=lambda: _head())

    def add(
        self,
        evaluation: Evaluation,
        description: Mapping[str, Any],
        how: How,
        warning: str = "",
    ) -> None:
        """Adds the evaluation of a task and a respondent.

        Args:
            evaluation: of the task and the respondent.
            description: `Respondent.describe()`; its `first_prompt` is shown if there is one.
            how: how it was asked.
            warning: shown before its figures, such as that it may have seen these people.

        Raises:
            UserError: this task and respondent have been added already.
        """
        name, task = evaluation.respondent, evaluation.task
        known = self.tasks.setdefault(task.name, _task(task, evaluation))
        if name in known["skipped"]:
            raise UserError(f"results: {name} was evaluated on {task.name} already")
        known["skipped"][name] = {
            reason: {"items": len(ids), "first": ids[:_IDS_NAMED]}
            for reason, ids in evaluation.skipped.items()
        }
        known["how"][name] = how_as_dict(how)
        self.main = self.main or name
        before = self.respondents.get(name, {}).get("warning", "")
        self.respondents[name] = {
            "description": dict(description),
            "warning": "; ".join(dict.fromkeys(filter(None, (before, warning)))),
        }
        self.figures += evaluation.figures
        self.distributions += evaluation.distributions

    def select(
        self,
        task: str = "",
        measure: str = "",
        respondent: str = "",
        where: Mapping[str, str] | None = None,
    ) -> list[Figure]:
        """The figures that match all arguments given."""
        return [
            figure
            for figure in self.figures
            if task in ("", figure.task)
            and measure in ("", figure.measure)
            and respondent in ("", figure.respondent)
            and (where is None or dict(where) == dict(figure.where))
        ]

    def figure(
        self, task: str, measure: str, respondent: str, where: Mapping[str, str] | None = None
    ) -> Figure | None:
        """One figure, of all of the task by default, or None."""
        matching = self.select(task, measure, respondent, where or {})
        return matching[0] if matching else None

    def __repr__(self) -> str:
        from befm_jax.evals import report  # which imports this module

        return report.summary(self)

    def _repr_html_(self) -> str:
        from befm_jax.evals import report

        page = html.escape(report.html(self))
        return f'<iframe srcdoc="{page}" width="100%" height="800"></iframe>'

    def to_pandas(self) -> Any:
        """The figures as a pandas data frame, with the columns of `figures.csv`."""
        import pandas

        return pandas.read_csv(io.StringIO(self.table()), keep_default_na=False, na_values=[""])

    def plot(self) -> Any:
        """The picture of the first task with closed answers, a matplotlib figure; None without."""
        from befm_jax.evals import report

        return report.slide(self)

    def as_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {"schema": SCHEMA, **self.head} | {
            name: getattr(self, name)
            for name in ("people", "main", "respondents", "beside", "tasks", "extra")
        } | {
            "figures": [_plain(figure) for figure in self.figures],
            "distributions": [_plain(distribution) for distribution in self.distributions],
        }  # fmt: skip

    def write(self, folder: str | Path) -> None:
        """Writes `results.json` and `figures.csv`, each atomically.

        Raises:
            ValueError: a NaN or an infinity; a figure whose task or respondent is not described.
        """
        self._check()
        content = json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        files.write(Path(folder) / "figures.csv", self.table().encode())
        files.write(Path(folder) / "results.json", (content + "\n").encode())

    def table(self) -> str:
        """The figures as CSV: `where` and `beside` as JSON, the interval in two columns."""
        names = [column.name for column in fields(Figure) if column.name != "ci95"]
        place = names.index("value") + 1
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names[:place], "low95", "high95", *names[place:]])
        for figure in self.figures:
            cells = [_cell(getattr(figure, name)) for name in names]
            writer.writerow([*cells[:place], *(figure.ci95 or ("", "")), *cells[place:]])
        return text.getvalue()

    def _check(self) -> None:
        rows: list[Figure | Distribution] = [*self.figures, *self.distributions]
        for row in rows:
            if row.task not in self.tasks or row.respondent not in self.respondents:
                raise ValueError(f"results: {row.respondent} on {row.task} is not described")
        if self.main not in self.respondents:
            raise ValueError(f"results: main is {self.main!r}; it must be a respondent")


def outside_remark(outside: float) -> str:
    """What is said of a figure with this share of answers outside the answer sets, "" if little."""
    if outside < WARN_OUTSIDE:
        return ""
    withheld = ": withheld from headlines" if outside >= WITHHOLD_OUTSIDE else ""
    return (
        f"{100 * outside:.1f} % of the answers are outside the answer sets, and the figure is of "
        f"the rest{withheld}"
    )


def read(path: str | Path) -> Results:
    """The content of a `results.json`.

    Raises:
        DataError: no such file, not JSON, another schema, or a field that is missing or unknown.
    """
    try:
        content = files.parse_json(files.decode(files.read_bytes(path), path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{path}: not valid JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: schema is {schema!r}; it must be {SCHEMA!r}")
    validator = Draft202012Validator(json.loads(_SCHEMA_FILE.read_text(encoding="utf-8")))
    wrong = best_match(validator.iter_errors(content))
    if wrong is not None:
        message = wrong.message if len(wrong.message) <= _LONGEST_MESSAGE else wrong.validator
        raise DataError(f"{path}: {wrong.json_path}: {message} (see results.schema.json)")
    try:
        results = Results(
            **{
                name: content[name]
                for name in ("people", "main", "beside", "extra", "respondents", "tasks")
            },
            figures=[_figure(record) for record in content["figures"]],
            distributions=[Distribution(**record) for record in content["distributions"]],
            head={name: content[name] for name in ("created", "command", "versions")},
        )
        results._check()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not results of this schema ({error})") from None
    return results


def _figure(record: Mapping[str, Any]) -> Figure:
    ends, worth = record["ci95"], record["worth_people"]
    return Figure(
        **{
            **record,
            "ci95": None if ends is None else (ends[0], ends[1]),
            "worth_people": None if worth is None else (worth[0], worth[1], worth[2]),
        }
    )


def _plain(record: Figure | Distribution) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(record).items()}


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping | tuple):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return "" if value is None else value


def _task(task: Task, evaluation: Evaluation) -> dict[str, Any]:
    known = {name: measures.get(name) for name in task.measures}
    return {
        "definition": (inspect.getdoc(task.items) or "").split("\n\n")[0].replace("\n", " "),
        "measures": {
            name: {
                "definition": measure.definition,
                "unit": measure.unit,
                "level": measure.level,
                "low": _finite(measure.low),
                "high": _finite(measure.high),
                "better": measure.better,
                "skill": measure.skill,
            }
            for name, measure in known.items()
        },
        "average": task.average,
        "cluster": task.cluster,
        "groups": list(task.groups),
        "published": [one._asdict() for one in task.published],
        "how": {},
        "skipped": {},
        "resamples": evaluation.resamples,
        "seed": evaluation.seed,
    }


def _finite(number: float) -> float | None:
    return number if abs(number) < float("inf") else None


def _head() -> dict[str, Any]:
    """The time, the command and the versions of packages."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
