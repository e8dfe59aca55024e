"""Every option of a training run, once: typed, documented, checked.

A config file defines `get_config() -> Config`; `--config.optimizer.learning_rate=2e-4` changes a
field from the command line.
"""

# No postponed annotations here: ml_collections reads the types of the fields.
import dataclasses
import difflib
import math
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.errors import UserError
from befm_jax.llama.config import LINEARS
from befm_jax.models import DTYPES, QUANTIZE

CACHES = ("full", "int8")
TRAINED = ("adapter", "all")
SPLITS = ("test", "validation")
USE = ("last", "best")
# The configs that come with the package.
SHIPPED = Path(__file__).with_name("configs")


class ConfigError(UserError):
    """A field with an invalid value, or an unknown field; the message names it."""


@dataclass
class Scratch:
    """A small model made from nothing, for runs without a checkpoint (`model.path` empty).

    It is first taught, all parameters, to answer every game in the right form and uniformly:
    a base with no idea of people.
    """

    width: int = 256
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 512
    pieces: int = 600  # learnt tokenizer pieces, beside bytes, numbers and special tokens
    embedding_scale: float = 0.3  # standard deviation; see llama.tiny.init_params
    steps: int = 150  # rounded up to whole rounds through every answer
    answers_per_step: int = 264  # uniform answers, over all games
    learning_rate: float = 3e-3


@dataclass
class Model:
    """The model that is tuned."""

    path: str = ""  # a Hugging Face directory or hub id; empty: made from `scratch`
    dtype: str = "bfloat16"  # what the layers compute in: float32 or bfloat16
    quantize: str = "no"  # "int8": the frozen linears in eight bits, half the memory of bfloat16
    remat: bool = True  # recompute activations in the backward pass: less memory, more time
    scratch: Scratch = field(default_factory=Scratch)


@dataclass
class Data:
    """What is learnt from."""

    games: str = "all"  # ids, "all", or .py files that declare games; separated by commas
    humans: str = ""  # CSV of people's choices; empty: the embedded reference
    tasks: str = ""  # further tasks with their tables: survey/next=TABLE,FILE.py=TABLE
    wording: str = ""  # a TOML file of the texts in which tasks ask; empty: the package's
    weights: str = ""  # shares of the loss: games=1,survey/next=2; empty: every answer counts alike
    examples: str = ""  # further examples: .json, .jsonl or .csv files, separated by commas
    people: int = 0  # persons a task to learn from, the first of them; 0: all
    split_seed: int = 0  # which people are for training and which for the test
    slots: int = 4096  # computed at once on a device: the longest row of a forest
    # People or texts; choices where it is not known whose they are; 0: all of them in every step.
    rows_per_step: int = 64
    one_by_one: bool = False  # deal single observations: nothing that a person's share is saved


