"""The step as a compiler cuts it over eight virtual devices: what is sent, and what is not."""

import jax
import jax.numpy as jnp
import pytest

from befm_jax import operations, parallel
from befm_jax.config import Config, Data, Lora, Model
from befm_jax.inference.edges import columns_at_once
from befm_jax.llama.config import LlamaConfig
from befm_jax.parallel import Layout
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
    data=Data(slots=64, rows=8, observations_per_step=8),
    lora=Lora(rank=2),
)


def sent(**mesh):
    """Bytes by collective of one step of one micro-batch."""
    over = parallel.make_mesh(**mesh, devices=jax.devices()[:8])
    given = programs.abstract(CONFIG, SHAPE, over)
    work = workload.from_figures(CONFIG, 8 // mesh.get("tensor", 1), 8, 64)
    assert work.micro_batches == 1
    compiled = programs.compile_step(CONFIG, SHAPE, over, given, work)
    return hlo.traffic(compiled.text, 8).by_kind()


def test_weights_are_gathered_once_each_way_and_embeddings_never():
    found = sent(fsdp=8)
    linears = sum(out * into for out, into in operations.linear_shapes(SHAPE).values())
    outputs = sum(out for out, _ in operations.linear_shapes(SHAPE).values())
    each_way = SHAPE.num_hidden_layers * 4 * (linears + outputs * 2)
    head = SHAPE.vocab_size * SHAPE.hidden_size * 4
    assert found["all-gather"] == pytest.approx(7 / 8 * (2 * each_way + head), rel=0.1)
    # What goes about beside weights is one layer's activations, and the gradient of the adapter.
    assert found["all-to-all"] <= 8 * 64 * SHAPE.hidden_size * 4
    assert found["all-reduce"] < 0.1 * found["all-gather"]


def test_over_data_alone_nothing_goes_about_but_gradients():
    found = sent(data=8)
    learnt = 2 * sum(sum(pair) for pair in operations.linear_shapes(SHAPE).values())
    gradient = SHAPE.num_hidden_layers * learnt * 4
    assert found == {"all-reduce": pytest.approx(2 * 7 / 8 * gradient, rel=0.01)}


def test_a_device_meets_as_much_of_the_vocabulary_at_a_time_as_if_it_were_alone():
    layout = Layout(parallel.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8]))
    alone = columns_at_once(64_000, 4, 2048)
    assert columns_at_once(128_000, 16, 2048, layout) == alone == 2**26 // 64_000 // 4


def test_bytes_held_are_those_of_the_shards():
    over = parallel.make_mesh(fsdp=4, tensor=2, devices=jax.devices()[:8])
    given = programs.abstract(CONFIG, SHAPE, over)
    made = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given.base),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, given.base),
    )()
    first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made)]
    assert given.parameters == sum(first)
    # Two moments beside every matrix, the step and AdamW's own count of it, and the key.
    adapter = programs.held(given.state.trained)
    assert given.trained == pytest.approx(3 * adapter, abs=64)
