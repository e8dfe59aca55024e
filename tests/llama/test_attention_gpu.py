"""GPU kernels of forest attention: interpreted on CPU against the dense rule, compiled for H100."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.data import forest
from befm_jax.llama import attention_gpu
from tests.helpers import small
from tests.helpers.plain_attention import plain_attention


def pack(*lengths):
    """One row of unrelated causal sequences."""
    return np.repeat(np.cumsum(lengths), lengths).astype(np.int32) - 1


def mixed_rows(slots):
    """Rows of every kind: random tries, a pack, one long sequence, a short one and padding."""
    tries = forest.build(small.random_paths(3, count=60), slots).forest.end[0]
    short = np.concatenate([pack(19), np.arange(19, slots, dtype=np.int32)])
    return jnp.asarray(np.stack([tries, pack(7, 130, slots - 137), pack(slots), short]))


def real_rows():
    return jnp.asarray(forest.build(small.real_paths(observations=200), 512).forest.end[:2])


ROWS = {
    "every kind": lambda: mixed_rows(256),
    "not whole blocks": lambda: mixed_rows(200),
    "real games": real_rows,
}


def arrays(end, heads, key_heads, width, dtype, seed=0):
    """Query, key, value and the gradient of what they give."""
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = (heads, key_heads, key_heads, heads)
    return [
        jax.random.normal(key, (*end.shape, count, width), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]


@jax.jit
def dense(query, key, value, end, gradient):
    """Mixed values, log-sum-exp and gradients by the whole mask, in float32."""
    query, key, value, gradient = (x.astype(jnp.float32) for x in (query, key, value, gradient))
    mixed, backward, sums = jax.vjp(
        lambda *heads: plain_attention(*heads, end), query, key, value, has_aux=True
    )
    return mixed, sums, *backward(gradient)


@jax.jit
def kernels(query, key, value, end, gradient):
    mixed, log_sum_exp = attention_gpu.forward(query, key, value, end, interpret=True)
    gradients = attention_gpu.backward(
        query, key, value, end, mixed, log_sum_exp, gradient, interpret=True
    )
    return mixed, log_sum_exp, *gradients


def assert_same(found, expected, tolerance):
    names = ("mixed", "log_sum_exp", "d_query", "d_key", "d_value")
    for name, ours, theirs in zip(names, found, expected, strict=True):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32),
            theirs,
            rtol=0,
            atol=tolerance * np.abs(theirs).max(),
            err_msg=name,
        )


@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "width"),
    [
        ("every kind", 4, 2, 64),
        ("not whole blocks", 3, 1, 128),
        ("real games", 2, 1, 16),
    ],
)
def test_float32_is_the_dense_rule(rows, heads, key_heads, width):
    end = ROWS[rows]()
    query, key, value, gradient = arrays(end, heads, key_heads, width, jnp.float32)
    found = kernels(query, key, value, end, gradient)
    assert [x.dtype for x in found] == [jnp.float32] * 5
    assert_same(found, dense(query, key, value, end, gradient), 2e-6)


@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "width"),
    [
        ("every kind", 16, 1, 64),
        ("not whole blocks", 6, 2, 80),
        ("real games", 4, 1, 128),
    ],
)
def test_bfloat16_is_the_dense_rule_but_for_rounding(rows, heads, key_heads, width):
    end = ROWS[rows]()
    query, key, value, gradient = arrays(end, heads, key_heads, width, jnp.bfloat16)
    found = kernels(query, key, value, end, gradient)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    assert_same(found, dense(query, key, value, end, gradient), 1e-2)


def test_large_scores_neither_overflow_nor_vanish():
    end = mixed_rows(200)
    query, key, value, gradient = arrays(end, 2, 1, 64, jnp.float32)
    query = query * 1000
    # Scores of some 10^4, rounded to 10^-3: softmax weights are as exact as that.
    assert_same(
        kernels(query, key, value, end, gradient), dense(query, key, value, end, gradient), 1e-2
    )


def test_blocks_that_nobody_sees_are_not_read():
    end = jnp.asarray(pack(512, 512))[None]
    query, key, value, gradient = arrays(end, 2, 1, 128, jnp.bfloat16)
    expected = dense(query, key, value, end, gradient)
    poisoned = [x.at[:, :512].set(jnp.nan) for x in (query, key, value)]
    found = kernels(*poisoned, end, gradient)
    names = ("mixed", "d_query", "d_key", "d_value")
    for name, ours, theirs in zip(
        names,
        (found[0], *found[2:]),
        (expected[0], *expected[2:]),
        strict=True,
    ):
        assert np.isnan(np.asarray(ours[:, :512], np.float32)).all(), name
        np.testing.assert_allclose(
            np.asarray(ours[:, 512:], np.float32), theirs[:, 512:], rtol=0, atol=0.05, err_msg=name
        )


@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "dtypes", "said"),
    [
        (2, 1, 256, ("float32",) * 3, "head width is 256; it must be at most 128"),
        (3, 2, 64, ("float32",) * 3, "there are 3 query heads; they must be a multiple"),
        (
            2,
            1,
            64,
            ("float32", "bfloat16", "float32"),
            "values are bfloat16 and float32; they must be all",
        ),
        (2, 1, 64, ("float16",) * 3, "values are float16; they must be all"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(heads, key_heads, width, dtypes, said):
    end = jnp.zeros((1, 16), jnp.int32)
    query, key, value = (
        jnp.zeros((1, 16, count, width), dtype)
        for count, dtype in zip((heads, key_heads, key_heads), dtypes, strict=True)
    )
    with pytest.raises(ValueError, match=said):
        attention_gpu.forward(query, key, value, end)


@pytest.fixture(scope="module")
def h100_programs():
    """What compiling for eight H100 said, program by program."""
    if importlib.util.find_spec("jax_plugins") is None or (
        importlib.util.find_spec("jax_plugins.xla_cuda12") is None
    ):
        pytest.skip("needs the CUDA compiler: jax-cuda12-plugin and jax-cuda12-pjrt, absent here")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve().parents[1] / "helpers" / "h100_programs.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_h100_within_its_shared_memory(h100_programs):
    # XLA refuses a program whose kernels want more shared memory than the card has.
    assert len(h100_programs) == 18
    assert all(program["by_triton"] for program in h100_programs)


def test_sharded_over_rows_and_heads_the_kernels_need_no_communication(h100_programs):
    assert [program for program in h100_programs if program["collectives"]] == []


def test_nothing_as_large_as_a_mask_is_in_device_memory(h100_programs):
    # Rows that are not whole tiles are copied to be padded: they say nothing here.
    whole = [program for program in h100_programs if program["slots"] % 128 == 0]
    assert len(whole) == 16
    assert [p for p in whole if p["temporary_bytes"] >= p["slots"] ** 2] == []
