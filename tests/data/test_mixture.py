"""Mixtures: a pure function of seed and step, every row once an epoch, each family its share."""

import itertools
import json

import numpy as np
import pytest

from befm_jax.data import mixture as mixtures
from befm_jax.data.items import Example
from befm_jax.data.mixture import Family, Mixture, one_by_one, weighted
from befm_jax.errors import DataError


class Letters:
    """One id a letter; a message's span is learnt with an end of turn."""

    calls = 0

    def encode_batch(self, conversations):
        return [self.encode(messages) for messages, _ in conversations]

    def encode(self, messages):
        Letters.calls += 1
        ids = tuple(ord(letter) for message in messages for letter in message.text)
        length = len(messages[-1].text)
        return (*ids, 0), ((len(ids) - length, len(ids) + 1),)


def family(name, rows, answers=1, **options):
    """Rows are numbers; each has `answers` examples with a prompt of its own."""

    def examples(row, rng):
        for answer in range(answers):
            yield Example.of("", f"{name}{row}?" * 3, f"{answer}" * (1 + row % 3))

    return Family(name, range(rows), examples, name, **options)


def mixture(*families, **options):
    settings = {"slots": 400, "epochs": 3, "rows_per_step": 5, "seed": 4}
    return Mixture(families, Letters(), **(settings | options))


def same(one, other):
    for left, right in zip((*one.forest, *one.reads), (*other.forest, *other.reads), strict=True):
        np.testing.assert_array_equal(left, right)


def test_every_row_comes_once_an_epoch_and_steps_are_dealt_evenly():
    run = mixture(family("a", 23), family("b", 11))
    assert (run.rows, run.steps_per_epoch, run.steps) == (34, 7, 21)
    dealt = [run.dealt(step) for step in range(run.steps)]
    for number, size in enumerate((23, 11)):
        rows = [row for step in dealt for row in step[number]]
        for lap in range(3):
            assert sorted(rows[lap * size : (lap + 1) * size]) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]  # shuffled anew
        assert (
            max(len(step[number]) for step in dealt) - min(len(step[number]) for step in dealt) <= 1
        )
    assert max(sum(map(len, step)) for step in dealt) <= 6


def test_batches_depend_on_seed_and_step_alone():
    run, again, other = (mixture(family("a", 23), seed=seed) for seed in (4, 4, 5))
    for step in (7, 2, 11):  # in any order, as after a restart
        same(run[step][0], again[step][0])
    assert run.dealt(0) != other.dealt(0)
    assert run.fingerprint == again.fingerprint
    assert run.fingerprint != mixture(family("b", 23)).fingerprint


def test_only_a_steps_own_rows_are_read_and_encoded():
    read = []

    class Rows:
        def __len__(self):
            return 10**6

        def __getitem__(self, number):
            read.append(number)
            return number

    many = Family("many", Rows(), family("many", 1).examples, "many")
    run = mixture(many)
    assert run.steps == 600_000
    _ = run[0]  # looks at a few steps of the run for the lengths of its rows
    assert len(read) <= 5 * 17
    read.clear()
    before = Letters.calls
    _, source = run[123_456]
    assert read == run.dealt(123_456)[0]
    assert Letters.calls - before == source.rows == len(read) == 5


@pytest.mark.parametrize(("room", "encoded_again"), [(10**6, False), (100, True)])
def test_conversations_are_encoded_once_while_there_is_room(monkeypatch, room, encoded_again):
    monkeypatch.setattr(mixtures, "_CACHED_IDS", room)
    run = mixture(family("a", 50))
    first = [run[step][0] for step in range(10)]
    assert sum(len(ids) for ids, _ in run._cache.values()) <= room
    before = Letters.calls
    for step, batch in enumerate(first):
        same(run[step][0], batch)
    assert (Letters.calls > before) == encoded_again


def test_batches_are_made_ahead_in_their_order():
    run = mixture(family("a", 23))
    ahead = list(run.ahead(4, 9))
    assert [source.step for _, source in ahead] == [4, 5, 6, 7, 8]
    for (batch, _), step in zip(ahead, range(4, 9), strict=True):
        same(batch, run[step][0])


