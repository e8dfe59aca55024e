"""Accelerators: what a plan and a utilisation are held against.

The makers' own figures, of one chip, read in November 2026:

- TPU: docs.cloud.google.com/tpu/docs, pages v5e, v5p and v6e.  Their "bidirectional ICI bandwidth
  per chip" (400, 1200 and 800 GB/s) counts both directions of all links: half of it is here.  Data
  centre network: 50 Gbit/s a chip of v5p; 2 x 100 and 4 x 200 Gbit/s a host of eight chips of v5e
  and v6e, shared out.  Memory is what their compiler (libtpu 0.0.42) lets a program take.
- GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense bf16 (half of what they
  say "with sparsity"), half of the NVLink figure, which counts both directions.  Memory is what the
  driver reports, as in the target configs of openxla/xla.  Between hosts: one adapter a GPU of 200
  (A100) or 400 Gbit/s, as in DGX systems.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    `operations`: bf16 operations a second; a multiplication and an addition are two.  `memory`:
    bytes that a program can have.  `bandwidth`: bytes a second from memory.  `network`: bytes a
    second that it can send to its neighbours, over all links.  `between_slices`: bytes a second
    to other slices, or of a GPU to other hosts.
    """

    name: str
    operations: float
    memory: float
    bandwidth: float
    network: float
    between_slices: float


_GB = 1e9
_GIB = float(1 << 30)
# By the name that topologies and plans give them.
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
# How JAX calls them (`Device.device_kind`).
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
    """The chip that JAX calls so, or None where the table has none: a CPU, say."""
    name = _KINDS.get(device_kind)
    return CHIPS[name] if name else None
