"""Read what a compiled kernel uses from its machine code: NVIDIA's SASS as cuobjdump prints it, or AMD's assembly.

The hottest loop is, of the innermost loops with products on matrix units, the one with most: there a kernel spends its
time. Loops are found as compilers define them, from basic blocks and their dominators, because instructions of a loop
do not lie side by side: code for waiting stands at the end of a program.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mixkernels.errors import BackendError


class Loop(NamedTuple):
    """The hottest loop; every instruction counts once, as if no branch skipped it."""

    instructions: int
    async_copies: int
    """Copies from global to shared memory that no thread waits for: LDGSTS, and tiles by the memory engine."""
    barriers: int
    """Barriers of a block, waits of warpgroups not counted."""
    spills: int
    """Loads and stores of local memory."""


class MachineCode(NamedTuple):
    """Figures of one kernel."""

    registers: int
    stack_bytes: int
    tensor_instructions: dict[str, int]
    global_load_bits: int
    loop: Loop | None
    """None without a loop that has products on matrix units, and on AMD."""


# warp-wide (HMMA, IMMA, ...), warpgroup-wide (HGMMA, ...) and tensor-memory (UTCHMMA, ...) products of SASS
_SASS_TENSOR = re.compile(r"\b((?:[A-Z]MMA|[A-Z]GMMA|UTC[A-Z]*MMA)(?:\.[A-Z0-9x.]+)?)\b")
_SASS_LOAD = re.compile(r"\b(?:LDG|LDGSTS)(\.[A-Z0-9.]+)")
_SASS_BULK_LOAD = re.compile(r"\b(?:UTMALDG|UBLKCP)\b")
_SASS_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_SASS_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)\s*$")
_SASS_CONDITION = re.compile(r"@|.*\bBRA(?:\.\S+)?\s+!?U?P\d|.*\bBRA\.(?:U|DIV|CONV)")
_AMD_TENSOR = re.compile(r"\bv_s?mfmac?_[a-z0-9_]+")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_([a-z0-9_]+)")
_AMD_LOAD_BITS = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16}


def read_sass(usage: str, sass: str) -> MachineCode:
    """Read cuobjdump's resource usage and disassembly of a file with one kernel."""
    return MachineCode(
        registers=_number(r"\bREG:(\d+)", usage),
        stack_bytes=_number(r"\bSTACK:(\d+)", usage),
        tensor_instructions=dict(Counter(_SASS_TENSOR.findall(sass))),
        global_load_bits=max(_sass_load_bits(sass), default=0),
        loop=hottest_loop(sass),
    )


def read_amdgcn(assembly: str) -> MachineCode:
    """Read the assembly of a file with one kernel."""
    # agprs are part of the vgpr count on CDNA3
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        tensor_instructions=dict(Counter(_AMD_TENSOR.findall(assembly))),
        global_load_bits=max(map(_amd_load_bits, _AMD_LOAD.findall(assembly)), default=0),
        loop=None,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BackendError(
            f"found no {pattern!r} in the compiler's output; this version of Triton writes another format"
        )
    return int(found.group(1))


def _sass_load_bits(sass: str) -> Iterator[int]:
    for modifiers in _SASS_LOAD.findall(sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?![0-9])", modifiers)
        yield int(width.group(1)) if width else 32
    if _SASS_BULK_LOAD.search(sass):
        # the copy engine moves whole tiles, at least 16 bytes at a time
        yield 128


def _amd_load_bits(kind: str) -> int:
    if lanes := re.match(r"dword(?:x(\d))?", kind):
        return 32 * int(lanes.group(1) or 1)
    # the halves of a register ("ubyte_d16", "short_d16_hi") are named after what is loaded
    return _AMD_LOAD_BITS[kind.partition("_")[0]]


def hottest_loop(sass: str) -> Loop | None:
    """Return the loop with most products among those that hold no other loop with products; None if none has any."""
    instructions = [(int(address, 16), text) for address, text in _SASS_INSTRUCTION.findall(sass)]
    if not instructions:
        return None
    blocks, followers = _basic_blocks(instructions)
    products = {
        block: sum(bool(_SASS_TENSOR.search(text)) for _, text in instructions[block:end])
        for block, end in blocks.items()
    }
    bodies = [body for body in _natural_loops(followers) if any(products[block] for block in body)]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    if not innermost:
        return None
    hottest = max(innermost, key=lambda body: sum(products[block] for block in body))
    loop = [text for block in hottest for _, text in instructions[block : blocks[block]]]

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in loop)

    return Loop(
        instructions=len(loop),
        async_copies=count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b"),
        barriers=count(r"\bBAR\.S"),
        spills=count(r"\b(?:LDL|STL)\b"),
    )


def _basic_blocks(instructions: list[tuple[int, str]]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return the end of every basic block, and the blocks that may follow it, by its first instruction."""
    number_at = {address: number for number, (address, _) in enumerate(instructions)}

    def target(text: str) -> int | None:
        branch = _SASS_BRANCH.search(text)
        return number_at.get(int(branch.group(1), 16)) if branch else None

    starts = {0}
    for number, (_, text) in enumerate(instructions):
        if re.search(r"\b(?:BRA|EXIT|RET)\b", text):
            starts |= {number + 1, target(text) or 0}
    ordered = sorted(start for start in starts if start < len(instructions))
    ends = dict(zip(ordered, [*ordered[1:], len(instructions)], strict=True))
    followers = {}
    for start, end in ends.items():
        last = instructions[end - 1][1]
        goal = target(last)
        leaves = re.search(r"\b(?:EXIT|RET)\b", last) or goal is not None
        goes_on = end in ends and (not leaves or _SASS_CONDITION.match(last))
        followers[start] = [*([] if goal is None else [goal]), *([end] if goes_on else [])]
    return ends, followers


def _natural_loops(followers: dict[int, list[int]]) -> list[set[int]]:
    """Return the blocks of every loop: of those with one entry, all that reach a jump back to it."""
    predecessors: dict[int, list[int]] = defaultdict(list)
    reached, waiting = {0}, [0]
    while waiting:
        block = waiting.pop()
        for follower in followers[block]:
            predecessors[follower].append(block)
            if follower not in reached:
                reached.add(follower)
                waiting.append(follower)
    dominators = {block: reached if block else {0} for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            found = {block} | set.intersection(*(dominators[before] for before in predecessors[block]))
            changed |= found != dominators[block]
            dominators[block] = found
    bodies: dict[int, set[int]] = defaultdict(set)
    for block in reached:
        for entry in followers[block]:
            if entry in dominators[block]:
                body, waiting = bodies[entry] | {entry}, [block]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += predecessors[inside]
                bodies[entry] = body
    return list(bodies.values())
