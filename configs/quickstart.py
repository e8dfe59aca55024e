"""People's choices in, a scored population out, on a laptop: about two minutes on two cores.

    python -m befm_jax.train --config configs/quickstart.py

Makes a Llama of two million parameters that answers economic games uniformly, tunes it with LoRA
on 52,474 choices of people in seven games, and holds it against 6,561 choices it has not seen.
Expect a mean rescaled Wasserstein distance of about 1.1 read exactly and 1.3 sampled; answering
uniformly is 12.4, other people in the model's place 1.7.
"""

from befm_jax.config import Checkpoints, Config, Data, Lora, Model, Optimizer


def get_config() -> Config:
    """The run: every step sees all observations, since a game's people are one token tree."""
    return Config(
        workdir="runs/quickstart",
        model=Model(dtype="float32", remat=False),
        data=Data(slots=3072, rows_per_step=0),
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(epochs=120, learning_rate=4e-3),
        checkpoints=Checkpoints(every=60),
    )
