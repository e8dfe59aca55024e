"""What the entry points share: flags, errors without stack traces, a compilation cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from befm_jax.config import CACHES, DTYPES, QUANTIZE, check_arguments
from befm_jax.distributed import processes
from befm_jax.errors import UserError

# Flags that say how answers are drawn, and mean nothing where they are scored.
SAMPLING = ("participants", "temperature", "top_k", "top_p", "max_new_tokens", "cache")


def run(main: Callable[[], None], documentation: str) -> None:
    """Parses the flags and runs `main`; what a person can mend is printed and exits with 2.

    What happens to errors in a run of several processes: see `processes.run`.
    `documentation` is shown by `--help`.
    """
    sys.modules["__main__"].__doc__ = documentation
    logging.set_verbosity(logging.WARNING)

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"not a flag: {arguments[1]}")
        processes.run(main)

    try:
        check_arguments(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(guarded)


def define_model_flags() -> None:
    """Which model answers, and how it samples: for every entry point that asks one."""
    flags.DEFINE_string(
        "model", None, "a training run, a Hugging Face directory, or a hub id (owner/name@revision)"
    )
    flags.DEFINE_string(
        "adapter", None, "a LoRA adapter (PEFT's format) for --model: a directory or a hub id"
    )
    flags.DEFINE_bool(
        "force_template", False, "take an adapter that was trained with another chat template"
    )
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "what to compute in (default: as the run did, or as stored)"
    )
    flags.DEFINE_enum(
        "quantize", None, QUANTIZE, "what to round the base to (default: as the run did, or no)"
    )
    flags.DEFINE_integer(
        "devices",
        None,
        "how many of this machine's devices share the model and those who answer (default: all "
        "accelerators, or one CPU device)",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "games", "all", "ids, 'all', or .py files that declare games; separated by commas"
    )
    flags.DEFINE_integer("participants", 1000, "simulated participants a game", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0)
    flags.DEFINE_float("temperature", 1.0, "1: the model's own distribution; 0: greedy", 0.0)
    flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0: off", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this probability; 1: off")
    flags.DEFINE_integer("max_new_tokens", 16, "longest answer, in tokens", lower_bound=1)
    flags.DEFINE_enum(
        "cache", "full", CACHES, "what sampling keeps keys and values in: --dtype's type, or int8"
    )


def define_process_flags() -> None:
    """Which process of a run over several hosts this is: `processes.start` takes them."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of the first process, where nothing else says it"
    )
    flags.DEFINE_integer("processes", None, "how many processes the run has", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)


def only_the_first_speaks() -> None:
    """Silences the standard output of all processes but the first; errors are still said."""
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 until the end


def note_unused_flags(names: Iterable[str], why: str) -> None:
    """Says on standard error which of these flags were given and do nothing."""
    for name in names:
        if flags.FLAGS[name].present:
            print(f"note: --{name} does nothing {why}", file=sys.stderr)


def note_ignored_settings(origin: Mapping[str, Any]) -> None:
    """Says on standard error which sampling settings of a model's own are not followed."""
    ignored = origin.get("ignored_generation_config")
    if ignored:
        settings = ", ".join(f"{name} {value}" for name, value in ignored.items())
        print(
            f"note: the model's generation_config.json is followed in where answers stop, and "
            f"ignored in: {settings}",
            file=sys.stderr,
        )


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache directory, the small ones too.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0` turns it off;
    what JAX is told of how long a program must take to be kept counts likewise.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "befm_jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
