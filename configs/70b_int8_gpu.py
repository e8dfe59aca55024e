"""Llama-3.1-70B-Instruct on people's choices, on two 80 GB GPUs, the base in int8.

    python -m befm_jax.plan --config configs/70b_int8_gpu.py
    XLA_PYTHON_CLIENT_MEM_FRACTION=.92 python -m befm_jax.train --config configs/70b_int8_gpu.py

DOCSTRING
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows at a time, every layer on both GPUs."""
    return Config(
        workdir="runs/70b_int8",
        mesh=Mesh(fsdp=1, tensor=2, topology="h100:2"),
        model=Model(path="meta-llama/Llama-3.1-70B-Instruct", dtype="bfloat16", quantize="int8"),
        data=Data(slots=2048, rows=2, observations_per_step=64),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
