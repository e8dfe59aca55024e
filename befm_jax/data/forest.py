"""Token forests: rows of token trees in which a shared prefix is stored, and computed, once.

What is computed and what is asked are two things.  A *slot* is a token that something follows or is
read at.  A *read* asks for `log p(token | slot and its ancestors)`, and says what that is worth in
the loss.  Encoded conversations that begin alike share slots for as long as they are alike, whether
a token is learnt in one and given in another; an answer's last token, which nothing follows, has a
read and no slot.

Slots of a row are in depth-first order, so that one integer a slot, `end`, describes who sees whom:
slot `i` sees slot `j` exactly when `j <= i <= end[j]`.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

TOO_LONG_BEFORE = "what is before the first learnt token is longer than a row"
TOO_LONG = "what is learnt would be cut by the end of the row"
NOTHING_TO_LEARN = "nothing to learn: no learnt token, or no observations"
NO_PROMPT = "its first token is learnt: there is nothing to predict it from"

# A conversation joins a tree when it finds at least this share of its tokens there.  Less is not
# worth it: trees that are not tied together pack rows tighter.
SHARED_ENOUGH = 0.25

# Lengths of rows: each of the ladder is longer by at most this share (see `rung`).
GROWTH = 0.07

# Trees begin at multiples of this where their row has room for it: attention works in blocks of
# slots (of 64 on CPUs), and needs fewer of them where a tree does not begin in the middle of one.
ALIGNED = 64


class Encoded(NamedTuple):
    """A conversation as token ids, some of them learnt.

    `learnt`: `(start, stop)` of what is learnt, in order; at least one id is before the first.
    `observations`: how many this is, not below 0.  `scale`: what each of their
    log-probabilities is multiplied by in the loss: a family's share, an advantage; any number.
    """

    ids: tuple[int, ...]
    learnt: tuple[tuple[int, int], ...]
    observations: float = 1.0
    scale: float = 1.0

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int], observations: float = 1.0) -> Encoded:
        """A prompt, and an answer of which every token is learnt."""
        ids = (*prompt, *answer)
        return cls(ids, ((len(prompt), len(ids)),) if answer else (), observations)

    @property
    def computed(self) -> tuple[int, ...]:
        """The ids that need a slot: all before the last that is learnt."""
        return self.ids[: self.learnt[-1][1] - 1] if self.learnt else ()

    @property
    def reads(self) -> int:
        """How many tokens are learnt."""
        return sum(stop - start for start, stop in self.learnt)


class Forest(NamedTuple):
    """Token trees in `B` rows of `N` slots (NumPy or JAX arrays; a pytree either way).

    `tokens` [B, N] int32, `parent` [B, N] int32 (slot of the parent in this row; -1 for a root and
    for padding), `depth` [B, N] int32 (distance from the root, the rotary position), `end` [B, N]
    int32 (slot of the last descendant; itself for a leaf and for padding).
    """

    tokens: Int32[np.ndarray, "B N"]
    parent: Int32[np.ndarray, "B N"]
    depth: Int32[np.ndarray, "B N"]
    end: Int32[np.ndarray, "B N"]


class Reads(NamedTuple):
    """The tokens whose log-probabilities are asked for, `M` a row, and what they are worth.

    All reads at one slot share its softmax, so the vocabulary projection runs once for each of
    `slots` [B, N] int32: the distinct slots that are read at, ascending, then zeros.  `column`
    [B, M] int32: at which of `slots` a read is; -1: padding.  `token` [B, M] int32: which token.
    `weight` [B, M] float32: observations x scale, summed over all who read it; may be 0 or
    negative.  `observations` [B, M] float32: the loss is divided by their sum.
    """

    slots: Int32[np.ndarray, "B N"]
    column: Int32[np.ndarray, "B M"]
    token: Int32[np.ndarray, "B M"]
    weight: Float32[np.ndarray, "B M"]
    observations: Float32[np.ndarray, "B M"]


class Place(NamedTuple):
    """Where a conversation is: its row, and the number in that row of each of its reads, in order.

    Its own log-probability is the sum of theirs.
    """

    row: int
    reads: Int64[np.ndarray, " R"]


class LeftOut(NamedTuple):
    """How much was left out for one reason: conversations, and the observations they are."""

    conversations: int
    observations: float


@dataclass(frozen=True)
class Report:
    """What went into a forest, what it saved, and what was left out and why.

    `observations`: how many were placed.  `tokens_apart`: tokens if each were a sequence of its
    own.  `slots_used`: slots that hold a token; `slots_computed`: padding included.  `left_out`:
    reason -> what was not placed.
    """

    observations: float = 0.0
    tokens_apart: float = 0.0
    slots_used: int = 0
    slots_computed: int = 0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def __add__(self, other: Report) -> Report:
        """The report of both."""
        left_out = dict(self.left_out)
        for reason, more in other.left_out.items():
            have = left_out.get(reason, LeftOut(0, 0.0))
            left_out[reason] = LeftOut(
                have.conversations + more.conversations, have.observations + more.observations
            )
        return Report(
            self.observations + other.observations,
            self.tokens_apart + other.tokens_apart,
            self.slots_used + other.slots_used,
            self.slots_computed + other.slots_computed,
            left_out,
        )

    def reasons(self) -> str:
        """What was left out, in words; empty if nothing was."""
        return "; ".join(
            f"{left.conversations:,} ({left.observations:g} observations): {reason}"
            for reason, left in self.left_out.items()
        )

    @property
    def saved(self) -> float:
        """Share of the tokens that sharing spared: `1 - slots_used / tokens_apart`."""
        return 1.0 - self.slots_used / self.tokens_apart if self.tokens_apart else 0.0


@dataclass(frozen=True)
class Build:
    """A forest and its reads, where every conversation given is (None: left out), and a report."""

    forest: Forest
    reads: Reads
    places: tuple[Place | None, ...]
    report: Report


def build(
    conversations: Sequence[Encoded],
    slots: int,
    *,
    parts: int = 0,
    seed: int = 0,
    growth: float = GROWTH,
) -> Build:
    """Lays conversations out as token trees in rows of at most `slots` slots.

    With `parts` at 0 rows have `slots` slots each, and there are as few as possible.  Otherwise
    there are a multiple of `parts` rows, as few as hold all, with about as much in each; their
    length is the `rung` that holds the fullest, on a ladder of this `growth`.  A tree that would
    leave other rows empty is split between them.

    Nothing is ever cut: a conversation that does not fit in a row, or of which nothing is learnt,
    is left out whole and counted in the report.  Trees are one behind the other, with padding
    between them where that brings them to `ALIGNED`.  The result is a pure function of the
    arguments; `seed` sets the order of the rows.

    Raises:
        ValueError: `slots` is not positive; observations are negative, or they or a scale not
            finite; learnt spans are not within the ids, in order.
    """
    if slots < 1:
        raise ValueError(f"a row needs at least one slot, not {slots}")
    left_out: dict[str, LeftOut] = {}
    placed: list[int] = []
    for number, one in enumerate(conversations):
        _check(one)
        reason = _reason_to_leave_out(one, slots)
        if reason is None:
            placed.append(number)
        else:
            before = left_out.get(reason, LeftOut(0, 0.0))
            left_out[reason] = LeftOut(
                before.conversations + 1, before.observations + one.observations
            )
    computed = {number: conversations[number].computed for number in placed}
    # In sorted order a conversation shares most with its neighbour.
    order = sorted(placed, key=computed.__getitem__)
    neighbours = _neighbours(order, computed)
    if parts:
        trees, rows, slots = _in_equal_rows(neighbours, slots, parts, seed, growth)
    else:
        trees = _grow_trees(neighbours, slots)
        rows = _packed([tree.size for tree in trees], slots, np.random.default_rng(seed))
    sizes = [tree.size for tree in trees]
    forest = empty(len(rows), slots)
    places: list[Place | None] = [None] * len(conversations)
    by_row = []
    for row, members in enumerate(rows):
        cursor, room = 0, slots - sum(sizes[tree] for tree in members)
        row_reads = _RowReads()
        for tree in members:
            gap = -cursor % ALIGNED
            if gap <= room:
                cursor, room = cursor + gap, room - gap
            _write_tree(forest, row, cursor, trees[tree], computed, conversations, row_reads)
            cursor += sizes[tree]
        by_row.append(row_reads.reads(places, row))
    report = Report(
        observations=math.fsum(conversations[number].observations for number in placed),
        tokens_apart=math.fsum(
            conversations[number].observations * len(conversations[number].ids) for number in placed
        ),
        slots_used=sum(sizes),
        slots_computed=forest.tokens.size,
        left_out=left_out,
    )
    return Build(forest, _stack_reads(by_row, slots), tuple(places), report)


def rung(slots: int, growth: float = GROWTH) -> int:
    """The least length of the ladder 8, 16, ... that is at least `slots`.

    Each length is at most `growth` longer than the one before, or 8 longer.  Padding to it costs
    half of that on average, and few lengths are ever compiled for.
    """
    length = 8
    while length < slots:
        length = max(length + 8, int(length * (1 + growth)) // 8 * 8)
    return length


def empty(rows: int, slots: int) -> Forest:
    """A forest of padding: every slot sees itself alone, and nothing is read."""
    shape = (rows, slots)
    return Forest(
        tokens=np.zeros(shape, np.int32),
        parent=np.full(shape, -1, np.int32),
        depth=np.zeros(shape, np.int32),
        end=np.tile(np.arange(slots, dtype=np.int32), (rows, 1)),
    )


def no_reads(rows: int, slots: int, reads: int) -> Reads:
    """The reads of a forest of padding."""
    shape = (rows, reads)
    return Reads(
        slots=np.zeros((rows, slots), np.int32),
        column=np.full(shape, -1, np.int32),
        token=np.zeros(shape, np.int32),
        weight=np.zeros(shape, np.float32),
        observations=np.zeros(shape, np.float32),
    )


def pad(
    forest: Forest, reads: Reads, rows: int, slots: int | None = None, width: int | None = None
) -> tuple[Forest, Reads]:
    """The same forest with padding added: to `rows` rows, of `slots` slots and `width` reads each.

    Raises ValueError where the forest is larger than that.
    """
    have, wide = reads.token.shape
    slots, width = slots or forest.tokens.shape[1], width or wide
    if rows < have or slots < forest.tokens.shape[1] or width < wide:
        raise ValueError(
            f"a forest of {have} rows of {forest.tokens.shape[1]} slots and {wide} reads can't be "
            f"padded to {rows} of {slots} and {width}"
        )
    padded = empty(rows, slots), no_reads(rows, slots, width)
    for arrays, given in zip(padded, (forest, reads), strict=True):
        for array, values in zip(arrays, given, strict=True):
            array[:have, : values.shape[1]] = values
    return padded


def mask(forest: Forest) -> Bool[np.ndarray, "B N N"]:
    """Who sees whom: `mask[b, i, j]` is true when slot `j` is slot `i` or an ancestor of it."""
    slot = np.arange(forest.tokens.shape[1])
    query, key = slot[None, :, None], slot[None, None, :]
    return (key <= query) & (query <= forest.end[:, None, :])


def _check(one: Encoded) -> None:
    if not (math.isfinite(one.observations) and one.observations >= 0):
        raise ValueError(f"observations must be finite and not negative, not {one.observations}")
    if not math.isfinite(one.scale):
        raise ValueError(f"a scale must be finite, not {one.scale}")
    before = 0
    for start, stop in one.learnt:
        if not before <= start < stop <= len(one.ids):
            raise ValueError(f"learnt spans {one.learnt} are not in order in {len(one.ids)} ids")
        before = stop


def _reason_to_leave_out(one: Encoded, slots: int) -> str | None:
    if not one.learnt or one.observations == 0:
        return NOTHING_TO_LEARN
    if one.learnt[0][0] == 0:
        return NO_PROMPT
    if one.learnt[0][0] > slots:
        return TOO_LONG_BEFORE
    if one.learnt[-1][1] - 1 > slots:
        return TOO_LONG
    return None


def shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
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
    """Conversations, in sorted order, of one tree; each with what it shares with the one before."""

    size: int
    members: list[tuple[int, int]]


class _Neighbour(NamedTuple):
    """A conversation of the sorted order: its number, its slots, how many the one before has."""

    number: int
    slots: int
    shared: int


def _neighbours(order: Sequence[int], computed: Mapping[int, tuple[int, ...]]) -> list[_Neighbour]:
    before: tuple[int, ...] = ()
    neighbours = []
    for number in order:
        ids = computed[number]
        neighbours.append(_Neighbour(number, len(ids), shared(before, ids)))
        before = ids
    return neighbours


def _grow_trees(neighbours: Sequence[_Neighbour], slots: int) -> list[_Tree]:
    """Splits sorted conversations into trees of at most `slots` slots (or one longer conversation).

    Walking the sorted order and starting a new tree when the next conversation does not fit repeats
    a prefix only where a tree is split.
    """
    trees: list[_Tree] = []
    size = slots + 1
    members: list[tuple[int, int]] = []
    for number, own, alike in neighbours:
        if size + own - alike > slots or alike < SHARED_ENOUGH * own:
            size, alike, members = 0, 0, []
            trees.append(_Tree(0, members))
        size += own - alike
        members.append((number, alike))
        trees[-1] = _Tree(size, members)
    return trees


def _in_equal_rows(
    neighbours: Sequence[_Neighbour], slots: int, parts: int, seed: int, growth: float
) -> tuple[list[_Tree], list[list[int]], int]:
    """Trees, which of them are in which row, and the length of the rows.

    Trees are first as large as rows may be; where that leaves rows unequal, also smaller ones are
    tried, which repeat more of what they share.
    """

    def tried(limit: int) -> tuple[int, list[_Tree], list[list[int]], int]:
        trees = _grow_trees(neighbours, limit)
        sizes = [tree.size for tree in trees]
        rows = _balanced(sizes, slots, parts, np.random.default_rng(seed))
        length = rung(max(sum(sizes[tree] for tree in row) for row in rows), growth)
        return len(rows) * length, trees, rows, length

    best = last = tried(slots)
    for trees_a_row in (1, 1, 2):
        _, trees, rows, _ = last
        used = sum(tree.size for tree in trees)
        if len(rows) == 1 or best[0] <= (1 + growth) * used:
            break
        last = tried(math.ceil(used / len(rows) / trees_a_row))
        best = min(best, last, key=lambda layout: layout[0])
    return best[1:]


def _packed(sizes: Sequence[int], slots: int, rng: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing: which trees are in which row, rows in a seeded order."""
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


