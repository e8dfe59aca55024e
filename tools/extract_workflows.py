"""Workflows from abstracts: what papers say of context, key idea, method, outcome and impact.

    python tools/extract_workflows.py ABSTRACTS --out workflows.csv --model MODEL
        [--base_url http://localhost:8000/v1] [--check ANNOTATED] (--yes | --budget_tokens N)

ABSTRACTS is a file of titles and abstracts (`befm_jax.data.literature`); workflows.csv is one of
workflows, for the tasks `workflow/...`.  A model of any server that speaks the OpenAI protocol is
asked, by a JSON schema where the server takes one.  An answer that is not such an object is
damaged: the paper is asked again, three times in all where the limit allows it, and then counted
and left out.  Every answer is kept in workflows.csv.answers.jsonl, and the same command goes on
from those that are there.

`--check` compares with what several people wrote of the same papers, by ROUGE F against one person
at a time: people among themselves are the ceiling, what was written of another paper the floor.
Papers of which one side says nothing are left out of that; `stated` is how often two agree on
whether the abstract speaks of a part at all.  Needs the extra `text`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from befm_jax import files
from befm_jax.data import literature
from befm_jax.data.literature import ASPECTS, Paper
from befm_jax.errors import DataError, UserError, printable
from befm_jax.evals import text_measures
from befm_jax.respondents import openai
from befm_jax.respondents.requests import KEY, OPENAI, Client, Request
from befm_jax.tasks.wording import DEFAULT

ATTEMPTS = 3
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": ["string", "null"]} for name in ASPECTS},
    "required": list(ASPECTS),
    "additionalProperties": False,
}
_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "workflow", "strict": True, "schema": SCHEMA},
}
_TOKENS = 800
_RESAMPLES = 2000
_MEASURES = ("rouge1", "rougeL")

Workflow = Mapping[str, str]


def main() -> None:
    """Extracts the workflows of the command line, and checks them."""
    arguments = parser().parse_args()
    out: Path = arguments.out
    try:
        papers = literature.read_abstracts(arguments.abstracts)
        annotated = literature.read_annotations(arguments.check) if arguments.check else {}
        for line in papers.left_out.lines():
            print(printable(line))
        with files.in_use(out.with_name(f".{out.name}.lock"), out):
            kept = out.with_name(f"{out.name}.answers.jsonl")
            workflows, damaged = extract(openai.client_from(arguments, kept), papers.rows)
            write(out, papers.rows, workflows)
        print(f"{out}: {len(workflows)} of {len(papers.rows)} papers")
        for reason, number in damaged.most_common():
            print(f"damaged: {number} answers: {printable(reason)}")
        if annotated:
            written = {paper.id: paper for paper in literature.read_workflows(out).rows}
            print(table(agreements(written, annotated)))
    except UserError as error:
        sys.exit(f"error: {error}")


def extract(client: Client, papers: Sequence[Paper]) -> tuple[dict[str, Workflow], Counter[str]]:
    """The workflow of each paper by its id, and how many answers were damaged, by the reason.

    Raises:
        UserError: see `Client.admit` and `Client.each`.
    """
    workflows: dict[str, Workflow] = {}
    damaged: Counter[str] = Counter()
    for attempt in range(ATTEMPTS):
        missing = [paper for paper in papers if paper.id not in workflows]
        requests = [request_of(paper, attempt) for paper in missing]
        number, most = client.missing(requests)
        if attempt and number and not client.spending.allows(client.spent.and_of(most)):
            said = "not asked again, since that can be above the limit"
            print(f"note: {said}: {number} of {len(papers)} papers", file=sys.stderr)
            break
        client.admit(requests)
        for request, text in client.each(requests, openai.text_of, refusable=True):
            if text is None:
                damaged["refused by the server"] += 1
                continue
            try:
                workflows[request.item] = workflow_in(text)
            except DataError as error:
                damaged[str(error)] += 1
    return workflows, damaged


def request_of(paper: Paper, attempt: int) -> Request:
    """What asks for a paper's workflow: for the likeliest answer first, then for any other."""
    prompt = DEFAULT("workflow/extraction", title=paper.title, abstract=paper.abstract)
    digest = hashlib.sha256(f"{paper.id}:{attempt}".encode()).digest()
    body = {
        "messages": [{"role": message.role, "content": message.text} for message in prompt],
        "max_tokens": _TOKENS,
        "temperature": 1.0 if attempt else 0.0,
        "top_p": 1.0,
        "seed": int.from_bytes(digest[:4], "big") >> 1,
        "response_format": _FORMAT,
    }
    instead: dict[str, dict[str, Any]] = {
        "response_format": {},
        "max_tokens": {"max_completion_tokens": _TOKENS},
    }
    return Request(paper.id, attempt, body, instead)


def workflow_in(text: str) -> Workflow:
    """The five texts of an answer, a JSON object with or without words around it; "" for null.

    Raises:
        DataError: there is none, or one of other fields; says which.
    """
    try:
        found = files.parse_json(text[text.find("{") : text.rfind("}") + 1])
    except ValueError:
        raise DataError("not a JSON object") from None
    for name in ASPECTS:
        if name not in found:
            raise DataError(f"{name} is missing")
        if not isinstance(found[name], str | None):
            raise DataError(f"{name} is a {type(found[name]).__name__}; it must be a text or null")
        if "\0" in (found[name] or ""):
            raise DataError(f"{name} holds a NUL, which no table can")
    return {name: " ".join((found[name] or "").split()) for name in ASPECTS}


