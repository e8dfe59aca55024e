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
from befm_jax.evals.answers import Answers
from befm_jax.evals.tasks import game_behavior

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
    reference = choices.reference(chosen)
    learnt, held_out = (reference.draw_split(split, 0) for split in ("train", "test"))
    rng = np.random.default_rng(0)
    exact, sampled = {}, {}
    for game in chosen:
        shares = (learnt.counts[game.id] + 1.0) / (learnt.counts[game.id] + 1.0).sum()
        exact[game.id] = Answers.from_distribution(0.98 * shares)
        sampled[game.id] = Answers.from_counts(rng.multinomial(300, shares), 4, 3, 0.9)
    found = {}
    for name, answers in (("exact", exact), ("sampled", sampled)):
        results = game_behavior.evaluate(answers, held_out, resamples=1000, seed=0)
        kept = ("metrics", "outside_mass", "ends_after_answer", "groups")
        found[name] = {part: results[part] for part in kept}
    return found


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
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    groups = {
        which: results[which]["tasks"]["game_behavior"]["groups"] for which in ("base", "tuned")
    }
    distributions = {
        which: {name: group["distribution"]["model"] for name, group in groups[which].items()}
        for which in groups
    }
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
