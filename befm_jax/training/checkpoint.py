"""Checkpoints of what is trained (Orbax): adapter, optimiser, step and random key.

The base is in them only where it is trained, and the position in the data is the step: batches are
a pure function of seed and step.

A checkpoint is a folder named by its step.  It is written under another name, sealed
(`befm_jax.training.checksums`) and renamed: under its own name it is whole or was damaged later.
Of a run of several processes, process 0 looks after the folders; all must see the same ones.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from befm_jax.distributed import processes
from befm_jax.errors import UserError
from befm_jax.training import checksums
from befm_jax.training.step import State

# Arrays are stored in pieces of this size, of which a process reads those that it needs.
_CHUNK_BYTES = 32 * 2**20
_UNFINISHED, _DAMAGED, _DELETED = ".orbax-checkpoint-tmp", ".damaged", ".deleted"


class CheckpointError(UserError):
    """A checkpoint that can't be written or read; the message names its folder."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint of a state of other shapes; the message names the first array that differs."""


class Checkpoints:
    """Saved states of one run: the last `keep` of them, and the best by a figure where asked for.

    Saved in the background: what was saved last counts, and what it replaces goes, at the next
    call.  To be made, called and closed by all processes alike.
    """

    def __init__(self, directory: Path, keep: int, best: bool = False) -> None:
        """Finds the checkpoints of a run that was interrupted.

        Passes over what is damaged or half-written, with a warning that names folder and reason:
        the former is kept as `STEP.damaged`, the latter removed.  `best`: also keeps the one whose
        figure is lowest, the earliest of equals.
        """
        self._directory, self._keep, self._best = directory.absolute(), keep, best
        mine: Any = list(_survey(self._directory)) if processes.is_first() else None
        # By step, the figure that each was saved with.
        self._figures: dict[int, float | None] = dict(processes.broadcast("checkpoints", mine))
        self._saving: tuple[int, float | None] | None = None
        self._said: dict[str, Any] = {}
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False),
            # Else threads wait for minutes for a folder that could not be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            # Orbax's own notes on a folder are there before it is sealed.
            checkpoint_metadata_store=ocp.metadata.metadata_store(
                enable_write=True, blocking_write=True
            ),
            temporary_path_class=_sealing(lambda: self._said),
        )

    @property
    def last(self) -> int | None:
        """The step of the newest checkpoint known to be whole, or None."""
        return max(self._figures, default=None)

    def save(self, step: int, state: State, figure: float | None = None) -> None:
        """Saves the state after `step` steps, once; it may be donated as soon as this returns.

        `figure` says how good the state is, lower is better (None, NaN, infinite: never
        the best).

        Raises:
            CheckpointError: it can't be written, or the one before could not be.
        """
        self.settle()
        if step in self._figures:
            return
        figure = float(figure) if figure is not None and math.isfinite(figure) else None
        named = _named(state)
        self._said = {
            "figure": figure,
            "arrays": {name: _described(leaf) for name, leaf in named.items()},
        }
        folder = self._directory / str(step)
        plain = {name: _plain(leaf) for name, leaf in named.items()}
        chunked = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in named}
        try:
            self._checkpointer.save(folder, args=ocp.args.PyTreeSave(plain, chunked))
        except Exception as error:  # Orbax and tensorstore raise of every kind
            raise _failed(folder, "written", error) from error
        self._saving = step, figure

    def restore(self, like: State) -> State | None:
        """The newest whole checkpoint, or None if there is none.

        `like` is abstract (`jax.ShapeDtypeStruct`s, the key's too): shapes and dtypes that are
        held against the file's, and the shardings to read it into, whatever it was saved from.

        Raises:
            CheckpointMismatchError: it is that of a state of other shapes or dtypes.
            CheckpointError: it is whole and can't be read, or not by every process.
        """
        self.settle()
        return None if self.last is None else self._read(self.last, like, "")

    def restore_best(self, like: Any) -> tuple[int, Any] | None:
        """The step of the best checkpoint and what was trained there; None if none has a figure.

        `like` is abstract: `State.trained`, as for `restore`, which see for errors.
        """
        self.settle()
        while (step := self._best_step()) is not None:
            folder = self._directory / str(step)
            if processes.broadcast(
                "the best", processes.is_first() and _keep_if_whole(folder) is not None
            ):
                return step, self._read(step, {"trained": like}, "trained/")["trained"]
            del self._figures[step]
        return None

    def close(self) -> None:
        """Waits for what is being saved.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self.settle()
        finally:
            self._checkpointer.close()

    def _best_step(self) -> int | None:
        figures = [(figure, step) for step, figure in self._figures.items() if figure is not None]
        return min(figures)[1] if figures else None

    def settle(self) -> None:
        """Waits for what is being saved, and lets go of what it replaces."""
        if self._saving is None:
            return
        (step, figure), self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # as above
            raise _failed(self._directory / str(step), "written", error) from error
        self._figures[step] = figure
        kept = set(sorted(self._figures)[-self._keep :])
        best = self._best_step() if self._best else None
        if best is not None:
            kept.add(best)
        for replaced in sorted(self._figures.keys() - kept):
            del self._figures[replaced]
            if processes.is_first():
                _delete(self._directory / str(replaced))

    def _read(self, step: int, like: Any, part: str) -> Any:
        """Reads a part of the arrays, all whose names begin so, as `like` says."""
        folder = self._directory / str(step)
        try:
            said = checksums.verify(folder, contents=False)  # process 0 has looked at the contents
            reason = ""
        except checksums.ChecksumError as error:
            said, reason = None, f" ({error})"
        blind = _where(said is None)
        if blind:
            raise CheckpointError(
                f"{folder}: not whole as process {', '.join(map(str, blind))} sees it{reason}"
                + "; it was a moment ago, as process 0 sees it: all must see the same folders"
            )
        assert said is not None
        wanted = _named(like)
        _check_same_arrays(
            folder,
            {name: one for name, one in said["arrays"].items() if name.startswith(part)},
            {name: _described(leaf) for name, leaf in wanted.items()},
        )
        abstract = {name: _plain_abstract(leaf) for name, leaf in wanted.items()}
        try:
            found = _reader(abstract.values()).restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    abstract,
                    ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=bool(part),
                ),
            )
        except Exception as error:  # as above
            raise _failed(folder, "read", error) from error
        leaves = [_typed(found.pop(name), leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _sealing(said: Callable[[], Mapping[str, Any]]) -> type:
    """Orbax's folder in the making, sealed with `said()` before it gets its name."""

    class Sealing(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            checksums.write(Path(self.get()), said())
            os.rename(self.get(), self.get_final())

    return Sealing


def _reader(arrays: Iterable[jax.ShapeDtypeStruct]) -> ocp.Checkpointer:
    """Orbax reading a few arrays at once: beside what it returns, memory holds little."""
    # What is under way must be more than any array: Orbax refuses what it could never begin.
    largest = max(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    reading = ocp.BasePyTreeCheckpointHandler(
        restore_concurrent_bytes=2 * max(largest, _CHUNK_BYTES), use_compression=False
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=reading))


def _survey(directory: Path) -> Iterator[tuple[int, float | None]]:
    """Steps and figures of a directory's checkpoints, damaged and half-written ones put aside.

    Of the newest one that is left, every byte is as it was written; of others the sizes are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.name.endswith(_DELETED):
            shutil.rmtree(path)
        elif _UNFINISHED in path.name:
            _warn(f"{path}: this checkpoint is half-written; it is removed")
            shutil.rmtree(path)
    steps = (
        int(path.name) for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)
    )
    newest = True
    for step in sorted(steps, reverse=True):
        said = _keep_if_whole(directory / str(step), contents=newest)
        if said is not None:
            yield step, said["figure"]
            newest = False


def _keep_if_whole(folder: Path, contents: bool = True) -> dict[str, Any] | None:
    """What is said of a whole checkpoint; None, a warning and another name for a damaged one."""
    try:
        return checksums.verify(folder, contents)
    except checksums.ChecksumError as error:
        aside = folder.with_name(folder.name + _DAMAGED)
        _warn(
            f"{folder}: this checkpoint is damaged ({error}) and passed over; it is kept as "
            f"{aside.name}"
        )
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        return None


def _delete(folder: Path) -> None:
    """Deletes a folder, or has it under a name that shows that this was under way."""
    going = folder.with_name(folder.name + _DELETED)
    folder.rename(going)
    shutil.rmtree(going)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _failed(folder: Path, done: str, error: Exception) -> CheckpointError:
    lines = str(error).splitlines() or [""]
    return CheckpointError(
        f"{folder}: the checkpoint can't be {done} ({type(error).__name__}: {lines[0]})"
    )


def _check_same_arrays(folder: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises CheckpointMismatchError unless names, dtypes and shapes are the same."""
    unlike = [
        name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)
    ]
    if unlike:
        name = unlike[0]
        others = f", as do {len(unlike) - 1} other arrays" if len(unlike) > 1 else ""
        raise CheckpointMismatchError(
            f"{folder}: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} in this run{others}; go on with the config that the "
            "checkpoint was made with, or give another --workdir"
        )


def _named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, in order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _described(leaf: Any) -> str:
    """An array's dtype and shape as in `float32[2,3]`; of keys the dtype names the generator."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _plain(leaf: Any) -> Any:
    """Keys as plain integers, which is what a file can hold."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """`_plain` of an abstract array, on its devices: without any, on the first of this process."""
    held = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=sharding)


def _typed(plain: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_plain`."""
    if not _is_key(like):
        return plain
    # The generator's name is to be had from arrays only.
    generator = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(plain, impl=generator)


def _where(mine: bool) -> list[int]:
    """The processes on which something holds, on all processes."""
    everywhere = np.atleast_1d(multihost_utils.process_allgather(np.array(mine)))
    return np.flatnonzero(everywhere).tolist()
