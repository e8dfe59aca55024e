"""The step as a compiler cuts it over eight virtual devices: what is sent, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.adapters import lora
from befm_jax.config import Config, Data, Lora, Model
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed.mesh import Layout
from befm_jax.inference import decode, sample
from befm_jax.inference.sample import Sampling
from befm_jax.llama import flops
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.log_probs import columns_at_once
from befm_jax.llama.model import Llama
from befm_jax.planning import hlo, programs, workload

# A vocabulary that outweighs the layers: gathering it once more would show.
SHAPE = LlamaConfig(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)
CONFIG = Config(
    model=Model(path="not/read", dtype="float32"),
    data=Data(slots=512, rows_per_step=8),
    lora=Lora(rank=2),
)


def sent(**mesh):
    """Bytes by collective of one step of one micro-batch."""
    over = meshes.make_mesh(**mesh, devices=jax.devices()[:8])
    given = programs.abstract(CONFIG, SHAPE, over)
    work = workload.from_figures(CONFIG, 8 // mesh.get("tensor", 1), 8, 64)
    assert work.micro_batches == 1
    compiled = programs.compile_step(given, work)
    return hlo.traffic(compiled.text, 8).by_kind()


def test_weights_are_gathered_once_each_way_and_embeddings_never():
    found = sent(fsdp=8)
    linears = sum(out * into for out, into in flops.linear_shapes(SHAPE).values())
    outputs = sum(out for out, _ in flops.linear_shapes(SHAPE).values())
    each_way = SHAPE.num_hidden_layers * 4 * (linears + outputs * 2)
    head = SHAPE.vocab_size * SHAPE.hidden_size * 4
    assert found["all-gather"] == pytest.approx(7 / 8 * (2 * each_way + head), rel=0.1)
    # What goes about beside weights is one layer's activations, and the gradient of the adapter.
    assert found["all-to-all"] <= 8 * 64 * SHAPE.hidden_size * 4
    assert found["all-reduce"] < 0.1 * found["all-gather"]


def test_over_data_alone_nothing_goes_about_but_gradients():
    found = sent(data=8)
    learnt = 2 * sum(sum(pair) for pair in flops.linear_shapes(SHAPE).values())
    gradient = SHAPE.num_hidden_layers * learnt * 4
    assert found == {"all-reduce": pytest.approx(2 * 7 / 8 * gradient, rel=0.01)}


def test_a_device_meets_as_much_of_the_vocabulary_at_a_time_as_if_it_were_alone():
    layout = Layout(meshes.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8]))
    alone = columns_at_once(600_000, 4, 2048)
    assert columns_at_once(1_200_000, 16, 2048, layout) == alone == 2**26 // 600_000 // 4


def test_bytes_held_are_those_of_the_shards():
    over = meshes.make_mesh(fsdp=4, tensor=2, devices=jax.devices()[:8])
    given = programs.abstract(CONFIG, SHAPE, over)
    made = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given.base),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, given.base),
    )()
    first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made)]
    parameters, trained = programs.bytes_held(given)
    assert parameters == sum(first)
    # Two moments beside every matrix, the step and AdamW's own count of it, and the key.
    adapter = programs.held(given.state.trained)
    assert trained == pytest.approx(3 * adapter, abs=64)


def test_the_planned_loop_of_sampling_is_the_one_that_runs():
    """Against arrays that are really made: a prompt computed, everyone's first token drawn."""
    over = meshes.answering_mesh(SHAPE, jax.devices()[:8])
    given = programs.abstract(CONFIG, SHAPE, over)
    planned = programs.compile_sampler(CONFIG, SHAPE, over, given, 64, 1e9)
    model = Llama(SHAPE, layout=Layout(over))
    abstract = lora.attach(given.base, given.state.trained)
    params = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
        out_shardings=meshes.shardings(abstract, over),
    )()
    _, weights = decode.weights_for_decoding(model, params)
    made = sample._programs(model, Sampling(), (0,))
    engine = sample._Engine(weights, made, Sampling(), np.zeros((1, 2), np.uint32), None, 1, 8)
    people = np.zeros((sample.AT_A_TIME, 2), np.int64)
    window = sample._computed(model, params, [tuple(range(1, 64))])
    _, asked, answers = engine._begun(window, sample._Batch([0], [people]))
    over_already = np.zeros(sample.AT_A_TIME, bool)
    real = made.go_on.lower(
        weights, asked, answers, over_already, np.int32(16), np.int32(0)
    ).compile()
    assert hlo.traffic(planned.text, 8) == hlo.traffic(real.as_text(), 8)
    memory = real.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    # The layers stand there stacked, too; where there is no room for that, stacked alone.
    stacked = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params["layers"])
    )
    assert planned.peak == pytest.approx(needed + stacked, rel=1e-3)
    tight = programs.compile_sampler(CONFIG, SHAPE, over, given, 64, 2.0 * stacked)
    assert stacked / 2 < planned.peak - tight.peak < 1.1 * stacked
