"""Communication of a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once.  Here every collective is multiplied by its
trip count: from the loop's `known_trip_count`, or its condition (`counter < constant`).  The caller
gives a trip count for loops whose own depends on data.
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
_TRIP_COUNT = re.compile(r'known_trip_count\\?":?\s*\{\\?"?n\\?"?:\s*\\?"(\d+)')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"ROOT \S+ = \S+ compare\((.*?)\), direction=(LT|GT)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+(?:e\d+m\d+\w*)?|bf16|c\d+)\[([\d,]*)\]")
# Replica groups: listed, as a reshaped iota, or by mesh axes.
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_BY_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_BY_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_BITS = {"pred": 8, "bf16": 16}
# Collective -> bytes that each of `n` chips sends in a ring algorithm, as a fraction of the full
# array: the gathered one, or the reduced one.
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
    """Bytes that each chip sends in one run of a program, by collective.

    `within` its slice, and `between` slices.  A collective over several slices is assumed to run in
    two stages: within each slice, then between the chips of the same share in each slice.
    `unknown_loops`: loops whose trip count depends on data, for which the caller's was used.
    """

    within: dict[str, float]
    between: dict[str, float]
    unknown_loops: int

    def by_kind(self) -> dict[str, float]:
        """Bytes by collective, within and between slices summed; largest first."""
        kinds = {kind: self.within.get(kind, 0) + self.between.get(kind, 0) for kind in _SENT}
        used = {kind: size for kind, size in kinds.items() if size}
        return dict(sorted(used.items(), key=lambda entry: -entry[1]))


def traffic(text: str, devices: int, slices: int = 1, unknown_turns: float = 1.0) -> Traffic:
    """The traffic of a module's text (`compiled.as_text()`), compiled for `devices` devices.

    The devices of a slice are consecutive.  `unknown_turns`: the trip count of loops that depend on
    data.
    """
    entry, computations = _computations(text)
    times: dict[str, float] = defaultdict(float)
    fused: set[str] = set()
    unknown = 0
    # Callees are before their callers in the text: in reverse order, callers come first.
    times[entry] = 1.0
    for name in reversed(list(computations)):
        if not times[name]:
            continue
        for line in computations[name]:
            turns = 1.0
            if " while(" in line:
                known = _trip_count(line, computations)
                turns = unknown_turns if known is None else known
                unknown += known is None
            for called in _CALLED.findall(line):
                for callee in called.replace("%", "").split(","):
                    times[callee.strip()] += times[name] * turns
                    if " fusion(" in line:
                        fused.add(callee.strip())
    within: dict[str, float] = defaultdict(float)
    between: dict[str, float] = defaultdict(float)
    counted: set[str] = set()
    for name, lines in computations.items():
        for line in lines if times[name] else ():
            for kind, inside, outside in _sent(name, line, devices, slices):
                # A collective that is fused with overlapping products is in each of its fusions,
                # always with the same channel.
                channel = _CHANNEL.search(line)
                if name in fused and channel:
                    if channel.group(1) in counted:
                        continue
                    counted.add(channel.group(1))
                within[kind] += times[name] * inside
                between[kind] += times[name] * outside
    return Traffic(dict(within), dict(between), unknown)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry computation's name, and the lines of every computation."""
    entry = ""
    by_name: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = by_name.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, by_name


def _trip_count(line: str, computations: dict[str, list[str]]) -> float | None:
    """A loop's trip count, assuming a counter from 0 in steps of 1, as in `lax.scan`."""
    known = _TRIP_COUNT.search(line)
    if known:
        return float(known.group(1))
    condition = _CONDITION.search(line)
    lines = computations.get(condition.group(1), []) if condition else []
    constants = {name: float(value) for text in lines for name, value in _CONSTANT.findall(text)}
    for text in lines:
        compared = _COMPARED.search(text)
        if compared:
            operands = [operand.split("%")[-1] for operand in compared.group(1).split(", ")]
            limit = operands[-1] if compared.group(2) == "LT" else operands[0]
            return constants.get(limit)
    return None


