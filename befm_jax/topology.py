"""Hardware that is not here, as JAX's compilers know it: `v5p:4x4x4`, `2*v5e:16x16`, `h100:8`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from befm_jax.chips import CHIPS, Chip
from befm_jax.errors import UserError

# Set before JAX is imported: TPU programs are compiled by libtpu with no TPU to ask.
ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_FORM = re.compile(r"(?:(\d+)\*)?([a-z]\d+[a-z]*):(\d+(?:x\d+)*)")
_TPU_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3}


class TopologyError(UserError):
    """A topology that is not of the form, not known, or not to be compiled for here."""


@dataclass(frozen=True)
class Topology:
    """`slices` networks of chips, each of a `shape` such as (4, 4, 4)."""

    slices: int
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips in all."""
        return self.slices * math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether these are TPUs; otherwise GPUs."""
        return self.chip.name in _TPU_DIMENSIONS

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{shape}"

    def devices(self) -> list[Any]:
        """The devices that programs can be compiled for; they can't run anything.

        Raises:
            TopologyError: the compiler for them is not installed, or knows no such shape.
        """
        from jax.experimental import topologies

        if not self.is_tpu:
            raise TopologyError(
                f"{self}: GPU programs are not compiled here; a plan for GPUs is an estimate"
            )
        shape = "x".join(map(str, self.shape))
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{shape}", **options
            )
        except Exception as error:  # whatever the plug-in raises
            raise TopologyError(
                f"{self}: the TPU compiler can't be had for it ({str(error).splitlines()[0]}); "
                "pip install 'befm_jax[tpu]' brings it"
            ) from error
        return list(found.devices)


def parse(text: str) -> Topology:
    """Reads `v5p:4x4x4`, `2*v5e:16x16` (two slices) or `h100:8`.

    Raises:
        TopologyError: another form, a chip that is not in the table, or a wrong shape for it.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise TopologyError(
            f"topology {text!r}: expected a form like v5p:4x4x4, 2*v5e:16x16 (two slices) or h100:8"
        )
    slices, name, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if name not in CHIPS:
        raise TopologyError(f"topology {text!r}: no chip {name!r}; known: {', '.join(CHIPS)}")
    dimensions = _TPU_DIMENSIONS.get(name, 1)
    if len(shape) != dimensions or min(*shape, slices) < 1:
        raise TopologyError(f"topology {text!r}: {name} takes a shape of {dimensions} sizes above 0")
    return Topology(slices, CHIPS[name], shape)
