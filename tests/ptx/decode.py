"""PTX text to the engine's instructions. What it does not know is an error that names the line."""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field

import numpy as np

from .api import INSTRUCTION, handlers, special_registers
from .fault import PtxFault

LANES = 32
SHARED_BASE = 1024  # kSharedBase of state.hpp
BITS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "b32": 32, "u32": 32,
        "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "pred": 1}  # fmt: skip
SPACES = {"global": 0, "shared": 1, "shared::cta": 1, "shared::cluster": 2, "param": 4}
GENERIC = 3
READ_ONLY_PATH, SIGNED, WIDE_TARGET = 1, 2, 4
# Of loads and stores: they change what is cached, and nothing that a program can see.
HINTS = {"nc", "cs", "cg", "ca", "wb", "weak", "volatile", "relaxed", "L1::no_allocate",
         "L1::evict_first"}  # fmt: skip
CONTROL = {"bra", "bra.uni", "ret", "exit"}
# Lanes meet in these: a guard would leave open who comes.
MEETING = ("shfl", "vote", "bar", "barrier", "mbarrier.try_wait", "mbarrier.test_wait")


@dataclass
class Parameter:
    """One parameter of the entry: its PTX type, `b8` for a struct, its size and place in bytes."""

    kind: str
    size: int
    offset: int


@dataclass
class Operation:
    """An instruction before its registers have places: names stand for them."""

    mnemonic: str
    line: int  # of the PTX
    site: tuple[int, ...]  # lines of the kernel text: the innermost, then those it was inlined at
    writes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    guard: str = ""
    negate: bool = False
    base: str = ""
    offset: int = 0
    space: int = 0
    width: int = 0
    count: int = 1
    flags: int = 0
    used: int = 2**32 - 1
    target: str = ""


@dataclass
class Program:
    """One entry, ready for the engine."""

    entry: str
    instructions: np.ndarray
    constants: np.ndarray
    suspects: np.ndarray
    sites: list[tuple[int, ...]]  # of each instruction: its line of the PTX, and `Operation.site`
    parameters: list[Parameter]
    register_bytes: int
    predicates: int
    suspect_count: int
    static_shared: int  # bytes
    dynamic_from: int  # where dynamic shared memory begins
    shared_spans: list[tuple[int, int]]  # of the static variables
    shared_granule: int  # bytes of the narrowest access to shared memory
    max_threads: int | None
    cluster: tuple[int, int, int]

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


