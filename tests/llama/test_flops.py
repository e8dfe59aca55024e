"""Flops counted from a model's shape against those of the traced step itself."""

import math

import jax
import jax.numpy as jnp
import pytest

from befm_jax.adapters import lora
from befm_jax.config import LINEARS
from befm_jax.data.forest import Forest, Reads
from befm_jax.data.pipeline import Batch
from befm_jax.llama import attention_cpu, flops
from befm_jax.llama import model as llama
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama
from befm_jax.llama.published import PUBLISHED
from befm_jax.training import step as steps

# A row is one block of the CPU's attention, and one chunk of the vocabulary's: what loops over
# those turns once, so that the walk need not know how often.
ROWS, SLOTS, MICRO = 3, attention_cpu.BLOCK, 2
SHAPE = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def walked(jaxpr) -> float:
    """Flops of every matrix product of a program; a scan's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        given = equation.params
        if equation.primitive.name == "dot_general":
            contracted = given["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "scan":
            total += given["length"] * walked(given["jaxpr"].jaxpr)
        elif equation.primitive.name == "while":
            total += walked(given["body_jaxpr"].jaxpr)
        elif equation.primitive.name == "cond":
            # Of the kernels for several platforms the first is the CPU's.
            total += walked(given["branches"][0].jaxpr)
        else:
            for inner in jax.tree.leaves(given, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += walked(inner)
    return total


def traced(trained: str, rank: int, targets, remat: bool) -> float:
    """What the walk finds in the loss and its gradient."""
    model = Llama(SHAPE, jnp.bfloat16, remat)
    params = llama.shapes(SHAPE)
    size = (MICRO, ROWS, SLOTS)
    whole = jax.ShapeDtypeStruct(size, jnp.int32)
    weight = jax.ShapeDtypeStruct(size, jnp.float32)
    batch = Batch(Forest(whole, whole, whole, whole), Reads(whole, whole, whole, weight, weight))
    key = jax.eval_shape(lambda: jax.random.key(0))
    if trained == "adapter":
        spec = lora.LoraSpec(rank, 2.0 * rank, targets=targets)
        adapter = jax.eval_shape(lambda key: lora.init_from(key, params, spec), key)
        combine, base = steps.train_adapter, params
    else:
        adapter, combine, base = params, steps.train_all, None
    program = jax.make_jaxpr(
        lambda *given: steps.value_and_gradient(model, combine, *given)
    )(base, adapter, batch, key)  # fmt: skip
    return walked(program.jaxpr)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("trained", "rank", "targets"),
    [
        ("adapter", 4, LINEARS),
        ("adapter", 7, ("q_proj", "v_proj")),
        ("adapter", 3, ("o_proj", "down_proj")),
        ("all", 0, LINEARS),
    ],
)
def test_a_step_has_the_operations_of_its_trace(trained, rank, targets, remat):
    slots = MICRO * ROWS * SLOTS
    counted = flops.training(
        SHAPE,
        slots=slots,
        # The kernel computes whole blocks, whatever is visible in them.
        pairs=slots * SLOTS,
        reads=slots,
        rank=rank,
        targets=targets,
        remat=remat,
    )
    assert counted.done == pytest.approx(traced(trained, rank, targets, remat), rel=1e-3)
    assert counted.needed < counted.done or not remat


def test_a_published_model_needs_two_operations_a_parameter_and_token():
    """8.03 billion parameters (the paper's "8B"), embeddings left out: they are looked up."""
    shape = PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"]
    counted = flops.decoding(shape, tokens=1, pairs=0)
    looked_up = shape.vocab_size * shape.hidden_size
    norms = shape.hidden_size * (2 * shape.num_hidden_layers + 1)
    assert counted.done / 2 + looked_up + norms == 8_030_261_248


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.1-405B-Instruct", 405_853_388_800),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, parameters):
    leaves = jax.tree.leaves(llama.shapes(PUBLISHED[name]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
