r"""Exports a tuned model: its adapter for PEFT and vLLM, or merged for any reader of Llama.

    befm export adapter --model runs/quickstart --out my-adapter \
        --base meta-llama/Llama-3.1-8B-Instruct
    befm export merged --model runs/quickstart --out my-model \
        [--max_shard_size 5GB] [--games all] [--humans choices.csv]

`--model` is a training run, or a model's directory or hub id with `--adapter` beside it.  Merging
reads the written model back and says how far its logits are from those of base and adapter apart,
where answers are read; with `--games` also what became of the distances to people.  The figures
are kept in OUT/merge.json.  OUT/README.md is a model card: base, data, figures, how to load it.
"""

from __future__ import annotations

from befm_jax import cli

if __name__ == "__main__":
    cli.starting("export")

import argparse
import re
from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.adapters import export, peft
from befm_jax.data import games
from befm_jax.distributed import processes
from befm_jax.models import resolve_model
from befm_jax.respondents import merging, model_card
from befm_jax.tasks import sources

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main() -> None:
    """`befm export`."""
    arguments = parser().parse_args()
    if arguments.form == "merged" and arguments.humans and not arguments.games:
        parser().error("--humans goes with --games: which distances are to be compared")
    processes.run(lambda: exported(arguments))


def exported(arguments: argparse.Namespace) -> None:
    """Exports what the command line names.

    Raises:
        UserError: a result is there, or as `export.check_out`, `export.adapter` and
            `merging.merged`.
    """
    out: Path = arguments.out
    resolved = resolve_model(arguments.model, arguments.adapter)
    export.check_out(out, resolved)
    if arguments.form == "adapter":
        cli.keep(out / peft.CONFIG, arguments.overwrite)
        known = export.adapter(resolved, out, arguments.base, arguments.force_base)
        base = arguments.base or resolved.name
        card = model_card.text(arguments.model, resolved, base, "peft")
        files.write(out / "README.md", card.encode())
        cli.note_base(known)
        if known["named"]:
            print(f"note: whether the adapter fits that base is not known: {known['named']}")
        if not arguments.base and Path(resolved.name).is_dir():
            print(f"note: others look for the base at {resolved.name}; --base names it for them")
        print(f"adapter: {out}")
        return
    cli.keep(out / "config.json", arguments.overwrite)
    cli.keep_compiled_programs()
    asked = games.select(arguments.games or "all")
    wanted = sources.select("games", asked, arguments.humans) if arguments.games else []
    report = merging.merged(
        arguments.model,
        arguments.adapter,
        out,
        max_shard_bytes=arguments.max_shard_size,
        asked=asked,
        people=wanted[0] if wanted else None,
        force_template=arguments.force_template,
        force_base=arguments.force_base,
    )
    cli.note_base(report["merged"])
    files.write_object(out / "merge.json", report)
    card = model_card.text(arguments.model, resolved, resolved.name, "transformers")
    files.write(out / "README.md", card.encode())
    print(summary(report))
    print(f"model: {out}")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The documentation as it is, and every flag's default."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("befm export", description=__doc__, formatter_class=_Help)
    forms = made.add_subparsers(dest="form", required=True, metavar="adapter|merged")
    for form, what in (("adapter", "PEFT's files"), ("merged", "a model's files")):
        one = forms.add_parser(form, help=what, formatter_class=_Help)
        one.add_argument(
            "--model", required=True, help="a training run, or a model's directory or id"
        )
        one.add_argument("--adapter", help="a LoRA adapter's directory or hub id for --model")
        one.add_argument("--out", required=True, type=Path, help="the directory to write")
        one.add_argument("--force_base", action="store_true", help="take another base model")
        one.add_argument("--overwrite", action="store_true", help="replace what is in --out")
        if form == "adapter":
            one.add_argument("--base", default="", help="the base's name for others (a hub id)")
            continue
        one.add_argument("--max_shard_size", default="5GB", type=size, help="the largest file")
        one.add_argument(
            "--games", default="", help="ids, 'all' or .py files: compare distances too"
        )
        one.add_argument("--humans", default="", help="CSV of people's choices, for --games")
        one.add_argument("--force_template", action="store_true", help="take another chat template")
    return made


def size(text: str) -> int:
    """Bytes of "5GB", "200 MB" or a plain number; argparse's error for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B|)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}; sizes are such as 5GB or 200MB")
    return int(float(found[1]) * UNITS[found[2]])


def summary(report: dict[str, Any]) -> str:
    """What merging changed, in lines for a reader."""
    lines = [
        f"largest change of a logit where answers are read: "
        f"{report['largest_logit_difference']:.2g}, of a range of {report['logit_range']:.3g}"
    ]
    for name, one in report["wasserstein"].items():
        lines.append(
            f"distance to people, {name}: {one['before']:.4f} before, {one['after']:.4f} merged"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