@dataclass
class Lora:
    """The adapter."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0  # per slot of a forest: shared prefixes share their mask
    targets: str = ",".join(LINEARS)  # any of the seven linears, separated by commas


@dataclass
class Optimizer:
    """AdamW with warm-up and cosine decay; the defaults are the recipe of the Be.FM paper."""

    epochs: int = 3
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass
class Checkpoints:
    """What is kept on the way."""

    every: int = 100  # steps between checkpoints; the last step is always kept
    keep: int = 2  # the last so many, and the best
    use: str = "last"  # or "best": of least loss on people of the validation split


@dataclass
class Evaluation:
    """How base and tuned model are compared with people at the end."""

    split: str = "test"
    participants: int = 1000  # simulated people a game
    people: int = 0  # persons a task, where each is compared with their own answers; 0: all
    resamples: int = 10_000  # of the bootstrap


@dataclass
class Mesh:
    """How devices share the work; the sizes multiply to the number of devices.

    One of them may be 0: all devices that are left.  A run on one machine uses its first devices
    only, where the sizes multiply to fewer than it has.
    """

    slices: int = 1  # TPU slices, joined by the data centre's network: rows are shared
    data: int = 0  # rows are shared, weights held by each
    fsdp: int = 1  # rows are shared, weights too
    tensor: int = 1  # heads and feed-forward width are shared
    topology: str = ""  # what the run is made for, such as v5p:4x4x4; for befm_jax.plan


@dataclass
class Config:
    """A training run."""

    workdir: str = "runs/default"
    seed: int = 0
    trained: str = "adapter"  # or "all": every parameter, for small models
    mesh: Mesh = field(default_factory=Mesh)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    evaluation: Evaluation = field(default_factory=Evaluation)


# field -> (what it must be, in words; the test)
_AT_LEAST_ONE = ("at least 1", lambda value: value >= 1)
_POSITIVE = ("above 0", lambda value: 0 < value <= sys.float_info.max)
_NOT_NEGATIVE = ("0 or more", lambda value: 0 <= value <= sys.float_info.max)
_RULES: dict[str, tuple[str, Any]] = {
    "trained": (f"one of {', '.join(TRAINED)}", lambda value: value in TRAINED),
    "model.dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
    "model.quantize": (f"one of {', '.join(QUANTIZE)}", lambda value: value in QUANTIZE),
    "mesh.slices": _AT_LEAST_ONE,
    "mesh.data": _NOT_NEGATIVE,
    "mesh.fsdp": _NOT_NEGATIVE,
    "mesh.tensor": _NOT_NEGATIVE,
    "data.slots": ("at least 8", lambda value: value >= 8),
    "data.rows_per_step": _NOT_NEGATIVE,
    "data.people": _NOT_NEGATIVE,
    "data.split_seed": _NOT_NEGATIVE,
    # A random key is made of 32 bits: a larger seed would begin as another one does.
    "seed": ("from 0 to 4,294,967,295", lambda value: 0 <= value < 2**32),
    "lora.rank": _AT_LEAST_ONE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "lora.targets": (
        f"among {', '.join(LINEARS)}, separated by commas",
        lambda value: value != "" and set(names(value)) <= set(LINEARS),
    ),
    "optimizer.epochs": _AT_LEAST_ONE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_fraction": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE,
    "checkpoints.every": _AT_LEAST_ONE,
    "checkpoints.keep": _AT_LEAST_ONE,
    "checkpoints.use": (f"one of {', '.join(USE)}", lambda value: value in USE),
    "evaluation.split": (f"one of {', '.join(SPLITS)}", lambda value: value in SPLITS),
    "evaluation.participants": _AT_LEAST_ONE,
    "evaluation.people": _NOT_NEGATIVE,
    "evaluation.resamples": ("at least 100", lambda value: value >= 100),
    "model.scratch.width": _AT_LEAST_ONE,
    "model.scratch.layers": _AT_LEAST_ONE,
    "model.scratch.heads": _AT_LEAST_ONE,
    "model.scratch.key_value_heads": _AT_LEAST_ONE,
    "model.scratch.feed_forward": _AT_LEAST_ONE,
    "model.scratch.pieces": _AT_LEAST_ONE,
    "model.scratch.embedding_scale": _POSITIVE,
    "model.scratch.steps": _AT_LEAST_ONE,
    "model.scratch.answers_per_step": _AT_LEAST_ONE,
    "model.scratch.learning_rate": _POSITIVE,
}


def validate(config: Config) -> None:
    """Raises ConfigError naming the first invalid field, its value and what it must be."""
    for name, value in fields(config):
        if name in _RULES:
            requirement, holds = _RULES[name]
            if not holds(value):
                raise ConfigError(f"{name} is {value!r}; it must be {requirement}")
    scratch = config.model.scratch
    if scratch.width % (2 * scratch.heads):
        raise ConfigError(
            f"model.scratch.width is {scratch.width}; it must be a multiple of twice "
            f"model.scratch.heads ({scratch.heads})"
        )
    if scratch.heads % scratch.key_value_heads:
        raise ConfigError(
            f"model.scratch.heads is {scratch.heads}; it must be a multiple of "
            f"model.scratch.key_value_heads ({scratch.key_value_heads})"
        )
    if config.trained == "all" and config.model.quantize != "no":
        raise ConfigError(
            f"model.quantize is {config.model.quantize!r}; with trained 'all' it must be no: "
            "rounded weights can't be trained"
        )
    if not (config.data.games or config.data.tasks or config.data.examples):
        raise ConfigError(
            "data.games, data.tasks and data.examples are all empty: there is nothing to learn"
        )
    if config.checkpoints.use == "best":
        if not (config.data.games or config.data.tasks):
            raise ConfigError(
                "checkpoints.use is 'best', and data.games and data.tasks are empty: what is best "
                "is measured on people of the validation split"
            )
        if config.evaluation.split == "validation":
            raise ConfigError(
                "checkpoints.use is 'best' and evaluation.split 'validation': a model that was "
                "selected by these people can't be compared with them; use the test split"
            )


def names(listed: str) -> list[str]:
    """The entries of a field that lists them with commas."""
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field as `(dotted name, value)`."""
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{declared.name}.")
        else:
            yield f"{prefix}{declared.name}", value


