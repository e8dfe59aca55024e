"""Which row of a batch everyone who answers has.

The rows are in blocks, one for each part of the devices that share rows (`parallel`): people keep
the devices that they begin with, and a block needs nothing of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from befm_jax.inference.kv_cache import Rows

# A batch goes on with fewer rows when no more than one in so many is unfinished, down to so few.
# Every size is a program to compile, so the sizes lie far apart.
SHRINK, SMALLEST = 4, 16


@dataclass(frozen=True)
class BatchSlots:
    """`row` [n]: everyone's row; `prompt` [n]: the number of the prompt that they answer.

    There are `blocks` blocks of `block` rows, a multiple of `least`: so many devices draw for a
    block, each for as many rows.
    """

    row: Int[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]
    blocks: int
    block: int
    least: int

    @classmethod
    def dealt(cls, prompt: Int[np.ndarray, " n"], blocks: int, draws: int) -> BatchSlots:
        """Everyone dealt out to the blocks one by one, so that each has as many of every prompt.

        `prompt` is in order; `draws` devices draw for all.
        """
        number = np.arange(len(prompt))
        least = draws // blocks
        block = power_of_two(-(-len(prompt) // draws)) * least
        return cls(number % blocks * block + number // blocks, prompt, blocks, block, least)

    @property
    def size(self) -> int:
        """Rows in all."""
        return self.blocks * self.block

    @property
    def few(self) -> int:
        """The batch can go on with fewer rows once no block has more than so many unfinished."""
        smaller = self.block // SHRINK if self.size > SMALLEST else 0
        return smaller if smaller % self.least == 0 else 0

    def fullest(self, some: Any) -> int:
        """How many of some people the block has that has most of them."""
        return int(np.bincount(self.row[some] // self.block).max())

    def most(self) -> int:
        """How many answer one prompt in one block, at most."""
        return int(np.bincount(self.prompt * self.blocks + self.row // self.block).max())

    def spread(self, values: Shaped[np.ndarray, "n ..."], fill: Any = 0) -> np.ndarray:
        """Everyone's values row by row, `fill` where nobody is; in 32 bits, or as booleans."""
        dtype = values.dtype if values.dtype.itemsize < 8 else np.int32
        spread = np.full((self.size, *values.shape[1:]), fill, dtype)
        spread[self.row] = values
        return spread

    def compacted(
        self, some: Int[np.ndarray, " m"]
    ) -> tuple[BatchSlots, Int[np.ndarray, "blocks block"]]:
        """Some people alone in fewer rows, and which rows of its block each block keeps.

        Rows that nobody needs are filled up with the first.
        """
        where, within = self.row[some] // self.block, self.row[some] % self.block
        block = shrunk(self.block, max(self.least, self.fullest(some)))
        place = _numbered(where)
        kept = np.zeros((self.blocks, block), np.int32)
        kept[where, place] = within
        row = where * block + place
        return BatchSlots(row, self.prompt[some], self.blocks, block, self.least), kept

    def rows(self, groups: int, lanes: int) -> Rows:
        """Who answers what of `groups` prompts, for the programs.

        A prompt has room for so many in a block as `lanes` says; if it is the only one, for all.
        """
        where, within = self.row // self.block, self.row % self.block
        if groups == 1:
            # The rows themselves are its lanes.
            lanes, place = self.block, within
        else:
            place = _numbered(where * groups + self.prompt)
        table = np.zeros((self.blocks, groups, lanes), np.int32)
        table[where, self.prompt, place] = within
        prompt, lane = self.spread(self.prompt), self.spread(self.prompt * lanes + place)
        return Rows(prompt=prompt, lanes=table, lane=lane)


def _numbered(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Everyone's number within their group, from 0, in the order given."""
    counts = np.bincount(group)
    number = np.empty(len(group), np.int64)
    order = np.argsort(group, kind="stable")
    number[order] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number


def shrunk(size: int, needed: int) -> int:
    """The least of `size`, `size / SHRINK`, `size / SHRINK ** 2`, ... that is enough."""
    while size // SHRINK >= needed:
        size //= SHRINK
    return size


def power_of_two(number: int) -> int:
    """The least power of two that is enough."""
    return 1 << (int(number) - 1).bit_length()
