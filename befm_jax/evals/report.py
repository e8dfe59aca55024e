"""Evaluations on paper: results.json, a page for readers, a figure for a slide, a table in text.

results.json holds one evaluation, or a train run's:

    schema          "befm_jax.results/1"
    ── a train run ──
    base            evaluation: the model before tuning
    tuned           evaluation: after it, read exactly
    tuned_sampled   evaluation, optional: after it, by draws; where none of them is an answer,
                    `not_compared` says so in place of tasks
    train           anything about the training
    ── an evaluation (at the top level, or under the names above) ──
    model           what was evaluated: any fields, among them
      first_prompt  game, ids (tokens), text (special tokens written out)
      chat_template  sha256; adapter: whether an adapter was trained with this template
      ignored_generation_config  {setting: value} of the model's own file, not followed
    answers         mode "exact" or "sampled"; temperature, top_k, top_p, seed, ...
    people          source, split, fingerprint, excluded {reason: rows}
    tasks.game_behavior
      metrics.M     of the mean over games; M is wasserstein, energy, crps, log_score,
                    total_variation, jensen_shannon, ks, mean_difference, variance_ratio
        value       the figure; null where undefined
        ci95        [low, high], or null
        floor       a perfect model against as many people
        ceiling     other people in the model's place
        skill       (uniform - model) / (uniform - floor); null where it means nothing
        baselines   {uniform, median, equilibrium, pooled}
        unit        "points" (the range of a game is 100), "nats", "bits", "share", "ratio"
        note        why a figure or its interval is null; absent otherwise
      outside_mass  value (mean over games), max: mass outside the answer set
      ends_after_answer  value (mean over the games where it is known), min; or null: how often
                    the turn ends right after an answer of the set
      groups.GAME   title, unit, people (number)
        model       exact, answers (number drawn, or null), unparsed, out_of_set, outside_mass,
                    ends_after_answer (or null)
        metrics.M   as above, for this game
        distribution  values, people (counts), model (shares within the set)
      skipped       {game: reason}
      resamples, seed
      definitions   {term: one line}

Other fields are kept, and listed on the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2

from befm_jax import files
from befm_jax.evals import charts

_LABELS = {"base": "base model", "tuned": "tuned model", "tuned_sampled": "tuned model, sampled"}
_DIGITS = {"points": 2, "nats": 2}
_LONGEST_LIST = 8


@dataclass(frozen=True)
class Run:
    """One evaluation of the results, under the name that readers see."""

    key: str
    label: str
    evaluation: Mapping[str, Any]

    @property
    def games(self) -> Mapping[str, Any]:
        """What stands at `tasks.game_behavior`."""
        return self.evaluation["tasks"]["game_behavior"]


def runs(results: Mapping[str, Any]) -> list[Run]:
    """The evaluations in the results: base before tuned, or the only one.

    Those that are `not_compared` are left out.

    Raises:
        ValueError: the results hold no evaluation of game behaviour.
    """
    found = [
        Run(key, label, results[key])
        for key, label in _LABELS.items()
        if key in results and "not_compared" not in results[key]
    ]
    found = found or [Run("model", "model", results)]
    for run in found:
        if "game_behavior" not in run.evaluation.get("tasks", {}):
            raise ValueError(f"results: {run.label} has no tasks.game_behavior")
    return found


def not_compared(results: Mapping[str, Any]) -> dict[str, str]:
    """Why an evaluation of a train run has no figures, under the name that readers see."""
    return {
        label: results[key]["not_compared"]
        for key, label in _LABELS.items()
        if key in results and "not_compared" in results[key]
    }


def write(results: Mapping[str, Any], out_dir: Path | str) -> None:
    """Write results.json, report.html and games.png into `out_dir`, made if it is not there.

    Each file is written atomically: an old one is never left half overwritten.

    Raises:
        ValueError: the results hold no evaluation of game behaviour, or a NaN or an infinity.
    """
    picture = BytesIO()
    main, base = _main_and_base(runs(results))
    charts.games_figure(main.games, base.games if base else None, main.label).savefig(picture)
    pages = {
        "results.json": json.dumps(results, indent=1, allow_nan=False).encode(),
        "report.html": page(results).encode(),
        "games.png": picture.getvalue(),
    }
    for name, content in pages.items():
        files.write(Path(out_dir) / name, content)


def page(results: Mapping[str, Any]) -> str:
    """The report as one HTML page without outside resources; all text in it is escaped."""
    found = runs(results)
    main, base = _main_and_base(found)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, span=span, percent=percent)
    template = resources.files("befm_jax.evals").joinpath("report_template.html").read_text("utf-8")
    return environment.from_string(template).render(
        runs=found,
        main=main,
        base=base,
        ladder=_ladder(found, main),
        panels={name: _panel(name, main, base) for name in main.games["groups"]},
        mean_metrics={run.key: run.games["metrics"] for run in found},
        group_metrics={
            name: {
                run.key: run.games["groups"][name]["metrics"]
                for run in found
                if name in run.games["groups"]
            }
            for name in main.games["groups"]
        },
        digits={
            name: _DIGITS.get(figure["unit"], 3) for name, figure in main.games["metrics"].items()
        },
        first_prompt=_prompt(main.evaluation.get("model", {}).get("first_prompt")),
        not_compared=not_compared(results),
        settings=list(_settings(results, found)),
        colours={
            "people": charts.PEOPLE_COLOUR,
            "model": charts.MODEL_COLOUR,
            "base": charts.BASE_COLOUR,
        },
    )


def summary(results: Mapping[str, Any]) -> str:
    """The table that an entry point prints at its end: a row a game, then their mean."""
    main, base = _main_and_base(runs(results))
    heads = ["game", "people", *(["base"] if base else []), main.label.split()[0]]
    table = [[*heads, "95 % interval", "other people"]]
    rows = [
        (group["title"], f"{group['people']}", name, group["metrics"]["wasserstein"])
        for name, group in main.games["groups"].items()
    ]
    rows.append(("mean", "", "", main.games["metrics"]["wasserstein"]))
    for title, people, name, figure in rows:
        before = []
        if base and name:
            group = base.games["groups"].get(name)
            before = [number(group["metrics"]["wasserstein"]["value"] if group else None)]
        elif base:
            before = [number(base.games["metrics"]["wasserstein"]["value"])]
        value, ceiling = number(figure["value"]), number(figure["ceiling"])
        table.append([title, people, *before, value, span(figure["ci95"]), ceiling])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["Wasserstein distance to people, each game's range = 100 (smaller is nearer)"]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{label}: {reason}" for label, reason in not_compared(results).items()]
    return "\n".join(lines)


def number(value: float | None, digits: int = 2) -> str:
    """A figure as text: a dash where there is none, never a minus nought."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}"


