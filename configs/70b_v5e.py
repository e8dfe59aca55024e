"""Llama-3.1-70B-Instruct on people's choices, on a whole pod of TPU v5e, 16x16 chips.

    python -m befm_jax.plan --config configs/70b_v5e.py
    python -m befm_jax.train --config configs/70b_v5e.py --config.data.examples=surveys.jsonl

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  Planned, not run on a TPU: 12.6 of 16.9 GB a
chip; 0.4 hours for 100,000 observations of 256 slots at 40 % of the peak.  The embedded games fill
a row or two of the 256: this is for more data.  No score is claimed.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """A row a chip; each 64 chips hold the weights once, four times in all."""
    return Config(
        workdir="runs/70b_v5e",
        mesh=Mesh(data=4, fsdp=64, topology="v5e:16x16"),
        model=Model(path="meta-llama/Llama-3.1-70B-Instruct", dtype="bfloat16"),
        data=Data(slots=2048, rows_per_step=2048),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