def test_what_is_drawn_for_a_row_is_its_own_whatever_else_is_in_the_step():
    def drawn(rows_per_step):
        found = []

        def draws(row, rng):
            found.append((row, int(rng.integers(10**9))))
            yield Example.of("", f"row {row}?", f"{found[-1][1]}")

        run = Mixture([Family("a", range(12), draws, "a")], Letters(), slots=400, epochs=2,
                      rows_per_step=rows_per_step)  # fmt: skip
        run[0]  # looks at a few steps of the run first
        found.clear()
        for step in range(run.steps):
            run[step]
        return found

    assert sorted(drawn(5)) == sorted(drawn(3)) == sorted(drawn(12))
    assert len({number for _, number in drawn(5)}) == 24  # another for each row, each time


def test_a_familys_share_of_the_loss_is_its_weight():
    """Answers of other lengths, and other numbers of rows; one that is in few steps alone."""
    run = mixture(
        family("long", 30, answers=4, weight=0.5),
        family("short", 40, weight=0.3),
        family("rare", 4, weight=0.2),
        epochs=2,
    )
    shares = np.zeros(3)
    for step in range(run.steps):
        batch, _ = run[step]
        total = batch.reads.observations.sum()
        for number, name in enumerate("lsr"):
            # Every tree begins with its family's letter.
            column = batch.reads.column[0, 0]
            slot = batch.reads.slots[0, 0][column]
            parent = batch.forest.parent[0, 0]
            roots = np.arange(len(parent))
            while (parent[roots] >= 0).any():
                roots = np.where(parent[roots] >= 0, parent[roots], roots)
            own = (batch.forest.tokens[0, 0][roots[slot]] == ord(name)) & (column >= 0)
            shares[number] += batch.reads.weight[0, 0][own].sum() / total
    np.testing.assert_allclose(shares / run.steps, [0.5, 0.3, 0.2], rtol=1e-5)


def test_what_is_in_every_step_is_beside_the_rows_of_the_others():
    run = mixture(
        family("a", 23, weight=3.0), family("counts", 4, weight=1.0, every_step=True), epochs=2
    )
    assert (run.steps_per_epoch, run.steps) == (5, 10)
    dealt = [run.dealt(step) for step in range(run.steps)]
    assert [step[1] for step in dealt] == [[0, 1, 2, 3]] * 10
    for lap in range(2):
        rows = [row for step in dealt for row in step[0]]
        assert sorted(rows[lap * 23 : (lap + 1) * 23]) == list(range(23))
    for step in range(run.steps):
        batch, source = run[step]
        assert source.rows == len(dealt[step][0]) + 4
        # "a0?a0?a0?" and "counts0?...": of the loss, a quarter is that of the counts.
        column = batch.reads.column[0, 0]
        slot = batch.reads.slots[0, 0][column]
        parent, roots = batch.forest.parent[0, 0], np.arange(batch.forest.parent.shape[-1])
        while (parent[roots] >= 0).any():
            roots = np.where(parent[roots] >= 0, parent[roots], roots)
        own = (batch.forest.tokens[0, 0][roots[slot]] == ord("c")) & (column >= 0)
        share = batch.reads.weight[0, 0][own].sum() / batch.reads.observations.sum()
        assert share == pytest.approx(0.25, rel=1e-5)
    assert mixture(family("c", 4, every_step=True)).steps_per_epoch == 1


def test_shares_by_name_are_those_of_families_that_are_there():
    shared = weighted([family("a", 2), family("b", 2)], {"a": 1.0, "b": 2.0})
    assert [one.weight for one in shared] == [1.0, 2.0]
    assert [one.weight for one in weighted([family("a", 2)], {})] == [None]
    with pytest.raises(DataError, match="unknown family 'c': known: a, b"):
        weighted([family("a", 2), family("b", 2)], {"c": 1.0})


def test_one_by_one_deals_single_observations():
    def examples(row, rng):
        yield Example.of("", f"{row}?", "yes", 3.0)
        yield Example.of("", f"{row}?", "no", 0.25)

    apart = one_by_one(Family("a", range(4), examples, "a"))
    assert len(apart.rows) == 4 * (3 + 1)
    run = Mixture([apart], Letters(), slots=400, epochs=1, rows_per_step=5)
    total = sum(run[step][1].report.observations for step in range(run.steps))
    assert total == 4 * (3 + 0.25)
    whole = Mixture([Family("a", range(4), examples, "a")], Letters(), slots=400, epochs=1)
    assert whole[0][1].report.observations == total


