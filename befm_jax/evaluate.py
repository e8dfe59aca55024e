r"""Compares a model, or a file of answers, with people, and writes a report.

    befm evaluate --model RUN_OR_HF_DIR --tasks games [--humans joint.csv] --out DIR
    befm evaluate --answers choices.csv --tasks games [--humans joint.csv] --out DIR
    befm evaluate --model openai:MODEL --base_url http://localhost:8000/v1 --sampled --yes --out DIR

A model is evaluated exactly (every answer scored; free text is drawn, one for an item), or with
`--sampled` by a population of draws.
`--answers` is a file of choices or a distribution, as `befm_jax.simulate` writes it.  People are
the embedded reference, or a CSV: MobLab's table, `game,participant,choice`, or `game,choice,count`;
those whom the model was trained on are left out.  Writes results.json, figures.csv, report.html and
populations.png to DIR, and the responses as they come: the same command goes on from those that are
there.  Results are replaced with `--overwrite` only.
"""

from __future__ import annotations

from befm_jax import cli

if __name__ == "__main__":
    cli.starting("evaluate")

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from befm_jax import files
from befm_jax.data import games as library
from befm_jax.data.games import Game
from befm_jax.data.responses import Exact, How, Respondent, how_from_dict
from befm_jax.data.rows import SPLITS
from befm_jax.errors import DataError, UserError, printable
from befm_jax.evals import report
from befm_jax.evals.results import Results
from befm_jax.respondents import comparing
from befm_jax.respondents.openai import OpenAI
from befm_jax.respondents.recorded import Recorded
from befm_jax.tasks import names as task_names
from befm_jax.tasks import sources
from befm_jax.tasks.games import item_of
from befm_jax.tasks.sources import Source

FLAGS = flags.FLAGS


def held_out(
    source: Source, trained_on: Mapping[str, Any] | None, split: str | None, seed: int | None
) -> tuple[Source, str]:
    """The people to compare a model with, and a warning if it may have been trained on them.

    By default the held-out people: the test split of embedded counts of people, and of rows that
    share people with those it was trained on; all of any other rows.  `trained_on` is that of
    `models.write_run`; None where it is unknown who answered.
    """
    seen = source.seen_by(trained_on or {})
    # Counts have no sketch by which a model's training people would be recognised.
    unknown = not source.table and not source.rows.sketch
    split = split or ("test" if seen or unknown else "all")
    split_seed = seed if seed is not None else seen["split_seed"] if seen else 0
    people = source.part(split, split_seed)
    # Some tasks ask nothing about people: whether a question is read, or what is played.
    if trained_on is None and not (source.table or source.task.needs in ("histograms", "cells")):
        return people, ""
    if trained_on is None:
        return people, "of unknown origin: the respondent may have been trained on these people"
    if seen is None:
        table = source.may_be_of(trained_on)
        warning = "counts do not say who was counted: these people may be among those of"
        return people, f"{warning} {table}, that the model was trained on" if table else ""
    if split not in ("test", "validation"):
        reason = f"{split!r} has people that it was trained on"
    elif bool(seen["sketch"]) != bool(source.rows.sketch):
        reason = "a table and the histograms made from it are split differently"
    elif seen["split_seed"] != split_seed:
        reason = f"it was trained with split seed {seen['split_seed']}, not {split_seed}"
    else:
        return people, ""
    return people, (
        f"the model was trained on people from this source, and these are not held out: {reason}"
    )


def how_recorded(recorded: Recorded) -> How:
    """How recorded answers were asked; missing settings are assumed to be the defaults.

    Raises:
        DataError: a setting that is no number, or is out of its range.
    """
    if recorded.exact:
        return Exact()
    settings = dict(recorded.describe()["how"] or {}) | {"mode": "sampled"}
    try:
        return how_from_dict(settings)
    except DataError as error:
        raise DataError(f"{recorded.path}: how it was sampled: {error}") from None


