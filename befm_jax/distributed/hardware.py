"""Peak figures of accelerators, for plans and utilisation.

Vendors' figures per chip, read in November 2026:

- TPU: docs.cloud.google.com/tpu/docs, pages v5e, v5p and v6e.  Their "bidirectional ICI bandwidth
  per chip" (400, 1200 and 800 GB/s) counts both directions of all links: half of it is here.  Data
  centre network: 50 Gbit/s per chip of v5p; 2 x 100 and 4 x 200 Gbit/s per host of eight chips of
  v5e and v6e, divided by eight.  Memory is the limit of their compiler (libtpu 0.0.42).
- GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense bf16 (half of the figure
  "with sparsity"), half of the NVLink figure, which counts both directions.  Memory as reported by
  the driver, as in the target configs of openxla/xla.  Between hosts: one adapter of 200 (A100) or
  400 Gbit/s per GPU, as in DGX systems.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    `operations`: peak bf16 FLOPs per second.  `memory`: bytes available to a program.  `bandwidth`:
    memory bandwidth in bytes per second.  `network`: bytes per second that it can send to its
    neighbours, over all links.  `between_slices`: bytes per second to other slices, or of a GPU to
    other hosts.
    """

    name: str
    operations: float
    memory: float
    bandwidth: float
    network: float
    between_slices: float


_GB = 1e9
_GIB = float(1 << 30)
# By their name in topologies and plans.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * _GIB, 819 * _GB, 200 * _GB, 3.125 * _GB),
        Chip("v5p", 459e12, 95.74 * _GIB, 2765 * _GB, 600 * _GB, 6.25 * _GB),
        Chip("v6e", 918e12, 31.25 * _GIB, 1638 * _GB, 400 * _GB, 12.5 * _GB),
        Chip("a100", 312e12, 85_100_068_864, 2039 * _GB, 300 * _GB, 25 * _GB),
        Chip("h100", 989e12, 84_942_979_072, 3350 * _GB, 450 * _GB, 50 * _GB),
        Chip("h200", 989e12, 151_397_597_184, 4800 * _GB, 450 * _GB, 50 * _GB),
    )
}
# By `jax.Device.device_kind`.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def of(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind, or None if it is not in the table (a CPU, say)."""
    name = _KINDS.get(device_kind)
    return CHIPS[name] if name else None
