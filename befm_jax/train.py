"""Fine-tunes a model on people's choices, then compares it with people it has not seen.

    befm train --config quickstart [--workdir runs/quickstart]
    befm train --config my_configs/mine.py --config.lora.rank=4

The working directory gets config.json, metrics.jsonl, TensorBoard events, checkpoints, the tuned
model in a form that `--model` takes (the directory itself), results.json, report.html and pictures.
The same command line goes on where an interrupted run stopped.
"""

from __future__ import annotations

from befm_jax import cli

if __name__ == "__main__":
    cli.starting("train")

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from befm_jax import checksums, config, files
from befm_jax.adapters import lora
from befm_jax.config import Config, ConfigError
from befm_jax.data import examples as example_files
from befm_jax.data.mixture import Family, Mixture, weighted
from befm_jax.data.responses import Sampled
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes
from befm_jax.errors import DataError, UserError
from befm_jax.evals import report
from befm_jax.evals.results import Results
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf
from befm_jax.llama.model import Llama
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import ResolvedModel, damage_named, resolve_model
from befm_jax.respondents import comparing
from befm_jax.respondents.comparing import NamedRespondent
from befm_jax.respondents.engine import Engine, fitting_tokenizer, text_metadata
from befm_jax.tasks import sources
from befm_jax.tasks.sources import Source
from befm_jax.training import from_nothing, loop, metrics, outputs, restarts
from befm_jax.training import setup as setups
from befm_jax.training.metrics import Watch
from befm_jax.training.setup import Setup

FLAGS = flags.FLAGS
# Rows of each family that the loss is measured on at checkpoints, at most.
VALIDATION_ROWS = 1024


def train(
    settings: Config, profile: tuple[int, int] | None = None, project: str | None = None
) -> Path:
    """One whole run: data, base model, tuning, evaluation.  Returns the working directory.

    `profile`: the first and last step of tuning to profile; `project`: the project of Weights &
    Biases that metrics are sent to.

    Raises UserError for what a person can mend: a field, a file, a table, a diverging loss; and
    InUseError where another process runs in the working directory.
    """
    config.validate(settings)
    workdir = Path(settings.workdir)
    with files.in_use(workdir / ".lock", workdir) if processes.is_first() else nullcontext():
        run(settings, workdir, profile, project)
    return workdir


def run(
    settings: Config, workdir: Path, profile: tuple[int, int] | None, project: str | None
) -> None:
    """A run in a working directory that is its own; see `train`."""
    restarts.start_or_resume(settings)
    with metrics.weights_and_biases(project if processes.is_first() else None, settings) as board:
        learn_and_compare(settings, workdir, Watch(profile, board))
    restarts.end(workdir)


def learn_and_compare(settings: Config, workdir: Path, watch: Watch) -> None:
    """The chapters of a run whose working directory exists."""
    since = time.perf_counter()
    mesh = setups.mesh_of(settings)
    print(f"{workdir}: on {meshes.devices_in_words(mesh.devices.flat)}", flush=True)

    # Data: people's rows, split by person, and examples of the user's own.
    data = settings.data
    everybody = sources.configured(data.games, data.humans, data.tasks, data.wording)
    learnt = [source.part("train", data.split_seed).limited(data.people) for source in everybody]
    for source, people in zip(everybody, learnt, strict=True):
        print(people.describe())
        source.part(settings.evaluation.split, data.split_seed)  # an error now, if nobody is
    shares = config.weights(data)
    of_tasks = sources.families(learnt, data.rows_per_step, data.one_by_one, shares)
    of_files = map(example_files.family, config.names(data.examples))
    families = weighted([*of_tasks, *of_files], shares)

    # Base model: a checkpoint's files, or those of a small one that is made of the data's texts.
    resolved = base_of(settings, families, workdir, mesh, watch)
    tokenizer = fitting_tokenizer(resolved.directory, llama_config.read(resolved.directory))

    # Mixture: the batches of every step.
    mixture = mixture_of(settings, families, tokenizer, mesh)
    print(metrics.describe(mixture, mesh))
    if watch.profile and watch.profile[0] > mixture.steps:
        raise UserError(f"--profile_steps={watch.profile[0]}: the run has {mixture.steps} steps")
    validation = validation_of(settings, everybody, tokenizer, mesh)

    # Step ahead: it compiles while the weights are read.
    shape, abstract = hf.abstract(
        resolved.directory, meshes.over(mesh), quantize=settings.model.quantize
    )
    setup = setups.of(settings, shape, abstract, mesh, mixture.steps)
    setup.step.compile(setup.place(mixture[0][0]))
    base = read_base(settings, resolved, tokenizer, mesh, setup.model)

    # Tune.
    tuned = tune(settings, base, setup, mixture, validation, learnt, watch)

    # Compare with people who were held out.
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
    print(f"model:   {workdir}   (befm simulate --model {workdir} ...)")


