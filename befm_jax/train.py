"""Fine-tunes a model on people's choices, then holds it against people it has not seen.

    python -m befm_jax.train --config configs/quickstart.py [--workdir runs/quickstart]
    python -m befm_jax.train --config configs/quickstart.py --config.lora.rank=4

The working directory gets config.json, metrics.jsonl, TensorBoard events, checkpoints, the tuned
model in a form that `--model` takes (the directory itself), results.json, report.html, games.png.
The same command line goes on where an interrupted run stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from ml_collections import config_flags

from befm_jax import cli, config, export, json_files, simulate
from befm_jax.adapters import lora, peft
from befm_jax.config import Config, ConfigError
from befm_jax.data import examples as example_files
from befm_jax.data import games
from befm_jax.data import people as human
from befm_jax.data.examples import Example
from befm_jax.data.games import Game
from befm_jax.data.people import People
from befm_jax.data.pipeline import ForestBatches, encode
from befm_jax.evals import report
from befm_jax.evaluate import evaluation, provenance
from befm_jax.inference.sample import Sampling
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf, scratch
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.located import RUN_FILE, Located, locate, write_run
from befm_jax.simulator import (
    Simulator,
    device_in_words,
    fitting_tokenizer,
    said_of_text,
)
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from befm_jax.training.ahead import StepAhead
from befm_jax.training.checkpoint import Checkpoints
from befm_jax.training.metrics import Log

FLAGS = flags.FLAGS
BASE, ADAPTER, TUNED = "base", "adapter", "tuned"


def train(settings: Config) -> Path:
    """One whole run: data, base model, tuning, evaluation.  Returns the working directory.

    Raises UserError for what a person can mend: a field, a file, a table, a diverging loss.
    """
    since = time.perf_counter()
    workdir = start_or_resume(settings)

    chosen = games.select(settings.data.games) if settings.data.games else []
    learnt, held_out = people_of(settings, chosen)
    located = base_of(settings, chosen, workdir)
    tokenizer = fitting_tokenizer(located.directory, llama_config.read(located.directory))

    batches = forests_of(settings, examples_of(settings, learnt, chosen), tokenizer)
    print(describe(batches))
    tuning = tuning_ahead(settings, located, batches)  # compiles while the weights are read
    base = base_model(settings, located, tokenizer)
    tuned = tune(settings, base, tuning, workdir, learnt)

    if held_out is not None:
        results = provenance() | compare(settings, base, tuned, held_out, chosen)
        results["train"] = {
            "device": device_in_words(),
            "seconds_of_the_last_sitting": round(time.perf_counter() - since, 1),
            "steps": batches.steps,
            "observations": batches.report.observations,
            "left_out": batches.report.reasons() or "nothing",
            "tokens_saved_by_sharing": batches.report.saved,
        }
        report.write(results, workdir)
        print(report.summary(results))
        print(f"page:    {workdir / 'report.html'}\nfigures: {workdir / 'results.json'}")
    print(f"model:   {workdir}   (python -m befm_jax.simulate --model {workdir} ...)")
    return workdir


def start_or_resume(settings: Config) -> Path:
    """Makes the working directory, or goes on in it if it holds a run of the same config.

    A directory in which nothing was trained yet takes any config: a typo is not for ever.
    """
    config.validate(settings)
    workdir = Path(settings.workdir)
    saved = workdir / "config.json"
    trained = (workdir / BASE, workdir / "checkpoints", workdir / RUN_FILE)
    if saved.is_file() and any(path.exists() for path in trained):
        config.check_same(settings, saved)
    config.save(settings, saved)
    return workdir


def check_same_inputs(workdir: Path, phase: str, inputs: Mapping[str, str], go_on: bool) -> None:
    """Refuses to go on where files changed behind the paths of an unchanged config.

    `inputs` are hashes of what a phase learns from; they are kept in `inputs.json`.  Raises
    ConfigError if the phase goes on from a checkpoint that was made from others.
    """
    path = workdir / "inputs.json"
    kept = json_files.read_object(path, ConfigError) if path.is_file() else {}
    changed = [name for name in inputs if kept.get(phase, {}).get(name) != inputs[name]]
    if go_on and changed:
        raise ConfigError(
            f"{workdir}: the {' and the '.join(changed)} changed since this run began ({phase}). "
            "Give another --workdir, or delete that one"
        )
    json_files.write_object(path, kept | {phase: dict(inputs)})


def people_of(settings: Config, chosen: list[Game]) -> tuple[People | None, People | None]:
    """People to learn from and people held out; None without games."""
    if not chosen:
        return None, None
    data, split = settings.data, settings.evaluation.split
    learnt = human.load(data.humans, chosen, "train", data.split_seed)
    print(learnt.describe())
    return learnt, human.load(data.humans, chosen, split, data.split_seed)


def examples_of(settings: Config, learnt: People | None, chosen: list[Game]) -> list[Example]:
    """Every example of the run: people's choices, and what the files named in the config hold."""
    found: list[Example] = []
    if learnt is not None:
        found += human.examples(learnt, [game for game in chosen if learnt.n(game.id)])
    for path in config.names(settings.data.examples):
        found += example_files.read(path)
    return found


