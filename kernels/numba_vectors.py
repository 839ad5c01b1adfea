"""Writing LLVM code on numbers and vectors, for the Numba engine's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.np.arrayobj import make_array

__all__ = ["BYTES", "INDEX", "INT", "MANY", "VECTOR_BYTES", "Number", "Vectors"]

# The processor that Numba compiles for: the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise.
TRIPLE, _, FEATURES = cpu_target.target_context.codegen().magic_tuple()
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx2" in FEATURES else 16
MANY = VECTOR_BYTES == 64 or TRIPLE.startswith(("aarch64", "arm64"))  # 32 vector registers, not 16
INT, INDEX, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


class Number:
    """A value in LLVM code with Python's operators: a number, a truth value, or a vector of either."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value
        self.element = getattr(value.type, "element", value.type)
        self.is_float = not isinstance(self.element, ir.IntType)
        #: Of float32: whether it is, bits of the mantissa, what is added to the exponent. Or of float64.
        self.single = self.element in (ir.FloatType(), INT)
        self.mantissa, self.bias = (23, 127) if self.single else (52, 1023)

    def constant(self, x: float) -> Number:
        """`x` as a value of this one's type."""
        kind = self.value.type
        return Number(self.builder, ir.Constant(kind, [x] * kind.count if isinstance(kind, ir.VectorType) else x))

    def _with(self, y: Number | float, of_floats: str, of_integers: str, **options: Any) -> Number:
        other = y if isinstance(y, Number) else self.constant(y)
        method = getattr(self.builder, of_floats if self.is_float else of_integers)
        return Number(self.builder, method(self.value, other.value, **options))

    def _arithmetic(self, y: Number | float, name: str) -> Number:
        return self._with(y, f"f{name}", name, flags=["contract"] if self.is_float else [])

    def __add__(self, y: Number | float) -> Number:
        return self._arithmetic(y, "add")

    def __sub__(self, y: Number | float) -> Number:
        return self._arithmetic(y, "sub")

    def __mul__(self, y: Number | float) -> Number:
        return self._arithmetic(y, "mul")

    def __truediv__(self, y: Number | float) -> Number:
        return self._arithmetic(y, "div")

    def __and__(self, y: Number | float) -> Number:
        return self._with(y, "", "and_")

    def __xor__(self, y: Number | float) -> Number:
        return self._with(y, "", "xor")

    def __lshift__(self, y: Number | float) -> Number:
        return self._with(y, "", "shl")

    def __rshift__(self, y: Number | float) -> Number:
        return self._with(y, "", "ashr")

    def _compared(self, y: Number | float, how: str) -> Number:
        other = y if isinstance(y, Number) else self.constant(y)
        method = self.builder.fcmp_ordered if self.is_float else self.builder.icmp_signed
        return Number(self.builder, method(how, self.value, other.value))

    def __lt__(self, y: Number | float) -> Number:
        return self._compared(y, "<")

    def equals(self, y: Number | float) -> Number:
        return self._compared(y, "==")

    def choose(self, x: Number | float, y: Number | float) -> Number:
        """x where this is true, else y; one of them may be a constant."""
        like = x if isinstance(x, Number) else y
        assert isinstance(like, Number)
        x, y = (value if isinstance(value, Number) else like.constant(value) for value in (x, y))
        return Number(self.builder, self.builder.select(self.value, x.value, y.value))

    def series(self, factors: list[float]) -> Number:
        """The polynomial of this value with such factors, that of the highest power first."""
        y = self.constant(factors[0])
        for factor in factors[1:]:
            y = y * self + factor
        return y

    def _cast(self, element: Any, how: str) -> Number:
        kind = self.value.type
        kind = ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element
        return Number(self.builder, getattr(self.builder, how)(self.value, kind))

    def bits(self) -> Number:
        """The integers, or floats, of the same size that have the same bits."""
        other = {ir.FloatType(): INT, ir.DoubleType(): INDEX, INT: ir.FloatType(), INDEX: ir.DoubleType()}
        return self._cast(next(to for kind, to in other.items() if kind == self.element), "bitcast")

    def rounded(self, like: Number) -> Number:
        """These integers as floats like others."""
        return self._cast(like.element, "sitofp")


class Some(NamedTuple):
    """The first lanes of a vector: how many, and as a mask."""

    count: Any
    mask: Any


