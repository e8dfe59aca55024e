"""Llama-3.1-8B-Instruct on people's choices, on 16 chips of TPU v5e, 4x4.

    python -m befm_jax.plan --config configs/8b_tpu.py
    python -m befm_jax.train --config configs/8b_tpu.py --config.data.examples=surveys.jsonl

DOCSTRING
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows a chip; each four chips hold the weights once, four times in all."""
    return Config(
        workdir="runs/8b_tpu",
        mesh=Mesh(data=4, fsdp=4, topology="v5e:4x4"),
        model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
        data=Data(slots=2048, rows=32, observations_per_step=256),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
