r"""Golden figures: what the pipeline computes, stored so that every change of it is seen.

    python tools/golden.py check              # what differs, and what such a difference means
    python tools/golden.py check --quickstart # runs it, too: three minutes
    python tools/golden.py write              # after a change that is meant; say why in the commit

Three files in `tests/golden/`:

- `figures.json`: every measure of every game, with floor, ceiling, skill, interval and baselines,
  of a model read exactly and of one sampled.  NumPy alone: equal to 1e-12 on any machine
  (`tests/test_golden.py`).
- `losses.json`: the quickstart's losses, step by step.  Equal to the last digit on one machine with
  one order of summation; elsewhere, and where rows are packed otherwise, to float32's rounding,
  which 270 steps make visible.
- `distributions.json`: the exact distributions of the quickstart's base and tuned model.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from befm_jax.data import choices, games
from befm_jax.data.responses import Exact, Response
from befm_jax.evals import results
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.results import Evaluation, Figure
from befm_jax.respondents import baselines
from befm_jax.tasks.games import GAMES, item_of

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"

MEANS = {
    "figures": "a figure that users have published would now be another. Either a measure, a "
    "floor, an interval or a baseline changed its definition, or the people or their split did. "
    "If that is meant, say so in CHANGELOG.md and the docstring, and write the files again.",
    "losses": "training takes another course: the data, their order, their weights, the "
    "initialisation, the schedule or the order of summation changed. Differences that begin at "
    "1e-6 and grow are rounding; a first step that differs is another loss.",
    "distributions": "the model answers otherwise: prompts, tokens, the forward pass or training "
    "changed. Look at the losses first.",
}


def figures() -> dict[str, Any]:
    """Every figure of two made-up respondents compared with the embedded test people."""
    chosen = [game for game in (games.get(name) for name in games.ids()) if game.reference]
    reference = choices.read("", chosen)
    learnt, held_out = (
        choices.histograms(choices.part(reference, split), chosen) for split in ("train", "test")
    )
    items = [item_of(game, held_out[game.id]) for game in chosen]
    # Fitted on the very people who are compared with, as when the figures were stored.
    beside = {
        name: {one.item: one for one in baselines.fit(name, items, "game").respond(items, Exact())}
        for name in ("uniform", "median", "equilibrium", "pooled")
    }
    rng = np.random.default_rng(0)
    exact, sampled = {}, {}
    for game in chosen:
        shares = (learnt[game.id] + 1.0) / (learnt[game.id] + 1.0).sum()
        exact[game.id] = Response.from_mass(game.id, 0.98 * shares)
        counts = rng.multinomial(300, shares)
        sampled[game.id] = Response.from_counts(game.id, counts, 4, 3, ends_after_answer=0.9)
    found = {}
    for name, responses in (("exact", exact), ("sampled", sampled)):
        evaluation = evaluate(
            GAMES, items, responses, respondent=name, beside=beside, resamples=1000, seed=0
        )
        found[name] = _as_stored(evaluation)
    return found


def _as_stored(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation in the layout of `figures.json`: by measure, and by game and measure."""

    def stored(figure: Figure) -> dict[str, Any]:
        kept = {
            "value": figure.value,
            "ci95": list(figure.ci95) if figure.ci95 else None,
            "floor": figure.floor,
            "ceiling": figure.ceiling,
            "skill": figure.skill,
            "baselines": dict(figure.beside),
            "unit": figure.unit,
        }
        undefined = figure.value is None or figure.ci95 is None
        return kept | ({"note": figure.note.split("; people are")[0]} if undefined else {})

    def measured(where: dict[str, str]) -> dict[str, Figure]:
        return {one.measure: one for one in evaluation.figures if one.where == where}

    groups: dict[str, dict[str, Any]] = {}
    for drawn in evaluation.distributions:
        own = measured(dict(drawn.where))
        figure = own["wasserstein"]
        groups[drawn.where["game"]] = {
            "title": drawn.title,
            "unit": drawn.unit,
            "people": figure.people,
            "model": {
                "exact": not figure.draws,
                "answers": figure.draws or None,
                "unparsed": figure.unread,
                "out_of_set": round(figure.outside * figure.draws) - figure.unread,
                "outside_mass": figure.outside,
                "ends_after_answer": figure.ends_after_answer,
            },
            "metrics": {name: stored(one) for name, one in own.items()},
            "distribution": {
                "values": list(drawn.values or ()),
                "people": list(drawn.people),
                "model": list(drawn.model),
            },
        }
    of_task = measured({})
    whole = of_task["wasserstein"]
    models = [group["model"] for group in groups.values()]
    ends = [one["ends_after_answer"] for one in models if one["ends_after_answer"] is not None]
    return {
        "metrics": {name: stored(one) for name, one in of_task.items()},
        "outside_mass": {
            "value": whole.outside,
            "max": max(one["outside_mass"] for one in models),
        },
        "ends_after_answer": {
            "value": whole.ends_after_answer,
            "min": min(ends) if ends else None,
        },
        "groups": groups,
    }


def quickstart(workdir: Path) -> dict[str, Any]:
    """The losses and the exact distributions of the quickstart, run in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "befm_jax.train", "--config", "configs/quickstart.py",
         "--workdir", str(workdir)],
        cwd=ROOT, check=True, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    losses: dict[str, list[float]] = {}
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record:
            losses.setdefault(record["phase"], []).append(record["loss"])
    distributions: dict[str, dict[str, list[float]]] = {"base": {}, "tuned": {}}
    for one in results.read(workdir / "results.json").distributions:
        if one.respondent in distributions:
            distributions[one.respondent][one.where["game"]] = list(one.model)
    return {"losses": losses, "distributions": distributions}


def differences(found: Any, golden: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Every place where two trees of JSON differ; numbers by more than `tolerance`, relatively."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*golden, *found]):
            if key not in found or key not in golden:
                yield f"{where}/{key}: only {'golden' if key in golden else 'found'}"
            else:
                yield from differences(found[key], golden[key], tolerance, f"{where}/{key}")
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for place, (one, other) in enumerate(zip(found, golden, strict=True)):
            yield from differences(one, other, tolerance, f"{where}[{place}]")
    elif isinstance(golden, float | int) and isinstance(found, float | int):
        if not math.isclose(found, golden, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{where}: {found!r}, was {golden!r}"
    elif found != golden:
        yield f"{where}: {found!r}, was {golden!r}"


def read(name: str) -> Any:
    """A golden file's content."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    """`python tools/golden.py write|check`."""
    if arguments[1:] not in (["write"], ["check"]):
        raise app.UsageError("say write or check")
    writing = arguments[1] == "write"
    found: dict[str, Any] = {"figures": figures()}
    if writing or FLAGS.quickstart:
        with tempfile.TemporaryDirectory() as folder:
            found |= quickstart(Path(folder))
    wrong = False
    for name, content in found.items():
        if writing:
            text = json.dumps(content, indent=1)
            (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            continue
        tolerance = {"figures": 1e-12, "losses": 0.0, "distributions": 1e-5}[name]
        differing = list(differences(content, read(name), tolerance))
        print(f"{name}: {len(differing)} differences")
        if differing:
            wrong = True
            print("\n".join(differing[:20]), f"\nThis means: {MEANS[name]}", sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    flags.DEFINE_bool("quickstart", False, "compare the quickstart's losses and answers, too")
    app.run(main)
