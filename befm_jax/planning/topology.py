"""Topologies that JAX compiles for ahead of time: `v5p:4x4x4`, `2*v5e:16x16`, `h100:8`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from befm_jax.distributed.hardware import CHIPS, Chip
from befm_jax.errors import UserError

# Set before JAX is imported: attached devices are not initialised, as they may be in use.
ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_FORM = re.compile(r"(?:(\d+)\*)?([a-z]+\d+[a-z]*):(\d+(?:x\d+)*)")
_TPU_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3}


# What XLA queries of an attached GPU: some fields of the target configs in openxla/xla (Apache-2.0)
# of A100 80GB SXM, H100 SXM and H200 SXM.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_memory_size: {memory:.0f} {figures}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_HOPPER = """
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132
  fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 }} memory_bandwidth: {bandwidth}
"""
_CARDS = {
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108 "
        "fpus_per_core: 64 l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
        "cuda_compute_capability { major: 8 } memory_bandwidth: 2039040000000",
    ),
    "h100": ("NVIDIA H100 80GB HBM3", _HOPPER.format(bandwidth=3352320000000)),
    "h200": ("NVIDIA H200", _HOPPER.format(bandwidth=4800000000000)),
}


class TopologyError(UserError):
    """A topology that is invalid, unknown, or can't be compiled for here."""


class CompilerAbsentError(TopologyError):
    """A topology whose compiler is not installed."""


@dataclass(frozen=True)
class Topology:
    """`slices` networks of chips, each of a `shape` such as (4, 4, 4)."""

    slices: int
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """The number of chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether these are TPUs; otherwise GPUs."""
        return self.chip.name in _TPU_DIMENSIONS

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{shape}"

    def devices(self) -> list[Any]:
        """Compile-only devices of the topology.

        Raises:
            CompilerAbsentError: their compiler is not installed.
            TopologyError: the compiler rejects the shape.
        """
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        try:
            if self.is_tpu:
                options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
                description = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{self.chip.name}:{shape}", **options
                )
            else:
                importlib.import_module("jax_plugins.xla_cuda12")
                description = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=self.chip.name,
                    topology=f"1x{self.slices}x{shape}",
                    target_config=_target(self.chip),
                )
        except Exception as error:  # whatever the plug-in raises
            extra, module = ("tpu", "libtpu") if self.is_tpu else ("gpu", "jax_cuda12_plugin")
            if importlib.util.find_spec(module) is None:
                raise CompilerAbsentError(
                    f"{self}: its compiler is not installed; run pip install 'befm_jax[{extra}]'"
                ) from error
            message = str(error).splitlines()[0]
            raise TopologyError(f"{self}: rejected by its compiler ({message})") from error
        return list(description.devices)


def parse(text: str) -> Topology:
    """Reads `v5p:4x4x4`, `2*v5e:16x16` (two slices) or `h100:8`.

    Raises:
        TopologyError: another form, an unknown chip, or a wrong shape for it.
    """
    match = _FORM.fullmatch(text)
    if not match:
        raise TopologyError(
            f"topology is {text!r}; it must be of the form v5p:4x4x4, 2*v5e:16x16 (two slices) or "
            "h100:8"
        )
    slices, name, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in CHIPS:
        raise TopologyError(f"topology {text!r}: no chip {name!r}; known: {', '.join(CHIPS)}")
    count = dimensions(CHIPS[name])
    if len(shape) != count or min(*shape, slices) < 1:
        raise TopologyError(f"topology {text!r}: {name} takes a shape of {count} sizes above 0")
    return Topology(slices, CHIPS[name], shape)


def dimensions(chip: Chip) -> int:
    """The number of dimensions of a topology of these chips."""
    return _TPU_DIMENSIONS.get(chip.name, 1)


def _target(chip: Chip) -> str:
    name, figures = _CARDS[chip.name]
    return _TARGET.format(memory=chip.memory, figures=figures, name=name)
