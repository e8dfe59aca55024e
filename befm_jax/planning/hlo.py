"""What a compiled program sends between chips, read from its text.

XLA's own cost analysis counts the body of a loop once.  Here everything is multiplied by how often
it runs: the number of turns stands beside a loop (`known_trip_count`), or in the condition that
ends it (`counter < constant`).  Loops whose turns depend on data are given a number by the caller.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations|true_computation|"
    r"false_computation)=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)"
)
_BY_HOSTS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count\\?":?\s*\{\\?"?n\\?"?:\s*\\?"(\d+)')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"ROOT \S+ = \S+ compare\((.*?)\), direction=(LT|GT)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+(?:e\d+m\d+\w*)?|bf16|c\d+)\[([\d,]*)\]")
# Who takes part: listed, as an array of all devices cut up, or by axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_CUT = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_BY_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_BITS = {"pred": 8, "bf16": 16}
# Collective -> bytes that each of `n` chips sends where they pass round in a ring, as a share of
# the whole array: the gathered one, or that which is reduced.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclass(frozen=True)
class Traffic:
    """What each chip sends in one run of a program, in bytes by collective.

    `within` its slice, and `between` slices.  A collective over several slices is taken to run in
    two stages: within each slice, then of every chip's share with its like in the others.
    `unknown_loops`: loops whose turns depend on data, which were taken to have the turns given.
    """

    within: dict[str, float]
    between: dict[str, float]
    unknown_loops: int

    def by_kind(self) -> dict[str, float]:
        """Bytes by collective, within slices and between them; largest first."""
        kinds = {kind: self.within.get(kind, 0) + self.between.get(kind, 0) for kind in _SENT}
        known = {kind: size for kind, size in kinds.items() if size}
        return dict(sorted(known.items(), key=lambda one: -one[1]))


def traffic(text: str, devices: int, slices: int = 1, unknown_turns: float = 1.0) -> Traffic:
    """Reads the text of a module (`compiled.as_text()`) compiled for so many devices.

    The devices of a slice follow one another.  `unknown_turns`: of loops that end when data say.
    """
    entry, computations = _computations(text)
    times: dict[str, float] = defaultdict(float)
    fused: set[str] = set()
    unknown = 0
    # Callees stand before their callers in the text: walked backwards, callers come first.
    times[entry] = 1.0
    for name in reversed(list(computations)):
        if not times[name]:
            continue
        for line in computations[name]:
            turns = 1.0
            if " while(" in line:
                known = _turns(line, computations)
                turns = unknown_turns if known is None else known
                unknown += known is None
            for called in _CALLED.findall(line):
                for callee in called.replace("%", "").split(","):
                    times[callee.strip()] += times[name] * turns
                    if " fusion(" in line:
                        fused.add(callee.strip())
    within: dict[str, float] = defaultdict(float)
    between: dict[str, float] = defaultdict(float)
    begun: set[str] = set()
    for name, lines in computations.items():
        for line in lines if times[name] else ():
            for kind, inside, outside in _sent(name, line, devices, slices):
                # Where a collective is fused with the products that run meanwhile, each of its
                # pieces names it, and all the same channel.
                channel = _CHANNEL.search(line)
                if name in fused and channel:
                    if channel.group(1) in begun:
                        continue
                    begun.add(channel.group(1))
                within[kind] += times[name] * inside
                between[kind] += times[name] * outside
    return Traffic(dict(within), dict(between), unknown)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry = ""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = found.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, found


def _turns(line: str, computations: dict[str, list[str]]) -> float | None:
    """How often a loop turns: counters go up from 0 by 1, as `lax.scan` makes them."""
    beside = _TURNS.search(line)
    if beside:
        return float(beside.group(1))
    condition = _CONDITION.search(line)
    lines = computations.get(condition.group(1), []) if condition else []
    constants = {name: float(value) for one in lines for name, value in _CONSTANT.findall(one)}
    for one in lines:
        compared = _COMPARED.search(one)
        if compared:
            operands = [operand.split("%")[-1] for operand in compared.group(1).split(", ")]
            limit = operands[-1] if compared.group(2) == "LT" else operands[0]
            return constants.get(limit)
    return None


def _sent(
    computation: str, line: str, devices: int, slices: int
) -> Iterator[tuple[str, float, float]]:
    """The collective of an instruction, and the bytes that a chip sends for it."""
    instruction = _INSTRUCTION.match(line)
    if not instruction:
        return
    result, operation = instruction.group(3), instruction.group(4)
    kind = operation.removesuffix("-start")
    sizes = [_bytes(array) for array in _ARRAY.findall(result)]
    by_hosts = _BY_HOSTS.search(line)
    if kind == "send" and by_hosts:
        # Between TPU slices the hosts carry what each chip has of the array.
        kind = by_hosts.group(1).lower().replace("_", "-")
        yield kind, 0.0, _SENT.get(kind, _SENT["all-gather"])(slices) * sizes[0]
    if kind not in _SENT or operation == "send":
        return
    if kind == "collective-permute":
        # Started: what is sent, what is received, and two counters.
        yield kind, *_permuted(line, sizes[0], devices, slices)
        return
    if operation == "all-gather-start":
        # What goes in, then what comes out.
        sizes = sizes[len(sizes) // 2 :]
    groups = _groups(line, devices)
    if groups.shape[1] < 2:
        return
    whole = sum(sizes) * (groups.shape[1] if kind == "reduce-scatter" else 1)
    if computation.startswith("all-reduce-scatter"):
        # A sum of which a slice is taken in the same fusion: the rest is never sent.
        kind = "reduce-scatter"
    across = max(len(set(group)) for group in (groups // (devices // slices)).tolist())
    near = groups.shape[1] // across
    yield kind, _SENT[kind](near) * whole, _SENT[kind](across) * whole / near


def _permuted(line: str, size: float, devices: int, slices: int) -> tuple[float, float]:
    listed = _PAIRS.search(line)
    numbers = _numbers(listed.group(1)) if listed else []
    pairs = np.asarray(numbers, np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(pairs):
        return 0.0, 0.0
    far = np.diff(pairs // (devices // slices), axis=1).any()
    return (0.0, size) if far else (size, 0.0)


def _groups(line: str, devices: int) -> np.ndarray:
    """The devices that take part together, `[groups, size]`.

    Raises:
        ValueError: the text names them in a form that is not known here.
    """
    by_axes, cut, listed = _BY_AXES.search(line), _CUT.search(line), _LISTED.search(line)
    if by_axes:
        mesh = {name: int(size) for name, size, *_ in _AXIS.findall(by_axes.group(1))}
        ids = _iota(by_axes.group(2) or "") if by_axes.group(2) else np.arange(devices)
        return _along(ids.reshape(list(mesh.values())), mesh, _AXIS.findall(by_axes.group(3)))
    if cut:
        return _iota(cut.group(1))
    if listed:
        groups = [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", listed.group(1) or "")]
        return np.array(groups) if any(groups) else np.arange(devices)[None]
    if "replica_groups=" in line:
        raise ValueError(f"who takes part in this can't be read: {line.strip()[:300]}")
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """`[4,4]<=[2,8]T(1,0)`: counted up in the second shape, transposed, cut into the first."""
    found = _IOTA.match(text)
    assert found is not None
    shape = _numbers(found.group(1))
    ids = np.arange(math.prod(shape)).reshape(_numbers(found.group(2) or found.group(1)))
    if found.group(3):
        ids = ids.transpose(_numbers(found.group(3)))
    return ids.reshape(shape) if found.group(2) else ids


def _along(ids: np.ndarray, mesh: dict[str, int], axes: list[tuple[str, ...]]) -> np.ndarray:
    """Groups along axes of a mesh; of an axis `'x':(2)4` only the 4 that follow the first 2."""
    shape: list[int] = []
    grouped: list[int] = []
    wanted = {name: (int(before or 1), int(size or mesh[name])) for name, _, before, size in axes}
    for name, whole in mesh.items():
        before, size = wanted.get(name, (whole, 1))
        if name in wanted:
            grouped.append(len(shape) + 1)
        shape += [before, size, whole // before // size]
    rest = [axis for axis in range(len(shape)) if axis not in grouped]
    ids = ids.reshape(shape).transpose(rest + grouped)
    return ids.reshape(-1, math.prod(size for _, size in wanted.values()))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _bytes(array: tuple[str, str]) -> float:
    kind, shape = array
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8
