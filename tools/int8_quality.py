"""What a base in eight bits costs: logits, distributions and every measure beside the stored one's.

    python tools/int8_quality.py --model runs/quickstart [--adapter DIR] [--games all]
        [--humans people.csv] [--dtype float32] [--resamples 10000] [--json int8.json]

`--model` is a training run, a model's directory or a hub id.  It is read twice, with its weights as
stored and with them rounded, an adapter on top of either, and answers the games exactly:

- *logits*: the largest and the root-mean-square difference at every position of each game's prompt
  and one answer, in percent of the range of all logits;
- *KL*: divergence of the rounded model's distribution from the stored one's, in nats, over a
  game's answers and, as one more, everything that is none;
- *measures*: those of the task "games", on people whom the model has not seen, with intervals.
  The same resamples of people serve both sides, so that the difference has an interval of its own,
  much narrower than theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from befm_jax import cli
from befm_jax.config import DTYPES
from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.data.items import AnswerSet, Item
from befm_jax.data.responses import Exact, Response
from befm_jax.errors import UserError, printable
from befm_jax.evals import measures, resampling
from befm_jax.evals.resampling import Resampled
from befm_jax.evals.results import Results
from befm_jax.evaluate import held_out
from befm_jax.respondents import merging
from befm_jax.respondents.engine import load
from befm_jax.tasks import sources
from befm_jax.tasks.games import GAMES

SIDES = {"stored": "no", "int8": "int8"}


class Found(NamedTuple):
    """What one side says: its logits, one array `[T, V]` a game, and its responses."""

    logits: list[np.ndarray]
    responses: dict[str, Response]


def main() -> None:
    """Compares the two bases of the model on the command line."""
    arguments = parser().parse_args()
    cli.keep_compiled_programs()
    try:
        report = compare(arguments)
        print(table(report))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"figures: {arguments.json}")
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--model", required=True, help="a training run, a model's directory or id")
    made.add_argument("--adapter", help="a LoRA adapter's directory or hub id for --model")
    made.add_argument("--games", default="all", help="ids, 'all' or .py files, with commas")
    made.add_argument("--humans", default="", help="CSV of choices (default: the reference)")
    made.add_argument("--dtype", choices=DTYPES, help="what to compute in (default: as the run)")
    made.add_argument("--resamples", type=_resamples, default=10_000, help="of the bootstrap")
    made.add_argument("--seed", type=int, default=0, help="of the resamples")
    made.add_argument("--force_template", action="store_true", help="take another chat template")
    made.add_argument("--json", type=Path, help="where to write every figure")
    return made


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of both sides, in the layout of `--json`."""
    (everybody,) = sources.select("games", games.select(arguments.games), arguments.humans)
    everyone = everybody.items()
    played = [games.get(item.id) for item in everyone]
    found: dict[str, Found] = {}
    for side, quantize in SIDES.items():
        # One model at a time: two of the size that is worth rounding may not fit.
        model = load(
            arguments.model, arguments.adapter, arguments.dtype, quantize, arguments.force_template
        )
        logits = merging.answer_logits(model, played, whole=True)
        responses = {one.item: one for one in model.respond(everyone, Exact())}
        found[side] = Found(logits, responses)
        origin = model.describe() | {"first_prompt": model.first_prompt(everyone)}
        device = model.device
        del model
    people, _ = held_out(everybody, origin.get("trained_on", {}), None, None)
    return Results().head | {
        "command": " ".join(["python", *sys.argv]),
        "model": {name: value for name, value in origin.items() if name != "quantize"},
        "device": device,
        "people": {"source": people.rows.source, "split": people.rows.split},
        "resamples": arguments.resamples,
        "seed": arguments.seed,
        **logit_errors(played, found["stored"].logits, found["int8"].logits),
        "kl": {
            game.id: divergence(*(found[side].responses[game.id] for side in SIDES))
            for game in played
        },
        "measures": compared(
            people.items(),
            {side: found[side].responses for side in SIDES},
            arguments.resamples,
            arguments.seed,
        ),
    }


