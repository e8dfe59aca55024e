"""A batch is the forest of its conversations, cut into micro-batches that devices share."""

import itertools

import numpy as np
import pytest

from befm_jax.data.forest import Encoded, rung
from befm_jax.data.pipeline import lay_out

CONVERSATIONS = [Encoded.of((1, 2, 3, n % 5, n), (10 + n, 9), float(n + 1)) for n in range(30)]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("slots", [16, 40, 4096])
def test_every_observation_is_in_one_micro_batch(slots, parts):
    batch, report = lay_out(CONVERSATIONS, slots=slots, parts=parts, seed=0)
    micro, rows, length = batch.forest.tokens.shape
    assert rows == parts
    assert length <= max(slots, 8)
    assert report.slots_computed == micro * rows * length
    assert batch.reads.observations[batch.reads.token == 9].sum() == sum(range(1, 31))
    assert report.observations == sum(range(1, 31))


def test_as_few_micro_batches_as_hold_all():
    assert lay_out(CONVERSATIONS, slots=4096, parts=1, seed=0)[0].forest.tokens.shape[0] == 1
    short, report = lay_out(CONVERSATIONS, slots=40, parts=1, seed=0)
    assert short.forest.tokens.shape[0] == -(-report.slots_used // 40)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_tree_is_split_where_it_would_leave_other_devices_idle(parts):
    prompt = tuple(range(100, 120))
    answers = [Encoded.of(prompt, tuple(range(10 * n, 10 * n + 11))) for n in range(200, 240)]
    batch, report = lay_out(answers, slots=1000, parts=parts, seed=0)
    assert batch.forest.tokens.shape[:2] == (1, parts)
    # Whole, it has 20 + 40 x 10 slots in one row; the others would be as long, and empty.
    assert report.slots_used <= parts * len(prompt) + 400
    assert report.slots_computed < 1.25 * report.slots_used
    # Trees are of equal limits, not of equal sizes: of 8 devices one stays idle here.
    assert (batch.reads.observations.sum(axis=-1) > 0).sum() >= min(parts, 7)
    assert batch.reads.observations.sum() == 40 * 11


def test_what_is_counted_of_a_batch_is_what_a_brute_force_count_finds():
    batch, report = lay_out(CONVERSATIONS, slots=40, parts=2, seed=0)
    pairs = read = 0
    for micro in range(batch.forest.tokens.shape[0]):
        for row in range(2):
            parent = batch.forest.parent[micro, row]
            used = (parent >= 0) | (batch.forest.end[micro, row] > np.arange(len(parent)))
            for slot in np.flatnonzero(used):
                while slot >= 0:
                    pairs, slot = pairs + 1, parent[slot]
            column = batch.reads.column[micro, row]
            read += len(set(column[column >= 0].tolist()))
    assert batch.pairs(report.slots_used) == pairs
    assert batch.slots_read() == read


def test_rungs_are_close_and_few():
    rungs = sorted({rung(slots) for slots in range(1, 20_000)})
    assert all(rung(slots) >= slots for slots in range(1, 20_000))
    assert all(high <= max(low + 8, 1.07 * low) for low, high in itertools.pairwise(rungs))
    assert len([one for one in rungs if 2000 <= one < 3700]) <= 10
