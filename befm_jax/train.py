"""Fine-tunes a model on people's choices, then holds it against people it has not seen.

    python -m befm_jax.train --config configs/quickstart.py [--workdir runs/quickstart]
    python -m befm_jax.train --config configs/quickstart.py --config.lora.rank=4

The working directory gets config.json, metrics.jsonl, TensorBoard events, checkpoints, the tuned
model in a form that `--model` takes (the directory itself), results.json, report.html and pictures.
The same command line goes on where an interrupted run stopped.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from befm_jax import cli, config
from befm_jax.adapters import export, lora, peft
from befm_jax.config import Config, ConfigError
from befm_jax.data import examples as example_files
from befm_jax.data import games
from befm_jax.data.items import AnswerSet, Example, Item
from befm_jax.data.mixture import Family, Mixture
from befm_jax.data.responses import Exact, Sampled
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes, transfer
from befm_jax.distributed.mesh import Layout
from befm_jax.errors import DataError, UserError
from befm_jax.evals import report
from befm_jax.evals.results import Results
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf, tiny
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import RUN_FILE, ResolvedModel, resolve_model, write_run
from befm_jax.respondents import comparing
from befm_jax.respondents.engine import Engine, fitting_tokenizer, text_metadata
from befm_jax.tasks import sources
from befm_jax.tasks.games import item_of
from befm_jax.tasks.sources import Source
from befm_jax.training import loop, metrics, restarts
from befm_jax.training import setup as setups
from befm_jax.training.metrics import Watch
from befm_jax.training.setup import Setup

FLAGS = flags.FLAGS
BASE, ADAPTER, TUNED = "base", "adapter", "tuned"
# Rows of each family that the loss is measured on at checkpoints, at most.
VALIDATION_ROWS = 1024
# Rows of each family, at most, that a tokenizer made here is of; and questions of each task that a
# model made here is taught to answer uniformly.
TOKENIZER_ROWS, QUESTIONS = 10_000, 100
# Above this share of padding a run says so.
MOST_PADDING = 0.5


def train(
    settings: Config, profile: tuple[int, int] | None = None, project: str | None = None
) -> Path:
    """One whole run: data, base model, tuning, evaluation.  Returns the working directory.

    `profile`: the first and last step of tuning of which a profile is written; `project`: that of
    Weights & Biases which figures go to.

    Raises UserError for what a person can mend: a field, a file, a table, a diverging loss.
    """
    workdir = start_or_resume(settings)
    with metrics.weights_and_biases(project if processes.is_first() else None, settings) as board:
        learn_and_compare(settings, workdir, Watch(profile, board))
    restarts.end(workdir)
    return workdir


def learn_and_compare(settings: Config, workdir: Path, watch: Watch) -> None:
    """The chapters of a run in a working directory that is there."""
    since = time.perf_counter()
    mesh = mesh_of(settings)

    data = settings.data
    everybody = sources.configured(data.games, data.humans, data.tasks)
    learnt = [source.part("train", data.split_seed) for source in everybody]
    for source in learnt:
        print(source.describe())
    families = [
        *sources.families(learnt, data.rows_per_step, data.one_by_one),
        *map(example_files.family, config.names(data.examples)),
    ]
    resolved = base_of(settings, families, workdir, mesh, watch)
    tokenizer = fitting_tokenizer(resolved.directory, llama_config.read(resolved.directory))

    mixture = mixture_of(settings, families, tokenizer, Layout(mesh).parts("rows"))
    print(describe(mixture, mesh))
    if watch.profile and watch.profile[0] > mixture.steps:
        raise UserError(f"--profile_steps={watch.profile[0]}: the run has {mixture.steps} steps")
    validation = validation_of(settings, everybody, tokenizer, mesh)
    # The step compiles while the weights are read.
    shape, abstract = hf.abstract(
        resolved.directory, meshes.over(mesh), quantize=settings.model.quantize
    )
    setup = setups.of(settings, shape, abstract, mesh, mixture.steps)
    setup.step.compile(setup.place(mixture[0][0]))
    base = base_model(settings, resolved, tokenizer, mesh, setup.model)
    tuned = tune(settings, base, setup, mixture, validation, learnt, watch)

    if everybody:
        results = compare(settings, base, tuned, everybody)
        results.extra["train"] = {
            "device": meshes.devices_in_words(mesh.devices.flat),
            "mesh": meshes.in_words(mesh),
            "processes": processes.count(),
            "seconds_since_last_start": round(time.perf_counter() - since, 1),
            "steps": mixture.steps,
            "rows": mixture.rows,
        }
        if processes.is_first():
            report.write(results, workdir)
        print(report.summary(results))
        print(f"page:    {workdir / 'report.html'}\nfigures: {workdir / 'results.json'}")
    print(f"model:   {workdir}   (python -m befm_jax.simulate --model {workdir} ...)")


def start_or_resume(settings: Config) -> Path:
    """Makes the working directory, or goes on in it if it holds a run of the same config.

    A directory in which nothing was trained yet takes any config: a typo is not for ever.  Of
    several processes the first writes, and all look whether they see it.

    Raises:
        ConfigError: the config is wrong, another than the run's, or not seen by all processes.
        NoProgressError: see `restarts.begin`.
    """
    config.validate(settings)
    workdir = Path(settings.workdir)
    saved = workdir / "config.json"
    trained = (workdir / BASE, workdir / "checkpoints", workdir / RUN_FILE)
    # The others look only when it is there: a shared file system may remember that it was not.
    if processes.is_first():
        if saved.is_file() and any(path.exists() for path in trained):
            config.check_same(settings, saved)
        config.save(settings, saved)
    processes.barrier("the working directory is there")
    if not saved.is_file():
        raise ConfigError(
            f"workdir is {settings.workdir!r}, which this host does not share with that of the "
            "first process; it must be a directory that all hosts mount"
        )
    # Of all processes: what one was started with the others must have been, too.
    config.check_same(settings, saved)
    restarts.begin(workdir, saved, trained)
    return workdir


def mesh_of(settings: Config) -> Mesh:
    """The run's mesh: over all devices, or over the first of one machine's where it is smaller.

    Raises ShardingError where the config's sizes or slices do not fit the devices.
    """
    wanted, devices = settings.mesh, jax.devices()
    meshes.check_slices(wanted.slices, devices)
    sizes = (wanted.slices, wanted.data, wanted.fsdp, wanted.tensor)
    if processes.count() == 1 and 0 not in sizes:
        devices = devices[: math.prod(sizes)]
    return meshes.make_mesh(**meshes.filled(*sizes, devices=len(devices)), devices=devices)


def mixture_of(
    settings: Config, families: Sequence[Family], tokenizer: Tokenizer, parts: int
) -> Mixture:
    """The batches of the run, whose rows of forests `parts` devices share."""
    data = settings.data
    return Mixture(
        families,
        tokenizer,
        slots=data.slots,
        epochs=settings.optimizer.epochs,
        rows_per_step=data.rows_per_step,
        seed=settings.seed,
        parts=parts,
    )


def validation_of(
    settings: Config, everybody: Sequence[Source], tokenizer: Tokenizer, mesh: Mesh
) -> Mixture | None:
    """People that the loss is measured on at every checkpoint; None where there are none."""
    data = settings.data
    try:
        kept = [source.part("validation", data.split_seed).family() for source in everybody]
    except DataError as error:
        if settings.checkpoints.use == "best":
            raise ConfigError(f"checkpoints.use is 'best', which needs people: {error}") from error
        print(f"no loss is measured at checkpoints: {error}")
        return None
    if not kept:
        return None
    return Mixture(
        [replace(family, rows=family.rows[:VALIDATION_ROWS]) for family in kept],
        tokenizer,
        slots=data.slots,
        epochs=1,
        seed=settings.seed,
        parts=Layout(mesh).parts("rows"),
    )


def describe(mixture: Mixture, mesh: Mesh) -> str:
    """What is learnt from, what sharing saves and who does the work, in lines for a reader."""
    _, first = mixture[0]
    found = first.report
    padding = 1 - found.slots_used / found.slots_computed
    lines = [
        f"{mixture.rows:,} rows, {mixture.steps:,} steps; in the first {first.rows:,} rows, "
        f"{found.tokens_apart:,.0f} tokens one by one, {found.slots_used:,} slots as forests "
        f"({found.saved:.2%} saved), {found.slots_computed:,} computed ({padding:.1%} padding)"
    ]
    if padding > MOST_PADDING:
        lines.append(
            f"warning: {padding:.0%} of what is computed is padding; give a step more rows "
            "(data.rows_per_step), or fewer devices (mesh)"
        )
    if found.left_out:
        lines.append(f"left out: {found.reasons()}")
    if mesh.size > 1:
        lines.append(
            f"{mesh.size} devices of {processes.count()} processes: {meshes.in_words(mesh)}"
        )
    return "\n".join(lines)


def base_of(
    settings: Config, families: Sequence[Family], workdir: Path, mesh: Mesh, watch: Watch
) -> ResolvedModel:
    """The files of the model to tune: a checkpoint, or a small one made here."""
    if settings.model.path:
        resolved = resolve_model(settings.model.path)
        if resolved.run:
            raise ConfigError(
                f"model.path is {settings.model.path!r}, a training run; export what it made "
                "(tools/export.py merged) and name the result"
            )
        return resolved
    directory = workdir / BASE
    # Only the first looks: a shared file system may remember for the others that it was not there.
    there = processes.is_first() and (directory / "config.json").is_file()
    if not processes.broadcast("whether the base is there", there):
        make_base(settings, families, workdir, mesh, watch)
    return ResolvedModel(directory, str(directory.resolve()))


def base_model(
    settings: Config, resolved: ResolvedModel, tokenizer: Tokenizer, mesh: Mesh, model: Llama
) -> Engine:
    """The model to tune, its weights read."""
    quantize = settings.model.quantize
    _, params = hf.load(resolved.directory, meshes.over(mesh), quantize=quantize)
    origin = {
        "path": settings.model.path or "made from nothing",
        "dtype": settings.model.dtype,
        "quantize": quantize,
        "mesh": meshes.in_words(mesh),
        **text_metadata(resolved.directory, tokenizer),
    }
    if processes.is_first():
        cli.note_ignored_settings(origin)
    return Engine(model, params, tokenizer, origin, resolved)


def uniform_answers(settings: Config) -> list[Example]:
    """Every answer to every game, and to some questions of the other tasks, equally often.

    Every question counts alike, however many answers it has.
    """
    chosen = games.select(settings.data.games) if settings.data.games else []
    items = [item_of(game) for game in chosen]
    for source in sources.select(settings.data.tasks, chosen, settings.data.humans):
        rows = source.rows.rows[:QUESTIONS]
        items += replace(source, rows=replace(source.rows, rows=rows)).items()
    return [example for item in items for example in _uniformly(item)]


def _uniformly(item: Item) -> Iterator[Example]:
    if isinstance(item.answers, AnswerSet):
        each = np.full(len(item.answers), 1 / len(item.answers))
        yield from replace(item, target=each).examples()


def make_base(
    settings: Config, families: Sequence[Family], workdir: Path, mesh: Mesh, watch: Watch
) -> None:
    """A small model from nothing, taught to answer every question in the right form, uniformly.

    Every device of the run holds it whole.  Where only texts are learnt its weights stay as they
    were drawn.
    """
    wanted, data = settings.model.scratch, settings.data
    asked = uniform_answers(settings)
    # The tokenizer is of all texts, in every process.
    of_answers = (message.text for one in asked for message in one.messages)
    tokenizer = tiny.train_tokenizer(
        [*of_answers, *sources.texts(families, TOKENIZER_ROWS)], wanted.pieces
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
    params = tiny.init_params(shape, settings.seed, wanted.embedding_scale)
    if asked:
        steps_per_epoch = math.ceil(len(asked) / wanted.answers_per_step)
        mixture = Mixture(
            [Family("uniform answers", asked, lambda example, rng: (example,), "")],
            tokenizer,
            slots=data.slots,
            epochs=math.ceil(wanted.steps / steps_per_epoch),
            rows_per_step=wanted.answers_per_step,
            seed=settings.seed,
            parts=mesh.size,
        )
        slices = mesh.shape["slice"]
        alike = Mesh(mesh.devices.reshape(slices, -1, 1, 1), meshes.AXES)
        setup = setups.from_nothing(settings, shape, alike, mixture.steps)
        params = loop.run(settings, setup, mixture, None, params, {}, Watch(board=watch.board))
    write_model(workdir / BASE, shape, params, tokenizer)


def tune(
    settings: Config,
    base: Engine,
    setup: Setup,
    mixture: Mixture,
    validation: Mixture | None,
    learnt: Sequence[Source],
    watch: Watch,
) -> Engine:
    """Trains the adapter (or every parameter), writes it, and returns the tuned model."""
    workdir, resolved = Path(settings.workdir), base.resolved
    inputs = {"base": hf.fingerprint(resolved.directory)}
    trained = loop.run(settings, setup, mixture, validation, base.params, inputs, watch)
    if settings.trained == "adapter":
        on_host = transfer.gather(trained)
        if processes.is_first():
            peft.save(workdir / ADAPTER, on_host, resolved.name, base.tokenizer.template_hash)
        params = lora.attach(base.params, trained)
        made_here = not settings.model.path
        model, adapter_dir = BASE if made_here else resolved.pinned, ADAPTER
    else:
        write_model(workdir / TUNED, base.model.config, trained, base.tokenizer, resolved.directory)
        params, made_here, model, adapter_dir = trained, True, TUNED, None
    trained_on = {
        "sources": [source.record() for source in learnt],
        "examples": settings.data.examples,
    }
    if processes.is_first():
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
    return Engine(base.model, params, base.tokenizer, origin, base.resolved)


def write_model(
    directory: Path,
    shape: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer,
    source: Path | None = None,
) -> None:
    """Writes a whole model from the first process, which gathers it tensor by tensor."""
    if processes.is_first():
        export.model(directory, shape, params, tokenizer, source=source, gather=transfer.gather)
    else:
        hf.help_save(shape, params, transfer.gather)
    processes.barrier(f"{directory.name} is written")


def compare(settings: Config, base: Engine, tuned: Engine, everybody: Sequence[Source]) -> Results:
    """Base and tuned model, read exactly, and the tuned one sampled, against people held out."""
    wanted, seed = settings.evaluation, settings.data.split_seed
    sampled = Sampled(wanted.participants, settings.seed)
    asked = (("tuned", tuned, Exact()), ("base", base, Exact()), ("tuned, sampled", tuned, sampled))
    results = Results(main="tuned")
    for source in everybody:
        held_out, learnt = source.part(wanted.split, seed), source.part("train", seed)
        comparing.compare(
            results, held_out, learnt, asked, resamples=wanted.resamples, seed=settings.seed
        )
    return results


def profile_of(text: str | None) -> tuple[int, int] | None:
    """First and last step of `5:8` (or of `5`).

    Raises UserError for another form.
    """
    if not text:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    steps = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if steps[0] > steps[1]:
        raise UserError(f"--profile_steps={text}: give a first and a last step, such as 5:8")
    return steps


def main() -> None:
    """`python -m befm_jax.train`."""
    settings: Config = FLAGS.config
    if FLAGS.workdir:
        settings.workdir = FLAGS.workdir
    processes.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
    cli.only_the_first_speaks()
    cli.keep_compiled_programs()
    train(settings, profile_of(FLAGS.profile_steps), FLAGS.wandb)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "a .py file with get_config()")
    flags.DEFINE_string("workdir", None, "where the run is kept (default: as in the config)")
    flags.DEFINE_string(
        "profile_steps", None, "write a profile of these steps of tuning (5:8), for TensorBoard"
    )
    flags.DEFINE_string(
        "wandb", None, "the project of Weights & Biases that figures go to (needs befm_jax[wandb])"
    )
    cli.define_process_flags()
    flags.mark_flag_as_required("config")
    defaults = "\n".join(f"    {name} = {value!r}" for name, value in config.fields(Config()))
    cli.run(main, f"{__doc__}\nFields of the config, with their defaults:\n\n{defaults}\n")
