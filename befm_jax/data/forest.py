"""Token forests: rows of token trees in which a shared prefix is stored, and computed, once.

A path is a prompt followed by an answer.  Paths that begin alike share slots for as long as they
are alike; every slot of an answer carries how many observations pass through it.  Slots of a row
stand in depth-first order, so that one integer a slot, `end`, describes who sees whom: slot `i`
sees slot `j` exactly when `j <= i <= end[j]`.

A slot belongs either to prompts or to answers.  Where one path's prompt and another's answer go
through the same tokens they keep separate slots: what is learnt would otherwise not be told apart
from what is given.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Shaped

PROMPT_TOO_LONG = "prompt longer than a row"
ANSWER_CUT = "answer would be cut by the end of the row"
NOTHING_TO_LEARN = "nothing to learn: empty answer or zero weight"
NO_PROMPT = "no prompt to predict the answer from"

# Two paths join in one tree when the newcomer finds at least this share of its tokens there.
# Less is not worth it: trees that are not tied together pack rows tighter.
SHARED_ENOUGH = 0.25

# Trees begin at multiples of this where their row has room for it: attention works in blocks of
# slots (of 64 on CPUs), and meets fewer of them where a tree does not begin in the middle of one.
ALIGNED = 64


class Path(NamedTuple):
    """One prompt and one answer as token ids, and how many observations gave that answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    weight: float = 1.0


class Forest(NamedTuple):
    """Token trees in `B` rows of `N` slots (NumPy or JAX arrays; a pytree either way).

    `tokens` [B, N] int32, `parent` [B, N] int32 (slot of the parent in this row; -1 for a root and
    for padding), `depth` [B, N] int32 (distance from the root, the rotary position), `end` [B, N]
    int32 (slot of the last descendant; itself for a leaf and for padding), `weight` [B, N] float32
    (observations whose answer goes through this token; 0 for prompts and padding).
    """

    tokens: Int32[np.ndarray, "B N"]
    parent: Int32[np.ndarray, "B N"]
    depth: Int32[np.ndarray, "B N"]
    end: Int32[np.ndarray, "B N"]
    weight: Float32[np.ndarray, "B N"]


class Reads(NamedTuple):
    """Where the log-probabilities of weighted tokens are read.

    A token's log-probability is read at its parent, so the vocabulary projection runs on `slots`
    alone, each parent once however many children it has.

    `slots` [B, N] int32: the distinct parents of weighted slots, ascending, then slot 0;
    `column` [B, N] int32: for a weighted slot, which column of `slots` is its parent (else 0).
    """

    slots: Int32[np.ndarray, "B N"]
    column: Int32[np.ndarray, "B N"]


class LeftOut(NamedTuple):
    """How much was left out for one reason: paths given, and the observations they stood for."""

    paths: int
    observations: float


@dataclass(frozen=True)
class Report:
    """What went into a forest, what it saved, and what was left out and why.

    `observations`: weight placed.  `tokens_apart`: tokens if every observation were a sequence of
    its own.  `slots_used`: slots that hold a token.  `left_out`: reason -> what was not placed.
    """

    observations: float = 0.0
    tokens_apart: float = 0.0
    slots_used: int = 0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def reasons(self) -> str:
        """What was left out, in words; empty if nothing was."""
        return "; ".join(
            f"{left.paths:,} ({left.observations:g} observations): {reason}"
            for reason, left in self.left_out.items()
        )

    @property
    def saved(self) -> float:
        """Share of the tokens that sharing spared: `1 - slots_used / tokens_apart`."""
        return 1.0 - self.slots_used / self.tokens_apart if self.tokens_apart else 0.0


@dataclass(frozen=True)
class Build:
    """A forest, the place of every path given (row and last slot; None: left out), a report."""

    forest: Forest
    places: tuple[tuple[int, int] | None, ...]
    report: Report


