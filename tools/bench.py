"""Measure befm_jax against what its users would pick instead, both in one run.

    python tools/bench.py load [--gigabytes 2.5] [--rounds 5] [--json load.json]
    python tools/bench.py train --data moblab|bigfive|literature [--shape tiny|100m]
    python tools/bench.py score|sample|attention [--shape tiny|100m]
    python tools/bench.py train|score|sample|attention --device gpu [--shape 8b]
    python tools/bench.py data [--parts encode start slots dealing]
    python tools/bench.py metrics
    python tools/bench.py processes

Prints a table.  `--json` writes the command line, the versions, the machine, both sides' figures
run by run, and `ratio` (median, min, max): how many times better than the peer befm_jax is, so
that higher is better for befm_jax.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import bench_attention
import bench_load
import bench_metrics
import bench_models
import bench_pipeline
import bench_processes
import bench_sample
import bench_score
import bench_train
import jax
from bench_report import Bench

from befm_jax.errors import UserError

PACKAGES = (
    "befm_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "torch", "peft",
    "safetensors",
)  # fmt: skip
BENCHES = {
    "train": bench_train,
    "score": bench_score,
    "sample": bench_sample,
    "metrics": bench_metrics,
    "attention": bench_attention,
    "data": bench_pipeline,
    "load": bench_load,
    "processes": bench_processes,
}
ON_A_DEVICE = ("train", "score", "sample", "attention")


def main() -> None:
    """Runs the benchmark that the command line names."""
    arguments = parser().parse_args()
    # This process makes checkpoints and starts the sides; an accelerator is theirs alone.
    jax.config.update("jax_platforms", "cpu")
    # What could go wrong with the file goes wrong before the benchmark has taken its time.
    around = context()
    try:
        if arguments.json and not arguments.json.parent.is_dir():
            raise UserError(f"--json {arguments.json}: there is no such folder")
        found: Bench = arguments.run(arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(found.table())
    if arguments.json:
        arguments.json.write_text(json.dumps(around | found.as_dict(), indent=1) + "\n")
        print(f"figures: {arguments.json}")
    sys.exit(0 if found.holds else 1)


def parser() -> argparse.ArgumentParser:
    """The command line: a benchmark, and its options."""
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    benches = whole.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, module in BENCHES.items():
        bench = benches.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter
        )
        bench.add_argument("--json", type=Path, help="where to write every figure")
        module.add_arguments(bench)
        if name in ON_A_DEVICE:
            bench_models.add_arguments(bench)
        bench.set_defaults(run=module.run)
    return whole


def context() -> dict[str, Any]:
    """The command line, the versions and the machine."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "accelerators": _accelerators(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a benchmark without this peer may still run


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _accelerators() -> list[str]:
    """The models of NVIDIA GPUs, as their driver names them."""
    return [
        line.split(":", 1)[1].strip()
        for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("Model")
    ]


if __name__ == "__main__":
    main()
