"""Every instruction that the engine knows, against exact integers, fractions and NumPy's scalars.

A formula takes one lane's operands: Python integers and bools, NumPy's floats. The same operands
run twice: in warps whose lanes all come, and behind a branch that only some lanes take, whose
others must keep what they had.
"""

import itertools
import operator
import re
from fractions import Fraction
from functools import partial
from math import inf

import ml_dtypes
import numpy as np
import pytest

from .api import handlers, special_registers
from .launch import Buffer, PtxFault, launch

CASES = {1: 256, 2: 1024, 3: 1024, 4: 1024, 5: 1024}  # of operands, by their number
FLOATS = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
NANS = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}  # PTX ISA: NaN results are canonical
INTEGERS = [sign + size for sign in "us" for size in ("8", "16", "32", "64")]


def bits_of(kind):
    return 1 if kind == "pred" else int(kind.removesuffix("x2").lstrip("usbf"))


def decoded(raw, kind):
    """What lanes take their registers' bits for."""
    raw = [int(r) & (1 << bits_of(kind)) - 1 for r in raw]
    if kind == "pred":
        return [bool(r) for r in raw]
    if kind in FLOATS:
        return np.array(raw, f"u{bits_of(kind) // 8}").view(FLOATS[kind])
    half = 1 << bits_of(kind) - 1
    return [r - 2 * half if kind[0] == "s" and r >= half else r for r in raw]


def encoded(value, kind, register):
    """Bits of the register that gets the value: a signed one fills it with its sign."""
    if kind in FLOATS:
        canonical = value != value and kind in NANS
        return NANS[kind] if canonical else int(value.view(f"u{bits_of(kind) // 8}"))
    (value,) = decoded([value], kind)
    return value & (1 << register) - 1


def packed(parts, size):
    return sum(part << size * k for k, part in enumerate(parts))


# ---- the formulas ----


