"""Whole people beside games in one small model, on two cores; give it the tables of your tasks.

    befm train --config befm_cpu --config.data.tasks=survey/next=bigfive.csv \\
        --config.data.weights=games=1,survey/next=1

Like `quickstart`, but persons are dealt sixteen a step, three times a thousand of a task
(`--config.data.people=0` takes all of them).  Counts of people in games are in every step, and each
task has the share of the loss that `data.weights` gives it.
"""

from befm_jax.config import Checkpoints, Config, Data, Evaluation, Lora, Model, Optimizer


def get_config() -> Config:
    """The run: rows of 3,072 slots hold two questionnaires of fifty answers."""
    return Config(
        workdir="runs/befm_cpu",
        model=Model(dtype="float32", remat=False),
        data=Data(weights="games=1", slots=3072, rows_per_step=16, people=1000),
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(epochs=3, learning_rate=4e-3),
        checkpoints=Checkpoints(every=60),
        evaluation=Evaluation(people=100),
    )
