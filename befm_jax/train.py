"""Fine-tunes a model on people's choices, then holds it against people it has not seen.

    python -m befm_jax.train --config configs/quickstart.py [--workdir runs/quickstart]
    python -m befm_jax.train --config configs/quickstart.py --config.lora.rank=4

The working directory gets config.json, metrics.jsonl, TensorBoard events, checkpoints, the tuned
model in a form that `--model` takes (the directory itself), results.json, report.html, games.png.
The same command line goes on where an interrupted run stopped.
"""

from __future__ import annotations

import math
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from befm_jax import cli, config, simulate
from befm_jax.adapters import export, lora, peft
from befm_jax.config import Config, ConfigError
from befm_jax.data import choices as human
from befm_jax.data import examples as example_files
from befm_jax.data import forest, games
from befm_jax.data.choices import People
from befm_jax.data.examples import Share
from befm_jax.data.games import Game
from befm_jax.data.pipeline import Encoder, ForestBatches, encode, pool
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes, transfer
from befm_jax.distributed.mesh import Layout
from befm_jax.errors import DataError, UserError
from befm_jax.evals import report
from befm_jax.evaluate import evaluation, provenance
from befm_jax.inference.sample import Sampling
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf, tiny
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import RUN_FILE, ResolvedModel, resolve_model, write_run
from befm_jax.respondents.engine import Simulator, fitting_tokenizer, said_of_text
from befm_jax.training import loop, metrics, restarts
from befm_jax.training import setup as setups
from befm_jax.training.loop import Phase
from befm_jax.training.metrics import Watch
from befm_jax.training.step import State

