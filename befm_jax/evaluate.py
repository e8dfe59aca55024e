r"""Holds a model, or a file of answers, against people; a page of figures out.

    python -m befm_jax.evaluate --model RUN_OR_HF_DIR --tasks game_behavior \
        [--humans joint.csv] --out DIR
    python -m befm_jax.evaluate --answers choices.csv --tasks game_behavior \
        [--humans joint.csv] --out DIR

A model is read exactly (every answer scored) unless `--sampled` asks for a population of draws.
`--answers` takes what `befm_jax.simulate` writes, choices or distribution, or any file of that
layout.  People are the embedded reference, or a CSV: MobLab's table, `game,participant,choice`,
or `game,choice,count`; those whom the model was trained on are left out.  DIR gets results.json,
report.html and games.png.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from befm_jax import cli, files
from befm_jax.data import choices as human
from befm_jax.data import games
from befm_jax.data.choices import SPLITS, People
from befm_jax.errors import UserError
from befm_jax.evals import answers as answer_files
from befm_jax.evals import report, tasks
from befm_jax.evals.answers import Answers

FLAGS = flags.FLAGS
SCHEMA = "befm_jax.results/1"
_PACKAGES = ("befm_jax", "jax", "flax", "numpy", "scipy", "transformers")


def evaluation(
    answers: Mapping[str, Answers],
    people: People,
    *,
    model: Mapping[str, Any],
    how: Mapping[str, Any],
    task_names: list[str],
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """One evaluation in the form of results.json (see `befm_jax.evals.report`)."""
    return {
        "model": dict(model),
        "answers": dict(how),
        "people": {
            "source": people.source,
            "split": people.split,
            "fingerprint": people.fingerprint,
            "choices": {name: people.n(name) for name in people.games},
            "excluded": dict(people.excluded),
        },
        "tasks": {
            name: tasks.get(name)(answers, people, resamples=resamples, seed=seed)
            for name in task_names
        },
    }


def provenance() -> dict[str, Any]:
    """Schema, date, command line and versions: the head of every results.json."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_what_python_runs(), *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _what_python_runs() -> list[str]:
    """`-m MODULE`, or the script's path as it was typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec else [sys.argv[0]]


def warning_if_not_held_out(
    trained_on: Mapping[str, Any], people: People, table: str, split_seed: int
) -> str | None:
    """A sentence where the model may have learnt from the very people it is held against.

    `trained_on` is that of `resolved.write_run`.  The embedded reference was made from a table,
    and a table is split otherwise than its histograms: people held out from the one are not held
    out from the other.
    """
    if trained_on.get("fingerprint") != people.fingerprint:
        return None
    if people.split not in ("test", "validation"):
        reason = f"{people.split!r} has people that it was trained on"
    elif bool(trained_on["table"]) != bool(table):
        reason = "a table and the histograms made from it are split differently"
    elif trained_on["split_seed"] != split_seed:
        reason = f"it was trained with split seed {trained_on['split_seed']}, not {split_seed}"
    else:
        return None
    return f"the model was trained on people from this source, and these are not held out: {reason}"


def which_people(trained_on: Mapping[str, Any], everyone: People, table: str) -> tuple[str, int]:
    """The split, and its seed, of the people that a model has not seen.

    The test split of the embedded reference, and of a table that the model was trained on; all
    people of any other table.
    """
    seen = trained_on.get("fingerprint") == everyone.fingerprint
    seed = trained_on["split_seed"] if seen else 0
    return ("test" if seen or not table else "all"), seed


def how_made(file: Path) -> dict[str, Any]:
    """What `befm_jax.simulate` wrote beside a file of answers: `model` and `answers`, or empty."""
    beside = file.with_name(file.name + ".json")
    if not beside.is_file():
        return {"model": {}, "answers": {}}
    made = files.read_object(beside)
    return {name: dict(made.get(name) or {}) for name in ("model", "answers")}


def main() -> None:
    """`python -m befm_jax.evaluate`."""
    if (FLAGS.model is None) == (FLAGS.answers is None):
        raise UserError("give either --model or --answers: what is to be held against people")
    if FLAGS.answers is not None:
        cli.note_unused_flags(
            ("adapter", "force_template", "dtype", "quantize", "devices", "sampled", *cli.SAMPLING),
            "with --answers",
        )
    elif not FLAGS.sampled:
        cli.note_unused_flags(cli.SAMPLING, "without --sampled: the model is read exactly")
    task_names = [name.strip() for name in FLAGS.tasks.split(",") if name.strip()]
    for name in task_names:
        tasks.get(name)
    chosen = games.select(FLAGS.games)
    everyone = human.load(FLAGS.humans, chosen)
    simulator = None
    if FLAGS.answers is not None:
        answers = answer_files.read_answers(FLAGS.answers)
        exact = all(one.exact for one in answers.values())
        made = how_made(Path(FLAGS.answers))
        how: dict[str, Any] = {**made["answers"], "mode": "exact" if exact else "sampled"}
        origin: dict[str, Any] = {**made["model"], "answers": FLAGS.answers}
    else:
        from befm_jax import simulate

        simulator = simulate.simulator_from_flags()
        origin = simulator.origin
    trained_on = origin.get("trained_on", {})
    split, split_seed = which_people(trained_on, everyone, FLAGS.humans)
    split = FLAGS.split or split
    split_seed = split_seed if FLAGS.split_seed is None else FLAGS.split_seed
    people = human.load(FLAGS.humans, chosen, split, split_seed)
    print(people.describe())
    warning = warning_if_not_held_out(trained_on, people, FLAGS.humans, split_seed)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if simulator is not None:
        played = [game for game in chosen if people.n(game.id)]
        origin = simulator.described(played)
        if FLAGS.sampled:
            sampling = simulate.sampling_from_flags()
            found = simulate.simulate_all(
                simulator, played, FLAGS.participants, FLAGS.seed, sampling
            )
            answers = {name: one.answers for name, one in found.items()}
            how = simulate.how_sampled(FLAGS.participants, FLAGS.seed, sampling)
        else:
            answers, how = simulate.exact_all(simulator, played), {"mode": "exact"}
    results = provenance() | evaluation(
        answers,
        people,
        model=origin | ({"warning": warning} if warning else {}),
        how=how,
        task_names=task_names,
        resamples=FLAGS.resamples,
        seed=FLAGS.seed,
    )
    report.write(results, FLAGS.out)
    print(report.summary(results))
    print(f"page: {Path(FLAGS.out) / 'report.html'}")


if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_string("answers", None, "choices.csv or distribution.csv, instead of --model")
    flags.DEFINE_bool("sampled", False, "draw --participants answers instead of scoring all")
    flags.DEFINE_string("tasks", "game_behavior", f"any of: {', '.join(tasks.names())}")
    flags.DEFINE_string("humans", "", "CSV of people's choices (default: the embedded reference)")
    flags.DEFINE_enum(
        "split",
        None,
        SPLITS,
        "which of these people (default: test for the embedded reference and for a table that the "
        "model was trained on, all for any other table)",
    )
    flags.DEFINE_integer(
        "split_seed", None, "which of the possible splits (default: the model's)", lower_bound=0
    )
    flags.DEFINE_integer("resamples", 10_000, "of the bootstrap", lower_bound=100)
    flags.DEFINE_string("out", None, "the directory to write")
    flags.mark_flag_as_required("out")
    cli.run(main, __doc__ or "")