def _sent(
    computation: str, line: str, devices: int, slices: int
) -> Iterator[tuple[str, float, float]]:
    """The collective of an instruction, and the bytes per chip within and between slices."""
    instruction = _INSTRUCTION.match(line)
    if not instruction:
        return
    result, operation = instruction.group(3), instruction.group(4)
    kind = operation.removesuffix("-start")
    sizes = [_bytes(array) for array in _ARRAY.findall(result)]
    by_hosts = _BY_HOSTS.search(line)
    if kind == "send" and by_hosts:
        # Between TPU slices the hosts transfer each chip's shard of the array.
        kind = by_hosts.group(1).lower().replace("_", "-")
        yield kind, 0.0, _SENT.get(kind, _SENT["all-gather"])(slices) * sizes[0]
    if kind not in _SENT or operation == "send":
        return
    if kind == "collective-permute":
        # The result is a tuple: what is sent, what is received, and two counters.
        yield kind, *_permuted(line, sizes[0], devices, slices)
        return
    if operation == "all-gather-start":
        # The result is a tuple of the inputs and the outputs.
        sizes = sizes[len(sizes) // 2 :]
    groups = _groups(line, devices)
    if groups.shape[1] < 2:
        return
    full = sum(sizes) * (groups.shape[1] if kind == "reduce-scatter" else 1)
    if computation.startswith("all-reduce-scatter"):
        # An all-reduce that is sliced in the same fusion: in fact a reduce-scatter.
        kind = "reduce-scatter"
    across = max(len(set(group)) for group in (groups // (devices // slices)).tolist())
    near = groups.shape[1] // across
    yield kind, _SENT[kind](near) * full, _SENT[kind](across) * full / near


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
    """The replica groups, `[groups, size]`.

    Raises:
        ValueError: the text has them in an unknown form.
    """
    by_axes, by_iota, listed = _BY_AXES.search(line), _BY_IOTA.search(line), _LISTED.search(line)
    if by_axes:
        mesh = {name: int(size) for name, size, *_ in _AXIS.findall(by_axes.group(1))}
        ids = _iota(by_axes.group(2) or "") if by_axes.group(2) else np.arange(devices)
        return _along(ids.reshape(list(mesh.values())), mesh, _AXIS.findall(by_axes.group(3)))
    if by_iota:
        return _iota(by_iota.group(1))
    if listed:
        groups = [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", listed.group(1) or "")]
        return np.array(groups) if any(groups) else np.arange(devices)[None]
    if "replica_groups=" in line:
        raise ValueError(f"the replica groups can't be read: {line.strip()[:300]}")
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """`[4,4]<=[2,8]T(1,0)`: an iota of the second shape, transposed, reshaped to the first."""
    match = _IOTA.match(text)
    assert match is not None
    shape = _numbers(match.group(1))
    ids = np.arange(math.prod(shape)).reshape(_numbers(match.group(2) or match.group(1)))
    if match.group(3):
        ids = ids.transpose(_numbers(match.group(3)))
    return ids.reshape(shape) if match.group(2) else ids


def _along(ids: np.ndarray, mesh: dict[str, int], axes: list[tuple[str, ...]]) -> np.ndarray:
    """Groups along mesh axes; `'x':(2)4` is the factor 4 of `x` after its major factor 2."""
    shape: list[int] = []
    grouped: list[int] = []
    split = {name: (int(before or 1), int(size or mesh[name])) for name, _, before, size in axes}
    for name, total in mesh.items():
        before, size = split.get(name, (total, 1))
        if name in split:
            grouped.append(len(shape) + 1)
        shape += [before, size, total // before // size]
    rest = [axis for axis in range(len(shape)) if axis not in grouped]
    ids = ids.reshape(shape).transpose(rest + grouped)
    return ids.reshape(-1, math.prod(size for _, size in split.values()))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _bytes(array: tuple[str, str]) -> float:
    kind, shape = array
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8
