"""What is read of a compiled entry: in its PTX, in ptxas's words, and in its machine code."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What NVRTC and ptxas made of one entry."""

    complaints: tuple[str, ...]  # errors and warnings
    has_entry: bool
    registers: int  # per thread
    stack: int  # bytes per thread, and so the next two
    spill_stores: int
    spill_loads: int
    static_shared: int  # bytes per block
    local: int  # .local declarations in the PTX
    loads128: int  # instructions in the PTX, of global memory
    stores128: int
    copies128: int  # cp.async past L1, to shared memory
    bulk_copies: int
    ftz: int  # float32 instructions that flush subnormals
    no_ftz: int  # those that could and do not
    approximate: int  # divisions and roots that are not IEEE
    fusable: int  # products whose sum with something ptxas may fuse, or not, as it likes


# Inline assembly has lines of one brace too, but no declaration comes after those.
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^}$\s*(?=\Z|\.)", re.MULTILINE | re.DOTALL)


def parts_of(ptx: str) -> tuple[str, dict[str, str]]:
    """A module's text but for the entries, and the entries."""
    ptx = re.sub(r"^\t// \.globl.*\n", "", ptx, flags=re.M)
    return _ENTRY.sub("", ptx), {match[1]: match[0] for match in _ENTRY.finditer(ptx)}


def words_of(log: str) -> dict[str, str]:
    """What ptxas says of each entry; what it says of none, of each."""
    of_none, *words = re.split(r"(?=^ptxas info +: Compiling entry function ')", log, flags=re.M)
    return {word.split("'")[1]: of_none + word for word in words}


def complaints_of(log: str) -> tuple[str, ...]:
    return tuple(line for line in log.splitlines() if re.search("error|warning", line, re.I))


def digest_of(around: str, entry: str, name: str, complaints: tuple[str, ...]) -> str:
    """Hash of all that ptxas is given of an entry; its name and place in a module do not count."""
    used = set(re.findall(r"\w+", entry))
    said = [
        line
        for line in around.splitlines()
        if not re.match(r"//|\.target", line)
        and not (line.startswith(".global") and used.isdisjoint(re.findall(r"\w+", line)[4:]))
    ]
    body = re.sub(r"\b(L__BB|__local_depot|\$L_)\d+", r"\1", entry.replace(name, "entry"))
    text = "\n".join([*said, body.strip(), *complaints])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _most(pattern: str, text: str, missing: int) -> int:
    return max(map(int, re.findall(pattern, text)), default=missing)


_ARITHMETIC = re.compile(
    r"\b(?:add|sub|mul|fma|div|sqrt|rcp|rsqrt|min|max|abs|neg)((?:\.\w+)*)\.f32\b"
)


def _fusable(ptx: str) -> int:
    """Sums of a product that is not rounded by itself (`mul.rn`)."""
    products = set(re.findall(r"\bmul(?:\.ftz)?\.f(?:32|64)\s+(%f\w+),", ptx))
    sums = re.findall(r"\b(?:add|sub)(?:\.ftz)?\.f(?:32|64)\s+%f\w+, (%f\w+), (%f\w+);", ptx)
    return sum(a in products or b in products for a, b in sums)


def facts_of(ptx: str, log: str, name: str) -> Facts:
    """Read the PTX and ptxas's words; numbers that ptxas did not state are -1."""
    arithmetic = _ARITHMETIC.findall(ptx)
    flushing = sum(".ftz" in modifiers for modifiers in arithmetic)
    return Facts(
        complaints=complaints_of(log),
        has_entry=f".visible .entry {name}(" in ptx,
        registers=_most(r"Used (\d+) registers", log, -1),
        stack=_most(r"(\d+) bytes stack frame", log, -1),
        spill_stores=_most(r"(\d+) bytes spill stores", log, -1),
        spill_loads=_most(r"(\d+) bytes spill loads", log, -1),
        static_shared=_most(r"(\d+) bytes smem", log, 0),
        local=len(re.findall(r"^\s*\.local\b", ptx, re.M)),
        loads128=len(re.findall(r"\bld\.global(?:\.[\w:]+)*\.v4\.[bfu]32\b", ptx)),
        stores128=len(re.findall(r"\bst\.global(?:\.[\w:]+)*\.v4\.[bfu]32\b", ptx)),
        copies128=len(re.findall(r"\bcp\.async\.cg\.shared\.global\b.*, 16;", ptx)),
        bulk_copies=len(re.findall(r"\bcp\.async\.bulk\.shared::cluster\.global\b", ptx)),
        ftz=flushing,
        no_ftz=len(arithmetic) - flushing,
        fusable=_fusable(ptx),
        approximate=len(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\b", ptx)),
    )


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\S*) *(.*?) *;", re.M)


def machine_facts(sass: str) -> tuple[float, int]:
    """Instructions per 16 bytes of global memory, and most loads before a use of one of them.

    Both are of the text, not of a run: loops and branches count once. Bulk copies have no size.
    """
    instructions = [word for word in _INSTRUCTION.findall(sass) if word[0] != "NOP"]
    moved, most = 0, 0
    on_their_way: list[set[str]] = []
    for name, operands in instructions:
        kind, *modifiers = name.split(".")
        first, _, rest = operands.partition(",")
        read = rest if not kind.startswith(("ST", "RED")) else operands
        registers = set(re.findall(r"\bR\d+\b", read))
        waits = kind in ("DEPBAR", "SYNCS") or any(registers & held for held in on_their_way)
        if waits:
            most, on_their_way = max(most, len(on_their_way)), []
        if kind in ("LDG", "STG", "LDGSTS"):
            widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
            size = next((widths[m] for m in modifiers if m in widths), 4)
            moved += size
            if kind != "STG":
                at = re.fullmatch(r"R(\d+)", first) if kind == "LDG" else None
                begin = int(at[1]) if at else 0
                words = range(begin, begin + -(-size // 4)) if at else ()
                on_their_way.append({f"R{word}" for word in words})
        elif kind == "UBLKCP":
            on_their_way.append(set())
    return len(instructions) * 16 / moved if moved else 0.0, max(most, len(on_their_way))
