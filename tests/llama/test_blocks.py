"""The blocks that a forest needs, against its whole mask cut into blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.data import forest
from befm_jax.llama import blocks
from tests.helpers import small


def real_games():
    """Rows of real games, some of them padding."""
    built = forest.build(small.real_paths(), 512)
    return forest.pad(built.forest, built.reads, 3)[0]


CASES = {
    "random tries": lambda: forest.build(small.random_paths(3), 64).forest,
    "real games": lambda: real_games(),
    "padding": lambda: forest.empty(2, 64),
    "one causal row": lambda: forest.empty(1, 64)._replace(end=np.full((1, 64), 63, np.int32)),
}


@pytest.mark.parametrize(("query_block", "key_block"), [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("case", CASES)
def test_needed_and_whole_blocks_are_those_of_the_mask(case, query_block, key_block):
    rows = CASES[case]()
    cut = _cut(forest.mask(rows), query_block, key_block)
    found = blocks.pairs(jnp.asarray(rows.end), query_block, key_block)
    np.testing.assert_array_equal(found.needed, cut.any((3, 4)))
    np.testing.assert_array_equal(found.whole, cut.all((3, 4)))


@pytest.mark.parametrize(("query_block", "key_block"), [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("case", CASES)
def test_work_lists_every_needed_pair_once_in_order_with_its_marks(case, query_block, key_block):
    rows = CASES[case]()
    cut = _cut(forest.mask(rows), query_block, key_block)
    found = blocks.pairs(jnp.asarray(rows.end), query_block, key_block)
    expected = np.argwhere(cut.any((3, 4)))
    work = blocks.by_query(found, len(expected) + 5)
    steps = np.stack([work.row, work.query, work.key], axis=1)
    count = int(work.steps)
    np.testing.assert_array_equal(steps[:count], expected)
    assert (steps[count:] == expected[0]).all()
    for at, (row, query, key) in enumerate(expected):
        same = expected[(expected[:, 0] == row) & (expected[:, 1] == query), 2]
        marks = int(work.marks[at])
        assert bool(marks & blocks.FIRST) == (key == same[0])
        assert bool(marks & blocks.LAST) == (key == same[-1])
        assert bool(marks & blocks.WHOLE) == cut[row, query, key].all()


@pytest.mark.parametrize(("query_block", "key_block"), [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("case", CASES)
def test_key_lists_hold_whole_blocks_then_partial_ones(case, query_block, key_block):
    rows = CASES[case]()
    cut = _cut(forest.mask(rows), query_block, key_block)
    lists = blocks.unmasked_first(blocks.pairs(jnp.asarray(rows.end), query_block, key_block))
    for row, outer in np.ndindex(*lists.whole.shape):
        whole, needed = int(lists.whole[row, outer]), int(lists.needed[row, outer])
        keys = lists.keys[row, outer]
        seen, seen_whole = cut[row, outer].any((1, 2)), cut[row, outer].all((1, 2))
        np.testing.assert_array_equal(keys[:whole], np.flatnonzero(seen_whole))
        np.testing.assert_array_equal(keys[whole:needed], np.flatnonzero(seen & ~seen_whole))
        np.testing.assert_array_equal(keys[needed:], np.flatnonzero(~seen))


def test_a_list_that_is_just_long_enough_ends_with_a_last_step():
    found = blocks.pairs(jnp.full((3, 96), 95, jnp.int32), 16, 16)
    work = blocks.by_query(found, 3 * 21)
    assert int(work.steps) == 3 * 21
    assert int(work.marks[-1]) & blocks.LAST


def test_added_slots_see_themselves_alone():
    rows = forest.build(small.random_paths(5), 48).forest
    padded = forest.empty(len(rows.end), 64)._replace(
        end=np.asarray(blocks.pad_end(jnp.asarray(rows.end), 64))
    )
    seen = forest.mask(padded)
    np.testing.assert_array_equal(seen[:, :48, :48], forest.mask(rows))
    np.testing.assert_array_equal(
        seen[:, 48:], np.broadcast_to(np.eye(64)[48:], (len(seen), 16, 64))
    )
    assert not seen[:, :48, 48:].any()


def test_rows_that_do_not_divide_into_blocks_are_refused():
    with pytest.raises(ValueError, match="60 slots don't divide into blocks of 16"):
        blocks.pairs(jnp.zeros((1, 60), jnp.int32), 16, 32)


def _cut(mask, query_block, key_block):
    rows, slots, _ = mask.shape
    cut = mask.reshape(rows, slots // query_block, query_block, slots // key_block, key_block)
    return cut.swapaxes(2, 3)