def save(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON."""
    files.write_object(path, dataclasses.asdict(config))


def weights(settings: Data) -> dict[str, float]:
    """Each family's share of the loss, as it is configured; empty where none is.

    Raises:
        ConfigError: an entry that is not NAME=NUMBER, or a number that is not above 0.
    """
    shares = {}
    for entry in names(settings.weights):
        name, _, number = entry.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not (share > 0 and math.isfinite(share)):
            raise ConfigError(
                f"data.weights: {entry!r} is no share of the loss; write NAME=NUMBER, such as "
                "games=1, the number above 0"
            )
        shares[name] = share
    return shares


_MAY_CHANGE = ("mesh.", "checkpoints.", "evaluation.")


def check_same(config: Config, path: Path) -> None:
    """Raises ConfigError where a saved config differs in a field that changes what is learnt.

    The working directory, the mesh, checkpointing and the final evaluation may change when a run is
    restarted.
    """
    saved = files.read_object(path, ConfigError)
    differing = []
    for name, value in fields(config):
        if name == "workdir" or name.startswith(_MAY_CHANGE):
            continue
        old: Any = saved
        for part in name.split("."):
            old = old.get(part) if isinstance(old, dict) else None
        if old != value:
            differing.append(f"{name} was {old!r}, now {value!r}")
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run of another config: {'; '.join(differing)}. Give another "
            "--workdir, or delete that one"
        )


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the file of a `--config` that names one that comes with the package.

    Raises ConfigError for a `--config.field` or a `--config` file that does not exist.  The message
    names fields that are near an unknown one.
    """
    known = [name for name, _ in fields(Config())]
    checked = list(arguments)
    for at, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument.startswith("-") and argument.lstrip("-").split("=")[0] == "config":
            if "=" in argument:
                flag, name = argument.split("=", 1)
                checked[at] = f"{flag}={_checked_file(name)}"
            else:
                checked[at + 1 : at + 2] = [str(_checked_file("".join(checked[at + 1 : at + 2])))]
        if not argument.startswith(("--config.", "-config.")):
            continue
        name = argument.split("=", 1)[0].lstrip("-").removeprefix("config.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            last = name.split(".")[-1]
            near = near or [path for path in known if path.split(".")[-1] == last]
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"--config.{name}: no such field; {hint}")
    return checked


def _checked_file(name: str) -> Path:
    """The file of a `--config`: a path, or the name of a config that comes with the package.

    Raises ConfigError where it does not give a Config; names line and reason.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.py"))}
    file = Path(name)
    if not file.is_file():
        if name not in shipped:
            raise ConfigError(f"--config {name}: no such file; by name: {', '.join(shipped)}")
        file = shipped[name]
    try:
        config = runpy.run_path(str(file))["get_config"]()
    except KeyError:
        raise ConfigError(f"{name}: has no get_config()") from None
    except Exception as error:  # the user's own code may raise anything
        lines = [
            at.lineno
            for at in traceback.extract_tb(error.__traceback__)
            if at.filename == str(file)
        ]
        where = f"{name}:{lines[-1]}" if lines else name
        raise ConfigError(f"{where}: {type(error).__name__}: {error}{_near(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{name}: get_config() gives a {type(config).__name__}, not a Config")
    return file


def _near(error: Exception) -> str:
    """Names the fields that are near a keyword which no part of the config has."""
    keyword = str(error).rsplit("unexpected keyword argument ", 1)[-1].strip("'")
    known = {part for name, _ in fields(Config()) for part in name.split(".")}
    near = difflib.get_close_matches(keyword, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
