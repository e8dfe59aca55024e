"""Llama-3.1-8B-Instruct on people's choices: the recipe of the Be.FM paper on one 80 GB GPU.

    python -m befm_jax.plan --config configs/8b_gpu.py
    python -m befm_jax.train --config configs/8b_gpu.py

LoRA of rank 8 and alpha 16 on all seven linears, bf16, 3 epochs, learning rate 1e-4, cosine with a
tenth of warm-up: the recipe of the Be.FM paper.  Planned, not run on a GPU: 54 of 85 GB,
activations kept; 1.6 hours for 100,000 observations of 256 slots at 40 % of an H100's peak, six
minutes for the embedded games.  No score is claimed.  Another model: `--config.model.path`, a hub
id or a local Hugging Face directory.
"""

from befm_jax.config import Config, Data, Lora, Mesh, Model, Optimizer


def get_config() -> Config:
    """Two rows at a time."""
    return Config(
        workdir="runs/8b",
        mesh=Mesh(topology="h100:1"),
        model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", remat=False),
        data=Data(slots=4096, rows_per_step=64),
        lora=Lora(rank=8, alpha=16.0),
        optimizer=Optimizer(epochs=3, learning_rate=1e-4, warmup_fraction=0.1),
    )