def _balanced(
    sizes: Sequence[int], slots: int, parts: int, rng: np.random.Generator
) -> list[list[int]]:
    """Each tree, the largest first, in the row that has least: a multiple of `parts` rows."""
    order = sorted(rng.permutation(len(sizes)), key=lambda tree: -sizes[tree])
    number = parts * max(1, math.ceil(sum(sizes) / (slots * parts)))
    while True:
        rows: list[list[int]] = [[] for _ in range(number)]
        filled = [(0, row) for row in range(number)]
        for tree in order:
            used, row = heapq.heappop(filled)
            rows[row].append(int(tree))
            heapq.heappush(filled, (used + sizes[tree], row))
        if max(filled)[0] <= slots:
            return [rows[row] for row in rng.permutation(number)]
        number += parts


class _RowReads:
    """The reads of one row while it is written: one entry a learnt token of a conversation.

    `slot` counts from where the conversation's tree begins.
    """

    def __init__(self) -> None:
        self.slot: list[int] = []
        self.token: list[int] = []
        # Of each conversation: number, where its tree begins, reads, weight, observations.
        self.of: list[tuple[int, int, int, float, float]] = []

    def reads(self, places: list[Place | None], row: int) -> Reads:
        """The row's reads `[M]`, those of one token at one slot summed; fills in the places."""
        table = np.array(self.of, np.float64).reshape(-1, 5).T
        conversations, starts, lengths = table[:3].astype(np.int64)
        slot = np.asarray(self.slot, np.int64) + np.repeat(starts, lengths)
        # Slot and token as one number, so that sorting them is one sort.
        pair = (slot << 32) | np.asarray(self.token, np.int64)
        distinct, number = np.unique(pair, return_inverse=True)
        weight, observations = (
            np.bincount(number, np.repeat(values, lengths), minlength=len(distinct)).astype(
                np.float32
            )
            for values in table[3:]
        )
        stop = 0
        for conversation, length in zip(conversations.tolist(), lengths.tolist(), strict=True):
            start, stop = stop, stop + length
            places[conversation] = Place(row, number[start:stop])
        slots, column = np.unique(distinct >> 32, return_inverse=True)
        return Reads(
            slots.astype(np.int32),
            column.astype(np.int32),
            (distinct & 0xFFFFFFFF).astype(np.int32),
            weight,
            observations,
        )