def forests_of(settings: Config, found: list[Example], tokenizer: Tokenizer) -> ForestBatches:
    """The run's batches of token forests."""
    data = settings.data
    return ForestBatches(
        encode(found, tokenizer),
        slots=data.slots,
        rows=data.rows,
        epochs=settings.optimizer.epochs,
        observations_per_step=data.observations_per_step,
        seed=settings.seed,
    )


def describe(batches: ForestBatches) -> str:
    """What is learnt from and what sharing saves, in lines for a reader."""
    found = batches.report
    lines = [
        f"{found.observations:,.0f} observations, {batches.steps:,} steps; "
        f"{found.tokens_apart:,.0f} tokens one by one, {found.slots_used:,} as forests "
        f"({found.saved:.2%} saved)"
    ]
    if found.left_out:
        lines.append(f"left out: {found.reasons()}")
    return "\n".join(lines)


def base_of(settings: Config, chosen: list[Game], workdir: Path) -> Located:
    """The files of the model to tune: a checkpoint, or a small one made here."""
    if settings.model.path:
        located = locate(settings.model.path)
        if located.run:
            raise ConfigError(
                f"model.path is {settings.model.path!r}, a training run; export what it made "
                "(tools/export.py merged) and name the result"
            )
        return located
    directory = workdir / BASE
    if not (directory / "config.json").is_file():
        make_base(settings, chosen, workdir)
    return Located(directory, str(directory.resolve()))


def model_of(settings: Config, shape: LlamaConfig) -> Llama:
    """The model to tune, as a function of its parameters."""
    return Llama(shape, dtype=jnp.dtype(settings.model.dtype), remat=settings.model.remat)


def base_model(settings: Config, located: Located, tokenizer: Tokenizer) -> Simulator:
    """The model to tune, its weights read."""
    shape, params = hf.load(located.directory, quantize=settings.model.quantize)
    origin = {
        "path": settings.model.path or "made from nothing",
        "dtype": settings.model.dtype,
        "quantize": settings.model.quantize,
        **said_of_text(located.directory, tokenizer),
    }
    cli.note_ignored_settings(origin)
    return Simulator(model_of(settings, shape), params, tokenizer, origin, located)