def build(paths: Sequence[Path], slots: int, *, seed: int = 0) -> Build:
    """Lays paths out as token trees in rows of `slots` slots.

    Identical paths are merged and their weights added.  Nothing is ever cut: a path that does not
    fit in a row, or that has nothing to learn, is left out whole and counted in the report.  Trees
    stand behind each other, with padding between them where that brings them to `ALIGNED`.  The
    result is a pure function of the arguments; `seed` sets the order of the rows.

    Raises:
        ValueError: `slots` is not positive, or a weight is negative or not finite.
    """
    if slots < 1:
        raise ValueError(f"a row needs at least one slot, not {slots}")
    weights: dict[tuple[int, ...], float] = {}
    codes_of: list[tuple[int, ...] | None] = []
    given: dict[tuple[int, ...], tuple[int, ...]] = {}
    left_out: dict[str, LeftOut] = {}
    tokens_apart = 0.0
    for path in paths:
        if not (math.isfinite(path.weight) and path.weight >= 0):
            raise ValueError(f"a path's weight must be finite and not negative, not {path.weight}")
        reason = _reason_to_leave_out(path, slots)
        if reason is not None:
            before = left_out.get(reason, LeftOut(0, 0.0))
            left_out[reason] = LeftOut(before.paths + 1, before.observations + path.weight)
            codes_of.append(None)
            continue
        # One integer a token that also says whether it is given (even) or learnt (odd).
        if path.prompt not in given:
            given[path.prompt] = tuple(2 * token for token in path.prompt)
        codes = given[path.prompt] + tuple(2 * token + 1 for token in path.answer)
        weights[codes] = weights.get(codes, 0.0) + path.weight
        codes_of.append(codes)
        tokens_apart += path.weight * len(codes)

    trees = _grow_trees(sorted(weights), slots)
    rows = _pack([tree.size for tree in trees], slots, np.random.default_rng(seed))
    forest = empty(len(rows), slots)
    place: dict[tuple[int, ...], tuple[int, int]] = {}
    for row, members in enumerate(rows):
        cursor, room = 0, slots - sum(trees[tree].size for tree in members)
        for tree in members:
            gap = -cursor % ALIGNED
            if gap <= room:
                cursor, room = cursor + gap, room - gap
            cursor = _write_tree(forest, row, cursor, trees[tree], weights, place)
    slots_used = sum(tree.size for tree in trees)
    report = Report(sum(weights.values()), tokens_apart, slots_used, left_out)
    places = tuple(None if codes is None else place[codes] for codes in codes_of)
    return Build(forest, places, report)


def empty(rows: int, slots: int) -> Forest:
    """A forest of padding: every slot sees itself alone and carries no weight."""
    shape = (rows, slots)
    return Forest(
        tokens=np.zeros(shape, np.int32),
        parent=np.full(shape, -1, np.int32),
        depth=np.zeros(shape, np.int32),
        end=np.tile(np.arange(slots, dtype=np.int32), (rows, 1)),
        weight=np.zeros(shape, np.float32),
    )


def pad_rows(forest: Forest, rows: int) -> Forest:
    """The same forest with rows of padding added, to `rows` in all."""
    have, slots = forest.tokens.shape
    if rows < have:
        raise ValueError(f"a forest of {have} rows can't be padded to {rows}")
    padding = empty(rows - have, slots)
    return Forest(*(np.concatenate(pair) for pair in zip(forest, padding, strict=True)))


def mask(forest: Forest) -> Bool[np.ndarray, "B N N"]:
    """Who sees whom: `mask[b, i, j]` is true when slot `j` is slot `i` or an ancestor of it."""
    slot = np.arange(forest.tokens.shape[1])
    query, key = slot[None, :, None], slot[None, None, :]
    return (key <= query) & (query <= forest.end[:, None, :])


def reads(forest: Forest) -> Reads:
    """The slots at which weighted tokens are predicted.

    Raises:
        ValueError: a root carries weight (nothing predicts it).
    """
    weighted = forest.weight > 0
    if np.any(weighted & (forest.parent < 0)):
        raise ValueError("a weighted token without a parent: nothing predicts it")
    at, column = np.zeros_like(forest.parent), np.zeros_like(forest.parent)
    for row, learnt in enumerate(weighted):
        parents, inverse = np.unique(forest.parent[row, learnt], return_inverse=True)
        at[row, : len(parents)] = parents
        column[row, learnt] = inverse
    return Reads(at, column)


def paths(forest: Forest) -> list[Path]:
    """Every root-to-leaf token sequence with its weight: the way back from `build`.

    A path that ends inside a longer one is found too, by the weight that does not go on to any
    child.  Slots without weight are read as prompt.  Padding is a lone slot with no weight, no
    parent and no child; it is not a path.
    """
    found: list[Path] = []
    rows, slots = forest.tokens.shape
    for row in range(rows):
        parent, weight = forest.parent[row], forest.weight[row]
        passed_on = np.zeros(slots, np.float64)
        has_child = np.zeros(slots, bool)
        for slot in range(slots):
            if parent[slot] >= 0:
                passed_on[parent[slot]] += weight[slot]
                has_child[parent[slot]] = True
        # Weights are sums in float32: what is left after the children may be rounding alone.
        rounding = 4 * np.finfo(np.float32).eps * weight
        ends_here = weight - np.where(weight > 0, passed_on, 0.0)
        for slot in range(slots):
            if has_child[slot]:
                if not ends_here[slot] > rounding[slot]:
                    continue
            elif parent[slot] < 0 and weight[slot] == 0:
                continue
            line = _line_to(parent, slot)
            learnt = [at for at in line if weight[at] > 0]
            given = [at for at in line if weight[at] == 0]
            found.append(
                Path(
                    tuple(int(forest.tokens[row, at]) for at in given),
                    tuple(int(forest.tokens[row, at]) for at in learnt),
                    float(ends_here[slot]),
                )
            )
    return found