def _stack_reads(rows: Sequence[Reads], slots: int) -> Reads:
    """The rows' reads side by side: as many a row as there are slots, or a multiple of that."""
    most = max((len(row.token) for row in rows), default=0)
    stacked = no_reads(len(rows), slots, slots * max(1, math.ceil(most / slots)))
    for at, row in enumerate(rows):
        for whole, part in zip(stacked, row, strict=True):
            whole[at, : len(part)] = part
    return stacked


def _write_tree(
    forest: Forest,
    row: int,
    start: int,
    tree: _Tree,
    computed: Mapping[int, tuple[int, ...]],
    conversations: Sequence[Encoded],
    row_reads: _RowReads,
) -> None:
    """Writes one tree into a row from slot `start` on, and what is read in it."""
    tokens: list[int] = []
    end = [0] * tree.size
    line: list[int] = []  # places in the tree, from its root to where the one before ended
    # Runs of slots, each the one behind the other: where they begin, how deep, and behind what.
    begins, depths, parents = [], [], []
    for number, kept in tree.members:
        ids = computed[number]
        last = start + len(tokens) - 1
        for at in line[kept:]:
            end[at] = last
        del line[kept:]
        if len(ids) > kept:
            begins.append(len(tokens))
            depths.append(kept)
            parents.append(start + line[-1] if line else -1)
            line.extend(range(len(tokens), len(tokens) + len(ids) - kept))
            tokens.extend(ids[kept:])
        one = conversations[number]
        for first, after in one.learnt:
            row_reads.slot.extend(line[first - 1 : after - 1])
            row_reads.token.extend(one.ids[first:after])
        row_reads.of.append(
            (number, start, one.reads, one.observations * one.scale, one.observations)
        )
    last = start + len(tokens) - 1
    for at in line:
        end[at] = last
    place = np.arange(tree.size, dtype=np.int32)
    parent = place + (start - 1)
    parent[begins] = parents
    bounds = np.array([*begins, tree.size])
    depth = place + np.repeat(depths - bounds[:-1], bounds[1:] - bounds[:-1])
    here = (row, slice(start, start + tree.size))
    for array, values in zip(forest, (tokens, parent, depth, end), strict=True):
        array[here] = values