def write(path: Path, papers: Sequence[Paper], workflows: Mapping[str, Workflow]) -> None:
    """Writes the workflows as a table, in the order of the papers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["title", *ASPECTS, "year", "venue"])
    for paper in papers:
        if (workflow := workflows.get(paper.id)) is not None:
            labels = (paper.labels.get(name, "") for name in ("year", "venue"))
            writer.writerow([paper.title, *(workflow[name] for name in ASPECTS), *labels])
    # A text of a model may hold half a character, which no file can.
    files.write(path, text.getvalue().encode(errors="replace"))


class Agreement(NamedTuple):
    """How alike the texts of two sides are on one aspect.

    `papers`: of which two people and the extraction say something. `rouge`: by measure the mean
    over these and its 95 % interval. `stated`: over all papers, the share of pairs that agree on
    whether there is anything to say.
    """

    aspect: str
    sides: str
    papers: int
    rouge: Mapping[str, tuple[float, float, float]]
    stated: float


def agreements(
    extracted: Mapping[str, Paper], annotated: Mapping[str, Sequence[Paper]]
) -> Iterator[Agreement]:
    """People among themselves, the extraction against each, and what it says of another paper.

    Of papers that two or more people annotated and that were extracted, each counting alike.

    Raises:
        DataError: there is none.
    """
    ids = [id for id, rows in annotated.items() if id in extracted and len(rows) > 1]
    if not ids:
        raise DataError("no extracted paper is annotated by two people or more")
    for aspect in ASPECTS:
        people = [[_said(paper, aspect) for paper in annotated[id]] for id in ids]
        model = [_said(extracted[id], aspect) for id in ids]
        # The one before in the file; the first has the last one's.
        others = [model[-1], *model[:-1]]
        among = [list(itertools.combinations(texts, 2)) for texts in people]
        known = [
            bool(text) and any(all(pair) for pair in pairs)
            for text, pairs in zip(model, among, strict=True)
        ]
        yield _agreement(aspect, "people", among, known)
        for sides, own in (("extraction", model), ("another paper", others)):
            pairs = [
                [(text, other) for other in texts] for text, texts in zip(own, people, strict=True)
            ]
            yield _agreement(aspect, sides, pairs, known)


def _said(paper: Paper, aspect: str) -> str:
    return paper.aspects.get(aspect, ("",))[0]


def _agreement(
    aspect: str, sides: str, by_paper: Sequence[Sequence[tuple[str, str]]], known: Sequence[bool]
) -> Agreement:
    """The agreement of pairs of texts, those of each paper together; ROUGE of the `known` alone."""
    stated = float(np.mean([np.mean([bool(a) == bool(b) for a, b in one]) for one in by_paper]))
    both = [
        [pair for pair in pairs if all(pair)]
        for pairs, is_known in zip(by_paper, known, strict=True)
        if is_known
    ]
    both = [pairs for pairs in both if pairs]
    rouge = {}
    for name in _MEASURES:
        scores = np.array(
            [
                text_measures.scores(name, [[a] for a, _ in one], [[b] for _, b in one]).mean()
                for one in both
            ]
        )
        rouge[name] = _interval(scores)
    return Agreement(aspect, sides, len(both), rouge, stated)


def _interval(scores: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95 % bootstrap interval; NaN of no score."""
    if not len(scores):
        return (float("nan"),) * 3
    draws = np.random.default_rng(0).integers(len(scores), size=(_RESAMPLES, len(scores)))
    low, high = np.percentile(scores[draws].mean(axis=1), [2.5, 97.5])
    return float(scores.mean()), float(low), float(high)


def table(rows: Iterator[Agreement]) -> str:
    """Agreements as a Markdown table."""
    lines = [
        "| part | between | papers | ROUGE-1 [95 %] | ROUGE-L [95 %] | stated |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rouge = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row.rouge[name]) for name in _MEASURES)
        lines.append(f"| {row.aspect} | {row.sides} | {row.papers} | {rouge} | {row.stated:.0%} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line; names as `befm evaluate --model openai:MODEL` has them."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("abstracts", type=Path)
    made.add_argument("--out", type=Path, required=True, help="the table to write")
    made.add_argument("--model", required=True, help="the model's name at the server")
    made.add_argument("--base_url", default=OPENAI, help=f"the server; its key is read from {KEY}")
    made.add_argument("--check", type=Path, help="workflows that people wrote, a row a person")
    made.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    made.add_argument("--timeout", type=float, default=120.0, help="seconds of a request")
    prices = "of a million tokens read and a million written: 2.5,10"
    made.add_argument("--prices", type=lambda text: text.split(","), help=prices)
    made.add_argument("--budget", type=float, help="the most to spend, as --prices count")
    made.add_argument("--budget_tokens", type=int, help="the most tokens to read and write")
    made.add_argument("--yes", action="store_true", help="ask, whatever it costs")
    return made


if __name__ == "__main__":
    main()