def test_steps_without_draws_that_have_all_rows_are_one_batch():
    run = mixture(family("a", 6), rows_per_step=0, epochs=4)
    assert run.steps == 4
    assert run[0][0] is run[3][0]


@pytest.mark.parametrize("parts", [1, 3])
def test_padding_is_little_and_shapes_are_few(parts):
    """Sixteen texts of very different lengths a step; a rung of the ladder holds them."""
    random = np.random.default_rng(0)
    texts = ["x" * int(length) for length in random.lognormal(4.5, 0.4, 600)]

    def examples(text, rng):
        yield Example.of("", f"{len(text)}", text)

    run = Mixture([Family("texts", texts, examples, "")], Letters(), slots=4096, epochs=1,
                  rows_per_step=16, parts=parts)  # fmt: skip
    used = computed = 0
    shapes = set()
    for step in range(run.steps):
        batch, source = run[step]
        shapes.add(batch.forest.tokens.shape)
        used += source.report.tokens_apart
        computed += source.report.slots_computed
    assert computed <= (1.1 if parts == 1 else 1.25) * used
    assert len(shapes) <= 12


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ((), "no rows"),
        ((family("a", 0),), "no rows"),
        ((family("a", 1, weight=1.0), family("b", 1)), "b: weight is missing"),
        ((family("a", 1, weight=-1.0),), "a: weight is -1.0"),
        ((family("a", 1, visits=0.0),), "a: visits is 0.0"),
    ],
)
def test_what_can_not_be_is_refused(families, message):
    with pytest.raises(DataError, match=message):
        mixture(*families)


def test_rows_that_are_too_short_say_so():
    with pytest.raises(DataError, match=r"nothing to learn from at 4 slots a row: .* longer"):
        mixture(family("a", 3), slots=4)[0]


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)])
def test_shards_of_a_step_are_the_step(weights):
    families = [family("a", 13, 2, weight=weights[0]), family("b", 7, weight=weights[1])]
    whole = mixture(*families, rows_per_step=6)
    posted = {}

    def shard(index):
        """One of three processes, of which the others have posted their values already."""
        calls = itertools.count()

        def all_gather(value):
            posted[call := next(calls), index] = json.loads(json.dumps(value))
            return [posted.get((call, other), [other, value[1]]) for other in range(3)]

        return mixture(
            *families, rows_per_step=6, shard_index=index, shard_count=3, all_gather=all_gather
        )

    # The second time round all three know what the others have.
    for _ in range(3 if weights[0] else 2):
        shards = [[one[step] for step in range(whole.steps)] for one in map(shard, range(3))]
    for step in range(whole.steps):
        batch, source = whole[step]
        parts = [one[step][0] for one in shards]
        assert len({part.forest.tokens.shape for part in parts}) == 1
        assert len({part.reads.token.shape for part in parts}) == 1
        for figure in ("weight", "observations"):
            apart = sum(getattr(part.reads, figure).sum() for part in parts)
            assert apart == pytest.approx(getattr(batch.reads, figure).sum(), rel=1e-5)
        (of_all,) = {str(one[step][1]) for one in shards}
        assert of_all == str(source)
        reports = [one[step][1].report for one in shards]
        assert {report.observations for report in reports} == {source.report.observations}
        assert reports[0].tokens_apart == source.report.tokens_apart
        assert reports[0].slots_computed == sum(part.forest.tokens.size for part in parts)
        assert shards[0][step][1].slots_read >= source.slots_read


@pytest.mark.parametrize("longest", [1, 40])
def test_a_run_compiles_for_few_shapes_with_little_padding(longest):
    lengths = np.random.default_rng(1).integers(1, longest + 1, 2000)

    def examples(row, rng):
        yield Example.of("", f"{row}?", "ab" * (5 + int(lengths[row])))

    run = Mixture([Family("texts", range(2000), examples, "")], Letters(), slots=600, epochs=1,
                  rows_per_step=16)  # fmt: skip
    batches = [run[step] for step in range(run.steps)]
    assert len({(*batch.forest.tokens.shape, *batch.reads.token.shape) for batch, _ in batches}) < 9
    used, computed = (
        sum(getattr(source.report, name) for _, source in batches)
        for name in ("slots_used", "slots_computed")
    )
    assert computed < 1.1 * used
