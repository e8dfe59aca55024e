"""Papers: their titles, abstracts and workflows, read from tables and JSON Lines.

A workflow is what a paper says of five aspects of the work (MASSW; Zhang et al., arXiv 2406.06357):
its context, key idea, method, outcome and projected impact.

A file has a `title` and, of each paper, an `abstract` or some of the aspects: `context`,
`key_idea`, `method`, `outcome`, `impact` (or `future_impact`).  It is CSV, tab-separated, Parquet
or JSON Lines.  What is missing is empty, null, `N/A` or a dash.  Rows with the same title are one
paper; what several people wrote of the same aspect are several texts of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from befm_jax import files
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of, sketch_of
from befm_jax.errors import DataError

ASPECTS = ("context", "key_idea", "method", "outcome", "impact")
_OTHER_NAMES = {"future_impact": "impact", "projected_impact": "impact"}
_LABELS = {"year": "year", "venue": "venue", "journal": "venue"}
# A text is more than a mark that there is none.
_MISSING = re.compile(
    r"(n\.?/?a\.?|none|null|nan|not (available|applicable|mentioned|stated))?\W*", re.IGNORECASE
)


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        id: follows from the words of the title.
        title: as the file has it.
        abstract: "" where it is missing.
        aspects: one of `ASPECTS` -> what people wrote of it, one text each; without those that
            nobody wrote of.
        labels: what else the file says: year, venue.
    """

    id: str
    title: str
    abstract: str = ""
    aspects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def person(self) -> str:
        """What splits go by: the paper."""
        return self.id


def read_workflows(path: str | Path) -> Rows[Paper]:
    """The papers of a file of which one or more aspects are described.

    The others are counted as left out; so are aspects that are missing, whose paper is kept.

    Raises:
        DataError: no such file, one without titles (with its first line), a damaged one (with the
            line), or no paper that can be used.
    """
    papers, left_out = _papers(path)
    for line, paper in papers:
        missing = [name for name in ASPECTS if name not in paper.aspects]
        reasons = [f"{name}: missing (the paper is kept)" for name in missing]
        for reason in reasons if paper.aspects else [f"paper: none of {', '.join(ASPECTS)}"]:
            left_out.add(reason, f"line {line}", paper.title)
    return _rows(path, [paper for _, paper in papers if paper.aspects], left_out)


def read_abstracts(path: str | Path) -> Rows[Paper]:
    """The papers of a file that have an abstract; the others are counted as left out.

    Raises:
        DataError: as `read_workflows`.
    """
    papers, left_out = _papers(path)
    for line, paper in papers:
        if not paper.abstract:
            left_out.add("paper: no abstract", f"line {line}", paper.title)
    return _rows(path, [paper for _, paper in papers if paper.abstract], left_out)


def read_annotations(path: str | Path) -> dict[str, list[Paper]]:
    """What each row of a file says of its paper, by the paper's id: two people's rows are two.

    Raises:
        DataError: as `read_workflows`.
    """
    by_paper: dict[str, list[Paper]] = {}
    for _, cells in _records(path):
        paper = _paper(cells)
        by_paper.setdefault(paper.id, []).append(paper)
    return by_paper


def _rows(path: str | Path, papers: list[Paper], left_out: LeftOut) -> Rows[Paper]:
    if not papers:
        raise DataError(f"{path}: no paper; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = [repr((paper.id, paper.abstract, sorted(paper.aspects.items()))) for paper in papers]
    sketch = sketch_of(paper.id for paper in papers)
    return Rows(papers, Path(path).name, fingerprint_of(facts), sketch, left_out)


def _papers(path: str | Path) -> tuple[list[tuple[int, Paper]], LeftOut]:
    """Every paper of a file with its first line, and what was left out so far."""
    left_out = LeftOut()
    papers: dict[str, tuple[int, Paper]] = {}
    for line, cells in _records(path):
        paper = _paper(cells)
        if not paper.id:
            left_out.add("row: no title", f"line {line}", "")
            continue
        if paper.id not in papers:
            papers[paper.id] = line, paper
            continue
        first, before = papers[paper.id]
        merged = _merged(before, paper)
        if before.abstract and paper.abstract not in ("", before.abstract):
            left_out.add("abstract: another of the same paper", f"line {line}", paper.title)
        elif merged == before:
            left_out.add("row: nothing new of a paper before", f"line {line}", paper.title)
        papers[paper.id] = first, merged
    return list(papers.values()), left_out


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The texts of each row by the name of the field, in small letters with `_` for spaces."""
    is_json = Path(path).suffix.lower() == ".jsonl"
    records = files.json_records(path) if is_json else files.records(path, ())
    for line, record in records:
        cells = {str(name).casefold().replace(" ", "_"): value for name, value in record.items()}
        if "title" not in cells:
            raise DataError(
                f"{path}:{line}: no title; found {', '.join(record)}; a paper has title and "
                f"abstract, or title and some of {', '.join(ASPECTS)}"
            )
        for name in {"title", "abstract", *ASPECTS, *_OTHER_NAMES} & set(cells):
            if not isinstance(cells[name], str | None):
                kind = type(cells[name]).__name__
                raise DataError(f"{path}:{line}: {name} is a {kind}; it must be a text or null")
        yield line, {name: _text(value) for name, value in cells.items()}


def _text(value: object) -> str:
    """A text with single spaces; "" for one that says that there is none."""
    text = "" if value is None else " ".join(str(value).split())
    return "" if _MISSING.fullmatch(text) else text


def _paper(cells: Mapping[str, str]) -> Paper:
    """The paper of a row; its id is "" where it has no title."""
    words = " ".join(re.findall(r"\w+", cells["title"].casefold()))
    id = hashlib.sha256(words.encode()).hexdigest()[:16] if words else ""
    named = {_OTHER_NAMES.get(name, name): text for name, text in cells.items() if text}
    aspects = {name: (named[name],) for name in ASPECTS if name in named}
    labels = {_LABELS[name]: text for name, text in named.items() if name in _LABELS}
    return Paper(id, cells["title"], named.get("abstract", ""), aspects, labels)


def _merged(paper: Paper, other: Paper) -> Paper:
    """A paper with what another row of it adds: its aspects' texts, and what was missing."""
    texts = {name: (*paper.aspects.get(name, ()), *other.aspects.get(name, ())) for name in ASPECTS}
    return replace(
        paper,
        abstract=paper.abstract or other.abstract,
        aspects={name: tuple(dict.fromkeys(both)) for name, both in texts.items() if both},
        labels={**other.labels, **paper.labels},
    )
