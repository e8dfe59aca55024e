"""Token forests: any set of paths survives the round trip, and slots see their ancestors only."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from befm_jax.data import forest as forests
from befm_jax.data.forest import Path

TOKENS = st.integers(0, 4)  # few tokens: many shared prefixes, many paths inside others
PROMPTS = st.lists(TOKENS, min_size=1, max_size=6).map(tuple)
ANSWERS = st.lists(TOKENS, min_size=1, max_size=4).map(tuple)
PATHS = st.lists(
    st.builds(Path, PROMPTS, ANSWERS, st.integers(1, 50).map(float)), min_size=1, max_size=30
)


@pytest.fixture(autouse=True, scope="module", params=[forests.ALIGNED, 4])
def aligned(request):
    """Every test in rows too short for gaps between trees, and in rows that have them."""
    kept, forests.ALIGNED = forests.ALIGNED, request.param
    yield request.param
    forests.ALIGNED = kept


def merged(paths):
    total = Counter()
    for path in paths:
        total[path.prompt, path.answer] += path.weight
    return total


@given(PATHS, st.integers(10, 40), st.integers(0, 3))
def test_any_set_of_paths_survives_the_round_trip(paths, slots, seed):
    built = forests.build(paths, slots, seed=seed)
    assert merged(forests.paths(built.forest)) == merged(paths)
    assert not built.report.left_out


@given(PATHS, st.integers(10, 40))
def test_mask_equals_brute_force_ancestry(paths, slots):
    forest = forests.build(paths, slots).forest
    seen = forests.mask(forest)
    for row in range(len(forest.tokens)):
        for slot in range(slots):
            ancestry, at = set(), slot
            while at >= 0:
                ancestry.add(at)
                at = forest.parent[row, at]
            assert set(np.flatnonzero(seen[row, slot])) == ancestry
            assert forest.depth[row, slot] == len(ancestry) - 1


@given(PATHS, st.integers(10, 40), st.integers(0, 3))
def test_places_lead_to_each_path_and_back_to_its_prompt(paths, slots, seed):
    built = forests.build(paths, slots, seed=seed)
    for path, place in zip(paths, built.places, strict=True):
        row, slot = place
        line = []
        while slot >= 0:
            line.append(slot)
            slot = built.forest.parent[row, slot]
        tokens = built.forest.tokens[row, line[::-1]]
        assert tuple(tokens) == path.prompt + path.answer
        learnt = built.forest.weight[row, line[::-1]] > 0
        assert list(learnt) == [False] * len(path.prompt) + [True] * len(path.answer)


@given(PATHS, st.integers(10, 40))
def test_reads_give_every_weighted_slot_its_parent_once(paths, slots):
    forest = forests.build(paths, slots).forest
    reads = forests.reads(forest)
    rows, at = np.nonzero(forest.weight)
    assert np.array_equal(reads.slots[rows, reads.column[rows, at]], forest.parent[rows, at])
    for row in range(len(forest.tokens)):
        parents = set(forest.parent[row, forest.weight[row] > 0])
        assert len(set(reads.column[row, forest.weight[row] > 0])) == len(parents)


@given(st.lists(st.builds(Path, PROMPTS, ANSWERS, st.just(1.0)), min_size=1, max_size=20))
def test_path_sums_add_up_the_edges_of_the_answer_alone(paths):
    built = forests.build(paths, 12)
    edges = np.random.default_rng(0).standard_normal(built.forest.tokens.shape).astype(np.float32)
    totals = forests.path_sums(built.forest, edges)
    assert not totals[built.forest.weight == 0].any()
    for path, place in zip(paths, built.places, strict=True):
        row, slot = place
        total = totals[row, slot]
        expected = 0.0
        for _ in path.answer:
            expected += float(edges[row, slot])
            slot = built.forest.parent[row, slot]
        assert total == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30)
@given(PATHS, st.integers(0, 1000))
def test_the_same_seed_gives_the_same_forest(paths, seed):
    first, second = (forests.build(paths, 16, seed=seed).forest for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_shared_prompt_is_stored_once():
    prompt = tuple(range(100))
    paths = [Path(prompt, (200 + n, 300), float(n + 1)) for n in range(50)]
    report = forests.build(paths, 256).report
    assert report.slots_used == 100 + 50 * 2
    assert report.observations == sum(range(1, 51))
    assert report.tokens_apart == 102 * report.observations
    assert report.saved == pytest.approx(1 - 200 / (102 * 1275))


def test_a_tree_larger_than_a_row_is_cut_and_repeats_its_prompt():
    prompt = tuple(range(10))
    paths = [Path(prompt, (100 + n,)) for n in range(25)]
    built = forests.build(paths, 20)
    assert len(built.forest.tokens) == 3
    assert built.report.slots_used == 3 * 10 + 25


def test_unlike_paths_are_packed_tightly():
    lengths = [12, 4, 8, 8, 10, 6, 16]
    paths = [Path((100 * n, *range(1, length - 1)), (99,)) for n, length in enumerate(lengths)]
    assert len(forests.build(paths, 16).forest.tokens) == 4  # 64 tokens in rows of 16


def test_trees_begin_at_block_borders_as_far_as_a_row_has_room(aligned):
    first, second = (Path((number,) * 2, (number,)) for number in (1, 2))
    roomy = forests.build([first, second], 2 * aligned)
    assert sorted(np.flatnonzero(roomy.forest.depth[0] == 1)) == [1, aligned + 1]
    assert roomy.report.slots_used == 6
    full = forests.build([first, second], 6)
    assert sorted(np.flatnonzero(full.forest.depth[0] == 1)) == [1, 4]


def test_what_is_left_out_is_counted_by_its_reason():
    paths = [
        Path(tuple(range(30)), (1,), 3.0),
        Path(tuple(range(15)), tuple(range(10)), 2.0),
        Path((1, 2), (), 5.0),
        Path((1, 2), (3,), 0.0),
        Path((), (3,), 4.0),
        Path((1, 2), (3,), 7.0),
    ]
    built = forests.build(paths, 20)
    assert built.report.left_out == {
        forests.PROMPT_TOO_LONG: (1, 3.0),
        forests.ANSWER_CUT: (1, 2.0),
        forests.NOTHING_TO_LEARN: (2, 5.0),
        forests.NO_PROMPT: (1, 4.0),
    }
    assert "2 (5 observations): nothing to learn" in built.report.reasons()
    assert built.places[:5] == (None,) * 5
    assert merged(forests.paths(built.forest)) == {((1, 2), (3,)): 7.0}


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_an_impossible_weight_is_an_error(weight):
    with pytest.raises(ValueError, match="weight"):
        forests.build([Path((1,), (2,), weight)], 8)


def test_reads_refuse_a_weighted_root():
    forest = forests.empty(1, 4)
    forest.weight[0, 0] = 1
    with pytest.raises(ValueError, match="without a parent"):
        forests.reads(forest)
