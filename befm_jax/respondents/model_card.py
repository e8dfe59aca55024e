"""The model card of an exported model: what it was made of, how it does, how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from befm_jax.evals import report, results
from befm_jax.models import ResolvedModel
from befm_jax.tasks import sources

_LOADED_WITH = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
```

vLLM: `vllm serve {base} --enable-lora --lora-modules befm=PATH_OF_THIS_FOLDER`.
befm_jax: `befm_jax.load({base!r}, adapter="PATH_OF_THIS_FOLDER")`.""",
    "transformers": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```

vLLM: `vllm serve PATH_OF_THIS_FOLDER`. befm_jax: `befm_jax.load("PATH_OF_THIS_FOLDER")`.""",
}


def text(model: str, resolved: ResolvedModel, base: str, library: str) -> str:
    """A model card in Markdown, with the metadata of the Hugging Face hub.

    Args:
        model: the run, model or hub id that is exported.
        resolved: its files.
        base: the name of its base.
        library: what loads the export: "peft" or "transformers".

    Returns:
        The base, the data by their fingerprints, the run's figures where it has any, and how to
        load it.  The license is for whoever publishes it to fill in.
    """
    sections = [
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: {library}\nlicense: unknown\n"
        "tags: [befm_jax]\n---\n",
        f"# {Path(model).name}\n",
        f"A model of human behaviour, tuned from `{base}` with befm_jax.\n",
        "## Use\n",
        _LOADED_WITH[library].format(base=base) + "\n",
    ]
    trained_on = sources.trained_on(resolved.run, model)
    if trained_on:
        sections.append("## Trained on\n")
        sections += [
            f"- {one.get('task', '')}: {one.get('source', '')}, {one.get('split', '')} split of "
            f"seed {one['split_seed']}; fingerprint `{one['fingerprint']}`"
            for one in trained_on.get("sources", ())
        ]
        if trained_on.get("examples"):
            sections.append(f"- examples: `{trained_on['examples']}`")
        sections.append("\nbefm_jax leaves these people out when it compares the model.\n")
    figures = Path(model) / "results.json"
    if figures.is_file():
        found = results.read(figures)
        rows = [
            f"| {task} | {figure.measure} | {report.number(figure.value)} | "
            f"{report.span(figure.ci95)} | {report.percent(figure.outside)} |"
            for task in found.tasks
            for figure in found.select(task, respondent=found.main)
            if not figure.where
        ]
        sections += [
            "## Figures\n",
            "Against people it was not trained on; with 95 % intervals.\n",
            "| task | measure | value | interval | outside the answer set |\n|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(sections)