def mixture_of(
    settings: Config, families: Sequence[Family], tokenizer: Tokenizer, mesh: Mesh
) -> Mixture:
    """The batches of the run, of which this process encodes the rows of its own devices."""
    data = settings.data
    return Mixture(
        families,
        tokenizer,
        slots=data.slots,
        epochs=settings.optimizer.epochs,
        rows_per_step=data.rows_per_step,
        seed=settings.seed,
        **setups.sharding_of("tune", mesh),
    )


def validation_of(
    settings: Config, everybody: Sequence[Source], tokenizer: Tokenizer, mesh: Mesh
) -> Mixture | None:
    """Validation people, whose loss is measured at every checkpoint; None where there are none."""
    data = settings.data
    try:
        families = [source.part("validation", data.split_seed).family() for source in everybody]
        shares = config.weights(data)
        families = weighted(families, {one.name: shares[one.name] for one in families if shares})
    except DataError as error:
        if settings.checkpoints.use == "best":
            raise ConfigError(f"checkpoints.use is 'best', which needs people: {error}") from error
        print(f"no loss is measured at checkpoints: {error}")
        return None
    if not families:
        return None
    return Mixture(
        [replace(family, rows=family.rows[:VALIDATION_ROWS]) for family in families],
        tokenizer,
        slots=data.slots,
        epochs=1,
        seed=settings.seed,
        **setups.sharding_of("validation", mesh),
    )


def base_of(
    settings: Config, families: Sequence[Family], workdir: Path, mesh: Mesh, watch: Watch
) -> ResolvedModel:
    """The files of the model to tune: a checkpoint's, or those of a small one made by this run."""
    if settings.model.path:
        resolved = resolve_model(settings.model.path)
        if resolved.run:
            raise ConfigError(
                f"model.path is {settings.model.path!r}, a training run; export what it made "
                "(befm export merged) and name the result"
            )
        return resolved
    directory = workdir / outputs.BASE
    # Only the first looks: a shared file system may cache for the others that it did not exist.
    exists = False
    if processes.is_first():
        with damage_named(workdir):
            exists = checksums.has(workdir, outputs.BASE)
            if exists:
                checksums.verify_once(workdir, [outputs.BASE])
    if not processes.broadcast("whether the base exists", exists):
        from_nothing.make_base(settings, families, directory, mesh, watch)
    return ResolvedModel(directory, str(directory.resolve()))


def read_base(
    settings: Config, resolved: ResolvedModel, tokenizer: Tokenizer, mesh: Mesh, model: Llama
) -> Engine:
    """Reads the weights of the model to tune."""
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
        cli.note_origin(origin)
    return Engine(model, params, tokenizer, origin, resolved)


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
    fingerprint = hf.fingerprint(hf.open_model(base.resolved.directory))
    inputs = {"base": fingerprint}
    trained = loop.run(settings, setup, mixture, validation, base.params, inputs, watch)
    trained_on = {
        "sources": [source.record() for source in learnt],
        "examples": settings.data.examples,
    }
    shape = base.model.config
    outputs.write_tuned(
        settings, trained, base.resolved, fingerprint, shape, base.tokenizer, trained_on
    )
    adapter_only = settings.trained == "adapter"
    params = lora.attach(base.params, trained) if adapter_only else trained
    origin = base.origin | {"tuned": settings.trained, "trained_on": trained_on}
    return Engine(base.model, params, base.tokenizer, origin, base.resolved)


def compare(settings: Config, base: Engine, tuned: Engine, everybody: Sequence[Source]) -> Results:
    """Compares base and tuned model with people held out; populations by draws, too."""
    evaluation, seed = settings.evaluation, settings.data.split_seed
    sampled = Sampled(evaluation.participants, settings.seed)
    results = Results(main="tuned")
    for source in everybody:
        held_out = source.part(evaluation.split, seed).limited(evaluation.people)
        how = source.task.how
        respondents: list[NamedRespondent] = [("tuned", tuned, how), ("base", base, how)]
        if not source.task.cluster:
            respondents.append(("tuned, sampled", tuned, sampled))
        comparing.compare(
            results, held_out, source.part("train", seed), respondents,
            resamples=evaluation.resamples, seed=settings.seed,
        )  # fmt: skip
    return results


def main() -> None:
    """`befm train`."""
    settings: Config = FLAGS.config
    if FLAGS.workdir:
        settings.workdir = FLAGS.workdir
    processes.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
    cli.only_the_first_speaks()
    cli.keep_compiled_programs()
    train(settings, metrics.steps_to_profile(FLAGS.profile_steps), FLAGS.wandb)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "a .py file with get_config(), or the name of a config that comes with it"
    )
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
