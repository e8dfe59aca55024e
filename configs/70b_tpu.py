"""draft"""
from befm_jax.config import Config, Data, Mesh, Model


def get_config() -> Config:
    return Config(
        workdir="runs/70b",
        mesh=Mesh(data=4, fsdp=16, topology="v5p:4x4x4"),
        model=Model(path="meta-llama/Llama-3.1-70B-Instruct"),
        data=Data(slots=2048, rows=64, observations_per_step=512),
    )
