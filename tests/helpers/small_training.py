"""The training loop run on a small model, for tests."""

from pathlib import Path

import jax

from befm_jax.config import Config, Model, Optimizer
from befm_jax.data.mixture import Mixture
from befm_jax.distributed import mesh as meshes
from befm_jax.llama.model import Llama
from befm_jax.training import loop, setup
from befm_jax.training.metrics import Watch
from tests.helpers.small import mixture_of, random_paths, small_model


def train_small_model(folder: Path, watch: Watch) -> tuple[Llama, Mixture]:
    """Trains every parameter of a small model for six steps, by the loop; returns its batches."""
    model, params = small_model()
    settings = Config(workdir=str(folder), trained="all", model=Model(dtype="float32", remat=False),
                      optimizer=Optimizer(learning_rate=1e-3))  # fmt: skip
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    batches = mixture_of(random_paths(0), slots=128, epochs=6)
    made = setup.of(settings, model.config, params, mesh, batches.steps)
    loop.run(settings, made, batches, None, params, {}, watch)
    return model, batches
