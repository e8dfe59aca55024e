"""Llama-3.1-8B-Instruct on people's choices, on 16 chips of TPU v5e, 4x4.

    python -m befm_jax.plan --config configs/8b_tpu.py
    python -m befm_jax.train --config configs/8b_tpu.py --config.data.examples=surveys.jsonl

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  Planned, not run on a TPU: 8.4 of 16.9 GB a chip;
0.7 hours for 100,000 observations of 256 slots at 40 % of the peak.  The embedded games fill a row
or two: this is for more data.  No score is claimed.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows a chip; each four chips hold the weights once, four times in all."""
    return Config(
        workdir="runs/8b_tpu",
        mesh=Mesh(data=4, fsdp=4, topology="v5e:4x4"),
        model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
        data=Data(slots=4096, rows_per_step=256),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