class _Text:
    """The statements of an entry's body, and what its head says."""

    def __init__(self, ptx: str, entry: str) -> None:
        self.entry = entry
        self.registers: dict[str, str] = {}  # name or prefix -> type
        self.symbols: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.operations: list[Operation] = []
        self.spans: list[tuple[int, int]] = []
        head, body, line = _cut(ptx, entry)
        self._shared(ptx)
        self.parameters = self._parameters(head)
        found = re.search(r"\.maxntid\s+([\d, ]+)", head)
        self.max_threads = int(np.prod([int(n) for n in found[1].split(",")])) if found else None
        found = re.search(r"\.reqnctapercluster\s+([\d, ]+)", head)
        dims = [int(n) for n in found[1].split(",")] if found else []
        self.cluster = (*dims, 1, 1, 1)[:3]
        self._sites: dict[tuple[int, int], tuple[int, ...]] = {}
        self._site: tuple[int, ...] = ()
        self._checked: set[str] = set()  # operands
        self._body(body, line)
        known = {name for name, at in self.labels.items() if at < len(self.operations)}
        for op in self.operations:
            if op.target and op.target not in known:
                raise self.fail(op.line, f"{op.mnemonic} {op.target}", f"{op.target} is not known")

    def fail(self, line: int, statement: str, why: str) -> PtxFault:
        place = f"in line {line} of the PTX: {statement.strip()}"
        return PtxFault("compile", f"{self.entry}: {why} {place}")

    # ---- declarations ----

    def _shared(self, ptx: str) -> None:
        """Static variables one after another with a gap; dynamic memory behind them."""
        at = 0
        declaration = r"^\s*\.shared(?: \.align (\d+))? \.(\w+) (\S+?)(?:\[(\d+)\])?;"
        for declared in re.finditer(declaration, ptx, re.M):
            align, kind, name, count = declared.groups()
            size = BITS[kind] // 8 * int(count or 1)
            at = -(-at // 16) * 16 if at else 0
            at = -(-at // int(align or 1)) * int(align or 1)
            self.symbols[name] = SHARED_BASE + at
            self.spans.append((at, at + size))
            at += size + 16
        self.static = sum(b - a for a, b in self.spans)
        self.dynamic_from = -(-at // 128) * 128
        for name in re.findall(r"^\s*\.extern \.shared[^;]*?(\w+)\[\];", ptx, re.M):
            self.symbols[name] = SHARED_BASE + self.dynamic_from

    def _parameters(self, head: str) -> list[Parameter]:
        found, at = [], 0
        pointer = r"(?: \.ptr(?: \.(?!align)\w+)*(?: \.align \d+)?)?"
        for align, kind, name, count in re.findall(
            rf"\.param(?: \.align (\d+))? \.(\w+){pointer} (\w+)(?:\[(\d+)\])?", head
        ):
            size = BITS[kind] // 8 * int(count or 1)
            step = int(align or BITS[kind] // 8)
            at = -(-at // step) * step
            self.symbols[name] = at
            found.append(Parameter(kind, size, at))
            at += size
        return found

    # ---- statements ----

    def _body(self, body: str, line: int) -> None:
        scopes: list[dict[str, str]] = [{}]
        serial = 0
        used = 2**32 - 1
        for row in body.split("\n"):
            line += 1
            rest = row.partition("//")[0].strip()
            if rest.startswith((".loc ", ".loc\t")):
                self._locate(rest)
                continue
            if rest.startswith(".pragma"):
                found = re.search(r"used_bytes_mask (\w+)", rest)
                used = int(found[1], 0) if found else used
                continue
            while rest:
                if rest[0] == "{":
                    scopes.append({})
                    rest = rest[1:].lstrip()
                elif rest[0] == "}":
                    scopes.pop()
                    rest = rest[1:].lstrip()
                    if not scopes:
                        return
                elif found := re.match(r"([$\w]+):", rest):
                    self.labels[found[1]] = len(self.operations)
                    rest = rest[found.end() :].lstrip()
                else:
                    statement, end, rest = rest.partition(";")
                    rest = rest.lstrip()
                    if not end:
                        raise self.fail(line, statement, "no end of the statement")
                    if statement.startswith(".shared"):
                        pass  # placed by _shared
                    elif statement.startswith(".reg"):
                        serial += 1
                        self._declare(statement, scopes[-1], serial if len(scopes) > 1 else 0)
                    else:
                        self._statement(statement, line, scopes, used)
                        used = 2**32 - 1

    def _declare(self, statement: str, scope: dict[str, str], serial: int) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        for name in names.split(","):
            plain = re.sub(r"<\d+>", "", name).strip()
            own = f"{plain}@{serial}" if serial else plain
            scope[plain] = own
            self.registers[own] = kind

    def _locate(self, statement: str) -> None:
        """.loc file line column, function_name label, inlined_at file line column"""
        numbers = [int(n) for n in re.findall(r"(?<![\w$])\d+", statement)]
        _, row, column, *inlined = numbers
        callers: tuple[int, ...] = ()
        if "inlined_at" in statement:
            _, up, up_column = inlined[-3:]
            callers = self._sites.get((up, up_column), (up,))
        if row:
            self._site = (row, *callers)
            self._sites[row, column] = self._site

    def kind(self, name: str) -> str:
        """Type of a register."""
        if name not in self.registers:
            self.registers[name] = self.registers[name.rstrip("0123456789")]
        return self.registers[name]

    def is_register(self, token: str) -> bool:
        return token not in ("", "_") and _number(token) is None and token not in self.symbols

    def _statement(self, statement: str, line: int, scopes: list[dict], used: int) -> None:
        guard, negate, whole = "", False, statement
        if statement[0] == "@":
            guard, _, statement = statement[1:].replace("\t", " ").partition(" ")
            negate, guard = guard[0] == "!", guard.lstrip("!")
        mnemonic, _, rest = statement.replace("\t", " ").strip().partition(" ")

        def resolve(token: str) -> str:
            for scope in reversed(scopes):
                if token in scope:
                    return scope[token]
            return token

        # The outermost scope gives names as they are.
        operands = [_operand(part, resolve if len(scopes) > 1 else str) for part in _split(rest)]
        op = Operation(mnemonic, line, self._site, guard=resolve(guard), negate=negate, used=used)
        try:
            self._operate(op, operands)
            for token in {*op.writes, *op.reads, op.base, op.guard} - self._checked:
                if self.is_register(token):
                    BITS[self.kind(token)]
                self._checked.add(token)
        except (KeyError, ValueError, IndexError) as error:
            raise self.fail(line, whole, f"{error!s} is not known") from None
        if guard and mnemonic.startswith(MEETING):
            raise self.fail(line, whole, "a guard where lanes meet is not executed,")
        self.operations.append(op)

    def _operate(self, op: Operation, operands: list) -> None:
        name, *modifiers = op.mnemonic.split(".")
        if name in ("ld", "st"):
            self._memory(op, name, modifiers, operands)
        elif op.mnemonic in ("bra", "bra.uni"):
            op.target = operands[0]
        elif op.mnemonic in ("ret", "exit"):
            pass
        elif name == "mov" and isinstance(operands[1], str) and operands[1] in special_registers():
            op.mnemonic, op.writes = "mov.special", [operands[0]]
            op.offset = special_registers().index(operands[1])
        elif name == "mov" and any(isinstance(o, list) for o in operands):
            to, source = operands
            way = "unpack" if isinstance(to, list) else "pack"
            op.mnemonic = f"{op.mnemonic}.{len(to if way == 'unpack' else source)}.{way}"
            op.writes = to if way == "unpack" else [to]
            op.reads = [source] if way == "unpack" else source
        else:
            if op.mnemonic.startswith(("cp.async.ca.", "cp.async.cg.")):
                op.width = int(operands.pop())
                if op.width not in (4, 8, 16):
                    raise ValueError(f"a copy of {op.width} bytes")
            self._plain(op, operands)

    def _plain(self, op: Operation, operands: list) -> None:
        """An instruction whose operands lie as its handler's letters say."""
        if op.mnemonic.startswith("cvt.") and operands[1] in self:
            wide = f"{op.mnemonic}.wide"
            if BITS[self.kind(operands[1])] == 64 and wide in handlers():
                op.mnemonic = wide
        results, sources = _letters_of(op.mnemonic)
        flat: list = []
        for operand in operands:
            if isinstance(operand, tuple) and operand[0] == "|":
                flat += operand[1:]
            elif isinstance(operand, tuple) and op.base:  # another address
                if operand[1]:
                    raise ValueError("an offset of the second address")
                flat.append(operand[0])
            elif isinstance(operand, tuple):
                op.base, op.offset = operand
            elif operand != "_" or results:
                flat.append(operand)
        if results == "wp" and len(flat) == len(sources) + 1:
            flat.insert(1, "_")
        wanted = len(results) + len(sources.replace("a", ""))
        if len(flat) != wanted:
            raise ValueError(f"{len(flat)} operands for {wanted}")
        op.writes, op.reads = flat[: len(results)], flat[len(results) :]
        for k, read in enumerate(op.reads):
            if read.startswith("!"):
                if not op.mnemonic.startswith(("vote.", "bar.")):
                    raise KeyError(read)
                op.reads[k], op.negate = read[1:], True

    def _memory(self, op: Operation, name: str, modifiers: list[str], operands: list) -> None:
        *said, kind = modifiers
        op.width, op.space, op.count = BITS[kind] // 8, GENERIC, 1
        for word in said:
            if word in SPACES:
                op.space = SPACES[word]
            elif word in ("v2", "v4", "v8"):
                op.count = int(word[1])
            elif word not in HINTS:
                raise KeyError(f".{word}")
            if word == "nc":
                op.flags |= READ_ONLY_PATH
        if kind.startswith("s"):
            op.flags |= SIGNED
        values, address = (operands[0], operands[1]) if name == "ld" else (operands[1], operands[0])
        values = values if isinstance(values, list) else [values]
        op.base, op.offset = address
        if name == "ld":
            op.mnemonic = "load.param" if op.space == SPACES["param"] else "load"
            op.writes = values
        else:
            op.mnemonic, op.reads = "store", values
        if BITS[self.kind(values[0])] == 64 if values[0] in self else op.width == 8:
            op.flags |= WIDE_TARGET
        if op.mnemonic == "load.param":
            op.offset += self.symbols[op.base]
            op.base = ""

    def __contains__(self, name: object) -> bool:
        return (isinstance(name, str) and name.startswith("%")) or name in self.registers


def _cut(ptx: str, entry: str) -> tuple[str, str, int]:
    """Head of the entry, what follows its brace, and the number of the line with the brace."""
    start = ptx.find(f".entry {entry}(")
    if start < 0:
        raise PtxFault("compile", f"no entry {entry} in the PTX")
    opened = re.compile(r"^\{", re.M).search(ptx, start)
    return ptx[start : opened.start()], ptx[opened.end() :], ptx.count("\n", 0, opened.end())


def _split(text: str) -> list[str]:
    """Operands, at commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, resolve) -> str | list[str] | tuple:
    """A register, number or symbol; {list}; [base+offset] as (base, offset); a|b as ("|", a, b)."""
    if text[0] == "{":
        return [resolve(part.strip()) for part in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return resolve(base.strip()), int(offset or "0", 0)
    if "|" in text:
        return ("|", *(resolve(part.strip()) for part in text.split("|")))
    return resolve(text)


@functools.cache
def _number(text: str) -> int | None:
    """Bits of an immediate operand; None for a name."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(?:0[xX])?[0-9a-fA-F]+U?", text) and text[0] in "-0123456789":
        return int(text.rstrip("U"), 0)
    return None


class _Places:
    """Rows for registers and constants."""

    def __init__(self, text: _Text) -> None:
        self.text = text
        self.constants = bytearray()
        self._known: dict[tuple[int, int], int] = {}
        self._held: dict[tuple[str, str], int] = {}
        names, self.unwritten = _registers(text)
        self.places: dict[str, int] = {}
        self.register_bytes = 0
        for slot in (8, 4):
            for name in (n for n in names if _slot(text.kind(n)) == slot):
                self.places[name] = self.register_bytes
                self.register_bytes += slot * LANES
        predicates = (n for n in names if text.kind(n) == "pred")
        self.predicates = {name: k for k, name in enumerate(predicates)}

    def of(self, token: str, letter: str) -> int:
        """What an instruction holds for an operand."""
        if (token, letter) not in self._held:
            self._held[token, letter] = self._of(token, letter)
        return self._held[token, letter]

    def _of(self, token: str, letter: str) -> int:
        if letter == "p":
            if token == "_":
                return -1
            value = _number(token)
            return self.predicates[token] if value is None else -2 if value else -1
        slot = 8 if letter == "l" else 4
        if token in self.places:
            if _slot(self.text.kind(token)) != slot:
                raise KeyError(f"{token} of {self.text.kind(token)}")
            return self.places[token]
        value = _number(token)
        if value is None:
            value = self.text.symbols[token]
        return self._constant(value % 2 ** (8 * slot), slot)

    def _constant(self, value: int, slot: int) -> int:
        key = value, slot
        if key not in self._known:
            self.constants += b"\0" * (-len(self.constants) % 64)
            self._known[key] = ~len(self.constants)
            self.constants += struct.pack("<Q" if slot == 8 else "<I", value) * LANES
        return self._known[key]


def _slot(kind: str) -> int:
    return 0 if kind == "pred" else 8 if BITS[kind] == 64 else 4


def _registers(text: _Text) -> tuple[list[str], dict[str, int]]:
    """All registers; numbers of those that some path reads before it writes them."""
    ops, names = text.operations, []
    bits: dict[str, int] = {}

    def mask(tokens: list[str]) -> int:
        out = 0
        for token in tokens:
            if token not in bits:
                bits[token] = 0
                if text.is_register(token):
                    bits[token] = 1 << len(names)
                    names.append(token)
            out |= bits[token]
        return out

    starts = {0, *text.labels.values()}
    starts |= {at + 1 for at, op in enumerate(ops) if op.mnemonic in CONTROL}
    cuts = sorted(s for s in starts if s < len(ops))
    index = {start: k for k, start in enumerate(cuts)}
    used, made, after = [], [], []  # by block: read before written, written, blocks that may follow
    for k, (start, stop) in enumerate(zip(cuts, [*cuts[1:], len(ops)], strict=True)):
        u = m = 0
        for op in ops[start:stop]:
            u |= mask([*op.reads, op.base, op.guard]) & ~m
            writes = mask(op.writes)
            m |= 0 if op.guard else writes
        used.append(u)
        made.append(m)
        last = ops[stop - 1]
        ends = last.mnemonic in CONTROL and not last.guard
        after.append([] if ends or k + 1 == len(cuts) else [k + 1])
        if last.target:
            after[-1].append(index[text.labels[last.target]])
    live, before = list(used), None
    while live != before:
        before = list(live)
        for k in reversed(range(len(live))):
            for other in after[k]:
                live[k] |= live[other] & ~made[k]
    unwritten = (name for name in names if live and live[0] & bits[name])
    return names, {name: k for k, name in enumerate(unwritten)}


@functools.cache
def _letters_of(mnemonic: str) -> list[str]:
    return handlers()[mnemonic].operands.split(":")


def decode(ptx: str, entry: str) -> Program:
    """The program of one entry."""
    text = _Text(ptx, entry)
    places = _Places(text)
    ops = text.operations
    records = []
    suspects: list[int] = []
    numbers = places.unwritten
    for op in ops:
        touched = [2 * numbers[n] for n in (*op.reads, op.base, op.guard) if n in numbers]
        touched += [2 * numbers[n] + 1 for n in op.writes if n in numbers]
        try:
            records.append(_encoded(op, text, places, len(suspects) if touched else -1))
        except (KeyError, ValueError) as error:
            statement = ptx.split("\n")[op.line - 1]
            raise text.fail(op.line, statement, f"{error!s} is not known") from None
        suspects += [*touched, -1] if touched else []
    table = np.array(records, INSTRUCTION)
    shared = [op.width for op in ops if op.space in (1, 2) and op.mnemonic in ("load", "store")]
    return Program(
        entry, table, np.frombuffer(bytes(places.constants or b"\0"), np.uint8).copy(),
        np.array(suspects or [-1], np.int32), [(op.line, *op.site) for op in ops],
        text.parameters, places.register_bytes,
        len(places.predicates) + 1, len(numbers), text.static, text.dynamic_from, text.spans,
        min(shared, default=4),
        text.max_threads, text.cluster,
    )  # fmt: skip


def _encoded(op: Operation, text: _Text, places: _Places, suspect: int) -> tuple:
    """An instruction's fields, in INSTRUCTION's order."""
    handler = handlers()[op.mnemonic]
    wide = "l" if op.flags & WIDE_TARGET else "w"
    operands = []
    for tokens, letters in zip((op.writes, op.reads), _letters_of(op.mnemonic), strict=True):
        letters = letters.replace("a", "").replace("v", wide * op.count)
        if len(tokens) != len(letters):
            raise ValueError(f"{len(tokens)} operands for {letters!r}")
        rows = [places.of(*pair) for pair in zip(tokens, letters, strict=True)]
        operands.append(rows + [0] * (8 - len(rows)))
    base, wide_base = 0, False
    if op.base:
        narrow = _slot(text.kind(op.base)) == 4 if op.base in places.places else op.space in (1, 2)
        base, wide_base = places.of(op.base, "w" if narrow else "l"), not narrow
    return (
        handler.number, op.negate, op.space, op.width, op.count, op.flags, wide_base,
        places.of(op.guard, "p") if op.guard else -1,
        text.labels[op.target] if op.target else -1,
        suspect, base, op.used, 0, op.offset, *operands,
    )  # fmt: skip
