"""Memory and traffic of a training step by formula: without a compiler, and to rank meshes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from befm_jax.config import Config
from befm_jax.llama import flops
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.log_probs import columns_at_once
from befm_jax.planning.workload import Workload


def memory(
    settings: Config,
    shape: LlamaConfig,
    sizes: Mapping[str, int],
    work: Workload,
    parameters: int,
    trained: int,
) -> int:
    """Bytes per device at the peak of a step, which is in the backward pass of a layer.

    The sum of parameters and optimiser state, gradients, every layer's input (or, without `remat`,
    all its residuals), one layer's activations, and the vocabulary projection.
    """
    width = jnp.dtype(settings.model.dtype).itemsize
    shared = sizes["slices"] * sizes["data"] * sizes["fsdp"]
    tensor = sizes["tensor"]
    slots = work.rows * work.slots / shared
    features, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    layer = slots * width * (5 * features + (3 * heads + 2 * keys + 4 * inner) / tensor)
    # Norms and rotary embeddings are in float32.
    all_residuals = layer + slots * 4 * (4 * features + (heads + keys) / tensor)
    residuals = slots * features * width if settings.model.remat else all_residuals
    linears = sum(out * into for out, into in flops.linear_shapes(shape).values()) / tensor
    # A layer's full weights are in memory where they are gathered, or dequantised from int8.
    gathered = sizes["fsdp"] > 1 or settings.model.quantize == "int8"
    vocabulary = shape.vocab_size * features * width / tensor * (sizes["fsdp"] > 1)
    rows, vocab_size = math.ceil(work.rows / shared), math.ceil(shape.vocab_size / tensor)
    # Float32, and their gradient.
    logits = 2 * 4 * rows * vocab_size * columns_at_once(vocab_size, rows, work.slots)
    gradients = trained if settings.trained == "all" else trained * 2 / 3
    return math.ceil(
        parameters
        + trained
        + gradients
        + shape.num_hidden_layers * residuals
        + 2 * layer
        + gathered * linears * width
        + vocabulary
        + logits
    )


def traffic(
    settings: Config, shape: LlamaConfig, sizes: Mapping[str, int], work: Workload
) -> tuple[dict[str, float], float]:
    """Bytes that a device sends in a step, by collective; and how many of them between slices.

    Weights are gathered over `fsdp` for the forward and for the backward pass; activations are
    all-reduced over `tensor`, twice per layer forward, once where they are recomputed, and backward
    for each of the five linears with sharded outputs; gradients are all-reduced over all
    data-parallel devices, within slices first: between slices each device sends its share.
    """
    width = jnp.dtype(settings.model.dtype).itemsize
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    shared = sizes["slices"] * sizes["data"] * fsdp
    shapes = flops.linear_shapes(shape)
    linears = sum(out * into for out, into in shapes.values())
    stored = 1 if settings.model.quantize == "int8" else width
    weights = shape.num_hidden_layers * linears * stored + shape.vocab_size * shape.hidden_size
    activations = work.rows * work.slots / shared * shape.hidden_size * width
    if settings.trained == "adapter":
        rank = settings.lora.rank * shape.num_hidden_layers
        targets = settings.lora.targets.split(",")
        trained = rank * sum(sum(shapes[name.strip()]) for name in targets)
    else:
        trained = shape.num_hidden_layers * linears
    times, slices = work.micro_batches, sizes["slices"]
    gradient = times * 2 * trained * width / tensor
    by_kind = {
        "all-gather": times * 2 * (fsdp - 1) / fsdp * weights / tensor,
        "all-reduce": times * 2 * (tensor - 1) / tensor * activations * shape.num_hidden_layers
        * (7 + settings.model.remat)
        + gradient * (shared - 1) / shared,
    }  # fmt: skip
    between = gradient * (slices - 1) / shared
    return {kind: size for kind, size in by_kind.items() if size}, between
