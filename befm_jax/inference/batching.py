"""Assigns the participants of a batch to its rows (batch slots), and compacts the batch.

Rows are in blocks, one per data-parallel group of devices: participants stay on the devices that
they start on, and blocks need no communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from befm_jax.inference.kv_cache import Rows

# A batch is compacted by this factor once no more rows than that are unfinished, down to this size.
# Every size is a program to compile, so that sizes are far apart.
SHRINK, SMALLEST = 4, 16


@dataclass(frozen=True)
class BatchSlots:
    """`row` [n]: each participant's row; `prompt` [n]: the index of the prompt that they answer.

    There are `blocks` blocks of `block` rows, a multiple of `least`, the number of devices that
    draw for a block, each for an equal share of its rows.
    """

    row: Int[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]
    blocks: int
    block: int
    least: int

    @classmethod
    def dealt(cls, prompt: Int[np.ndarray, " n"], blocks: int, draws: int) -> BatchSlots:
        """Participants assigned to blocks round-robin, so that each block has as many per prompt.

        `prompt` is sorted; `draws` devices draw for all blocks.
        """
        number = np.arange(len(prompt))
        least = draws // blocks
        block = power_of_two(-(-len(prompt) // draws)) * least
        return cls(number % blocks * block + number // blocks, prompt, blocks, block, least)

    @property
    def size(self) -> int:
        """The number of rows in all blocks."""
        return self.blocks * self.block

    @property
    def few(self) -> int:
        """The batch can be compacted once no block has more unfinished rows than this."""
        smaller = self.block // SHRINK if self.size > SMALLEST else 0
        return smaller if smaller % self.least == 0 else 0

    def fullest(self, some: Any) -> int:
        """The most of some participants that any block has."""
        return int(np.bincount(self.row[some] // self.block).max())

    def most(self) -> int:
        """The most participants that any block has for one prompt."""
        return int(np.bincount(self.prompt * self.blocks + self.row // self.block).max())

    def spread(self, values: Shaped[np.ndarray, "n ..."], fill: Any = 0) -> np.ndarray:
        """Participants' values by row, `fill` in unused rows; in 32 bits, or as booleans."""
        dtype = values.dtype if values.dtype.itemsize < 8 else np.int32
        spread = np.full((self.size, *values.shape[1:]), fill, dtype)
        spread[self.row] = values
        return spread

    def compacted(
        self, some: Int[np.ndarray, " m"]
    ) -> tuple[BatchSlots, Int[np.ndarray, "blocks block"]]:
        """The slots of some participants alone in fewer rows, and the rows that each block keeps.

        Rows are counted within their block; padding repeats its first row.
        """
        of_block, within = self.row[some] // self.block, self.row[some] % self.block
        block = shrunk(self.block, max(self.least, self.fullest(some)))
        place = _rank_in_group(of_block)
        kept = np.zeros((self.blocks, block), np.int32)
        kept[of_block, place] = within
        row = of_block * block + place
        return BatchSlots(row, self.prompt[some], self.blocks, block, self.least), kept

    def rows(self, groups: int, capacity: int) -> Rows:
        """The rows of each of `groups` prompts, as an input of the programs.

        `capacity`: how many a prompt may have in a block; a single prompt has all of the block's.
        """
        of_block, within = self.row // self.block, self.row % self.block
        if groups == 1:
            # All rows of the block are its own.
            capacity, place = self.block, within
        else:
            place = _rank_in_group(of_block * groups + self.prompt)
        table = np.zeros((self.blocks, groups, capacity), np.int32)
        table[of_block, self.prompt, place] = within
        prompt, flat = self.spread(self.prompt), self.spread(self.prompt * capacity + place)
        return Rows(prompt, of_prompt=table, place=flat)


def _rank_in_group(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Each entry's index within its group, from 0, in the order given."""
    counts = np.bincount(group)
    rank = np.empty(len(group), np.int64)
    order = np.argsort(group, kind="stable")
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def shrunk(size: int, needed: int) -> int:
    """The least of `size`, `size / SHRINK`, `size / SHRINK ** 2`, ... that is at least `needed`."""
    while size // SHRINK >= needed:
        size //= SHRINK
    return size


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (int(number) - 1).bit_length()
