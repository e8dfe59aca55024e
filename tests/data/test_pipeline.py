"""Batches: a pure function of seed and step, every observation once an epoch."""

from collections import Counter

import numpy as np
import pytest

from befm_jax.data import forest as forests
from befm_jax.data.forest import Forest, Path
from befm_jax.data.pipeline import ForestBatches, pool

PATHS = [Path((1, 2, 3, n % 3), (10 + n, 9), float(n + 1)) for n in range(12)]


def batches(**options):
    settings = {"slots": 24, "rows": 2, "epochs": 3, "observations_per_step": 20, "seed": 5}
    return ForestBatches(PATHS, **(settings | options))


def observed(batch):
    flat = Forest(*(array.reshape(-1, array.shape[-1]) for array in batch.forest))
    return Counter({(path.prompt, path.answer): path.weight for path in forests.paths(flat)})


def test_an_epoch_goes_through_every_observation_once():
    run = batches()
    assert run.steps == 3 * run.steps_per_epoch == 3 * 4  # 78 observations, 20 a step
    for epoch in range(3):
        total = Counter()
        for step in range(run.steps_per_epoch):
            batch, source = run[epoch * run.steps_per_epoch + step]
            assert sum(observed(batch).values()) == source.report.observations <= 20
            total += observed(batch)
        assert total == {(path.prompt, path.answer): path.weight for path in PATHS}


def test_batches_depend_on_seed_and_step_alone():
    run, again = batches(), batches()
    for step in (7, 2, 11):  # in any order, as after a restart
        for one, other in zip(run[step][0].forest, again[step][0].forest, strict=True):
            np.testing.assert_array_equal(one, other)
    assert observed(run[0][0]) != observed(run[run.steps_per_epoch][0])
    assert observed(run[0][0]) != observed(batches(seed=6)[0][0])


def test_all_observations_in_every_step_need_no_padded_rows():
    run = batches(observations_per_step=0, epochs=4)
    assert run.steps == 4
    batch, source = run[3]
    assert source.report == run.report
    assert sum(observed(batch).values()) == 78
    assert batch.forest.weight.reshape(-1, 24).any(axis=1).mean() >= 0.5


def test_fractional_weights_are_drawn_whole():
    paths = [Path((1,), (n,), 0.25) for n in range(2, 10)]
    run = ForestBatches(paths, slots=8, rows=1, epochs=1, observations_per_step=3)
    total = Counter()
    for step in range(run.steps):
        total += observed(run[step][0])
    assert total == {((1,), (n,)): 0.25 for n in range(2, 10)}


def test_few_shapes_are_ever_made():
    run = batches(observations_per_step=7, epochs=8)
    shapes = {run[step][0].forest.tokens.shape for step in range(run.steps)}
    assert all(micro & (micro - 1) == 0 for micro, _, _ in shapes)


def test_a_step_that_needs_one_row_is_not_padded_to_all():
    run = batches(slots=128, rows=8, observations_per_step=10)
    assert {run[step][0].forest.tokens.shape for step in range(run.steps)} == {(1, 1, 128)}


def test_nothing_to_learn_from_says_why():
    with pytest.raises(ValueError, match=r"1 .*: prompt longer than a row"):
        ForestBatches([Path((1,) * 9, (2,))], slots=8, rows=1, epochs=1)


@pytest.mark.parametrize("processes", [1, 3, 30])
def test_what_processes_read_apart_is_pooled_in_the_order_of_the_files(processes):
    paths = [path._replace(weight=path.weight / 3) for path in PATHS]
    sent = []

    def gather(numbers):
        sent.append(numbers)
        return [numbers]

    for part in range(processes):
        pool(paths[part::processes], gather)
    assert all(numbers.dtype == np.int32 for numbers in sent)
    assert pool([], lambda _: sent) == paths