FLAGS = flags.FLAGS
BASE, ADAPTER, TUNED = "base", "adapter", "tuned"


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

    chosen = games.select(settings.data.games) if settings.data.games else []
    learnt, held_out = people_of(settings, chosen)
    resolved = base_of(settings, chosen, workdir, mesh, watch)
    tokenizer = fitting_tokenizer(resolved.directory, llama_config.read(resolved.directory))

    parts = Layout(mesh).parts("rows")
    batches = forests_of(settings, paths_of(settings, learnt, chosen, tokenizer), parts)
    print(describe(batches, settings.data.rows, mesh))
    if watch.profile and watch.profile[0] > batches.steps:
        raise UserError(f"--profile_steps={watch.profile[0]}: the run has {batches.steps} steps")
    validation = validation_of(settings, chosen, tokenizer, parts)
    # The step compiles while the weights are read.
    tuning = tuning_ahead(settings, resolved, mesh, batches, validation)
    base = base_model(settings, resolved, tokenizer, mesh, tuning.setup.model)
    tuned = tune(settings, base, tuning, workdir, learnt, watch)

    if held_out is not None:
        results = provenance() | compare(settings, base, tuned, held_out, chosen)
        results["train"] = {
            "device": meshes.devices_in_words(mesh.devices.flat),
            "mesh": meshes.in_words(mesh),
            "processes": processes.count(),
            "seconds_of_the_last_sitting": round(time.perf_counter() - since, 1),
            "steps": batches.steps,
            "observations": batches.report.observations,
            "left_out": batches.report.reasons() or "nothing",
            "tokens_saved_by_sharing": batches.report.saved,
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


def people_of(settings: Config, chosen: list[Game]) -> tuple[People | None, People | None]:
    """People to learn from and people held out; None without games."""
    if not chosen:
        return None, None
    data, split = settings.data, settings.evaluation.split
    learnt = human.load(data.humans, chosen, "train", data.split_seed)
    print(learnt.describe())
    return learnt, human.load(data.humans, chosen, split, data.split_seed)


def paths_of(
    settings: Config, learnt: People | None, chosen: list[Game], tokenizer: Encoder
) -> list[forest.Path]:
    """All that is learnt: people's choices, and what the files named in the config hold.

    Of the files every process reads and renders a share of the records, then all know all of them.
    """
    found: list[forest.Path] = []
    if learnt is not None:
        asked = [game for game in chosen if learnt.n(game.id)]
        found += encode(human.examples(learnt, asked), tokenizer)
    share = Share(jax.process_index(), processes.count())
    for path in config.names(settings.data.examples):
        mine = encode(example_files.read(path, share=share), tokenizer)
        found += pool(mine, transfer.all_gather)
    return found


def forests_of(settings: Config, found: list[forest.Path], parts: int) -> ForestBatches:
    """The run's batches of token forests, whose rows `parts` devices share.

    Every process lays out all rows of a step (0.2 s for 64 of 2,048 slots), and hands its own to
    its devices: which tree stands in which row depends on all of them.
    """
    data = settings.data
    return ForestBatches(
        found,
        slots=data.slots,
        rows=data.rows,
        epochs=settings.optimizer.epochs,
        observations_per_step=data.observations_per_step,
        seed=settings.seed,
        parts=parts,
    )


def validation_of(
    settings: Config, chosen: list[Game], tokenizer: Tokenizer, parts: int
) -> ForestBatches | None:
    """People that the loss is measured on at every checkpoint; None where there are none."""
    if not chosen:
        return None
    data = settings.data
    try:
        kept = human.load(data.humans, chosen, "validation", data.split_seed)
    except DataError as error:
        if settings.checkpoints.use == "best":
            raise ConfigError(f"checkpoints.use is 'best', which needs people: {error}") from error
        print(f"no loss is measured at checkpoints: {error}")
        return None
    asked = [game for game in chosen if kept.n(game.id)]
    return ForestBatches(
        encode(human.examples(kept, asked), tokenizer),
        slots=data.slots,
        rows=data.rows,
        epochs=1,
        seed=settings.seed,
        parts=parts,
    )


def describe(batches: ForestBatches, rows: int, mesh: Mesh) -> str:
    """What is learnt from, what sharing saves and who does the work, in lines for a reader."""
    found = batches.report
    lines = [
        f"{found.observations:,.0f} observations, {batches.steps:,} steps; "
        f"{found.tokens_apart:,.0f} tokens one by one, {found.slots_used:,} as forests "
        f"({found.saved:.2%} saved)"
    ]
    if found.left_out:
        lines.append(f"left out: {found.reasons()}")
    if mesh.size > 1:
        lines.append(
            f"{mesh.size} devices of {processes.count()} processes: {meshes.in_words(mesh)}"
        )
    if batches.rows != rows:
        lines.append(
            f"{batches.rows} rows together (data.rows is {rows}): at most, one or more a device"
        )
    return "\n".join(lines)


def base_of(
    settings: Config, chosen: list[Game], workdir: Path, mesh: Mesh, watch: Watch
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
        make_base(settings, chosen, workdir, mesh, watch)
    return ResolvedModel(directory, str(directory.resolve()))


def base_model(
    settings: Config, resolved: ResolvedModel, tokenizer: Tokenizer, mesh: Mesh, model: Llama
) -> Simulator:
    """The model to tune, its weights read."""
    quantize = settings.model.quantize
    _, params = hf.load(resolved.directory, meshes.over(mesh), quantize=quantize)
    origin = {
        "path": settings.model.path or "made from nothing",
        "dtype": settings.model.dtype,
        "quantize": quantize,
        "mesh": meshes.in_words(mesh),
        **said_of_text(resolved.directory, tokenizer),
    }
    if processes.is_first():
        cli.note_ignored_settings(origin)
    return Simulator(model, params, tokenizer, origin, resolved)


def make_base(
    settings: Config, chosen: list[Game], workdir: Path, mesh: Mesh, watch: Watch
) -> None:
    """A small model from nothing, taught to answer every game in the right form, uniformly.

    Every device of the run holds it whole.  Without games its weights stay as they were drawn.
    """
    wanted, data = settings.model.scratch, settings.data
    # Every game counts alike, however many answers it has.
    asked = [
        game.example(int(value), weight=1 / len(game.values))
        for game in chosen
        for value in game.values
    ]
    # The tokenizer is of all texts, in every process.
    own = [one for path in config.names(data.examples) for one in example_files.read(path)]
    tokenizer = tiny.train_tokenizer(
        (text for one in [*asked, *own] for text in (one.system, one.user, one.answer)),
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
    params = tiny.init_params(shape, settings.seed, wanted.embedding_scale)
    if asked:
        steps_per_epoch = math.ceil(len(asked) / wanted.answers_per_step)
        batches = ForestBatches(
            encode(asked, tokenizer),
            slots=data.slots,
            rows=data.rows,
            epochs=math.ceil(wanted.steps / steps_per_epoch),
            observations_per_step=wanted.answers_per_step,
            seed=settings.seed,
            parts=mesh.size,
        )
        slices = mesh.shape["slice"]
        alike = Mesh(mesh.devices.reshape(slices, -1, 1, 1), meshes.AXES)
        setup = setups.from_nothing(settings, shape, alike, batches.steps)
        teaching = loop.ahead("base", setup, batches)
        fresh = partial(setup.fresh, setups.fresh_parameters, params, seed=settings.seed)
        params = loop.run(settings, teaching, None, fresh, {}, Watch(board=watch.board))
    write_model(workdir / BASE, shape, params, tokenizer)


def tuning_ahead(
    settings: Config,
    resolved: ResolvedModel,
    mesh: Mesh,
    batches: ForestBatches,
    validation: ForestBatches | None,
) -> Phase:
    """Begins to compile the step that tunes a model whose weights were not read yet."""
    shape, params = hf.abstract(
        resolved.directory, meshes.over(mesh), quantize=settings.model.quantize
    )
    setup = setups.of(settings, shape, params, mesh, batches.steps)
    return loop.ahead("tune", setup, batches, validation)


def tune(
    settings: Config,
    base: Simulator,
    tuning: Phase,
    workdir: Path,
    learnt: People | None,
    watch: Watch,
) -> Simulator:
    """Trains the adapter (or every parameter), writes it, and returns the tuned model."""
    inputs = {"base": hf.fingerprint(base.resolved.directory)}
    setup, seed = tuning.setup, settings.seed
    adapter_dir = None
    if settings.trained == "adapter":

        def fresh() -> State:
            return setup.fresh(partial(setups.fresh_adapter, settings, setup.base), seed=seed)

        adapter = loop.run(settings, tuning, base.params, fresh, inputs, watch)
        made_here = not settings.model.path
        template = base.tokenizer.template_hash
        on_host = transfer.gather(adapter)
        if processes.is_first():
            peft.save(workdir / ADAPTER, on_host, base.resolved.name, template)
        model, adapter_dir = BASE if made_here else base.resolved.pinned, ADAPTER
        params = lora.attach(base.params, adapter)
    else:

        def fresh() -> State:
            return setup.fresh(setups.fresh_parameters, base.params, seed=seed)

        params = loop.run(settings, tuning, None, fresh, inputs, watch)
        source, shape = base.resolved.directory, base.model.config
        write_model(workdir / TUNED, shape, params, base.tokenizer, source)
        model, made_here = TUNED, True
    trained_on = {
        "fingerprint": learnt.fingerprint if learnt is not None else "",
        "table": settings.data.humans,
        "split_seed": settings.data.split_seed,
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
    return Simulator(base.model, params, base.tokenizer, origin, base.resolved)


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


def compare(
    settings: Config, base: Simulator, tuned: Simulator, held_out: People, chosen: list[Game]
) -> dict[str, Any]:
    """Base and tuned model, read exactly, and the tuned one sampled, against people held out.

    Of draws that all miss the answer sets, as a model that has learnt little may give, it is told
    why there is nothing to compare; what was read exactly stands.
    """
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
    compared: dict[str, Any] = {}
    for name, (found, simulator, how) in answers.items():
        try:
            compared[name] = evaluation(
                found,
                held_out,
                model=simulator.described(played),
                how=how,
                task_names=["game_behavior"],
                resamples=wanted.resamples,
                seed=settings.seed,
            )
        except DataError as error:
            if how["mode"] == "exact":
                raise
            compared[name] = {"answers": how, "not_compared": str(error)}
    return compared


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