def make_base(settings: Config, chosen: list[Game], workdir: Path) -> None:
    """A small model from nothing, taught to answer every game in the right form, uniformly.

    Without games its weights stay as they were drawn.
    """
    wanted, data = settings.model.scratch, settings.data
    # Every game counts alike, however many answers it has.
    asked = [
        game.example(int(value), weight=1 / len(game.values))
        for game in chosen
        for value in game.values
    ]
    tokenizer = scratch.train_tokenizer(
        (
            text
            for one in asked + examples_of(settings, None, [])
            for text in (one.system, one.user, one.answer)
        ),
        wanted.pieces,
    )
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=wanted.width,
        intermediate_size=wanted.feed_forward,
        num_hidden_layers=wanted.layers,
        num_attention_heads=wanted.heads,
        num_key_value_heads=wanted.key_value_heads,
        head_dim=wanted.width // wanted.heads,
        max_position_embeddings=data.slots,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.stop_ids,
    )
    params = scratch.init_params(shape, settings.seed, wanted.embedding_scale)
    if asked:
        steps_per_epoch = math.ceil(len(asked) / wanted.answers_per_step)
        batches = ForestBatches(
            encode(asked, tokenizer),
            slots=data.slots,
            rows=data.rows,
            epochs=math.ceil(wanted.steps / steps_per_epoch),
            observations_per_step=wanted.answers_per_step,
            seed=settings.seed,
        )
        rates = optimizers.schedule(wanted.learning_rate, batches.steps, 0.1)
        model = Llama(shape, dtype=jnp.float32, remat=settings.model.remat)
        teaching = phase_ahead(
            settings, "base", model, steps.train_all, None, params, batches, rates
        )
        params = fit(settings, teaching, None, params, {})
    export.model(workdir / BASE, shape, params, tokenizer)


class Phase(NamedTuple):
    """A training loop to come, its first program compiling in the background."""

    name: str
    batches: ForestBatches
    rates: optax.Schedule
    optimizer: optax.GradientTransformation
    step: StepAhead


def phase_ahead(
    settings: Config,
    name: str,
    model: Llama,
    combine: steps.Combine,
    base: Any,
    trained: Any,
    batches: ForestBatches,
    rates: optax.Schedule,
) -> Phase:
    """Begins to compile a phase's step; of `base` and `trained` only the shapes count."""
    wanted = settings.optimizer
    optimizer = optimizers.adamw(rates, wanted.weight_decay, wanted.clip_norm)
    start = partial(steps.init_state, optimizer=optimizer, seed=settings.seed)
    state = jax.eval_shape(start, trained)
    train_step = steps.make_train_step(model, optimizer, combine)
    return Phase(name, batches, rates, optimizer, StepAhead(train_step, state, base, batches[0][0]))


def tuning_ahead(settings: Config, located: Located, batches: ForestBatches) -> Phase:
    """Begins to compile the step that tunes a model whose weights were not read yet."""
    shape, params = hf.abstract(located.directory, quantize=settings.model.quantize)
    wanted = settings.optimizer
    rates = optimizers.schedule(wanted.learning_rate, batches.steps, wanted.warmup_fraction)
    trained = jax.eval_shape(partial(untrained, settings), params)
    all_of_it = settings.trained == "all"
    return phase_ahead(
        settings,
        "tune",
        model_of(settings, shape),
        steps.train_all if all_of_it else steps.train_adapter,
        None if all_of_it else params,
        trained,
        batches,
        rates,
    )


def untrained(settings: Config, params: Params) -> Any:
    """What tuning starts from: a fresh adapter, or every parameter.

    The parameters as a copy in float32, the dtype that small updates need: a step consumes what it
    is given.
    """
    if settings.trained == "all":
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    wanted = settings.lora
    return lora.init(
        jax.random.key(settings.seed),
        params,
        rank=wanted.rank,
        alpha=wanted.alpha,
        rslora=wanted.rslora,
        dropout=wanted.dropout,
        targets=config.names(wanted.targets),
    )


