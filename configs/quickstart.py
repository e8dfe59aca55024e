"""People's choices in, a scored population out, on a laptop: two or three minutes on two cores.

    python -m befm_jax.train --config configs/quickstart.py

Makes a Llama of about a million parameters that answers seven economic games uniformly, tunes it
with LoRA on the choices of some 52,000 people, and holds it against people it has not seen.
"""

from befm_jax.config import (
    Checkpoints,
    Config,
    Data,
    Lora,
    Model,
    Optimizer,
    Scratch,
)


def get_config() -> Config:
    """The run: every step sees all observations, since a game's people are one token tree."""
    return Config(
        workdir="runs/quickstart",
        model=Model(
            dtype="float32",
            remat=False,
            scratch=Scratch(width=128, layers=4, heads=4),
        ),
        data=Data(slots=512, rows=4, observations_per_step=0),
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(epochs=100, learning_rate=4e-3),
        checkpoints=Checkpoints(every=50),
    )
