"""Runs a kernel's sm_90 machine code, as nvdisasm prints it, one warp instruction at a time, and counts.

It counts what a GPU would issue: each instruction once for all lanes that are there together, whether its predicate lets them
through or not. It knows the instructions that the counted kernels run, and raises on any other. Nothing here says how long
an instruction takes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

LANES = np.arange(32)
PARAMETERS = 0x210  # where sm_90 has a kernel's arguments in constant bank 0
SHARED = 0x400  # and where a block's shared memory begins
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
ONES = np.uint64(0xFFFFFFFF)

Getter = Callable[["Warp"], np.ndarray]


class Memory:
    """Named arrays at addresses of their own, as far apart as it takes to notice what misses them."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.base = 1 << 40
        self.buffers: list[tuple[str, int, int]] = []

    def put(self, name: str, array: np.ndarray) -> int:
        begin = len(self.bytes) + 256
        padding = np.full(-(-array.nbytes // 256) * 256 - array.nbytes + 256, 0xFF, np.uint8)
        self.bytes = np.concatenate((self.bytes, np.full(256, 0xFF, np.uint8), array.view(np.uint8).ravel(), padding))
        self.buffers.append((name, begin, begin + array.nbytes))
        return self.base + begin

    def address(self, name: str) -> int:
        return self.base + next(begin for known, begin, _ in self.buffers if known == name)

    def get(self, name: str, dtype: np.dtype) -> np.ndarray:
        begin, end = next((begin, end) for known, begin, end in self.buffers if known == name)
        return self.bytes[begin:end].view(dtype)

    def places(self, addresses: np.ndarray, width: int) -> tuple[str, np.ndarray]:
        """The buffer that all addresses lie in, and the places of their bytes."""
        first = addresses.astype(np.int64) - self.base
        for name, begin, end in self.buffers:
            if begin <= first[0] < end:
                assert (first >= begin).all() and (first + width <= end).all(), f"beyond the end of {name}"
                assert not (first % width).any(), f"misaligned in {name}"
                return name, first[:, None] + np.arange(width)
        raise IndexError(f"no buffer at {int(addresses[0]):#x}")


class Warp:
    def __init__(self, first_thread: int, block: tuple[int, int, int], constants: np.ndarray) -> None:
        self.registers = np.zeros((256, 32), np.uint32)
        self.uniform = np.zeros((64, 32), np.uint32)
        self.predicates = np.zeros((8, 32), bool)
        self.uniform_predicates = np.zeros((8, 32), bool)
        self.predicates[7] = self.uniform_predicates[7] = True
        self.special = {"SR_TID.X": first_thread + LANES, "SR_LANEID": LANES, "SR_CgaCtaId": 0 * LANES}
        self.special |= {f"SR_CTAID.{axis}": 0 * LANES + index for axis, index in zip("XYZ", block, strict=True)}
        self.constants = constants
        self.pc = np.zeros(32, np.int64)
        self.waiting = False
        self.any = False  # what BAR.RED.OR found
        self.pending: list[tuple[str, frozenset[int]]] = []  # loads: buffer, registers


def _float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.float32)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def _signed(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: the float64 sum is rounded to odd, so that rounding it again to float32 does no harm."""
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        inexact = np.isfinite(total) & np.isfinite(error) & (error != 0)
        even = (total.view(np.int64) & 1) == 0
        towards = np.where(error > 0, np.inf, -np.inf)
        # The odd neighbour on the side of the exact sum.
        return np.where(inexact & even, np.nextafter(total, towards), total).astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """As cvt.rn.bf16.f32: to nearest even; every NaN is 0x7fff."""
    bits = _bits(x).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded)


COMPARE = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def _lut(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray, ones: np.ndarray) -> np.ndarray:
    result = a & 0 if a.dtype != bool else np.zeros(32, bool)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else a ^ ones) & (b if i & 2 else b ^ ones) & (c if i & 1 else c ^ ones))
    return result


class Instruction:
    """One line of the listing, taken apart once."""

    def __init__(self, text: tuple[str, ...], labels: dict[str, int]) -> None:
        _, negated, guard, self.opcode, operands = text
        self.parts = self.opcode.split(".")
        self.name = self.parts[0]
        self.operands = [part.strip() for part in operands.split(",")] if operands else []
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.guard = self.predicate(negated + guard) if guard else None
        self.labels = labels
        self.run = self.build()

    # Operands

    def predicate(self, text: str) -> Getter:
        inverted, name = text.startswith("!"), text.lstrip("!")
        bank = "uniform_predicates" if name.startswith("U") else "predicates"
        index = 7 if name.endswith("PT") else int(name[-1])
        if inverted:
            return lambda warp: ~getattr(warp, bank)[index]
        return lambda warp: getattr(warp, bank)[index]

    def raw(self, text: str, part: int = 0) -> Getter:
        """The 32 bits of a register (or of its neighbour), a constant or an immediate, without a sign in front."""
        text = text.replace(".reuse", "")
        if match := re.fullmatch(r"(U?)R(\d+|Z)(?:\.\w+)*", text):
            bank = "uniform" if match[1] else "registers"
            if match[2] == "Z":
                return lambda warp: np.zeros(32, np.uint32)
            index = int(match[2]) + part
            if not match[1]:
                self.reads.add(index)
            return lambda warp: getattr(warp, bank)[index]
        if match := re.fullmatch(r"c\[0x0\]\[(?:(U?R\d+)\+)?(-?0x[0-9a-f]+)\]", text):
            base, offset = match[1], int(match[2], 16) + 4 * part
            if base:
                at = self.raw(base)
                return lambda warp: np.concatenate(
                    [warp.constants[o : o + 4].view(np.uint32) for o in at(warp).astype(np.int64) + offset]
                )
            return lambda warp: np.broadcast_to(warp.constants[offset : offset + 4].view(np.uint32), 32)
        number = np.full(32, 0 if part else self.immediate(text), np.uint32)
        return lambda warp: number

    def immediate(self, text: str) -> int:
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return int(text, 16) & 0xFFFFFFFF
        names = {"+INF": 0x7F800000, "-INF": 0xFF800000, "+QNAN": 0x7FFFFFFF, "-QNAN": 0xFFFFFFFF, "QNAN": 0x7FFFFFFF}
        return names[text] if text in names else int(np.float32(text).view(np.uint32))

    def sign(self, text: str) -> tuple[str, str]:
        if re.match(r"[-~](?!0x|\d|INF|QNAN)", text):
            return text[0], text[1:]
        return "", text

    def integer(self, i: int, wide: bool = False) -> Getter:
        sign, text = self.sign(self.operands[i])
        low = self.raw(text)
        if wide and re.match(r"U?R\d|c\[", text):
            high = self.raw(text, 1)
            get = lambda warp: low(warp).astype(np.uint64) | high(warp).astype(np.uint64) << np.uint64(32)  # noqa: E731
        else:
            get = lambda warp: low(warp).astype(np.uint64)  # noqa: E731
        ones = np.uint64(0xFFFFFFFFFFFFFFFF) if wide else ONES
        if sign == "~":
            return lambda warp: get(warp) ^ ones
        if sign == "-":  # two's complement, with the carry that a subtraction has: -0 is 2^32
            return lambda warp: (get(warp) ^ ones) + np.uint64(1)
        return get

    def float(self, i: int) -> Getter:
        sign, text = self.sign(self.operands[i])
        magnitude = text.startswith("|")
        get = self.raw(text.strip("|"))

        def value(warp: Warp) -> np.ndarray:
            x = _float(get(warp))
            x = np.abs(x) if magnitude else x
            return -x if sign else x

        return value

    def address(self, text: str) -> Getter:
        most = np.uint64(0xFFFFFFFFFFFFFFFF) if text.startswith("desc") else ONES
        inner = re.search(r"\[([^\[\]]*)\]$", text)[1]
        terms: list[Getter] = []
        for term in re.findall(r"[+-]?[^+-]+", inner):
            name = term.lstrip("+")
            if match := re.fullmatch(r"(U?R(?:\d+|Z))(\.64|\.U32)?(?:\.X(\d+))?", name):
                low, scale = self.raw(match[1]), np.uint64(int(match[3] or 1))
                if match[2] == ".64" and not match[1].endswith("Z"):
                    high = self.raw(match[1], 1)
                    terms.append(lambda w, low=low, high=high: low(w) + (high(w).astype(np.uint64) << np.uint64(32)))
                else:
                    terms.append(lambda w, low=low, scale=scale: low(w).astype(np.uint64) * scale)
            else:
                offset = np.full(32, int(name, 16) & (2**64 - 1), np.uint64)
                terms.append(lambda w, offset=offset: offset)
        return lambda warp: sum((term(warp).astype(np.uint64) for term in terms), np.zeros(32, np.uint64)) & most

    # Results

    def to_register(self, text: str, width: int = 1) -> Callable[[Warp, np.ndarray, Sequence[np.ndarray]], None]:
        match = re.match(r"(U?)R(\d+|Z)", text)
        if match[2] == "Z":
            return lambda warp, mask, words: None
        first = int(match[2])
        if match[1]:

            def write_uniform(warp: Warp, mask: np.ndarray, words: Sequence[np.ndarray]) -> None:
                lane = int(np.argmax(mask))
                for i in range(width):
                    warp.uniform[first + i] = np.uint32(int(words[i][lane]) & 0xFFFFFFFF)

            return write_uniform
        self.writes |= set(range(first, first + width))

        def write(warp: Warp, mask: np.ndarray, words: Sequence[np.ndarray]) -> None:
            for i in range(width):
                word = words[i]
                word = (word & ONES).astype(np.uint32) if word.dtype == np.uint64 else word.astype(np.uint32)
                np.copyto(warp.registers[first + i], word, where=mask)

        return write

    def to_predicate(self, text: str) -> Callable[[Warp, np.ndarray, np.ndarray], None]:
        if text.endswith("PT"):
            return lambda warp, mask, value: None
        bank, index = "uniform_predicates" if text.startswith("U") else "predicates", int(text[-1])
        if bank == "predicates":
            return lambda warp, mask, value: np.copyto(warp.predicates[index], value, where=mask)

        def write(warp: Warp, mask: np.ndarray, value: np.ndarray) -> None:
            warp.uniform_predicates[index] = value[int(np.argmax(mask))]

        return write

    # What each instruction does. Uniform ones (UIADD3) are their namesakes, on registers that all lanes share.

    def build(self) -> Callable[[Warp, np.ndarray, Execution], None]:
        name = self.name[1:] if self.name.startswith("U") else self.name
        name = {"VOTEU": "VOTE", "IMNMX": "VIMNMX", "S2UR": "S2R"}.get(name, name)
        known = getattr(self, f"_{name.lower()}", None)
        if known:
            return known()
        opcode = self.opcode

        def unknown(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            raise NotImplementedError(f"{opcode} {self.operands}: teach the interpreter this instruction")

        return unknown

    def leading_predicates(self) -> list[str]:
        """Predicates that are written beside the register in front of them (carries)."""
        found = []
        while len(self.operands) > 1 and re.fullmatch(r"U?P[\dT]", self.operands[1]):
            found.append(self.operands.pop(1))
        return found

    def _simple(self, value: Callable[..., np.ndarray], *gets: Getter):
        write = self.to_register(self.operands[0])
        return lambda warp, mask, _: write(warp, mask, [value(*(get(warp) for get in gets))])

    def _nop(self):
        return lambda warp, mask, execution: None

    _bssy = _bsync = _break = _warpsync = _nop

    def _mov(self):
        return self._simple(lambda a: a, self.integer(1))

    def _s2r(self):
        write, source = self.to_register(self.operands[0]), self.operands[1]
        return lambda warp, mask, _: write(warp, mask, [warp.special[source]])

    def _cs2r(self):
        assert self.operands[1] == "SRZ"
        width = 1 if "32" in self.parts else 2
        write = self.to_register(self.operands[0], width)
        return lambda warp, mask, _: write(warp, mask, [np.zeros(32, np.uint64)] * width)

    def _ldc(self):
        width = 2 if "64" in self.parts else 1
        gets = [self.raw(self._aligned(self.operands[1]), part) for part in range(width)]
        write = self.to_register(self.operands[0], width)
        if "U8" in self.parts:
            shift = np.uint64(8 * (int(re.search(r"\[(0x[0-9a-f]+)\]$", self.operands[1])[1], 16) % 4))
            return lambda warp, mask, _: write(warp, mask, [gets[0](warp).astype(np.uint64) >> shift & np.uint64(0xFF)])
        return lambda warp, mask, _: write(warp, mask, [get(warp) for get in gets])

    def _aligned(self, text: str) -> str:
        return re.sub(r"\[(0x[0-9a-f]+)\]$", lambda match: f"[{int(match[1], 16) & ~3:#x}]", text)

    def _imad(self):
        carries = self.leading_predicates()
        if "WIDE" in self.parts or "HI" in self.parts:
            unsigned = "U32" in self.parts
            a, b, c = self.integer(1), self.integer(2), self.integer(3, wide=True)
            extend = (lambda x: x) if unsigned else (lambda x: _signed(x & ONES).astype(np.uint64))
            high_only = "HI" in self.parts
            assert not carries or carries == ["PT"] or high_only
            write = self.to_register(self.operands[0], 1 if high_only else 2)

            def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
                total = extend(a(warp)) * extend(b(warp)) + c(warp)
                high = total >> np.uint64(32)
                write(warp, mask, [high] if high_only else [total, high])

            return run
        extra = self.predicate(self.operands[4]) if "X" in self.parts and len(self.operands) > 4 else None
        a, b, c = self.integer(1), self.integer(2), self.integer(3)
        write = self.to_register(self.operands[0])

        def low(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            total = (a(warp) & ONES) * (b(warp) & ONES) + c(warp)
            write(warp, mask, [total + extra(warp).astype(np.uint64) if extra else total])

        return low

    def _iadd3(self):
        carries = self.leading_predicates()
        terms = [self.integer(1), self.integer(2), self.integer(3)]
        extra = [self.predicate(text) for text in self.operands[4:]] if "X" in self.parts else []
        write, write_carries = self.to_register(self.operands[0]), [self.to_predicate(carry) for carry in carries]

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            values = [term(warp) for term in terms] + [get(warp).astype(np.uint64) for get in extra]
            total = sum(values, np.zeros(32, np.uint64))
            write(warp, mask, [total])
            for i, write_carry in enumerate(write_carries):  # three terms may carry twice
                write_carry(warp, mask, total >> np.uint64(32) > i)

        return run

    def _viadd(self):
        return self._simple(lambda a, b: a + b, self.integer(1), self.integer(2))

    def _lea(self):
        carries = self.leading_predicates()
        high = "HI" in self.parts
        extra = self.predicate(self.operands[-1]) if "X" in self.parts else None
        a, b = self.integer(1), self.integer(2)
        if high and "SX32" in self.parts:
            top, shift = lambda warp: (_signed(a(warp)) >> 31).astype(np.uint64) & ONES, self.operands[3]
        elif high:
            top, shift = self.integer(3), self.operands[4]
        else:
            top, shift = None, self.operands[3]
        amount = np.uint64(int(shift, 16))
        write, write_carries = self.to_register(self.operands[0]), [self.to_predicate(carry) for carry in carries]

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            if high:
                both = (a(warp) & ONES) | (top(warp) & ONES) << np.uint64(32)
                shifted = both >> (np.uint64(32) - amount) & ONES if amount else both >> np.uint64(32)
            else:
                shifted = a(warp) << amount & ONES
            total = shifted + b(warp)
            if extra:
                total = total + extra(warp).astype(np.uint64)
            write(warp, mask, [total])
            for write_carry in write_carries:
                write_carry(warp, mask, total >> np.uint64(32) != 0)

        return run

    def _lop3(self):
        to = self.to_predicate(self.operands.pop(0)) if re.match(r"U?P", self.operands[0]) else None
        a, b, c, table = self.integer(1), self.integer(2), self.integer(3), int(self.operands[4], 16)
        before = self.predicate(self.operands[5])
        write = self.to_register(self.operands[0])

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            result = _lut(table, a(warp), b(warp), c(warp), ONES)
            if to:
                to(warp, mask, (result != 0) | before(warp))
            write(warp, mask, [result])

        return run

    def _plop3(self):
        gets = [self.predicate(text) for text in self.operands[2:5]]
        tables = [int(text, 16) for text in self.operands[5:7]]
        writes = [self.to_predicate(text) for text in self.operands[:2]]

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            values = [get(warp).copy() for get in gets]
            for write, table in zip(writes, tables, strict=True):
                write(warp, mask, _lut(table, *values, np.ones(32, bool)))

        return run

    def _shf(self):
        low, amount, high = self.integer(1), self.integer(2), self.integer(3)
        left, to_high = "L" in self.parts, "HI" in self.parts
        kind, wraps = next(part for part in self.parts if part in ("U32", "S32", "U64", "S64")), "W" in self.parts

        def value(low: np.ndarray, amount: np.ndarray, high: np.ndarray) -> np.ndarray:
            most = 64 if kind.endswith("64") else 32
            shift = amount & np.uint64(most - 1) if wraps else np.minimum(amount & ONES, most).astype(np.uint64)
            both = low & ONES | (high & ONES) << np.uint64(32)
            if left:
                moved = both << shift
            elif kind.startswith("S"):
                moved = (both.astype(np.int64) >> shift.astype(np.int64)).astype(np.uint64)
            else:
                moved = both >> shift
            return moved >> np.uint64(32) if to_high else moved

        return self._simple(value, low, amount, high)

    def _prmt(self):
        def value(a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> np.ndarray:
            both, result = a & ONES | (b & ONES) << np.uint64(32), np.zeros(32, np.uint64)
            for i in range(4):
                nibble = selector >> np.uint64(4 * i) & np.uint64(0xF)
                byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
                byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(0x80), 0xFF, 0), byte)
                result |= byte.astype(np.uint64) << np.uint64(8 * i)
            return result

        return self._simple(value, self.integer(1), self.integer(2), self.integer(3))

    def _sel(self):
        return self._simple(np.where, self.predicate(self.operands[3]), self.integer(1), self.integer(2))

    def _fsel(self):
        pick = self.predicate(self.operands[3])
        return self._simple(lambda p, a, b: _bits(np.where(p, a, b)), pick, self.float(1), self.float(2))

    def _setp(self, compare: Callable[[np.ndarray, np.ndarray], np.ndarray], a: Getter, b: Getter, lower=None):
        last = self.predicate(self.operands[4])
        join = next(part for part in self.parts if part in ("AND", "OR", "XOR"))
        joined = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[join]
        writes = [self.to_predicate(text) for text in self.operands[:2]]

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            found = compare(a(warp), b(warp), *([lower(warp)] if lower else []))
            rest = last(warp).copy()
            writes[0](warp, mask, joined(found, rest))
            writes[1](warp, mask, joined(~found, rest))

        return run

    def _isetp(self):
        convert = (lambda x: x & ONES) if "U32" in self.parts else (lambda x: _signed(x & ONES))
        operator = self.parts[1]
        a, b = self.integer(2), self.integer(3)
        if "EX" not in self.parts:
            return self._setp(lambda x, y: COMPARE[operator](convert(x), convert(y)), a, b)
        strict = {"LE": "LT", "GE": "GT"}.get(operator, operator)

        def extended(x: np.ndarray, y: np.ndarray, lower: np.ndarray) -> np.ndarray:
            x, y = convert(x), convert(y)
            if operator == "EQ":
                return (x == y) & lower
            return COMPARE[strict](x, y) | (x == y) & lower

        return self._setp(extended, a, b, self.predicate(self.operands[5]))

    def _fsetp(self):
        operator = self.parts[1]

        def compare(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            unordered = np.isnan(x) | np.isnan(y)
            if operator in ("NAN", "NUM"):
                return unordered if operator == "NAN" else ~unordered
            found = COMPARE[operator.removesuffix("U")](x, y)
            return found | unordered if operator.endswith("U") else found & ~unordered

        return self._setp(compare, self.float(2), self.float(3))

    def _vimnmx(self):
        convert = (lambda x: x & ONES) if "U32" in self.parts else (lambda x: _signed(x & ONES))
        least = self.predicate(self.operands[3])
        return self._simple(
            lambda a, b, p: np.where(p, np.minimum(convert(a), convert(b)), np.maximum(convert(a), convert(b))).astype(
                np.uint64
            ),
            self.integer(1), self.integer(2), least,
        )  # fmt: skip

    def _fmnmx(self):
        least = self.predicate(self.operands[3])
        return self._simple(
            lambda a, b, p: _bits(np.where(p, np.fmin(a, b), np.fmax(a, b))), self.float(1), self.float(2), least
        )

    def _fadd(self):
        return self._simple(lambda a, b: _bits(a + b), self.float(1), self.float(2))

    def _fmul(self):
        return self._simple(lambda a, b: _bits(a * b), self.float(1), self.float(2))

    def _ffma(self):
        assert not {"RM", "RP", "RZ"} & set(self.parts)
        return self._simple(lambda a, b, c: _bits(fused(a, b, c)), self.float(1), self.float(2), self.float(3))

    def _mufu(self):
        operation = {"RCP": lambda x: np.float32(1) / x}.get(self.parts[1])

        def value(x: np.ndarray) -> np.ndarray:
            if operation is None:
                raise NotImplementedError(self.opcode)
            with np.errstate(all="ignore"):
                return _bits(operation(x))

        return self._simple(value, self.float(1))

    def _fchk(self):
        write, a, b = self.to_predicate(self.operands[0]), self.float(1), self.float(2)

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            # Whether a division needs the long way. Zero, infinity and NaN do on a GPU, but come out right without, and the
            # long way is a subroutine, which is not known here.
            x, y = np.abs(a(warp)), np.abs(b(warp))
            write(warp, mask, (x > 0) & (x < 1e-30) | (y > 0) & (y < 1e-30))

        return run

    def _i2f(self):
        def value(x: np.ndarray) -> np.ndarray:
            exact = x & ONES if "U32" in self.parts else _signed(x & ONES)
            rounded = exact.astype(np.float32)
            if "RP" in self.parts:
                rounded = np.where(
                    rounded.astype(np.float64) < exact, np.nextafter(rounded, np.float32(np.inf)), rounded
                )
            return _bits(rounded)

        return self._simple(value, self.integer(1))

    def _f2i(self):
        most, least = (2**32 - 1, 0) if "U32" in self.parts else (2**31 - 1, -(2**31))
        return self._simple(
            lambda x: np.clip(np.nan_to_num(np.trunc(x.astype(np.float64))), least, most).astype(np.int64),
            self.float(1),
        )

    def _f2fp(self):
        assert "PACK_AB" in self.parts
        assert "BF16" in self.parts, self.opcode
        return self._simple(lambda a, b: to_bf16(a) << np.uint64(16) | to_bf16(b), self.float(1), self.float(2))

    def _popc(self):
        return self._simple(lambda x: np.bitwise_count(x & ONES).astype(np.uint64), self.integer(1))

    def _brev(self):
        def value(x: np.ndarray) -> np.ndarray:
            return np.array([int(f"{int(v) & 0xFFFFFFFF:032b}"[::-1], 2) for v in x], np.uint64)

        return self._simple(value, self.integer(1))

    def _flo(self):
        def value(x: np.ndarray) -> np.ndarray:
            top = np.array([(int(v) & 0xFFFFFFFF).bit_length() - 1 for v in x], np.int64)
            return (np.where(top < 0, -1, 31 - top) if "SH" in self.parts else top).astype(np.uint64)

        return self._simple(value, self.integer(1))

    def _vote(self):
        predicate = self.predicate(self.operands[-1])
        to = self.to_predicate(self.operands[-2])
        write = self.to_register(self.operands[0]) if re.match(r"U?R", self.operands[0]) else None

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            votes = predicate(warp) & mask
            bits = np.uint64(sum(1 << int(lane) for lane in np.flatnonzero(votes)))
            if write:
                write(warp, mask, [np.full(32, bits, np.uint64)])
            all_of_them = (votes == mask).all() if "ALL" in self.parts else votes.any()
            to(warp, mask, np.full(32, all_of_them))

        return run

    def _match(self):
        assert "ANY" in self.parts
        write, value = self.to_register(self.operands[0]), self.integer(1)

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            values = value(warp) & ONES
            alike = (values[:, None] == values) & mask
            write(warp, mask, [(alike.astype(np.uint64) << LANES.astype(np.uint64)).sum(1, dtype=np.uint64)])

        return run

    def _shfl(self):
        mode = self.parts[1]
        to, write = self.to_predicate(self.operands[0]), self.to_register(self.operands[1])
        value, b, c = self.integer(2), self.integer(3), self.integer(4)

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            by, control = (b(warp) & np.uint64(31)).astype(int), c(warp).astype(np.int64)
            segment = control >> 8 & 31
            last = LANES & segment | control & 31 & ~segment
            least = LANES & segment
            source = {"IDX": least | by & ~segment, "UP": LANES - by, "DOWN": LANES + by, "BFLY": LANES ^ by}[mode]
            there = source >= last if mode == "UP" else source <= last
            source = np.where(there, source, LANES)
            assert mask[source[mask]].all(), f"{self.opcode} reads a lane that is not there"
            write(warp, mask, [value(warp)[source]])
            to(warp, mask, there)

        return run

    def _p2r(self):  # predicates of a mask into a register's low bits, and back
        write, rest, bits = self.to_register(self.operands[0]), self.integer(2), np.uint64(int(self.operands[3], 16))

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            packed = sum(
                (warp.predicates[i].astype(np.uint64) << np.uint64(i) for i in range(7)), np.zeros(32, np.uint64)
            )
            write(warp, mask, [rest(warp) & (bits ^ ONES) | packed & bits])

        return run

    def _r2p(self):
        value, bits = self.integer(1), int(self.operands[2], 16)

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            packed = value(warp)
            for i in range(7):
                if bits >> i & 1:
                    np.copyto(warp.predicates[i], packed >> np.uint64(i) & np.uint64(1) != 0, where=mask)

        return run

    def _r2ur(self):
        return self._simple(lambda a: a, self.integer(1))

    # Memory

    def width(self) -> int:
        for part, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if part in self.parts:
                return width
        return 4

    def _ldg(self):
        return self.load(lambda warp, execution: execution.memory)

    def _lds(self):
        return self.load(lambda warp, execution: execution.shared)

    def load(self, memory_of: Callable):
        width, at = self.width(), self.address(self.operands[1])
        words = max(1, width // 4)
        write = self.to_register(self.operands[0], words)
        signed = {"S16": 16, "S8": 8}.get(next((part for part in self.parts if part in ("S16", "S8")), ""), 0)
        written = frozenset(self.writes)

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            memory = memory_of(warp, execution)
            name, places = memory.places(at(warp)[mask], width)
            data = np.zeros((32, max(4, width)), np.uint8)
            data[mask, :width] = memory.bytes[places]
            loaded = data.view(np.uint32).astype(np.uint64)
            if signed:
                loaded = np.where(loaded >> np.uint64(signed - 1), loaded | ONES << np.uint64(signed), loaded)
            write(warp, mask, [loaded[:, i] for i in range(words)])
            if memory is execution.memory:
                warp.pending.append((name, written))

        return run

    def _stg(self):
        return self.store(lambda warp, execution: execution.memory)

    def _sts(self):
        return self.store(lambda warp, execution: execution.shared)

    def store(self, memory_of: Callable):
        width, at = self.width(), self.address(self.operands[0])
        gets = [self.raw(self.operands[1], part) for part in range(max(1, width // 4))]

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            memory = memory_of(warp, execution)
            _, places = memory.places(at(warp)[mask], width)
            data = np.ascontiguousarray(np.stack([get(warp) for get in gets], 1)).view(np.uint8)
            memory.bytes[places] = data[mask, :width]

        return run

    # Control

    def _bra(self):
        target = self.labels[re.search(r"\((\S+)\)", self.operands[-1])[1]]
        condition = self.predicate(self.operands[0]) if len(self.operands) > 1 else None
        if "DIV" in self.parts:  # lanes that are not together, of which there are none here
            return self._nop()

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            warp.pc[mask & condition(warp) if condition else mask] = target

        return run

    def _exit(self):
        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            warp.pc[mask] = Execution.ENDED

        return run

    def _bar(self):
        vote = self.predicate(self.operands[-1]) if "RED" in self.parts else None

        def run(warp: Warp, mask: np.ndarray, execution: Execution) -> None:
            warp.waiting = True
            if vote:
                execution.any |= bool((vote(warp) & mask).any())

        return run

    def _b2r(self):
        to = self.to_predicate(self.operands[1])
        return lambda warp, mask, execution: to(warp, mask, np.full(32, warp.any))


class Execution:
    """Blocks of one kernel. Lanes that have parted meet again where the one that is behind catches up."""

    ENDED = np.int64(1 << 62)

    def __init__(self, code: str, memory: Memory) -> None:
        self.memory = memory
        self.shared = Memory()
        self.instructions = 0  # of warps
        self.opcodes: Counter[str] = Counter()
        # By buffer: the most loads from it that are under way when an instruction first needs what a load brings.
        self.in_flight: Counter[str] = Counter()
        labels, lines = {}, []
        for line in code.splitlines():
            if match := re.fullmatch(r"\s*(\S+):", line):
                labels[match[1]] = len(lines)
            elif match := LINE.search(line):
                lines.append(match.groups())
        self.labels, self.lines = labels, lines
        self.decoded: list[Instruction | None] = [None] * len(lines)

    def block(self, arguments: bytes, index: tuple[int, int, int], shared_bytes: int, threads: int = 256) -> None:
        constants = np.zeros(PARAMETERS + len(arguments) + 8, np.uint8)
        constants[:4] = np.array([threads], np.uint32).view(np.uint8)
        constants[PARAMETERS : PARAMETERS + len(arguments)] = np.frombuffer(arguments, np.uint8)
        self.shared = Memory()
        self.shared.base, self.shared.buffers = SHARED, [("shared", 0, shared_bytes)]
        self.shared.bytes = np.full(shared_bytes, 0xFF, np.uint8)
        self.any = False
        warps = [Warp(first, index, constants) for first in range(0, threads, 32)]
        while warps:
            for warp in warps:
                self.run(warp)
            warps = [warp for warp in warps if warp.waiting]
            for warp in warps:
                warp.waiting, warp.any = False, self.any
            self.any = False

    def run(self, warp: Warp) -> None:
        """Up to a barrier, or to the end."""
        while not warp.waiting:
            pc = int(warp.pc.min())
            if pc == self.ENDED:
                return
            mask = warp.pc == pc
            instruction = self.decoded[pc]
            if instruction is None:
                instruction = self.decoded[pc] = Instruction(self.lines[pc], self.labels)
            self.instructions += 1
            self.opcodes[instruction.name] += 1
            warp.pc[mask] = pc + 1
            if warp.pending:
                self.wait(warp, instruction)
            if instruction.guard:
                mask = mask & instruction.guard(warp)
                if not mask.any():
                    continue
            with np.errstate(all="ignore"):
                instruction.run(warp, mask, self)

    def wait(self, warp: Warp, instruction: Instruction) -> None:
        touched = instruction.reads | instruction.writes
        for _, registers in warp.pending:
            if registers & touched:
                self.in_flight |= Counter(name for name, _ in warp.pending)
                last = max(n for n, (_, written) in enumerate(warp.pending) if written & touched)
                del warp.pending[: last + 1]
                return