def tune(
    settings: Config, base: Simulator, tuning: Phase, workdir: Path, learnt: People | None
) -> Simulator:
    """Trains the adapter (or every parameter), writes it, and returns the tuned model."""
    inputs = {"base": hf.fingerprint(base.located.directory)}
    adapter_dir = None
    trained = untrained(settings, base.params)
    if settings.trained == "adapter":
        adapter = fit(settings, tuning, base.params, trained, inputs)
        made_here = not settings.model.path
        template = base.tokenizer.template_hash
        peft.save(workdir / ADAPTER, adapter, base.located.name, template)
        model, adapter_dir = BASE if made_here else base.located.pinned, ADAPTER
        params = lora.attach(base.params, adapter)
    else:
        params = fit(settings, tuning, None, trained, inputs)
        source = base.located.directory
        export.model(workdir / TUNED, base.model.config, params, base.tokenizer, source=source)
        model, made_here = TUNED, True
    trained_on = {
        "fingerprint": learnt.fingerprint if learnt is not None else "",
        "table": settings.data.humans,
        "split_seed": settings.data.split_seed,
        "examples": settings.data.examples,
    }
    write_run(
        workdir,
        model=model,
        made_here=made_here,
        adapter=adapter_dir,
        dtype=settings.model.dtype,
        quantize=settings.model.quantize,
        trained_on=trained_on,
    )
    origin = base.origin | {"tuned": settings.trained, "trained_on": trained_on}
    return Simulator(base.model, params, base.tokenizer, origin, base.located)


def fit(settings: Config, phase: Phase, base: Any, trained: Any, inputs: Mapping[str, str]) -> Any:
    """The training loop: from the last checkpoint, or from the start, to the last step.

    `inputs` are hashes of what it learns from beside the batches (see `check_same_inputs`).
    """
    workdir, batches = Path(settings.workdir), phase.batches
    state = steps.init_state(trained, phase.optimizer, settings.seed)
    saved = Checkpoints(workdir / "checkpoints" / phase.name, settings.checkpoints.keep)
    inputs = {"observations": batches.fingerprint, **inputs}
    check_same_inputs(workdir, phase.name, inputs, go_on=saved.last is not None)
    if saved.last is not None:
        state = saved.restore(state)
        print(f"{phase.name}: going on from the checkpoint of step {saved.last}")
    start = int(state.step)
    if start < batches.steps:
        print(f"{phase.name}: {phase.step.wait(batches[start][0])}")
    log = Log(workdir, phase.name, batches.steps, start, phase.rates)
    try:
        for number in range(start + 1, batches.steps + 1):
            batch, source = batches[number - 1]
            state, metrics = phase.step(state, base, batch)
            log.step(number, metrics, source)
            if number % settings.checkpoints.every == 0 or number == batches.steps:
                log.settle()
                saved.save(number, state)
                log.last_checkpoint = number
    finally:
        log.close()
        saved.close()
    return state.trained


def compare(
    settings: Config, base: Simulator, tuned: Simulator, held_out: People, chosen: list[Game]
) -> dict[str, Any]:
    """Base and tuned model, read exactly, and the tuned one sampled, against people held out."""
    played = [game for game in chosen if held_out.n(game.id)]
    wanted, sampling = settings.evaluation, Sampling()
    sampled = simulate.simulate_all(tuned, played, wanted.participants, settings.seed, sampling)
    answers = {
        "base": (simulate.exact_all(base, played), base, {"mode": "exact"}),
        "tuned": (simulate.exact_all(tuned, played), tuned, {"mode": "exact"}),
        "tuned_sampled": (
            {name: one.answers for name, one in sampled.items()},
            tuned,
            simulate.how_sampled(wanted.participants, settings.seed, sampling),
        ),
    }
    return {
        name: evaluation(
            found,
            held_out,
            model=simulator.described(played),
            how=how,
            task_names=["game_behavior"],
            resamples=wanted.resamples,
            seed=settings.seed,
        )
        for name, (found, simulator, how) in answers.items()
    }


def main() -> None:
    """`python -m befm_jax.train`."""
    settings: Config = FLAGS.config
    if FLAGS.workdir:
        settings.workdir = FLAGS.workdir
    cli.keep_compiled_programs()
    train(settings)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "a .py file with get_config()")
    flags.DEFINE_string("workdir", None, "where the run is kept (default: as in the config)")
    flags.mark_flag_as_required("config")
    defaults = "\n".join(f"    {name} = {value!r}" for name, value in config.fields(Config()))
    cli.run(main, f"{__doc__}\nFields of the config, with their defaults:\n\n{defaults}\n")
