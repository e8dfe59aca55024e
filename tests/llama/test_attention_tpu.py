"""Forest attention on TPU, interpreted, against the dense rule; and compiled for real chips.

Interpreted kernels are exact but slow: rows are a few blocks of 128 long.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from befm_jax.data import forest
from befm_jax.llama import attention_tpu
from tests.helpers import small
from tests.helpers.plain_attention import plain_attention

forward = jax.jit(partial(attention_tpu.forward, block=128, interpret=True))
backward = jax.jit(partial(attention_tpu.backward, block=128, interpret=True))


def _causal(*lengths):
    """The ends of a row of plain sequences behind each other."""
    return np.repeat(np.cumsum(lengths) - 1, lengths)[None].astype(np.int32)


ENDS = {
    "real games": lambda: forest.build(small.real_paths(), 512).forest.end[:2],
    "random tries, 300 slots": lambda: forest.build(small.random_paths(0, 300), 300).forest.end[:2],
    "packed sequences": lambda: np.concatenate([_causal(384), _causal(200, 3, 181)]),
    "padding": lambda: forest.empty(1, 256).end,
    "fewer slots than a block": lambda: forest.build(small.random_paths(1), 40).forest.end[:1],
}


def _inputs(end, *, heads=4, key_heads=2, width=64, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    shape = (*end.shape, heads, width), (*end.shape, key_heads, width)
    query, key, value, gradient = (
        jnp.asarray(random.normal(size=shape[of]), dtype) for of in (0, 1, 1, 0)
    )
    # Some scores far from the others, as trained heads have them.
    return query * 2, key, value, jnp.asarray(end), gradient


def _truth(query, key, value, end, gradient):
    """The rule in float64: mixed values, log-sum-exps and the three gradients."""
    with jax.enable_x64(True):
        query, key, value, gradient = (
            jnp.asarray(np.asarray(of, np.float64)) for of in (query, key, value, gradient)
        )
        mixed, back, log_sum_exp = jax.vjp(
            lambda *of: plain_attention(*of, jnp.asarray(np.asarray(end))),
            query,
            key,
            value,
            has_aux=True,
        )
        return [np.asarray(of) for of in (mixed, log_sum_exp, *back(gradient))]


def _computed(query, key, value, end, gradient, forward=forward, backward=backward):
    mixed, log_sum_exp = forward(query, key, value, end)
    gradients = backward(query, key, value, end, mixed, log_sum_exp, gradient)
    return mixed, log_sum_exp, *gradients


def _assert_close(computed, truth, tolerance):
    for have, want in zip(computed, truth, strict=True):
        error = np.max(np.abs(np.asarray(have, np.float64) - want))
        assert error <= tolerance * max(1.0, np.max(np.abs(want)))


@pytest.mark.parametrize("case", ENDS)
def test_values_and_gradients_are_those_of_the_rule_in_float32(case):
    inputs = _inputs(ENDS[case]())
    _assert_close(_computed(*inputs), _truth(*inputs), 1e-5)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 2, 128), (3, 3, 80), (2, 1, 160)])
def test_any_group_and_head_width(heads, key_heads, width):
    end = ENDS["random tries, 300 slots"]()[:1]
    inputs = _inputs(end, heads=heads, key_heads=key_heads, width=width)
    _assert_close(_computed(*inputs), _truth(*inputs), 1e-5)


def test_bfloat16_is_as_close_as_its_rounding_and_keeps_its_dtype():
    inputs = _inputs(ENDS["real games"](), width=128, dtype=jnp.bfloat16)
    computed = _computed(*inputs)
    assert [of.dtype for of in computed] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    truth = _truth(*inputs)
    _assert_close(computed, truth, 1e-2)
    _assert_close(computed[1:2], truth[1:2], 1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
    query, key, value, end, gradient = _inputs(ENDS["packed sequences"]())
    inputs = query * 100, key, value, end, gradient
    _assert_close(_computed(*inputs), _truth(*inputs), 2e-4)


def test_rows_longer_than_their_gradients_may_take_of_vmem_go_in_spans(monkeypatch):
    inputs = _inputs(ENDS["real games"](), width=32)
    whole = _computed(*inputs)
    monkeypatch.setattr(attention_tpu, "ROW_BYTES", 16 * 128 * 300)
    in_spans = jax.jit(partial(attention_tpu.backward, block=128, interpret=True))
    computed = _computed(*inputs, backward=in_spans)
    _assert_close(computed, [np.asarray(of, np.float64) for of in whole], 1e-6)
    assert "f32[2,2,256,32]" in str(jax.make_jaxpr(in_spans)(*inputs[:4], *whole[:2], inputs[4]))


def test_blocks_that_nobody_sees_are_not_read():
    end = np.concatenate([_causal(128, 256), _causal(256, 128)])
    query, key, value, end, gradient = _inputs(end)
    whole = _computed(query, key, value, end, gradient)
    key, value = (of.at[0, :128].set(jnp.nan).at[1, 256:].set(jnp.nan) for of in (key, value))
    broken = _computed(query, key, value, end, gradient)
    for axis, have, want in zip((1, 2, 1, 1, 1), broken, whole, strict=True):
        have, want = (np.moveaxis(np.asarray(of), axis, 1) for of in (have, want))
        np.testing.assert_array_equal(have[0, 128:], want[0, 128:])
        np.testing.assert_array_equal(have[1, :256], want[1, :256])


def test_no_memory_is_read_before_it_is_written():
    """The TPU interpreter starts all memory as NaN, scratch and outputs too, and moves blocks."""
    on_tpu = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    inputs = _inputs(ENDS["random tries, 300 slots"]()[:1], heads=2, key_heads=1)
    computed = _computed(
        *inputs,
        partial(attention_tpu.forward, block=128, interpret=on_tpu),
        partial(attention_tpu.backward, block=128, interpret=on_tpu),
    )
    _assert_close(computed, _truth(*inputs), 1e-5)


def test_what_it_cannot_compute_is_refused():
    query, key, value, end, _ = _inputs(ENDS["padding"]())
    with pytest.raises(ValueError, match="block is 100; it must be a multiple of 128 slots"):
        attention_tpu.forward(query, key, value, end, block=100)
    half = (of.astype(jnp.float16) for of in (query, key, value))
    with pytest.raises(ValueError, match="query is float16; it must be bfloat16 or float32"):
        attention_tpu.forward(*half, end)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_compiles_for_chips_that_are_not_here_and_keeps_no_square_array(chip):
    """Layers of real sizes; a kernel that needs more VMEM than it asks for does not compile."""
    for program in _compile(chip):
        square = program["rows"] * program["heads"] * program["slots"] ** 2
        assert program["temporary_bytes"] < min(square, 4 * program["argument_bytes"]), program


def test_compiles_sharded_over_rows_and_heads_without_communication():
    (program,) = _compile("v5e:4x4")
    assert program["collectives"] == []
    assert program["argument_bytes"] * 16 == program["whole_bytes"]


def _compile(what):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPU needs libtpu (pip install '.[tpu]'), absent here")
    # Read when jax is imported; libtpu is otherwise loaded by one process of a machine at a time.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    script = Path(__file__).resolve().parents[1] / "helpers" / "tpu_programs.py"
    root = script.parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, what], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
