"""Checkpoints of what is trained (Orbax): adapter, optimiser, step and random key.

The base is never in them, and the position in the data is the step: batches are a pure function
of seed and step.
"""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from befm_jax.errors import UserError
from befm_jax.training.step import State


class CheckpointDamagedError(UserError):
    """A checkpoint that can't be read; the message names its folder."""


class Checkpoints:
    """Saved states of one run, the last `keep` of them; saved in the background."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    @property
    def last(self) -> int | None:
        """The step of the newest checkpoint that is whole, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: State) -> None:
        """Saves the state after `step` steps, once; copies it first, so it may be donated."""
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(_plain(state)))

    def restore(self, like: State) -> State:
        """The newest state, in the shapes and on the devices of `like`.

        Raises CheckpointDamagedError where it can't be read as such.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        try:
            restored = self._manager.restore(self.last, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and tensorstore raise of every kind
            raise CheckpointDamagedError(
                f"{self._directory / str(self.last)}: the checkpoint can't be read "
                f"({type(error).__name__}); delete that folder to go on from the one before"
            ) from error
        leaves = jax.tree.leaves(restored)
        plain: State = jax.tree.unflatten(jax.tree.structure(_plain(like)), leaves)
        return plain.replace(key=jax.random.wrap_key_data(plain.key))

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(state: State) -> State:
    """The state with its key as plain integers, which is what a file can hold."""
    return state.replace(key=jax.random.key_data(state.key))