def logit_errors(
    played: Sequence[Game], stored: Sequence[np.ndarray], rounded: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The range of all logits, and the largest and root-mean-square difference: all, and a game.

    A model may have more rows in its vocabulary than its tokenizer has tokens; all are compared.
    """
    errors = [(one - other).astype(np.float64) for one, other in zip(rounded, stored, strict=True)]

    def figures(of: Sequence[np.ndarray]) -> dict[str, float]:
        squares = sum(float(np.square(one).sum()) for one in of)
        return {
            "largest": max(float(np.abs(one).max()) for one in of),
            "rms": (squares / sum(one.size for one in of)) ** 0.5,
        }

    highest, lowest = max(one.max() for one in stored), min(one.min() for one in stored)
    return {
        "logit_range": float(highest - lowest),
        "logit_error": figures(errors),
        "logit_error_by_game": {
            game.id: figures([error]) for game, error in zip(played, errors, strict=True)
        },
    }


def divergence(stored: Response, rounded: Response) -> float:
    """KL(stored || rounded) in nats, over a game's answers and all that is none, as one more."""
    p, q = (np.append(one.shares * (1 - one.outside), one.outside) for one in (stored, rounded))
    there = p > 0
    with np.errstate(divide="ignore"):  # where the rounded one excludes what the other says: inf
        return float(np.sum(p[there] * np.log(p[there] / q[there])))


def compared(
    items: Sequence[Item],
    responses: Mapping[str, Mapping[str, Response]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Each measure, mean over games and game by game: both sides and the difference, int8 - stored.

    The resamples are those of `befm_jax.evaluate`, and the same for both sides.
    """
    known = [measures.get(name) for name in GAMES.measures]
    by_game: dict[str, dict[str, dict[str, Resampled]]] = {}
    for item in items:
        assert isinstance(item.answers, AnswerSet), "games have closed sets of answers"
        values, people = np.asarray(item.answers.values), np.asarray(item.target)
        by_game[item.id] = {
            side: resampling.compare(
                values,
                responses[side][item.id].shares,
                people,
                exact=True,
                resamples=resamples,
                rng=np.random.default_rng([seed, zlib.crc32(item.id.encode())]),
                measures=known,
            )
            for side in SIDES
        }
    found = {}
    for measure in known:
        games_of = {
            game: {side: of[side][measure.name] for side in SIDES} for game, of in by_game.items()
        }
        mean = {
            side: Resampled(
                value=float(np.mean([of[side].value for of in games_of.values()])),
                replicates=np.mean([of[side].replicates for of in games_of.values()], axis=0),
                floor=np.nan,
                ceiling=np.nan,
            )
            for side in SIDES
        }
        found[measure.name] = {
            "unit": measure.unit,
            "mean": _figures(measure, mean),
            "games": {game: _figures(measure, sides) for game, sides in games_of.items()},
        }
    return found


def _figures(measure: measures.Measure, sides: Mapping[str, Resampled]) -> dict[str, Any]:
    """Value and interval of both sides and of the difference; None where undefined."""
    stored, rounded = (sides[side] for side in SIDES)
    anything = replace(measure, low=-np.inf, high=np.inf)
    return {
        label: {
            "value": value if np.isfinite(value) else None,
            "ci95": resampling.interval(value, replicates, within),
        }
        for label, value, replicates, within in (
            ("stored", stored.value, stored.replicates, measure),
            ("int8", rounded.value, rounded.replicates, measure),
            (
                "difference",
                rounded.value - stored.value,
                rounded.replicates - stored.replicates,
                anything,
            ),
        )
    }


def table(report: Mapping[str, Any]) -> str:
    """The figures in lines for a reader."""
    spread, error = report["logit_range"], report["logit_error"]
    model = report["model"]
    lines = [
        f"int8 against the stored weights: {model['path']}, computed in {model['dtype']}",
        f"people: {report['people']['source']}, {report['people']['split']} split",
        "",
        f"logits of a range of {spread:.3g}: largest difference {error['largest'] / spread:.3%}, "
        f"root mean square {error['rms'] / spread:.4%}",
        "",
        f"{'game':22}{'largest':>10}{'rms':>10}{'KL, nats':>12}"
        f"{'Wasserstein stored':>21}{'int8':>9}{'difference, 95 % interval':>32}",
    ]
    moved = report["measures"]["wasserstein"]["games"]
    for game, errors in report["logit_error_by_game"].items():
        line = (
            f"{game:22}{errors['largest'] / spread:>10.3%}{errors['rms'] / spread:>10.4%}"
            f"{report['kl'][game]:>12.2e}"
        )
        if game in moved:
            sides = moved[game]
            line += f"{sides['stored']['value']:>21.3f}{sides['int8']['value']:>9.3f}"
            line += f"{_difference(sides['difference']):>32}"
        lines.append(line)
    lines += ["", f"{'mean over games':22}{'stored':>28}{'int8':>28}{'difference':>32}"]
    for name, one in report["measures"].items():
        mean = one["mean"]
        lines.append(
            f"{name:22}{_with_interval(mean['stored']):>28}{_with_interval(mean['int8']):>28}"
            f"{_difference(mean['difference']):>32}"
        )
    return "\n".join(lines)


def _with_interval(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "undefined"
    ends = figure["ci95"]
    return f"{figure['value']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def _difference(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "undefined"
    ends = figure["ci95"]
    return f"{figure['value']:+.4f}" + (f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else "")


def _resamples(text: str) -> int:
    """A number of resamples; argparse's error for too few."""
    number = int(text)
    if number < 100:
        raise argparse.ArgumentTypeError(f"{number}; at least 100")
    return number


if __name__ == "__main__":
    main()
