"""Which collectives of a compiled program could start while a loop sends something of its own."""

import re

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-\w+)(-start)?"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


def beside_loops(text):
    """`(computation, loop, collective)` of a module's text: in its schedule the collective comes
    after the loop, which has collectives too, and depends on nothing that the loop makes.

    A collective that comes first is no danger: XLA's CPU runtime is done with it before it goes on.
    What is read of a loop's result is taken to depend on the loop, passed through or not.
    """
    found, sends = [], set()
    for computation, instructions in _computations(text).items():
        loops, depends = [], {}
        for name, operation, operands, rest in instructions:
            # Callees stand before their callers in the text.
            nested = any(callee in sends for callee in _NAME.findall(rest))
            depends[name] = set().union(*(depends.get(one, ()) for one in _NAME.findall(operands)))
            if nested or _COLLECTIVE.fullmatch(operation):
                sends.add(computation)
                found += [(computation, loop, name) for loop in loops if loop not in depends[name]]
            if nested:
                loops.append(name)
                depends[name].add(name)
    return found


def _computations(text):
    """Name -> instructions in the order of the schedule: name, operation, operands, the rest."""
    found, current = {}, []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = found.setdefault(start[1], [])
        elif instruction := _INSTRUCTION.match(line):
            name, operation, after = instruction.groups()
            operands, rest = _parted(after)
            current.append((name, operation, operands, rest))
    return found


def _parted(text):
    """What stands before the parenthesis that closes, and what after it."""
    depth = 1
    for at, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return text[:at], text[at:]
    raise ValueError(text)
