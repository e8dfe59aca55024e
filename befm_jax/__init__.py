"""befm_jax: foundation models of human behaviour, in pure JAX.

import befm_jax

people = befm_jax.load("runs/quickstart")
people.distribution("dictator")        # the model's exact distribution over $0 to $100
people.simulate("dictator", n=1000)    # a thousand participants
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from befm_jax.respondents.engine import Engine, load

# Of transformers, only tokenizers are used: no need to be told that PyTorch is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# As the XDG specification says, a path that is not absolute is ignored; huggingface_hub would read
# models from the working directory.
if not os.path.isabs(os.environ.get("XDG_CACHE_HOME", "/")):
    del os.environ["XDG_CACHE_HOME"]

__all__ = ["Engine", "load"]


def __getattr__(name: str) -> Any:
    """Imports the engine when it is first asked for: evaluation alone needs no JAX."""
    if name in __all__:
        from befm_jax.respondents import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