def path_sums(forest: Forest, figures: Shaped[np.ndarray, "B N"]) -> Float64[np.ndarray, "B N"]:
    """For every slot the sum of the answer's figures down to it, in float64.

    `figures[b, i]` belongs to slot `i` given its ancestors, such as its log-probability; only the
    weighted slots, the answers', are added: at a prompt's slot the sum is 0.
    """
    totals = np.zeros(forest.tokens.shape, np.float64)
    for row, learnt in enumerate(forest.weight > 0):
        # Slots one by one are quicker as Python's own numbers.
        parent, added = forest.parent[row].tolist(), figures[row].tolist()
        found = [0.0] * len(parent)
        for slot in np.flatnonzero(learnt).tolist():
            found[slot] = found[parent[slot]] + added[slot]
        totals[row] = found
    return totals


def _line_to(parent: np.ndarray, slot: int) -> list[int]:
    """Slots from the root down to `slot`."""
    line = [slot]
    while parent[line[-1]] >= 0:
        line.append(int(parent[line[-1]]))
    return line[::-1]


def _reason_to_leave_out(path: Path, slots: int) -> str | None:
    if not path.answer or path.weight == 0:
        return NOTHING_TO_LEARN
    if not path.prompt:
        return NO_PROMPT
    if len(path.prompt) >= slots:
        return PROMPT_TOO_LONG
    if len(path.prompt) + len(path.answer) > slots:
        return ANSWER_CUT
    return None


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    # Halved by comparing runs, which Python does without a step for each token: prompts are long,
    # and every answer repeats its own.
    alike, unlike = 0, min(len(left), len(right)) + 1
    while unlike - alike > 1:
        middle = (alike + unlike) // 2
        if left[alike:middle] == right[alike:middle]:
            alike = middle
        else:
            unlike = middle
    return alike


class _Tree(NamedTuple):
    """Sorted paths that stand in one tree, each with what it shares with the one before."""

    size: int
    members: list[tuple[tuple[int, ...], int]]


def _grow_trees(ordered: Sequence[tuple[int, ...]], slots: int) -> list[_Tree]:
    """Cuts sorted paths into trees of at most `slots` slots.

    In sorted order a path shares most with its neighbour, so walking that order and starting a new
    tree when the next path does not fit repeats a prefix only at the cuts.
    """
    trees: list[_Tree] = []
    for codes in ordered:
        if trees:
            size, members = trees[-1]
            shared = _shared(members[-1][0], codes)
            grown = size + len(codes) - shared
            if grown <= slots and shared >= SHARED_ENOUGH * len(codes):
                members.append((codes, shared))
                trees[-1] = _Tree(grown, members)
                continue
        trees.append(_Tree(len(codes), [(codes, 0)]))
    return trees


def _pack(sizes: Sequence[int], slots: int, rng: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing: which trees stand in which row, rows in a seeded order."""
    order = sorted(rng.permutation(len(sizes)), key=lambda tree: -sizes[tree])
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free slots, row), ascending
    for tree in order:
        at = bisect.bisect_left(room, (sizes[tree], -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = slots, len(rows)
            rows.append([])
        rows[row].append(int(tree))
        bisect.insort(room, (free - sizes[tree], row))
    return [rows[row] for row in rng.permutation(len(rows))]


def _write_tree(
    forest: Forest,
    row: int,
    start: int,
    tree: _Tree,
    weights: Mapping[tuple[int, ...], float],
    place: dict[tuple[int, ...], tuple[int, int]],
) -> int:
    """Writes one tree into a row from slot `start` on; returns the next free slot."""
    tokens: list[int] = []  # with the bit that says whether they are learnt
    parent: list[int] = []
    depth: list[int] = []
    end = [0] * tree.size
    weight = [0.0] * tree.size
    line: list[int] = []  # places in the tree, from its root to where the path before ended
    for codes, kept in tree.members:
        for at in line[kept:]:
            end[at] = start + len(tokens) - 1
        del line[kept:]
        # A run of new slots at a time: long texts are thousands of them.
        run = range(len(tokens), len(tokens) + len(codes) - kept)
        parent.append(start + line[-1] if line else -1)
        parent.extend(range(start + run.start, start + run.stop - 1))
        depth.extend(range(kept, len(codes)))
        line.extend(run)
        tokens.extend(codes[kept:])
        observations = weights[codes]
        for at, code in zip(reversed(line), reversed(codes), strict=True):
            if not code & 1:
                break
            weight[at] += observations
        place[codes] = (row, start + line[-1])
    for at in line:
        end[at] = start + len(tokens) - 1
    here = (row, slice(start, start + tree.size))
    ids = np.array(tokens) >> 1
    for array, values in zip(forest, (ids, parent, depth, end, weight), strict=True):
        array[here] = values
    return start + tree.size
