"""Llama-3.1-8B-Instruct on people's choices, on a machine of eight 80 GB GPUs.

    python -m befm_jax.plan --config configs/8b_gpu8.py
    python -m befm_jax.train --config configs/8b_gpu8.py

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  Planned, not run on GPUs: 54 of 85 GB on each,
activations kept; 12 minutes for 100,000 observations of 256 slots at 40 % of the H100s' peak.  The
embedded games fill a row or two, which one GPU does as fast: this is for more data,
`--config.data.examples`.  No score is claimed.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows a GPU; each holds the weights, and only the adapter's gradients are sent."""
    return Config(
        workdir="runs/8b_gpu8",
        mesh=Mesh(data=8, fsdp=1, topology="h100:8"),
        model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", remat=False),
        data=Data(slots=4096, rows_per_step=256),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
