"""The command `befm`, and shared code of the entry points: flags, errors, the compilation cache."""

from __future__ import annotations

import ast
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from logging import getLogger
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from befm_jax import files
from befm_jax.config import CACHES, check_arguments
from befm_jax.distributed import processes
from befm_jax.errors import UserError, printable, unknown
from befm_jax.models import DTYPES, QUANTIZE
from befm_jax.respondents.requests import KEY, OPENAI

COMMANDS = ("train", "simulate", "evaluate", "plan", "export")
HELP = ("-h", "--help", "-help")
# Flags of a model that is loaded here, and of one that a server has.
LOADED = ("adapter", "force_template", "force_base", "dtype", "quantize", "devices")
SERVED = (
    *("base_url", "tokenizer", "concurrency", "timeout"),
    *("prices", "budget", "budget_tokens", "yes"),
)
# Flags of sampling, without effect on exact answers.
SAMPLING = ("participants", "temperature", "top_k", "top_p", "max_new_tokens", "cache")


def befm() -> None:
    """`befm COMMAND ...` is `python -m befm_jax.COMMAND ...`; `--version`; `--help` lists them."""
    name, *rest = sys.argv[1:] or HELP[:1]
    if name == "--version":
        print(f"befm_jax {metadata.version('befm_jax')}")
    elif name in HELP:
        print("befm COMMAND ...; befm COMMAND --help lists its flags; befm --version\n")
        for command in COMMANDS:
            source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
            documentation = ast.get_docstring(ast.parse(source)) or ""
            print(f"  {command:10}{documentation.splitlines()[0]}")
    elif name not in COMMANDS:
        _mistake(unknown("command", name, COMMANDS))
    else:
        sys.argv = [f"befm {name}", *rest]
        runpy.run_module(f"befm_jax.{name}", run_name="__main__", alter_sys=True)


def starting(command: str) -> None:
    """Says that a command has started, before imports that take seconds; Ctrl-C just ends these."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not set(HELP) & set(sys.argv[1:]):
        print(f"befm {command}: starting", file=sys.stderr, flush=True)


def run(main: Callable[[], None], documentation: str) -> None:
    """Parses the flags and runs `main` by `processes.run`; user errors are printed and exit with 2.

    `--help` prints the `documentation`, and the flags of the command with their defaults.
    """
    logging.set_verbosity(logging.WARNING)
    # Orbax raises what it logs with a stack trace, and asyncio logs its writes that were under way;
    # `processes.run` prints that in a line.
    for logger in (logging.get_absl_logger(), getLogger("asyncio")):
        logger.addFilter(lambda record: not record.exc_info)
    sys.unraisablehook = _unraisable
    if set(HELP) & set(sys.argv[1:]):
        # To absl, a command's own flags are those that its main module defines.
        for flag in flags.FLAGS.flags_by_module_dict().get(__name__, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        own = flags.FLAGS.main_module_help().strip().split("\n", 1)[1]
        print(f"{documentation.strip()}\n\nFlags:\n{own}")
    else:
        app.run(lambda _: processes.run(main), flags_parser=_parsed)


def _unraisable(unraisable: Any) -> None:
    """Prints no stack trace of writes that were under way when Orbax gave up a checkpoint."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parsed(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it exits with 2, so that no launcher tries it again."""
    try:
        program, *rest = arguments
        rest = flags.FLAGS([program, *check_arguments(rest)])[1:]
        if rest:
            raise UserError(f"{rest[0]!r} is not a flag; flags begin with --")
    except (UserError, flags.Error) as error:
        _mistake(error)
    return arguments[:1]


def _mistake(error: Exception) -> NoReturn:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.exit(processes.MISTAKE)


