r"""Simulated participants answer games; a table of choices out.

    python -m befm_jax.simulate --model RUN_OR_HF_DIR --games all --participants 1000 \
        --seed 0 --out choices.csv
    python -m befm_jax.simulate --model RUN_OR_HF_DIR --games dictator,my_game.py --exact \
        --out distribution.csv

`choices.csv` has the columns game, participant, choice: one row a simulated participant, the
choice in the game's own unit (a named action by its number), empty where the answer could not be
used.  `distribution.csv` has game, choice, probability: the model's exact distribution, no
sampling; what is missing to 1 is the probability of anything that is no answer.  How the answers
were made is written beside either file, as FILE.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from tqdm import tqdm

from befm_jax import cli, files
from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.distributed import processes
from befm_jax.errors import UserError
from befm_jax.evals import answers as answer_files
from befm_jax.evals.answers import Answers
from befm_jax.inference.sample import Sampling
from befm_jax.respondents.engine import Simulation, Simulator, load

FLAGS = flags.FLAGS
_Item = TypeVar("_Item")


def simulator_from_flags() -> Simulator:
    """Loads what `--model`, `--adapter` and `--dtype` name, over `--devices`."""
    cli.keep_compiled_programs()
    simulator = load(
        FLAGS.model,
        FLAGS.adapter,
        FLAGS.dtype,
        FLAGS.quantize,
        FLAGS.force_template,
        FLAGS.devices,
    )
    cli.note_ignored_settings(simulator.origin)
    return simulator


def sampling_from_flags() -> Sampling:
    """Raises UserError where a sampling flag is out of range."""
    try:
        return Sampling(
            FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.max_new_tokens, FLAGS.cache
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error


def simulate_all(
    simulator: Simulator, chosen: list[Game], participants: int, seed: int, sampling: Sampling
) -> dict[str, Simulation]:
    """A population for each game, with a progress bar."""
    each = simulator.simulate_each(chosen, participants, seed, sampling)
    found = {one.game: one for one in _progress(each, "simulate", len(chosen))}
    return {game.id: found[game.id] for game in chosen}


def exact_all(simulator: Simulator, chosen: list[Game]) -> dict[str, Answers]:
    """The exact distribution for each game, with a progress bar."""
    each = simulator.distribution_each(chosen)
    shown = _progress(each, "score", len(chosen))
    return {game.id: found for game, found in zip(chosen, shown, strict=True)}


def _progress(each: Iterable[_Item], what: str, games: int) -> Iterable[_Item]:
    """A progress bar over games; of several processes the first shows it."""
    bar: Iterable[_Item] = tqdm(
        each, desc=what, unit="game", total=games, disable=not processes.is_first()
    )
    return bar


def how_sampled(participants: int, seed: int, sampling: Sampling) -> dict[str, Any]:
    """The settings of a sampled population, for every file that is made from it."""
    return {"mode": "sampled", "participants": participants, "seed": seed, **sampling.as_dict()}


def _write_beside(out: Path, how: Mapping[str, Any], model: Mapping[str, Any], device: str) -> None:
    made = {"model": model, "answers": how, "device": device}
    files.write_object(out.with_name(out.name + ".json"), made)


def main() -> None:
    """`python -m befm_jax.simulate`."""
    if FLAGS.exact:
        cli.note_unused_flags((*cli.SAMPLING, "seed"), "with --exact: nothing is drawn")
    chosen, sampling, out = games.select(FLAGS.games), sampling_from_flags(), Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise UserError(f"--out {out}: is a directory; name a file")
    simulator = simulator_from_flags()
    model = simulator.described(chosen)
    since = time.perf_counter()
    if FLAGS.exact:
        exact = exact_all(simulator, chosen)
        answer_files.write_distribution(out, exact)
        _write_beside(out, {"mode": "exact"}, model, simulator.device)
        for name, answers in exact.items():
            print(
                f"{name:24} outside the answer set: {answers.outside:.3%}; stops after an answer: "
                f"{answers.ends_after_answer:.3%}"
            )
    else:
        found = simulate_all(simulator, chosen, FLAGS.participants, FLAGS.seed, sampling)
        answer_files.write_choices(out, {name: one.choices for name, one in found.items()})
        how = how_sampled(FLAGS.participants, FLAGS.seed, sampling)
        _write_beside(out, how, model, simulator.device)
        for name, one in found.items():
            answers = one.answers
            print(
                f"{name:24} {int(answers.weights.sum())} answers, {answers.unparsed} without an "
                f"answer, {answers.out_of_set} outside the answer set"
            )
    print(f"{out} ({len(chosen)} games, {time.perf_counter() - since:.1f} s)")


if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_bool("exact", False, "write the exact distribution instead of sampling")
    flags.DEFINE_string("out", None, "the file to write")
    flags.mark_flags_as_required(["model", "out"])
    cli.run(main, __doc__ or "")
