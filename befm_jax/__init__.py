"""befm_jax: foundation models of human behaviour, in pure JAX.

import befm_jax

people = befm_jax.load("runs/quickstart")
people.distribution("dictator")        # the model's exact distribution over $0 to $100
people.simulate("dictator", n=1000)    # a thousand participants
befm_jax.evaluate(people, "games")     # compared with real people
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from befm_jax.evaluate import evaluate as evaluate
    from befm_jax.respondents.engine import Engine, load

# Of transformers, only tokenizers are used: no need to be told that PyTorch is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# As the XDG specification says, a path that is not absolute is ignored; huggingface_hub would read
# models from the working directory.
if not os.path.isabs(os.environ.get("XDG_CACHE_HOME", "/")):
    del os.environ["XDG_CACHE_HOME"]

# Where `befm_jax[tpu]` is installed and no TPU is attached (JAX, too, looks for Google's chips on
# the PCI bus), libtpu looks for the hosts of a slice, and prints a block of errors before JAX takes
# another device.  To a slice of this host alone it says nothing.
_VENDORS = Path("/sys/bus/pci/devices").glob("*/vendor")
if "JAX_PLATFORMS" not in os.environ and "0x1ae0\n" not in map(Path.read_text, _VENDORS):
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")

__all__ = ["Engine", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """Imports the engine when it is first asked for: evaluation alone needs no JAX."""
    if name == "evaluate":
        return importlib.import_module("befm_jax.evaluate")
    if name in __all__:
        from befm_jax.respondents import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the module, those that are imported on first use included."""
    return sorted({*globals(), *__all__})