def main() -> None:
    """`befm evaluate`."""
    if (FLAGS.model is None) == (FLAGS.answers is None):
        raise UserError("give either --model or --answers, to compare with people")
    if FLAGS.answers is not None:
        cli.note_unused_flags(
            (*cli.LOADED, *cli.SERVED, "sampled", *cli.SAMPLING), "with --answers"
        )
    elif not FLAGS.sampled:
        cli.note_unused_flags(cli.SAMPLING, "without --sampled: the model is read exactly")
    out = Path(FLAGS.out)
    cli.keep(out / "results.json", FLAGS.overwrite)
    with files.in_use(out / ".lock", out):
        results = _evaluated(
            partial(_of_flags, out),
            FLAGS.tasks,
            FLAGS.games,
            FLAGS.humans,
            FLAGS.wording,
            FLAGS.people,
            FLAGS.split,
            FLAGS.split_seed,
            FLAGS.resamples,
            FLAGS.seed,
            out,
        )
    print(report.summary(results))
    print(f"page: {out / 'report.html'}")


def evaluate(
    respondent: Respondent | str | Path,
    tasks: str = "games",
    *,
    games: str = "all",
    humans: str = "",
    wording: str = "",
    how: How | None = None,
    people: int = 0,
    split: str | None = None,
    split_seed: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Results:
    """Compares a respondent with people, as `befm evaluate` does with the flags of these names.

    Args:
        respondent: an `Engine` or another respondent; the path of a model, as `load` takes it, or
            of a file of recorded answers.
        tasks: as `--tasks`: names, NAME=TABLE, FILE.py=TABLE, with commas between; or "all".
        games: names and files of games, with commas between.
        humans: a table of people's choices; "": the embedded reference.
        wording: a file of the texts in which tasks ask; "": the package's.
        how: `Exact()` or `Sampled(...)`; None: as each task asks.
        people: persons a task; 0: all.
        split: the people's split; None: the held-out people, as `held_out` finds them.
        split_seed: seed of the split; None: the model's.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.
        out: where results, report and responses are written; None: nowhere.
        overwrite: whether results that are there are replaced.

    Returns:
        The results, which a notebook shows as the report; `to_pandas()` has the figures.

    Raises:
        UserError: whatever is wrong with a path, a table or a model; results that are there, or
            another process that writes to `out`.
    """
    if out is not None:
        cli.keep(Path(out) / "results.json", overwrite)
    with nullcontext() if out is None else files.in_use(Path(out) / ".lock", out):
        return _evaluated(
            lambda: (_resolved(respondent), how),
            tasks, games, humans, wording, people, split, split_seed, resamples, seed,
            None if out is None else Path(out),
        )  # fmt: skip


def _evaluated(
    make: Callable[[], tuple[Respondent, How | None]],
    tasks: str,
    games: str,
    humans: str,
    wording: str,
    people: int,
    split: str | None,
    split_seed: int | None,
    resamples: int,
    seed: int,
    out: Path | None,
) -> Results:
    """`evaluate`, in a directory that is locked."""
    chosen = library.select(games)
    # What is misspelt is found before a model is loaded.
    all_sources = [] if tasks == "all" else sources.select(tasks, chosen, humans, wording)
    respondent, how = make()
    name: object = respondent.name
    if isinstance(respondent, Recorded):
        origin, name = respondent.describe()["respondent"], respondent.path
        if how is not None:
            raise UserError(f"{respondent.path}: how is {how}; recorded answers are as they are")
        how = how_recorded(respondent)
    else:
        # On which people a server's model was trained is unknown.
        origin = getattr(respondent, "origin", None)
        name = (origin or {}).get("path", name)
    known = sources.trained_on(origin, name) if origin else None
    if tasks == "all":
        all_sources = sources.select(sources.everything(known or {}), chosen, humans, wording)
    if isinstance(respondent, Recorded):
        for source in all_sources:
            if source.task.episodes is not None:
                raise UserError(f"{source.task.name} is played: recorded answers can't play it")
        _note_unused(respondent, all_sources, chosen)
    compared = []
    for source in all_sources:
        persons, warning = held_out(source, known, split, split_seed)
        compared.append((source, persons.limited(people), warning))
    if isinstance(respondent, OpenAI):
        asked = (comparing.questions(some, how or some.task.how, seed) for _, some, _ in compared)
        respondent.admit([*asked])
    results = Results()
    for source, persons, warning in compared:
        print(persons.describe())
        if warning:
            print(f"warning: {printable(warning)}", file=sys.stderr)
        # Without a training split, baselines are fitted on the compared people themselves.
        no_split = persons.rows.split == "all"
        learnt = persons if no_split else source.part("train", persons.rows.split_seed)
        comparing.compare(
            results,
            persons,
            learnt,
            [(respondent.name, respondent, how or source.task.how)],
            resamples=resamples,
            seed=seed,
            folder=out,
            warning=warning,
        )
    if out is not None:
        report.write(results, out)
    return results


def _note_unused(recorded: Recorded, asked: Sequence[Source], selected: Sequence[Game]) -> None:
    """Prints notes on standard error of what a file of answers has and nothing uses."""
    items = [item for source in asked for item in source.items()]
    items += [item_of(game) for game in selected]
    notes = [f"column {name!r}: not used as weights" for name in recorded.weights]
    notes += [
        f"{name} is in no task (--games takes .py files that declare more)"
        for name in recorded.unasked(items)
    ]
    for note in notes:
        print(f"note: {printable(f'{recorded.path}: {note}')}", file=sys.stderr)


def _of_flags(out: Path) -> tuple[Respondent, How | None]:
    """The respondent of the flags, and how it is asked; None: as each task asks."""
    if FLAGS.answers is not None:
        return Recorded(FLAGS.answers), None
    from befm_jax import simulate  # which imports JAX

    answers = out / f"{comparing.file_name(FLAGS.model)}.answers.jsonl"
    how = simulate.sampled_from_flags() if FLAGS.sampled else None
    return simulate.respondent_from_flags(answers), how


def _resolved(respondent: Respondent | str | Path) -> Respondent:
    """The respondent, or that of a path: a file of recorded answers, or a model."""
    if not isinstance(respondent, str | Path):
        return respondent
    path = Path(respondent)
    if path.is_file() or path.suffix.lower() in (".csv", ".jsonl", ".parquet", ".gz"):
        return Recorded(path)
    from befm_jax.respondents.engine import load  # which imports JAX

    return load(respondent)


class _Callable(types.ModuleType):
    """This module as `befm_jax.evaluate(...)`: a package's attribute is its imported submodule."""

    def __call__(self, *arguments: Any, **options: Any) -> Results:
        """See `evaluate`."""
        return evaluate(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(evaluate)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_string("answers", None, "a file of recorded answers, instead of --model")
    flags.DEFINE_bool("sampled", False, "draw --participants answers instead of scoring all")
    flags.DEFINE_string(
        "tasks",
        "games",
        f"comma-separated: any of {', '.join(task_names())}, what several of these begin with "
        "(behaviorbench), those that read a table as NAME=TABLE, or FILE.py=TABLE for your own "
        "tasks; all: those with data in the package, and those that the model was trained on",
    )
    flags.DEFINE_string("humans", "", "CSV of people's choices (default: the embedded reference)")
    flags.DEFINE_string(
        "wording", "", "TOML file of the texts in which tasks ask (default: the package's)"
    )
    flags.DEFINE_integer(
        "people", 0, "persons a task (default: all; populations keep everybody)", lower_bound=0
    )
    flags.DEFINE_enum(
        "split",
        None,
        SPLITS,
        "the people's split (default: test for the embedded reference and for a table that the "
        "model was trained on, all for any other table)",
    )
    flags.DEFINE_integer(
        "split_seed", None, "seed of the split (default: the model's)", lower_bound=0
    )
    flags.DEFINE_integer("resamples", 10_000, "number of bootstrap resamples", lower_bound=100)
    flags.DEFINE_string("out", None, "the directory to write")
    flags.DEFINE_bool("overwrite", False, "replace the results in --out")
    flags.mark_flag_as_required("out")
    cli.run(main, __doc__ or "")
