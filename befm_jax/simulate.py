r"""Simulates participants who answer games, and writes a table of choices.

    befm simulate --model RUN_OR_HF_DIR --games all --participants 1000 --seed 0 \
        --out choices.csv
    befm simulate --model RUN_OR_HF_DIR --games dictator,my_game.py --exact --out distribution.csv
    befm simulate --model openai:MODEL --base_url http://localhost:8000/v1 --yes --out choices.csv

`choices.csv` has the columns game, participant, choice: one row per simulated participant, the
choice in the game's own unit (a named action by its index), empty where the answer was unusable.
`distribution.csv` has game, choice, probability: the model's unconditional probabilities, without
sampling; what they lack to 1 is the probability of outputs outside the answer set.  Metadata are
written beside either file, as FILE.json.
"""

from __future__ import annotations

from befm_jax import cli

if __name__ == "__main__":
    cli.starting("simulate")

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from befm_jax import files
from befm_jax.data import games
from befm_jax.data.items import Item
from befm_jax.data.responses import Exact, How, Sampled, how_as_dict
from befm_jax.errors import UserError
from befm_jax.respondents import comparing, openai, recorded
from befm_jax.respondents.engine import Engine, load
from befm_jax.respondents.openai import OpenAI
from befm_jax.tasks.games import item_of

FLAGS = flags.FLAGS


def engine_from_flags() -> Engine:
    """The engine of `--model`, `--adapter`, `--dtype` and `--devices`, loaded."""
    cli.keep_compiled_programs()
    engine = load(
        FLAGS.model,
        FLAGS.adapter,
        FLAGS.dtype,
        FLAGS.quantize,
        FLAGS.force_template,
        FLAGS.devices,
        FLAGS.cache,
        FLAGS.force_base,
    )
    cli.note_origin(engine.origin)
    return engine


def respondent_from_flags(kept: Path) -> Engine | OpenAI:
    """The model of `--model`: loaded, or a server's, whose answers are kept in a file.

    Raises:
        UserError: see `load` and `Client`; prices that are not two numbers.
    """
    if not FLAGS.model.startswith(openai.PREFIX):
        cli.note_unused_flags(cli.SERVED, "without --model openai:MODEL")
        return engine_from_flags()
    cli.note_unused_flags((*cli.LOADED, "cache"), "with --model openai:MODEL")
    return OpenAI(openai.client_from(FLAGS, kept), FLAGS.tokenizer)


def sampled_from_flags() -> Sampled:
    """The sampling settings of the flags; raises UserError where one is out of range."""
    return Sampled(
        FLAGS.participants,
        FLAGS.seed,
        FLAGS.temperature,
        FLAGS.top_k,
        FLAGS.top_p,
        FLAGS.max_new_tokens,
    )


def main() -> None:
    """`befm simulate`."""
    if FLAGS.exact:
        cli.note_unused_flags((*cli.SAMPLING, "seed"), "with --exact: nothing is drawn")
    items = [item_of(game) for game in games.select(FLAGS.games)]
    how: How = Exact() if FLAGS.exact else sampled_from_flags()
    out = Path(FLAGS.out)
    if out.is_dir():
        raise UserError(f"--out is {out}, a directory; it must be a file")
    with files.in_use(out.with_name(f".{out.name}.lock"), out):
        simulate(items, how, out)


def simulate(items: Sequence[Item], how: How, out: Path) -> None:
    """Writes what the model of the flags answers, with its metadata, and prints a summary."""
    model = respondent_from_flags(out.with_name(f"{out.name}.answers.jsonl"))
    start = time.perf_counter()
    by_item = comparing.ask(model, items, how)
    responses = [by_item[item.id] for item in items]
    write = recorded.write_distribution if isinstance(how, Exact) else recorded.write_choices
    beside = out.with_name(out.name + ".json")
    with files.writing(beside):
        beside.unlink(missing_ok=True)  # it describes the answers that were here before
    write(out, items, responses)
    metadata: dict[str, Any] = {
        "model": model.describe() | {"first_prompt": model.first_prompt(items)},
        "answers": how_as_dict(how),
        "fingerprint": recorded.Recorded(out).fingerprint,
    }
    if isinstance(model, Engine):
        metadata["device"] = model.device
    files.write_object(beside, metadata)
    for response in responses:
        ends = response.ends_after_answer
        summary = f"outside the answer set: {response.outside:.3%}"
        summary += "" if ends is None else f"; stops after an answer: {ends:.3%}"
        summary += f"; {response.unread} of {response.draws} unreadable" if response.draws else ""
        print(f"{response.item:24} {summary}")
    print(f"{out} ({len(items)} games, {time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_bool("exact", False, "write the exact distribution instead of sampling")
    flags.DEFINE_string("out", None, "the file to write")
    flags.mark_flags_as_required(["model", "out"])
    cli.run(main, __doc__ or "")