def quotient(a, b):
    """Toward zero; PTX leaves open what it is by zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def remainder(a, b):
    return a - quotient(a, b) * b if b else -1


def insert(a, b, at, length):
    mask = (1 << (length & 255)) - 1 << (at & 255)
    return b & ~mask | a << (at & 255) & mask


def permute(a, b, selector):
    both = (a | b << 32).to_bytes(8, "little")
    names = [selector >> 4 * k & 15 for k in range(4)]
    return packed([both[n] if n < 8 else both[n - 8] // 128 * 255 for n in names], 8)


def rounded(exact, to):
    """The float next to a fraction; of two, the even one."""
    try:
        near = np.float64(float(exact))
    except OverflowError:
        return to(inf if exact > 0 else -inf)
    if to is np.float32 and float(near) != exact and not int(near.view("u8")) & 1:
        # Rounded to odd, it is no tie of float32 unless the fraction is one.
        near = np.nextafter(near, inf if exact > Fraction(float(near)) else -inf)
    return to(near)


def fused(a, b, c):
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        return c if np.isfinite(a) and np.isfinite(b) else a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    below_zero = np.signbit(a) != np.signbit(b) and np.signbit(c)
    return rounded(exact, type(a)) if exact else type(a)(-0.0 if below_zero else 0.0)


def unordered(a, b):
    return bool(a != a or b != b)


def ordered(compare, a, b):
    return not unordered(a, b) and compare(a, b)


def extreme(pick, a, b):
    """A NaN loses, and -0 is less than +0."""
    if unordered(a, b):
        return b if a != a else a
    return pick(a, b, key=lambda x: (x, not np.signbit(x)))


def flushed(value):
    """Of .ftz: a subnormal float32 is a zero of its sign."""
    if type(value) is np.float32 and abs(value) < np.finfo(np.float32).tiny:
        return np.copysign(np.float32(0), value)
    return value


COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
# By an instruction's name without its types.
ON_INTEGERS = {
    "neg": operator.neg,
    "abs": abs,
    "not": operator.invert,
    "mov": lambda a: a,
    "cvta.to.global": lambda a: a,
    "cvta.global": lambda a: a,
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.hi": lambda a, b, size: a * b >> size,
    "mul.wide": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": quotient,
    "rem": remainder,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": lambda a, by: a << min(by, 64),
    "shr": operator.rshift,
    "shf.l.wrap": lambda low, high, by: (high << 32 | low) << (by & 31) >> 32,
    "shf.r.wrap": lambda low, high, by: (high << 32 | low) >> (by & 31),
    "prmt": permute,
    "bfi": insert,
    "clz": lambda a, size: size - a.bit_length(),
    "popc": int.bit_count,
    "selp": lambda a, b, p: a if p else b,
    **{f"setp.{name}": f for name, f in COMPARISONS.items()},
}
ON_FLOATS = {
    "neg": operator.neg,
    "abs": abs,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "add.rn": operator.add,
    "sub.rn": operator.sub,
    "mul.rn": operator.mul,
    "div.rn": operator.truediv,
    "rcp.rn": lambda a: type(a)(1) / a,
    "sqrt.rn": np.sqrt,
    "fma.rn": fused,
    "min": partial(extreme, min),
    "max": partial(extreme, max),
    "setp.num": lambda a, b: not unordered(a, b),
    "setp.nan": unordered,
    **{f"setp.{n}": partial(ordered, f) for n, f in COMPARISONS.items()},
    **{f"setp.{n}u": lambda a, b, f=f: unordered(a, b) or f(a, b) for n, f in COMPARISONS.items()},
}
SIZED = ("mul.hi", "clz")  # whose formulas take the bits of their type
# Results and sources that are not all of the instruction's type T; W has twice its size.
SIGNATURES = {
    "mul.wide": "W:TT", "mad.wide": "W:TTW", "shl": "T:Tu", "shr": "T:Tu", "bfi": "T:TTuu",
    "clz": "u:T", "popc": "u:T", "selp": "T:TTp",
}  # fmt: skip
FAMILIES = sorted({"cvt", *(name.split(".")[0] for name in (*ON_INTEGERS, *ON_FLOATS))})
# What tests of their own execute: those of a warp and of memory below, those of threads that wait
# for one another or for copies in other files.
IN_A_WARP = {
    *(f"shfl.sync.{kind}.b32" for kind in ("up", "down", "bfly", "idx")),
    *(f"vote.sync.{kind}" for kind in ("any.pred", "all.pred", "ballot.b32")),
}
OF_MEMORY = {"mov.special", "load", "load.param", "store"}
ELSEWHERE = {
    "bra", "bra.uni", "ret", "exit",
    "bar.warp.sync", "bar.sync", "barrier.sync",
    "bar.red.popc.u32", "bar.red.and.pred", "bar.red.or.pred",
    "barrier.cluster.arrive.release.aligned", "barrier.cluster.arrive.relaxed.aligned",
    "barrier.cluster.wait.acquire.aligned",
    "mapa.shared::cluster.u32", "cp.async.ca.shared.global", "cp.async.cg.shared.global",
    "cp.async.wait_all", "cp.async.mbarrier.arrive.noinc.shared.b64",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
    "mbarrier.init.shared.b64", "mbarrier.arrive.expect_tx.shared.b64",
    "mbarrier.try_wait.parity.shared.b64", "mbarrier.test_wait.parity.shared.b64",
    "fence.proxy.async.shared::cta",
}  # fmt: skip


def conversion(to, source):
    """(types of results, of sources, formula) of a cvt."""
    if to in ("f16x2", "bf16x2"):
        half = to.removesuffix("x2")

        def pair(high, low):
            return packed([encoded(FLOATS[half](a), half, 16) for a in (low, high)], 16)

        return ["b32"], [source] * 2, pair
    if to not in FLOATS:
        return [to], [source], lambda a: a
    return [to], [source], FLOATS[to] if source in FLOATS else lambda a: rounded(a, FLOATS[to])


def meaning(name):
    """(types of results, of sources, formula) of an instruction; KeyError where there is none."""
    if found := re.fullmatch(r"mov\.b(\d+)\.(\d)\.(un)?pack", name):
        count, size = int(found[2]), int(found[1]) // int(found[2])
        whole, parts = [f"b{found[1]}"], [f"b{size}"] * count
        if found[3]:
            return parts, whole, lambda a: [a >> size * k for k in range(count)]
        return whole, parts, lambda *a: packed(a, size)
    *words, kind = name.removesuffix(".wide").split(".")
    op = ".".join(word for word in words if word != "ftz")
    if words[0] == "cvt":
        results, sources, formula = conversion(words[-1], kind)
    else:
        if op in ("mov", "selp") and kind != "pred":
            kind = f"b{bits_of(kind)}"  # floats too are bits to them
        formula = (ON_FLOATS if kind in FLOATS else ON_INTEGERS)[op]
        if op in SIZED:
            formula = partial(formula, size=bits_of(kind))
        usual = "T:" + "T" * len(handlers()[name].operands.split(":")[1])
        signature = "p:TT" if words[0] == "setp" else SIGNATURES.get(op, usual)
        letters = {"T": kind, "W": f"{kind[0]}{2 * bits_of(kind)}", "u": "u32", "p": "pred"}
        results, sources = ([letters[c] for c in side] for side in signature.split(":"))
    if "ftz" in words:
        return results, sources, lambda *a: flushed(formula(*map(flushed, a)))
    return results, sources, formula


# ---- operands ----

# The first are met in all pairs.
SPECIAL_FLOATS = [
    inf, 0.0, 1.0, 0.5, 2.0**-24, 2.0**-53, 2.0**-126, 2.0**-126 - 2.0**-149, 2.0**-149, 2.0**103,
    3.4028235e38, np.finfo(np.float64).max, np.finfo(np.float64).tiny, 5e-324, 1 + 2.0**-23,
    *(1 + k * 2.0**-p for p in (8, 11, 24) for k in (1, 3)),  # ties of bfloat16, float16, float32
    2.0**-25, 3 * 2.0**-25, 2.0**-14, 65504.0, 65519.996, 65520.0, 3.4028235677973366e38,
    2.0**-126 - 2.0**-150, 2.0**-150, 3 * 2.0**-150,
]  # fmt: skip
SPECIAL_INTEGERS = [
    0, 1, 2, 15, 16, 31, 32, 33, 63, 64,
    *(2**b - k for b in (15, 16, 31, 32, 63, 64) for k in (0, 1, 2)),
    3, 5, 7, 8, 65, 127, 128, 255, 256, 257, 2**24 + 1, 2**24 + 3, 2**32 + 1, 2**53 + 1, 2**54 + 6,
    2**60 + 2**36 + 1,  # by way of float64 a tie of float32
]  # fmt: skip


def special(kind):
    """Bits of special values."""
    if kind not in FLOATS:
        return list(dict.fromkeys(n % 2 ** bits_of(kind) for n in SPECIAL_INTEGERS))
    floats = np.array(SPECIAL_FLOATS).astype(FLOATS[kind]).view(f"u{bits_of(kind) // 8}").tolist()
    sign, signalling = 1 << bits_of(kind) - 1, floats[0] + 5
    quiet = encoded(FLOATS[kind]("nan"), kind, 64) | sign
    return list(dict.fromkeys([signalling, quiet, *(f | s for f in floats for s in (0, sign))]))


def operands(sources, rng):
    """Bits of each source, all pairs of special values first where they fit, then drawn."""
    pools, cases = [special(kind) for kind in sources], CASES[len(sources)]
    columns = []
    for kind, pool in zip(sources, pools, strict=True):
        column = rng.integers(0, 2**64, cases, dtype=np.uint64) >> rng.integers(0, 64, cases, "u8")
        if kind in FLOATS:
            usual = rng.normal(size=cases).astype(FLOATS[kind]).view(f"u{bits_of(kind) // 8}")
            column = np.where(rng.random(cases) < 0.7, usual, column)
        picked = rng.choice(np.array(pool, np.uint64), cases)
        columns.append(np.where(rng.random(cases) < 0.4, picked, column))
    if len(sources) < 3:
        pairs = sorted(
            itertools.product(*map(enumerate, pools)), key=lambda p: max(k for k, _ in p)
        )
        for column, *first in zip(columns, *pairs[: cases * 3 // 4], strict=True):
            column[: len(first)] = [value for _, value in first]
    return columns


def branch(rng, threads=1024):
    """Who takes the branch: all threads of the first half, some of the second."""
    return np.concatenate([np.ones(threads, bool), rng.random(threads) < 0.5])


def filler(rng, registers, threads):
    """Bits of registers that stay where the branch is not taken."""
    return [rng.integers(0, 2**r, threads, dtype=np.uint64) for r in registers]


# ---- the kernel around an instruction ----


def kernel(parameters, lines, directives=""):
    head = ".version 8.7\n.target sm_90\n.address_size 64\n.extern .shared .align 32 .b8 memory[];"
    entry = f".visible .entry run({parameters}) {directives}"
    return "\n".join([head, entry, "{", *lines, "ret;", "}"])


def execute(statement, results, sources, taken, columns, before, memory=None, block=None):
    """Bits of the results: `before` where the branch is not taken.

    `results` and `sources` are bits of the registers %d0.. and %s0.. of the statement, which may
    use 32 bytes of shared memory at %at, a buffer, and a struct as the parameter `block`.
    """
    registers = [(f"%s{k}", r) for k, r in enumerate(sources)]
    registers += [(f"%d{k}", r) for k, r in enumerate(results)]
    row = 8 * (1 + len(registers))
    lines = [
        ".reg .u32 %block, %thread, %t, %at; .reg .u64 %from, %to; .reg .pred %taken;",
        "mov.u32 %thread, %tid.x; mov.u32 %at, memory; mad.lo.u32 %at, %thread, 32, %at;",
        "mov.u32 %block, %ctaid.x; mad.lo.u32 %thread, %block, 64, %thread;",
        f"ld.param.u64 %from, [from]; mad.wide.u32 %from, %thread, {row}, %from;",
        f"ld.param.u64 %to, [to]; mad.wide.u32 %to, %thread, {8 * len(results)}, %to;",
        "ld.global.u32 %t, [%from]; setp.ne.u32 %taken, %t, 0;",
    ]
    for k, (name, register) in enumerate(registers):
        at = f"[%from+{8 * k + 8}]"
        if register == 1:
            lines.append(f".reg .pred {name}; ld.global.u32 %t, {at}; and.b32 %t, %t, 1;")
            lines.append(f"setp.ne.u32 {name}, %t, 0;")
        else:  # 16 bits with their sign, which fills the rest of the engine's row
            kind = "s16" if register == 16 else f"b{register}"
            lines.append(f".reg .b{register} {name}; ld.global.{kind} {name}, {at};")
    lines += [f"@!%taken bra past;\n{statement};\npast:"]
    for k, register in enumerate(results):
        if register == 1:
            lines.append(f"selp.u32 %t, 1, 0, %d{k}; st.global.u32 [%to+{8 * k}], %t;")
        else:
            lines.append(f"st.global.b{register} [%to+{8 * k}], %d{k};")
    given = Buffer.from_array(np.stack([taken.astype(np.uint64), *columns, *before], 1))
    got = Buffer.empty(8 * taken.size * max(1, len(results)))
    parameters, arguments = ".param .u64 from, .param .u64 to", [given, got]
    if block is not None:
        parameters += f", .param .align 32 .b8 block[{block.nbytes}]"
        arguments.append(block)
    buffers = [given, got, *([memory] if memory else [])]
    text = kernel(parameters, lines)
    launch(text, "run", (taken.size // 64,), (64,), 2048, arguments, buffers=buffers, count=False)
    raw = got.to_numpy(np.uint64, (taken.size, -1))
    return [raw[:, k] & np.uint64(2**register - 1) for k, register in enumerate(results)]


def one_nan(bits, kind):
    """Bits of floats whose NaNs are all the same."""
    nan = np.isnan(bits.astype(f"u{bits_of(kind) // 8}").view(FLOATS[kind]))
    return np.where(nan, np.uint64(2 ** bits_of(kind) - 1), bits)


def written(name, results, sources):
    """The instruction in PTX, of registers %d0.. and %s0.."""
    mnemonic = re.sub(r"\.\d\.(un)?pack$|\.wide$", "", name)
    sides = []
    for letter, kinds in (("d", results), ("s", sources)):
        names = ", ".join(f"%{letter}{k}" for k, _ in enumerate(kinds))
        sides.append(f"{{{names}}}" if "pack" in name and len(kinds) > 1 else names)
    return f"{mnemonic} {', '.join(sides)}"


def forms(name, results, sources):
    """Bits of the registers of results and sources: a cvt takes wider ones than its types."""
    choices = []
    for side, kinds in enumerate((results, sources)):
        for kind in kinds:
            least = bits_of(kind)
            if name.endswith(".wide") and side:
                choices.append([64])
            elif name.startswith("cvt.") and kind in INTEGERS:
                choices.append([r for r in (16, 32) if r >= least] or [64])
            else:
                choices.append([1 if kind == "pred" else max(16, least)])
    for registers in itertools.product(*choices):
        yield registers[: len(results)], registers[len(results) :]


@np.errstate(all="ignore")  # infinities and NaNs are what it is about
def check(name):
    """Hold an instruction against its formula, in each form."""
    results, sources, formula = meaning(name)
    rng = np.random.default_rng(len(name))
    columns = operands(sources, rng)
    taken = branch(rng, columns[0].size)
    lanes = zip(*map(decoded, columns, sources), strict=True)
    values = [formula(*lane) for lane in lanes]
    values = zip(*values, strict=True) if len(results) > 1 else [values]
    values = list(zip(results, values, strict=True))
    columns = [np.tile(column, 2) for column in columns]
    statement = written(name, results, sources)
    for to, of in forms(name, results, sources):
        before = filler(rng, to, taken.size)
        got = execute(statement, to, of, taken, columns, before)
        for (kind, value), register, found, old in zip(values, to, got, before, strict=True):
            wanted = np.array([encoded(v, kind, register) for v in value], np.uint64)
            wanted = np.where(taken, np.tile(wanted, 2), old)
            if kind == "f64" or (kind == "f32" and name.startswith(("neg", "abs"))):
                wanted, found = one_nan(wanted, kind), one_nan(found, kind)  # payloads may stay
            wrong = np.flatnonzero(wanted != found)
            assert not wrong.size, (
                f"{statement}, registers of {to} and {of} bits: {wrong.size} wrong, first of "
                f"{[hex(c[wrong[0]]) for c in columns]}, branch taken: {taken[wrong[0]]}: "
                f"{found[wrong[0]]:#x}, not {wanted[wrong[0]]:#x}"
            )


def of_family(family):
    return [name for name in handlers() if name.split(".")[0] == family and name not in OF_MEMORY]


def test_no_instruction_is_without_a_formula():
    by_formula = {name for family in FAMILIES for name in of_family(family)}
    assert set(handlers()) - by_formula == IN_A_WARP | OF_MEMORY | ELSEWHERE


@pytest.mark.parametrize("family", FAMILIES)
def test_instructions(family):
    names = of_family(family)
    assert names
    for name in names:
        check(name)


# ---- within a warp ----


LANES = np.uint64(1) << np.arange(32, dtype=np.uint64)


def named_lanes(taken, rng):
    """The mask of each thread: all lanes of its warp that come, or, in odd warps, of its part."""
    warp = np.arange(taken.size) // 32
    part = 2 * warp + (warp % 2 & rng.integers(0, 2, taken.size))
    masks = np.zeros(part.max() + 1, np.uint64)
    np.bitwise_or.at(masks, part, np.where(taken, LANES[np.arange(taken.size) % 32], 0))
    return masks[part]


def source_lane(kind, lane, b, c):
    """PTX ISA, shfl: the lane to read, and whether it is inside of the segment."""
    segment, clamp, b = c >> 8 & 31, c & 31, b & 31
    low, last = lane & segment, lane & segment | clamp & ~segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | b & ~segment}[kind]
    inside = source >= last if kind == "up" else source <= last
    return (source, True) if inside else (lane, False)


@pytest.mark.parametrize("name", sorted(n for n in IN_A_WARP if n.startswith("shfl")))
def test_shuffles(name):
    kind = name.split(".")[2]
    rng = np.random.default_rng(7)
    taken = branch(rng)
    mask = named_lanes(taken, rng)
    values, b, c = filler(rng, [32, 32, 32], taken.size)
    usual = np.uint64(0 if kind == "up" else 31)  # what a width of 32 passes
    c = np.where(rng.random(taken.size) < 0.5, usual, c)
    wanted, inside = values.copy(), np.zeros(taken.size, bool)
    for t in range(taken.size):
        source, inside[t] = source_lane(kind, t % 32, int(b[t]), int(c[t]))
        if not int(mask[t]) >> source & 1:  # which may not be read: the lane reads itself
            b[t] = t % 32 if kind == "idx" else 0
            source, inside[t] = source_lane(kind, t % 32, int(b[t]), int(c[t]))
        wanted[t] = values[t // 32 * 32 + source]
    before = filler(rng, [32, 1], taken.size)
    for result, count in (("%d0|%d1", 2), ("%d0", 1)):
        statement = f"{name} {result}, %s0, %s1, %s2, %s3"
        registers = [32, 1][:count]
        got = execute(statement, registers, [32] * 4, taken, [values, b, c, mask], before[:count])
        for found, value, old in zip(got, (wanted, inside), before, strict=False):
            np.testing.assert_array_equal(found, np.where(taken, value, old))


@pytest.mark.parametrize("negated", ["", "!"])
@pytest.mark.parametrize("name", sorted(n for n in IN_A_WARP if n.startswith("vote")))
def test_votes(name, negated):
    rng = np.random.default_rng(8)
    taken = branch(rng)
    mask = named_lanes(taken, rng)
    odds = rng.choice([0.0, 0.05, 0.5, 0.95, 1.0], taken.size // 32).repeat(32)
    yes = rng.random(taken.size) < odds
    ballots = ((yes ^ bool(negated)).reshape(-1, 32) @ LANES).repeat(32) & mask
    wanted = {"any": ballots != 0, "all": ballots == mask, "ballot": ballots}[name.split(".")[2]]
    register = 32 if name.endswith("b32") else 1
    (before,) = filler(rng, [register], taken.size)
    statement = f"{name} %d0, {negated}%s0, %s1"
    (got,) = execute(statement, [register], [1, 32], taken, [yes.astype("u8"), mask], [before])
    np.testing.assert_array_equal(got, np.where(taken, wanted, before))


def test_a_negated_operand_that_is_not_executed_is_an_error():
    with pytest.raises(PtxFault, match="'!%s1' is not known in line"):
        execute("and.pred %d0, %s0, !%s1", [1], [1, 1], np.ones(64, bool), [], [])


# ---- memory and special registers ----


def moves():
    """(.vector.type, type, bits of the registers, {them}): up to the 32 bytes of sm_100."""
    kinds = ["b8", "b16", "b32", "b64", *INTEGERS, "f32", "f64"]
    for kind, count, register in itertools.product(kinds, (1, 2, 4, 8), (16, 32, 64)):
        size = bits_of(kind)
        if size * count > 256 or register < size or (kind in FLOATS and register > size):
            continue
        vector = f".v{count}" if count > 1 else ""
        # A load moves the bits of a float as they are.
        plain = f"b{size}" if kind in FLOATS else kind
        names = ", ".join(f"%d{k}" for k in range(count))
        yield f"{vector}.{kind}", plain, [register] * count, f"{{{names}}}" if vector else names


@pytest.mark.parametrize(
    "store,load",
    [
        (None, ".global.nc"),
        (None, ".global.L1::no_allocate"),
        (None, ".param"),
        ("", ""),
        (".global", ".global"),
        (".global.cs", ".global.cs"),
        (".shared", ".shared"),
        (".shared::cta", ".shared::cta"),
    ],
)
def test_loads_and_stores(store, load):
    rng = np.random.default_rng(9)
    taken = branch(rng, 64)
    address = {".param": "block", ".shared": "%at", ".shared::cta": "%at"}.get(load, "%s0")
    # What is moved is all the same to most spaces: some of it is enough.
    every = store == "" or load == ".param"
    for words, kind, registers, names in list(moves())[:: 1 if every else 7]:
        columns, before = (filler(rng, registers, taken.size) for _ in range(2))
        if load == ".param":
            columns = [np.full_like(column, column[0]) for column in columns]
        stored = np.stack(columns, 1).astype(f"u{bits_of(kind) // 8}")
        memory = Buffer.from_array(stored if store is None else ~stored)
        block = np.frombuffer(stored[0].tobytes(), f"V{stored[0].nbytes}")[0]
        places = memory.ptr + stored[0].nbytes * np.arange(taken.size, dtype=np.uint64)
        statement = f"ld{load}{words} {names}, [{address}]"
        if store is not None:
            sources = re.sub(r"%d(\d+)", lambda found: f"%s{int(found[1]) + 1}", names)
            statement = f"st{store}{words} [{address}], {sources}; {statement}"
        sources = [64, *registers]
        columns = [places, *columns]
        got = execute(statement, registers, sources, taken, columns, before, memory, block)
        for k, register in enumerate(registers):
            wanted = np.array([encoded(int(v), kind, register) for v in stored[:, k]], np.uint64)
            np.testing.assert_array_equal(got[k], np.where(taken, wanted, before[k]), statement)
        if store is not None and address == "%s0":
            wanted = np.where(taken[:, None], stored, ~stored)
            found = memory.to_numpy(stored.dtype, stored.shape)
            np.testing.assert_array_equal(found, wanted, statement)


@pytest.mark.parametrize("cluster", [1, 2])
def test_special_registers(cluster):
    grid, block = (4, 3, 2), (4, 2, 5)
    registers = special_registers()
    lines = [".reg .u32 %value, %place; .reg .u64 %to; mov.u32 %place, 0;"]
    for name, lengths in (("%ctaid", grid), ("%tid", block)):
        for axis, length in reversed([*zip("xyz", lengths, strict=True)]):
            lines.append(f"mov.u32 %value, {name}.{axis};")
            lines.append(f"mad.lo.u32 %place, %place, {length}, %value;")
    lines.append("ld.param.u64 %to, [to];")
    lines.append(f"mad.wide.u32 %to, %place, {4 * len(registers)}, %to;")
    for k, register in enumerate(registers):
        lines.append(f"mov.u32 %value, {register}; st.global.u32 [%to+{4 * k}], %value;")
    lengths = (*reversed(grid), *reversed(block))
    at = np.arange(np.prod(lengths))
    target = Buffer.empty(4 * len(registers) * at.size)
    directive = f".reqnctapercluster {cluster}" if cluster > 1 else ""
    text = kernel(".param .u64 to", lines, directive)
    launch(text, "run", grid, block, 0, (target,), buffers=[target], count=False)
    *block_id, z, y, x = np.unravel_index(at, lengths)
    lane = at % np.prod(block) % 32
    wanted = [x, y, z, *block, *block_id[::-1], *grid, lane, block_id[-1] % cluster, cluster]
    wanted = np.stack([np.broadcast_to(w, at.size) for w in wanted], 1)
    np.testing.assert_array_equal(target.to_numpy(np.uint32, wanted.shape), wanted)
