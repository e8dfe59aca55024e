"""Everyone has a row of their own, on the devices that they began with, whoever leaves."""

import numpy as np
import pytest

from befm_jax.inference.batching import SHRINK, SMALLEST, BatchSlots


def check(seats):
    """Rows are apart, and every lane of the programs leads to a row of its prompt and back."""
    assert len(set(seats.row.tolist())) == len(seats.row)
    assert seats.row.max() < seats.size == seats.blocks * seats.block
    assert seats.block % seats.least == 0
    groups = int(seats.prompt.max()) + 1
    rows = seats.rows(groups, seats.most())
    assert rows.of_prompt.shape[:2] == (seats.blocks, groups)
    for row, prompt in zip(seats.row, seats.prompt, strict=True):
        block, within = divmod(int(row), seats.block)
        assert rows.prompt[row] == prompt
        lane = rows.of_prompt[block].reshape(-1)
        if groups > 1:
            # With one prompt rows are taken as they stand.
            assert lane[rows.place[row]] == within
        else:
            assert rows.of_prompt.shape[2] == seats.block
            assert rows.place[row] == within


@pytest.mark.parametrize(("blocks", "draws"), [(1, 1), (4, 4), (4, 8), (3, 6), (1, 8)])
@pytest.mark.parametrize("counts", [[1], [100], [7, 1, 30], [5] * 9])
def test_everyone_is_dealt_a_row_evenly(blocks, draws, counts):
    prompt = np.repeat(np.arange(len(counts)), counts)
    seats = BatchSlots.dealt(prompt, blocks, draws)
    check(seats)
    each = np.bincount(seats.row // seats.block, minlength=blocks)
    assert each.max() - each.min() <= 1
    for number, count in enumerate(counts):
        of_one = np.bincount(seats.row[prompt == number] // seats.block, minlength=blocks)
        assert of_one.max() == -(-count // blocks)
    # No more rows than twice the people, but for one a device.
    assert seats.size < 2 * max(len(prompt), draws) + draws
    assert (seats.spread(prompt, -1)[seats.row] == prompt).all()
    assert np.count_nonzero(seats.spread(prompt, -1) >= 0) == len(prompt)


@pytest.mark.parametrize(("blocks", "draws"), [(1, 1), (4, 8), (3, 6)])
def test_those_who_stay_keep_their_devices(blocks, draws):
    random = np.random.default_rng(0)
    prompt = np.sort(random.integers(0, 5, 300))
    seats = BatchSlots.dealt(prompt, blocks, draws)
    steps = 0
    while seats.few and len(seats.row) > 1:
        stay = np.sort(random.choice(len(seats.row), len(seats.row) // 5 + 1, replace=False))
        if seats.fullest(stay) > seats.few:
            stay = stay[: seats.few]
        closer, kept = seats.compacted(stay)
        check(closer)
        assert closer.size <= seats.size // SHRINK
        for old, new in zip(seats.row[stay], closer.row, strict=True):
            assert old // seats.block == new // closer.block
            assert kept[new // closer.block, new % closer.block] == old % seats.block
        np.testing.assert_array_equal(closer.prompt, seats.prompt[stay])
        seats, steps = closer, steps + 1
    assert steps >= 2
    assert seats.size <= max(SMALLEST, SHRINK * draws)
