"""A step compiled ahead: it is the jitted step, and compiled once for each shape of a batch."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax import train as training
from befm_jax.adapters import lora
from befm_jax.config import Config, Data, Evaluation, Lora, Mesh, Model, Optimizer, Scratch
from befm_jax.data.pipeline import lay_out
from befm_jax.llama import hf, int8
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from befm_jax.training.ahead import StepAhead
from tests.helpers.small import random_paths, small_model


class Compilations(logging.Handler):
    """What JAX says it compiles, by name: "Compiling jit(train_step) with global shapes ..."."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Compiling "):
            self.names.append(message.split()[1])

    def __enter__(self):
        self._logger = logging.getLogger("jax._src.interpreters.pxla")
        self._logger.addHandler(self)
        jax.config.update("jax_log_compiles", True)  # in the thread that compiles, too
        return self

    def __exit__(self, *_):
        jax.config.update("jax_log_compiles", False)
        self._logger.removeHandler(self)

    @property
    def of_steps(self):
        return sum("train_step" in name for name in self.names)


def test_steps_compiled_ahead_are_those_of_jit_and_are_compiled_once_a_shape():
    model, params = small_model()
    optimizer = optimizers.adamw(1e-2)
    adapter = lora.init(jax.random.key(0), params, rank=2)
    start = partial(steps.init_state, optimizer=optimizer, seed=0)
    batches = [
        lay_out(random_paths(seed), slots=slots, parts=2, seed=0)[0]
        for seed, slots in ((0, 40), (1, 80), (0, 40))
    ]
    shapes = {batch.forest.tokens.shape + batch.reads.slots.shape for batch in batches}
    assert 1 < len(shapes) < len(batches)
    jitted = steps.make_train_step(model, optimizer, steps.train_adapter)
    with Compilations() as compilations:
        ahead = StepAhead(jitted, jax.eval_shape(start, adapter), params)
        ahead.compile(batches[0])
        assert "s to compile" in ahead.wait(batches[0])
        state = start(adapter)
        found = []
        for batch in batches:
            state, metrics = ahead(state, params, batch)
            found.append(metrics)
    assert compilations.of_steps == ahead.programs == len(shapes)
    again = start(lora.init(jax.random.key(0), params, rank=2))
    for batch, metrics in zip(batches, found, strict=True):
        again, expected = jitted(again, params, batch)
        np.testing.assert_array_equal(metrics, expected)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_a_run_compiles_a_step_for_each_phase_and_shape_and_no_more(tmp_path, trained, capsys):
    scratch = Scratch(
        width=32, layers=1, heads=2, key_value_heads=1, feed_forward=48,
        steps=2, answers_per_step=64,
    )  # fmt: skip
    config = Config(
        workdir=str(tmp_path),
        trained=trained,
        mesh=Mesh(data=1),
        model=Model(dtype="float32", remat=False, scratch=scratch),
        data=Data(games="public_goods", slots=512, rows_per_step=0),
        lora=Lora(rank=2),
        optimizer=Optimizer(epochs=3),
        evaluation=Evaluation(participants=600, resamples=100),
    )
    with Compilations() as compilations:
        training.train(config)
    assert compilations.of_steps == 2
    printed = capsys.readouterr().out
    assert "base: the step took" in printed
    assert "tune: the step took" in printed


@pytest.mark.parametrize("quantize", ["no", "int8"])
def test_what_a_model_will_be_is_known_before_it_is_read(tmp_path, quantize):
    model, params = small_model()
    hf.save(tmp_path, model.config, params)
    config, abstract = hf.abstract(tmp_path, dtype=jnp.bfloat16, quantize=quantize)
    loaded_config, loaded = hf.load(tmp_path, dtype=jnp.bfloat16, quantize=quantize)
    assert config == loaded_config
    assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
    for one, other in zip(jax.tree.leaves(abstract), jax.tree.leaves(loaded), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
    kernel = loaded["layers"]["mlp"]["up_proj"]["weight"]
    assert isinstance(kernel, int8.Int8Kernel) == (quantize == "int8")
