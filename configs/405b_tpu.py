"""Llama-3.1-405B-Instruct on people's choices, on 128 chips of TPU v5p (a v5p-256 slice, 4x4x8).

    python -m befm_jax.plan --config configs/405b_tpu.py
    python -m befm_jax.train --config configs/405b_tpu.py --config.data.examples=surveys.jsonl

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  Planned, not run on a TPU: 40 of 103 GB a chip; 2
hours for 100,000 observations of 256 slots at 40 % of the peak.  Loading it reads 812 GB.  No
score is claimed.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """A row a chip; each 64 chips hold the weights once, twice in all."""
    return Config(
        workdir="runs/405b",
        mesh=Mesh(data=2, fsdp=64, topology="v5p:4x4x8"),
        model=Model(path="meta-llama/Llama-3.1-405B-Instruct", dtype="bfloat16"),
        data=Data(slots=2048, rows_per_step=1024),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