def span(ends: list[float] | None, digits: int = 2) -> str:
    """An interval as text."""
    return "–" if ends is None else f"{number(ends[0], digits)} to {number(ends[1], digits)}"


def percent(share: float | None) -> str:
    """A share as text: small ones keep two digits that say something; a dash for none."""
    if share is None:
        return "–"
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.1f} %"


def _main_and_base(found: list[Run]) -> tuple[Run, Run | None]:
    """The evaluation that the page is about, and the one before tuning if there is one."""
    by_key = {run.key: run for run in found}
    main = by_key.get("tuned") or by_key.get("model") or found[-1]
    return main, by_key.get("base") if main.key != "base" else None


def _ladder(found: list[Run], main: Run) -> list[dict[str, Any]]:
    """Everybody who can be held against the people, nearest first, with a bar's width in %."""
    figure = main.games["metrics"]["wasserstein"]
    steps = [
        {"label": "a perfect model (floor)", "value": figure["floor"], "kind": "reference"},
        {"label": "other people (ceiling)", "value": figure["ceiling"], "kind": "people"},
        {"label": "pooled: ignores the game", "value": figure["baselines"]["pooled"]},
        {"label": "uniform: answers at random", "value": figure["baselines"]["uniform"]},
        {"label": "always the median person", "value": figure["baselines"]["median"]},
        {"label": "textbook equilibrium", "value": figure["baselines"]["equilibrium"]},
    ]
    for run in found:
        mean = run.games["metrics"]["wasserstein"]
        kind = "base" if run.key == "base" else "model"
        steps.append(
            {"label": run.label, "value": mean["value"], "kind": kind, "ci95": mean["ci95"]}
        )
    steps = sorted((step for step in steps if step["value"] is not None), key=_value)
    longest = max(_value(steps[-1]), 1e-9)
    return [
        {"kind": "reference", "ci95": None, **step, "width": round(100 * _value(step) / longest, 2)}
        for step in steps
    ]


def _value(step: Mapping[str, Any]) -> float:
    return float(step["value"])


def _panel(name: str, main: Run, base: Run | None) -> charts.Panel:
    group = main.games["groups"][name]
    outlines = {}
    if base and name in base.games["groups"]:
        outlines["base"] = base.games["groups"][name]["distribution"]["model"]
    outlines["model"] = group["distribution"]["model"]
    return charts.panel(group["distribution"], outlines, group["unit"])


def _prompt(value: Any) -> Mapping[str, Any] | None:
    """A first prompt; None for what is none (the file beside answers may be anybody's)."""
    known = isinstance(value, Mapping) and {"game", "ids", "text"} <= set(value)
    return value if known and isinstance(value["ids"], list) else None


def _settings(results: Mapping[str, Any], found: list[Run]) -> Iterator[tuple[str, str]]:
    """Every field that the page shows nowhere else, as a dotted name and a text."""
    keys = {run.key for run in found}
    for name, value in results.items():
        if name in keys:
            for inner, content in value.items():
                yield from _flat(f"{name}.{inner}", content)
        else:
            yield from _flat(name, value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    last = name.split(".")[-1]
    if last in ("tasks", "excluded") or (last == "first_prompt" and _prompt(value)):
        return
    if isinstance(value, Mapping):
        for inner, content in value.items():
            yield from _flat(f"{name}.{inner}", content)
    elif isinstance(value, list) and len(value) > _LONGEST_LIST:
        yield name, f"{len(value)} values, in results.json"
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
