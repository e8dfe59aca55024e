"""Memory and traffic of a training step by formula: for GPUs, and to choose what is compiled."""

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
    """Bytes a device at the peak of a step, which is in the backward pass of a layer.

    What is held, gradients of what is trained, every layer's input (or, without `remat`, all that
    its backward pass needs), one layer at work, and the vocabulary's projection.
    """
    width = jnp.dtype(settings.model.dtype).itemsize
    shared = sizes["slices"] * sizes["data"] * sizes["fsdp"]
    tensor = sizes["tensor"]
    slots = work.rows * work.slots / shared
    features, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    layer = slots * width * (5 * features + (3 * heads + 2 * keys + 4 * inner) / tensor)
    # Norms and rotations are in float32.
    whole = layer + slots * 4 * (4 * features + (heads + keys) / tensor)
    kept = slots * features * width if settings.model.remat else whole
    linears = sum(out * into for out, into in flops.linear_shapes(shape).values()) / tensor
    # Weights of a layer exist whole where they are gathered, or widened from eight bits.
    gathered = sizes["fsdp"] > 1 or settings.model.quantize == "int8"
    vocabulary = shape.vocab_size * features * width / tensor * (sizes["fsdp"] > 1)
    rows, words = math.ceil(work.rows / shared), math.ceil(shape.vocab_size / tensor)
    # Float32, and their gradient.
    logits = 2 * 4 * rows * words * columns_at_once(words, rows, work.slots)
    gradients = trained if settings.trained == "all" else trained * 2 / 3
    return math.ceil(
        parameters
        + trained
        + gradients
        + shape.num_hidden_layers * kept
        + 2 * layer
        + gathered * linears * width
        + vocabulary
        + logits
    )


def traffic(
    settings: Config, shape: LlamaConfig, sizes: Mapping[str, int], work: Workload
) -> tuple[dict[str, float], float]:
    """Bytes that a device sends in a step, by collective, as a compiler that does well has them.

    Beside them, how many of these go from one slice to another.

    Weights are gathered over `fsdp` for the forward and for the backward pass; activations are
    added up over `tensor`, twice a layer forward, once where they are recomputed, and backward for
    each of the five linears that widen; gradients of what is trained are added up over all devices
    that have rows, within slices first: between them each device sends its part of the sum.
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
        learnt = rank * sum(sum(shapes[name.strip()]) for name in targets)
    else:
        learnt = shape.num_hidden_layers * linears
    times, slices = work.micro_batches, sizes["slices"]
    gradient = times * 2 * learnt * width / tensor
    found = {
        "all-gather": times * 2 * (fsdp - 1) / fsdp * weights / tensor,
        "all-reduce": times * 2 * (tensor - 1) / tensor * activations * shape.num_hidden_layers
        * (7 + settings.model.remat)
        + gradient * (shared - 1) / shared,
    }  # fmt: skip
    between = gradient * (slices - 1) / shared
    return {kind: size for kind, size in found.items() if size}, between