def define_model_flags() -> None:
    """Defines the flags of a model and its sampling."""
    flags.DEFINE_string(
        "model",
        None,
        "a training run, a Hugging Face directory, a hub id (owner/name@revision), or openai:MODEL "
        "for a model of a server",
    )
    flags.DEFINE_string(
        "adapter", None, "a LoRA adapter (PEFT's format) for --model: a directory or a hub id"
    )
    flags.DEFINE_bool(
        "force_template", False, "accept an adapter that was trained with another chat template"
    )
    flags.DEFINE_bool(
        "force_base", False, "accept an adapter that was trained on another base model"
    )
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "dtype of activations (default: the run's, or the stored one)"
    )
    flags.DEFINE_enum(
        "quantize", None, QUANTIZE, "quantisation of the base (default: the run's, or no)"
    )
    flags.DEFINE_integer(
        "devices",
        None,
        "number of this machine's devices over which the model and participants are sharded "
        "(default: all accelerators, or one CPU device)",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "games", "all", "comma-separated ids, 'all', or .py files that declare games"
    )
    flags.DEFINE_integer("participants", 1000, "simulated participants per game", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0)
    flags.DEFINE_float("temperature", 1.0, "1: the model's own distribution; 0: greedy", 0.0)
    flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0: off", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this probability; 1: off")
    flags.DEFINE_integer("max_new_tokens", 16, "longest answer, in tokens", lower_bound=1)
    flags.DEFINE_enum(
        "cache", "full", CACHES, "dtype of the key-value cache in sampling: --dtype's, or int8"
    )
    define_server_flags()


def define_server_flags() -> None:
    """Defines the flags of a model of a server, `--model openai:MODEL`."""
    flags.DEFINE_string(
        "base_url",
        OPENAI,
        f"openai:MODEL: the server; its key is read from the environment variable {KEY}",
    )
    flags.DEFINE_string(
        "tokenizer",
        "",
        "openai:MODEL: a directory or hub id with the model's tokenizer and chat template, for "
        "exact distributions where the server echoes log-probabilities of completions",
    )
    flags.DEFINE_integer("concurrency", 16, "openai:MODEL: requests at a time", lower_bound=1)
    flags.DEFINE_float("timeout", 120.0, "openai:MODEL: seconds after which to try again", 0.0)
    flags.DEFINE_list(
        "prices", None, "openai:MODEL: of a million tokens read and a million written: 2.5,10"
    )
    flags.DEFINE_float("budget", None, "openai:MODEL: the most to spend, as --prices count", 0.0)
    flags.DEFINE_integer(
        "budget_tokens", None, "openai:MODEL: the most tokens to read and write", lower_bound=0
    )
    flags.DEFINE_bool("yes", False, "openai:MODEL: ask, whatever it costs")


def define_process_flags() -> None:
    """Defines the flags of a multi-process run: the arguments of `processes.start`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where it is not detected")
    flags.DEFINE_integer("processes", None, "number of processes of the run", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)


def only_the_first_speaks() -> None:
    """Silences the standard output of all processes but the first, not their standard error."""
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 until the end


def keep(result: Path, overwrite: bool) -> None:
    """Raises UserError where a result is there, unless it is to be overwritten."""
    if result.exists() and not overwrite:
        raise UserError(f"{result} exists; name another --out, or add --overwrite to replace it")


def note_unused_flags(names: Iterable[str], why: str) -> None:
    """Prints a note on standard error for each of these flags that was given."""
    for name in names:
        if flags.FLAGS[name].present:
            print(f"note: --{name} has no effect {why}", file=sys.stderr)


def note_base(origin: Mapping[str, Any]) -> None:
    """Prints a note on standard error where it is unknown which base an adapter was trained on."""
    outcome = origin.get("adapter_base", "")
    if outcome.startswith("unknown"):
        print(f"note: the base that the adapter was trained on is {outcome}", file=sys.stderr)


def note_origin(origin: Mapping[str, Any]) -> None:
    """Prints notes on standard error of what was loaded.

    Of a model's own sampling settings, which are ignored, and of an adapter whose base is unknown.
    """
    note_base(origin)
    ignored = origin.get("ignored_generation_config")
    if ignored:
        settings = ", ".join(f"{name} {value}" for name, value in ignored.items())
        print(
            "note: of the model's generation_config.json only the stop tokens are used; ignored: "
            f"{printable(settings)}",
            file=sys.stderr,
        )


def keep_compiled_programs() -> None:
    """Enables JAX's persistent compilation cache in the user's own cache, for all programs.

    Compiled programs are run as they are read, so the directory is the user's alone, or there is
    none, with a note on standard error.  JAX's own variables override it:
    `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=0` and
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = files.user_cache()
        if cache is None:
            print(
                "note: compiled programs are not kept: neither XDG_CACHE_HOME nor HOME leads to a "
                "directory of this user's own",
                file=sys.stderr,
            )
        else:
            jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
