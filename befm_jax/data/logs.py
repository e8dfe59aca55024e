"""Logs: what people were asked or shown, and what they answered, in order of time.

JSON Lines.  A record has a question and an answer, or a conversation, in one of the layouts of
`befm_jax.data.examples`, or as `prompt, answer`; and, where they are known,

- `person`: an id; a record without one is a person of its own;
- `time`: a number, or a date and time as in ISO 8601; a person's records are put in its order, and
  stay in that of the file without it;
- `options`: the possible answers, numbers or texts; without them, an answer is free text;
- `question`: the id of a question that several people were asked, for figures and baselines;
- `labels`: what else is known of the person, by name: sex, country.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.data import examples
from befm_jax.data.items import AnswerSet, Example
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of, normal_id, sketch_of
from befm_jax.errors import DataError

# Labels that items have of their own.
_TAKEN = ("person", "question")


@dataclass(frozen=True)
class Event:
    """A question and its answer.

    Attributes:
        prompt: what the person was asked or shown.
        answer: the answer; where there are options, one of them.
        options: the possible answers; () for free text.
        question: the id of the question, "" where it has none.
        is_learnt: whether the answer is asked for and learnt, or only part of what came before.
    """

    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    question: str = ""
    is_learnt: bool = True

    @property
    def answers(self) -> AnswerSet | None:
        """The answer set of the options; None for free text."""
        return _answers(self.options) if self.options else None


@dataclass(frozen=True)
class Log:
    """What one person was asked and answered, in order.

    Attributes:
        person: the id.
        events: in order of time.
        system: what was said before all of it; "" for nothing.
        labels: what else is known of the person.
    """

    person: str
    events: tuple[Event, ...]
    system: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def read(path: str | Path) -> Rows[Log]:
    """Everybody's log in a file; what can't be used is counted by reason.

    Raises:
        DataError: as `files.json_records`; or there is no record that can be used.
    """
    left_out = LeftOut()
    usable: list[tuple[float | None, int, Log]] = []
    anonymous: Counter[str] = Counter()
    for line, record in files.json_records(path):
        place = f"line {line}"
        try:
            log, time = _log(record), _time(record.get("time"))
        except DataError as error:
            left_out.add(f"record: {error}", place, "")
            continue
        if record.get("person") is None:
            # Two that are alike are two persons.
            anonymous[log.person] += 1
            if (number := anonymous[log.person]) > 1:
                log = replace(log, person=f"{log.person}/{number}")
        if float(record.get("weight", 1)) != 1:
            left_out.add("weight: not used, records count alike", place, str(record["weight"]))
        usable.append((time, line, log))
    timed = {log.person for time, _, log in usable if time is not None}
    people: dict[str, Log] = {}
    for time, line, log in sorted(usable, key=lambda one: (one[0] or 0.0, one[1])):
        known = people.get(log.person, log)
        if log.person in timed and time is None:
            left_out.add(
                "record: no time, which others of this person have", f"line {line}", log.person
            )
        elif log.system not in ("", known.system):
            left_out.add("record: another system message than before", f"line {line}", log.person)
        elif any(known.labels.get(name, value) != value for name, value in log.labels.items()):
            left_out.add("record: other labels than before", f"line {line}", log.person)
        elif log.person not in people:
            people[log.person] = log
        else:
            labels = {**known.labels, **log.labels}
            people[log.person] = replace(known, events=known.events + log.events, labels=labels)
    if not people:
        raise DataError(f"{path}: no record; {'; '.join(left_out.lines()) or 'no lines'}")
    # Who answered what, so that the same people are known again in a file that has grown.
    facts = {repr((p.person, e.prompt, e.answer)) for p in people.values() for e in p.events}
    source = f"{Path(path).name} (logs)"
    return Rows(list(people.values()), source, fingerprint_of(facts), sketch_of(facts), left_out)


def _log(record: dict[str, Any]) -> Log:
    """A record as the log of its person."""
    options = record.get("options", [])
    if not isinstance(options, list) or any(isinstance(one, list | dict) for one in options):
        raise DataError("options are not a list of texts or numbers")
    possible = tuple(map(str, options))
    question, person = str(record.get("question", "")), record.get("person")
    if isinstance(person, list | dict | bool) or not normal_id(str(person)):
        raise DataError("person is not a text or a number")
    labels = record.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise DataError("labels are not texts by name")
    if taken := set(labels) & set(_TAKEN):
        raise DataError(f"labels have {taken.pop()}, which items have of their own")
    # `answer` is what examples call `completion`.
    renamed = {("completion" if name == "answer" else name): one for name, one in record.items()}
    example = examples.of_record(renamed)
    system = "\n\n".join(one.text for one in example.messages if one.role == "system")
    events = tuple(
        Event(prompt, answer, possible, question, is_learnt)
        for prompt, answer, is_learnt in _turns(example)
    )
    for event in events:
        if event.answers and event.is_learnt:
            event.answers.read_cell(event.answer)
    if person is None:
        content = repr((system, events, sorted(labels.items())))
        person = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Log(normal_id(str(person)), events, system, labels)


def _turns(example: Example) -> list[tuple[str, str, bool]]:
    """What was asked, what was answered, and whether that is learnt; of every reply."""
    learnt = {place for place, _, _ in example.spans} or {len(example.messages) - 1}
    turns: list[tuple[str, str, bool]] = []
    asked: list[str] = []
    for place, message in enumerate(example.messages):
        if message.role == "user":
            asked.append(message.text)
        elif message.role == "assistant":
            if not asked:
                raise DataError("a reply has no question before it")
            turns.append(("\n\n".join(asked), message.text, place in learnt))
            asked = []
    if asked:
        raise DataError("the last question has no answer")
    return turns


@lru_cache(maxsize=1024)
def _answers(options: tuple[str, ...]) -> AnswerSet:
    """The answer set of options: numbers on a scale where all are numbers, else names."""
    try:
        values = sorted(float(one) for one in options)
    except ValueError:
        return AnswerSet.labels(*options)
    return AnswerSet.numbers(values)


def _time(value: Any) -> float | None:
    """A time as a number, of a date and time the seconds since 1970; None where there is none."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise DataError("time is neither a number nor a date as in ISO 8601") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