class Vectors:
    """Writes LLVM code on vectors of one element type. Addresses and indices are 64-bit integers."""

    def __init__(self, context: Any, builder: Any, real: Any) -> None:
        self.context, self.builder = context, builder
        self.element = context.get_data_type(real)
        self.size = context.get_abi_sizeof(self.element)
        self.lanes = VECTOR_BYTES // self.size
        self.type = ir.VectorType(self.element, self.lanes)
        self.zero, self.one = (ir.Constant(self.type, [x] * self.lanes) for x in (0.0, 1.0))

    def index(self, n: Any) -> Any:
        return ir.Constant(INDEX, n)

    def plus(self, i: Any, n: Any) -> Any:
        return self.builder.add(i, self.index(n))

    def up_to(self, start: Any, stop: Any, step: Any) -> Any:
        """The end of the whole steps from start to stop."""
        return self.builder.sub(stop, self.builder.srem(self.builder.sub(stop, start), self.index(step)))

    def each(self, start: Any, stop: Any, step: Any) -> Any:
        """Loops over start, start + step, ... below stop."""
        return self.each_by(start, stop, self.index(step))

    def each_by(self, start: Any, stop: Any, step: Any) -> Any:
        """`each` by a step that is only known when the code runs."""
        return cgutils.for_range_slice(self.builder, start, stop, step, inc=True)

    def shuffle(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        """Some lanes of x and y, those of y counted on from those of x."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes)))

    def least(self, i: Any, j: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", i, j), i, j)

    def splat(self, x: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(x.type, self.lanes), ir.Undefined)
        return self.shuffle(self.builder.insert_element(undefined, x, ir.Constant(INT, 0)), undefined, [0] * self.lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(x, y, flags=["contract"]), z, flags=["contract"])

    def first(self, n: Any) -> Some:
        """The first n lanes, or all where n is larger."""
        numbers = ir.Constant(ir.VectorType(INDEX, self.lanes), list(range(self.lanes)))
        return Some(self.least(n, self.index(self.lanes)), self.builder.icmp_signed("<", numbers, self.splat(n)))

    def load(self, address: Any, lanes: Some | None = None, kind: Any = None) -> Any:
        """A vector of floats, or of another `kind`; 0 outside of `lanes`."""
        kind = kind or self.type
        size = self.context.get_abi_sizeof(kind.element)
        pointer = self.pointer(address, kind)
        if lanes is None:
            return self.builder.load(pointer, align=size)
        letter = "i" if isinstance(kind.element, ir.IntType) else "f"
        name = f"llvm.masked.load.v{self.lanes}{letter}{8 * size}.p0"
        zero = ir.Constant(kind, [0] * self.lanes)
        return self._call(name, kind, pointer, ir.Constant(INT, size), lanes.mask, zero)

    def pointer(self, address: Any, kind: Any = None) -> Any:
        return self.builder.inttoptr(address, (kind or self.element).as_pointer())

    def load_part(self, address: Any, lanes: int) -> Any:
        """A vector of another length."""
        return self.builder.load(self.pointer(address, ir.VectorType(self.element, lanes)), align=self.size)

    def store_part(self, x: Any, address: Any) -> None:
        self.builder.store(x, self.pointer(address, x.type), align=self.size)

    def store(self, x: Any, address: Any, lanes: Some | None = None) -> None:
        self.store_all([(x, address)], lanes)

    def store_all(self, pairs: list[tuple[Any, Any]], lanes: Some | None = None) -> None:
        """Store vectors at addresses."""
        if lanes is None or VECTOR_BYTES == 64:
            for x, address in pairs:
                if lanes is None:
                    self.store_part(x, address)
                else:
                    name = f"llvm.masked.store.v{self.lanes}f{8 * self.size}.p0"
                    pointer = self.pointer(address, self.type)
                    self._call(name, ir.VoidType(), x, pointer, ir.Constant(INT, self.size), lanes.mask)
            return
        # in parts of 8, 4, 2 and 1 lanes, because other processors than those with AVX-512 store slowly by a mask
        parts = [(cgutils.alloca_once_value(self.builder, x), address) for x, address in pairs]
        done, width = self.index(0), self.lanes
        while width:
            bit = self.builder.and_(lanes.count, self.index(width))
            with self.builder.if_then(self.builder.icmp_signed("!=", bit, self.index(0))):
                for rest, address in parts:
                    x = self.builder.load(rest)
                    offset = self.builder.mul(done, self.index(self.size))
                    self.store_part(self.shuffle(x, x, range(width)), self.builder.add(address, offset))
                    order = [(lane + width) % self.lanes for lane in range(self.lanes)]
                    self.builder.store(self.shuffle(x, x, order), rest)
            done, width = self.builder.add(done, bit), width // 2

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        function = ir.FunctionType(result, [x.type for x in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), args)

    def prefetch(self, address: Any) -> None:
        """Asks for what is soon read or written."""
        self._call("llvm.prefetch.p0", ir.VoidType(), self.builder.inttoptr(address, BYTES), *map(INT, (0, 3, 1)))

    def barrier(self) -> None:
        """Keeps the compiler from loading before this what is used behind it, for which it may want more registers."""
        self.builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    def load_splat(self, address: Any) -> Any:
        return self.splat(self.builder.load(self.pointer(address)))

    def matrix(self, ty: Any, value: Any) -> Any:
        """The shape of an array and a function from (row, column) to an address; None for what is no array."""
        if not isinstance(ty, types.Array):
            return None, None
        b, array = self.builder, make_array(ty)(self.context, self.builder, value)
        shape, strides = (cgutils.unpack_tuple(b, x, 2) for x in (array.shape, array.strides))
        unit = {"C": 1, "F": 0}.get(ty.layout)  # a stride that is known makes shorter addresses
        size = self.context.get_abi_sizeof(self.context.get_data_type(ty.dtype))
        strides = [self.index(size) if axis == unit else strides[axis] for axis in (0, 1)]
        start = b.ptrtoint(array.data, INDEX)
        return shape, lambda i, j: b.add(start, b.add(b.mul(i, strides[0]), b.mul(j, strides[1])))
