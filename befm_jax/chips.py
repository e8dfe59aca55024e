"""Accelerators: what a plan and a utilisation are held against.

Figures are the makers' own, for one chip: dense bf16 operations, memory, and the bandwidth of the
network between chips, all links, one direction.

- TPU: cloud.google.com/tpu/docs, the pages v5e, v5p and v6e ("ICI bandwidth" there is of both
  directions, or in bits: half of it, or an eighth of half); DCN from the same pages.
- GPU: NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80GB SXM (sparsity left out; NVLink is
  of both directions there: half of it).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    `operations`: bf16 multiply-adds a second, an addition counted too.  `memory`: bytes.
    `bandwidth`: bytes a second from memory.  `network`: bytes a second that it sends to its
    neighbours over all links.  `between_slices`: bytes a second to other slices or hosts.
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
        Chip("v5e", 197e12, 16 * _GIB, 819 * _GB, 100 * _GB, 3.125 * _GB),
        Chip("v5p", 459e12, 95 * _GIB, 2765 * _GB, 300 * _GB, 6.25 * _GB),
        Chip("v6e", 918e12, 32 * _GIB, 1640 * _GB, 224 * _GB, 12.5 * _GB),
        Chip("a100", 312e12, 80 * _GIB, 2039 * _GB, 300 * _GB, 25 * _GB),
        Chip("h100", 989e12, 80 * _GIB, 3350 * _GB, 450 * _GB, 50 * _GB),
        Chip("h200", 989e12, 141 * _GB, 4800 * _GB, 450 * _GB, 50 * _GB),
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
