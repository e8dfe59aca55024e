"""Llama-3.1-70B-Instruct on people's choices, on two 80 GB GPUs, the base in int8.

    python -m befm_jax.plan --config configs/70b_int8_gpu.py
    python -m befm_jax.train --config configs/70b_int8_gpu.py

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  The base is rounded to int8 while it is loaded,
the adapter is not.  Planned, not run on GPUs: 45 of 85 GB on each; 10 hours for 100,000
observations of 256 slots at 40 % of the H100s' peak, and the GPUs send each other 43 GB a micro-
batch, which wants NVLink.  No score is claimed.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows at a time, every layer on both GPUs."""
    return Config(
        workdir="runs/70b_int8",
        mesh=Mesh(fsdp=1, tensor=2, topology="h100:2"),
        model=Model(path="meta-llama/Llama-3.1-70B-Instruct", dtype="bfloat16", quantize="int8"),
        data=Data(slots=4096, rows_per_step=64),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
