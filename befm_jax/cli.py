"""Shared code of the entry points: flags, errors without stack traces, the compilation cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from befm_jax.config import CACHES, DTYPES, QUANTIZE, check_arguments
from befm_jax.distributed import processes
from befm_jax.errors import UserError, printable

# Flags of sampling, without effect on exact answers.
SAMPLING = ("participants", "temperature", "top_k", "top_p", "max_new_tokens", "cache")


def run(main: Callable[[], None], documentation: str) -> None:
    """Parses the flags and runs `main` by `processes.run`; user errors are printed and exit with 2.

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
    """Defines the flags of a model and its sampling."""
    flags.DEFINE_string(
        "model", None, "a training run, a Hugging Face directory, or a hub id (owner/name@revision)"
    )
    flags.DEFINE_string(
        "adapter", None, "a LoRA adapter (PEFT's format) for --model: a directory or a hub id"
    )
    flags.DEFINE_bool(
        "force_template", False, "accept an adapter that was trained with another chat template"
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


def define_process_flags() -> None:
    """Defines the flags of a multi-process run: the arguments of `processes.start`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where it is not detected")
    flags.DEFINE_integer("processes", None, "number of processes of the run", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)


def only_the_first_speaks() -> None:
    """Silences the standard output of all processes but the first, not their standard error."""
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 until the end


def note_unused_flags(names: Iterable[str], why: str) -> None:
    """Prints a note on standard error for each of these flags that was given."""
    for name in names:
        if flags.FLAGS[name].present:
            print(f"note: --{name} has no effect {why}", file=sys.stderr)


def note_ignored_settings(origin: Mapping[str, Any]) -> None:
    """Prints a note on standard error of a model's own sampling settings, which are ignored."""
    ignored = origin.get("ignored_generation_config")
    if ignored:
        settings = ", ".join(f"{name} {value}" for name, value in ignored.items())
        print(
            "note: of the model's generation_config.json only the stop tokens are used; ignored: "
            f"{printable(settings)}",
            file=sys.stderr,
        )


def keep_compiled_programs() -> None:
    """Enables JAX's persistent compilation cache in the user's cache directory, for all programs.

    Compiled programs are run as they are read, so the directory is the user's alone, or there is
    none, with a note on standard error.
    JAX's own variables override it: `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=0`
    and `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        directory = _users_cache()
        if directory is None:
            print(
                "note: compiled programs are not kept: neither XDG_CACHE_HOME nor HOME leads to a "
                "directory of this user's own",
                file=sys.stderr,
            )
        else:
            jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _users_cache() -> Path | None:
    """A directory that this user alone can write to; None where there is none to be had."""
    home = Path(os.environ.get("HOME", ""))
    own = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "befm_jax"
    if not own.is_absolute():
        return None
    try:
        for directory in (own, own / "compiled"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A link and what it leads to, both.
            if {directory.lstat().st_uid, directory.stat().st_uid} != {os.geteuid()}:
                return None
            directory.chmod(0o700)
    except OSError:
        return None
    return directory
