"""Forest attention, as it runs on this machine, against every pair of slots masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from befm_jax.data import forest as forests
from befm_jax.llama import attention_cpu
from befm_jax.llama.attention import forest_attention
from tests.helpers.plain_attention import plain_attention
from tests.helpers.small import random_paths, real_paths


def heads_of(rows, slots, heads=4, key_heads=2, width=16, dtype=jnp.float32, seed=0):
    """Random queries, keys, values and a gradient of what comes out."""
    random = np.random.default_rng(seed)
    shapes = [(rows, slots, count, width) for count in (heads, key_heads, key_heads, heads)]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def both(query, key, value, gradient, end):
    """Values and gradients of the kernel and of the definition."""

    def plainly(*heads):
        return plain_attention(*(array.astype(jnp.float32) for array in heads), end)[0]

    found = []
    for attention in (lambda *heads: forest_attention(*heads, end), plainly):

        @jax.jit
        def run(query, key, value, attention=attention):
            mixed, pull = jax.vjp(attention, query, key, value)
            return mixed, pull(gradient.astype(mixed.dtype))

        found.append(jax.tree.leaves(run(query, key, value)))
    return found


def assert_close(ours, theirs, relative):
    """Largest difference, relative to the largest entry or to the inputs' size of about one."""
    for one, other in zip(ours, theirs, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() <= relative * max(1.0, np.abs(other).max())


def packed(slots, lengths):
    """`end` of texts behind each other, the rest padding."""
    end = np.arange(slots)
    start = 0
    for length in lengths:
        end[start : start + length] = start + length - 1
        start += length
    return end[None]


def tree(seed, slots):
    """`end` of a random depth-first tree: each slot hangs on the path to the one before it."""
    random = np.random.default_rng(seed)
    end, line = np.arange(slots), []
    for slot in range(slots):
        del line[len(line) - random.geometric(0.5) + 1 :]
        line.append(slot)
        end[line] = slot
    return end[None]


CASES = {
    "one slot": np.array([[0]]),
    "less than a block": packed(50, [20, 20]),
    "a causal row of one block": packed(attention_cpu.BLOCK, [attention_cpu.BLOCK]),
    "a causal row": packed(300, [300]),
    "texts that end within blocks": packed(520, [100, 200, 150, 40]),
    "padding of whole blocks": packed(640, [90]),
    "a wide fan": np.concatenate([np.full((1, 100), 639), np.arange(100, 640)[None]], axis=1),
    "random trees": np.concatenate([tree(seed, 400) for seed in range(3)]),
    "real game trees": forests.build(real_paths(observations=4000), 640).forest.end,
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_every_pair_masked(case):
    end = jnp.asarray(CASES[case])
    assert_close(*both(*heads_of(*end.shape), end), 2e-6)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
def test_query_heads_meet_the_keys_of_their_group(heads, key_heads):
    end = jnp.asarray(CASES["a causal row"])
    assert_close(*both(*heads_of(1, 300, heads, key_heads), end), 2e-6)


def test_bfloat16_heads_are_mixed_with_a_softmax_in_float32():
    end = jnp.asarray(CASES["texts that end within blocks"])
    query, key, value, gradient = heads_of(*end.shape, dtype=jnp.bfloat16)
    ours, theirs = both(query, key, value, gradient, end)
    assert ours[0].dtype == jnp.bfloat16
    assert_close(ours, theirs, 2e-2)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_in_any_try_a_path_is_mixed_as_if_it_stood_alone(seed):
    """The forests that training lays out, against softmax over each path's own slots, by NumPy."""
    built = forests.build(random_paths(seed), 96)
    forest, _ = forests.pad(built.forest, built.reads, 8)
    heads = heads_of(*forest.end.shape, seed=seed)[:3]
    mixed = np.asarray(forest_attention(*heads, jnp.asarray(forest.end)))
    query, key, value = (np.asarray(array, np.float64) for array in heads)
    for place in built.places:
        row = place.row
        last = int(built.reads.slots[row, built.reads.column[row, place.reads[-1]]])
        line = [last]
        while forest.parent[row, line[-1]] >= 0:
            line.append(int(forest.parent[row, line[-1]]))
        for head in range(query.shape[2]):
            keys, values = (array[row, line, head // 2] for array in (key, value))
            weights = np.exp(keys @ query[row, last, head] / query.shape[3] ** 0.5)
            alone = weights @ values / weights.sum()
            np.testing.assert_allclose(mixed[row, last, head], alone, rtol=1e-5, atol=2e-6)


def test_no_array_of_every_pair_of_slots_exists():
    slots = 4096
    query, key, value, gradient = heads_of(1, slots, 2, 1)
    end = jnp.asarray(packed(slots, [slots]))

    def run(query, key, value):
        mixed, pull = jax.vjp(lambda *heads: forest_attention(*heads, end), query, key, value)
        return mixed, pull(gradient)

    program = jax.jit(run).lower(query, key, value).compile()
    of_every_pair = slots * slots * 4
    assert program.memory_analysis().temp_size_in_bytes < of_every_pair / 2


def test_a_platform_without_a_kernel_is_refused():
    query, key, value, _ = heads_of(1, 8)
    run = jax.jit(forest_attention).trace(query, key, value, jnp.arange(8)[None])
    with pytest.raises(NotImplementedError, match="rocm"):
        run.lower(lowering_platforms=("rocm",))
