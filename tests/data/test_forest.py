"""Token forests: what is read is read once, in its own context; nothing else is computed."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded

TOKENS = st.integers(0, 4)  # few tokens: many shared prefixes, many conversations inside others
COUNTS = st.integers(1, 50).map(float)


@st.composite
def conversations(draw):
    """A conversation with spans anywhere behind its first token."""
    ids = draw(st.lists(TOKENS, min_size=2, max_size=9).map(tuple))
    edges = draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=6).map(sorted))
    learnt = tuple(zip(edges[::2], edges[1::2], strict=False))
    scale = draw(st.sampled_from([1.0, 0.5, 0.0, -2.0]))
    return Encoded(ids, learnt, draw(COUNTS), scale)


SETS = st.lists(conversations(), min_size=1, max_size=30)


@pytest.fixture(autouse=True, scope="module", params=[forests.ALIGNED, 4])
def aligned(request):
    """Every test in rows too short for gaps between trees, and in rows that have them."""
    kept, forests.ALIGNED = forests.ALIGNED, request.param
    yield request.param
    forests.ALIGNED = kept


def line_to(forest, row, slot):
    """Tokens from the root to a slot."""
    tokens = []
    while slot >= 0:
        tokens.append(int(forest.tokens[row, slot]))
        slot = forest.parent[row, slot]
    return tuple(reversed(tokens))


def asked(built):
    """What is read: (tokens before, token) -> weight and observations, over the whole forest."""
    found = defaultdict(lambda: np.zeros(2))
    for row, column in zip(*np.nonzero(built.reads.column >= 0), strict=True):
        slot = built.reads.slots[row, built.reads.column[row, column]]
        key = (line_to(built.forest, row, slot), int(built.reads.token[row, column]))
        found[key] += built.reads.weight[row, column], built.reads.observations[row, column]
    return found


def expected(given):
    found = defaultdict(lambda: np.zeros(2))
    for one in given:
        for start, stop in one.learnt:
            for at in range(start, stop):
                worth = (one.observations * one.scale, one.observations)
                found[one.ids[:at], one.ids[at]] += worth
    return found


@given(SETS, st.integers(10, 40), st.integers(0, 3))
def test_every_learnt_token_is_read_in_its_own_context(given, slots, seed):
    built = forests.build(given, slots, seed=seed)
    found, right = asked(built), expected(given)
    assert set(found) == set(right)
    for key, worth in right.items():
        np.testing.assert_allclose(found[key], worth, rtol=1e-6, atol=1e-6)
    assert not built.report.left_out


@given(SETS, st.integers(10, 40))
def test_one_token_at_one_slot_is_read_once(given, slots):
    reads = forests.build(given, slots).reads
    for column, token in zip(reads.column, reads.token, strict=True):
        pairs = list(zip(column[column >= 0], token[column >= 0], strict=True))
        assert len(set(pairs)) == len(pairs)


@given(SETS, st.integers(10, 40))
def test_mask_equals_brute_force_ancestry(given, slots):
    forest = forests.build(given, slots).forest
    seen = forests.mask(forest)
    for row in range(len(forest.tokens)):
        for slot in range(slots):
            ancestry, at = set(), slot
            while at >= 0:
                ancestry.add(at)
                at = forest.parent[row, at]
            assert set(np.flatnonzero(seen[row, slot])) == ancestry
            assert forest.depth[row, slot] == len(ancestry) - 1


@given(SETS, st.integers(10, 40), st.integers(0, 3))
def test_places_lead_to_each_conversations_own_reads(given, slots, seed):
    built = forests.build(given, slots, seed=seed)
    for one, place in zip(given, built.places, strict=True):
        learnt = [at for start, stop in one.learnt for at in range(start, stop)]
        assert len(place.reads) == one.reads == len(learnt)
        for at, read in zip(learnt, place.reads, strict=True):
            slot = built.reads.slots[place.row, built.reads.column[place.row, read]]
            assert line_to(built.forest, place.row, slot) == one.ids[:at]
            assert built.reads.token[place.row, read] == one.ids[at]


@settings(max_examples=20)
@given(SETS)
def test_slots_are_the_tokens_that_something_follows_or_is_read_at(given):
    built = forests.build(given, 270)
    lines = Counter(
        line_to(built.forest, row, slot)
        for row in range(len(built.forest.tokens))
        for slot in range(270)
        if built.forest.depth[row, slot] or built.forest.end[row, slot] > slot
        or slot in built.reads.slots[row, : built.reads.column[row].max() + 1]
    )  # fmt: skip
    needed = {one.ids[:at] for one in given for at in range(1, len(one.computed) + 1)}
    assert set(lines) == needed
    assert built.report.slots_used == sum(lines.values())


def test_no_answers_last_token_has_a_slot():
    built = forests.build([Encoded.of((1, 2, 3), (4, 9)), Encoded.of((1, 2, 3), (5, 9))], 64)
    assert built.report.slots_used == 5  # the prompt, 4 and 5: not the 9 that ends both
    assert 9 not in built.forest.tokens
    choice = forests.build([Encoded.of((1, 2, 3), (letter,)) for letter in range(4, 8)], 64)
    assert choice.report.slots_used == 3  # a multiple-choice question is its prompt alone


def test_a_persons_answers_in_a_row_are_one_chain_of_its_own_length():
    """Fifty questions of ten tokens, each answered by two; one conversation, one read a token."""
    ids, learnt = [0], []
    for question in range(50):
        ids += [100 + question] * 10
        learnt.append((len(ids), len(ids) + 2))
        ids += [question % 5, 99]
    built = forests.build([Encoded(tuple(ids), tuple(learnt))], 1024)
    assert built.report.slots_used == len(ids) - 1
    assert built.report.slots_used <= 1.05 * len(ids)
    assert int((built.reads.column >= 0).sum()) == 100
    # All five answers to each question read, history passing through the one that was given.
    alternatives = [
        Encoded((*ids[:start], answer, 99), ((start, start + 2),))
        for start, _ in learnt
        for answer in range(5)
    ]
    scored = forests.build(alternatives, 1024)
    assert scored.report.slots_used == len(ids) - 1 + 50 * 4
    assert len(scored.forest.tokens) == 1


@given(SETS, st.integers(10, 40), st.integers(0, 3))
def test_the_layout_is_a_pure_function_of_its_arguments(given, slots, seed):
    first, second = (forests.build(given, slots, seed=seed) for _ in range(2))
    for one, other in zip(
        (*first.forest, *first.reads), (*second.forest, *second.reads), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=20)
@given(SETS)
def test_slots_of_a_row_are_depth_first(given):
    forest = forests.build(given, 40).forest
    for parent, end in zip(forest.parent, forest.end, strict=True):
        for slot, above in enumerate(parent):
            if above >= 0:
                assert above < slot <= end[above]
                assert end[slot] <= end[above]


def test_a_shared_prompt_is_stored_once():
    prompt = tuple(range(100))
    given = [Encoded.of(prompt, (200 + n, 300), float(n + 1)) for n in range(50)]
    built = forests.build(given, 256)
    assert built.report.slots_used == 100 + 50
    assert built.report.observations == sum(range(1, 51))
    assert built.report.tokens_apart == sum(range(1, 51)) * 102
    assert built.report.saved == pytest.approx(1 - 150 / (1275 * 102))


def test_a_prefix_is_repeated_only_where_a_tree_is_full():
    prompt = tuple(range(10))
    built = forests.build([Encoded.of(prompt, (100 + n, 1)) for n in range(25)], 20)
    assert built.report.slots_used == 3 * 10 + 25
    assert len(built.forest.tokens) == 3


def test_rows_are_packed_tight():
    lengths = [60, 50, 40, 30, 30, 20, 10]
    given = [Encoded.of((100 * n, *range(length - 1)), (99,)) for n, length in enumerate(lengths)]
    assert len(forests.build(given, 80).forest.tokens) == 3


def test_trees_begin_at_block_borders_as_far_as_a_row_has_room(aligned):
    first, second = (Encoded.of((number,) * 3, (number,)) for number in (1, 2))
    roomy = forests.build([first, second], aligned + 3).forest
    roots = [np.flatnonzero(row != 0)[0::3].tolist() for row in roomy.tokens]
    assert roots == [[0, aligned]]
    tight = forests.build([first, second], 6).forest
    assert [np.flatnonzero(row)[0::3].tolist() for row in tight.tokens] == [[0, 3]]


def test_what_does_not_fit_is_left_out_whole_and_counted():
    given = [
        Encoded.of(tuple(range(30)), (1,), 3.0),
        Encoded.of(tuple(range(15)), tuple(range(10)), 2.0),
        Encoded.of((1, 2), (), 5.0),
        Encoded.of((1, 2), (3,), 0.0),
        Encoded.of((), (3,), 4.0),
        Encoded.of((1, 2), (3,), 7.0),
    ]
    built = forests.build(given, 20)
    assert [place is None for place in built.places] == [True] * 5 + [False]
    assert built.report.observations == 7.0
    assert built.report.left_out == {
        forests.TOO_LONG_BEFORE: (1, 3.0),
        forests.TOO_LONG: (1, 2.0),
        forests.NOTHING_TO_LEARN: (2, 5.0),
        forests.NO_PROMPT: (1, 4.0),
    }
    assert "1 (3 observations): what is before" in built.report.reasons()


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Encoded.of((1,), (2,), -1.0), "observations"),
        (Encoded.of((1,), (2,), float("nan")), "observations"),
        (Encoded((1, 2), ((1, 2),), 1.0, float("inf")), "scale"),
        (Encoded((1, 2), ((1, 3),)), "learnt spans"),
        (Encoded((1, 2, 3), ((2, 3), (1, 2))), "learnt spans"),
    ],
)
def test_what_can_not_be_is_refused(one, message):
    with pytest.raises(ValueError, match=message):
        forests.build([one], 8)
    with pytest.raises(ValueError, match="at least one slot"):
        forests.build([], 0)


def test_rows_of_padding_are_read_nowhere():
    built = forests.build([Encoded.of((1, 2), (3,))], 8)
    forest, reads = forests.pad(built.forest, built.reads, 3)
    assert forest.tokens.shape == (3, 8)
    assert (reads.column[1:] == -1).all()
    assert reads.observations.sum() == 1
    with pytest.raises(ValueError, match="can't be padded"):
        forests.pad(forest, reads, 2)
