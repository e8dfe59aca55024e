"""Llama-3.1-8B-Instruct on people's choices: the recipe of the Be.FM paper on one 80 GB GPU.

    python -m befm_jax.train --config configs/8b_gpu.py \\
        --config.model.path=meta-llama/Llama-3.1-8B-Instruct

Name a hub id or a local Hugging Face directory.  LoRA of rank 8 and alpha 16 on all linears, bf16,
3 epochs, learning rate 1e-4, cosine with a tenth of warm-up.  Not yet run on a GPU: no time and no
score is claimed here.
"""

from befm_jax.config import Config, Data, Model


def get_config() -> Config:
    """The defaults of `befm_jax.config`, one row at a time: 16 GB of weights, and recomputation."""
    return Config(
        workdir="runs/8b",
        model=Model(path="name one with --config.model.path", dtype="bfloat16", remat=True),
        data=Data(slots=2048, rows=1, observations_per_step=64),
    )
