"""Matrix products for the Numba engine, written in vectors.

`product` is the heart: tiles of a product stay in registers until all their terms are added, and there they meet bias,
ReLU, mask, column sums or update. BLAS takes over where products are large. Nothing is allocated.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from .numba_math import FAST
from .ops import Array

__all__ = [
    "SLOPES",
    "VECTOR_BYTES",
    "copy_row",
    "is_narrow",
    "is_narrow_product",
    "is_small",
    "narrow_forward",
    "narrow_product",
    "product",
    "room",
    "transpose",
    "transposed",
]

# The processor that Numba compiles for: the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise.
TRIPLE, _, FEATURES = cpu_target.target_context.codegen().magic_tuple()
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx2" in FEATURES else 16
MANY = VECTOR_BYTES == 64 or TRIPLE.startswith(("aarch64", "arm64"))  # 32 vector registers, not 16
ROWS, WIDTHS = (6, (4, 2)) if MANY else (6, (2,))  # a tile's rows and vectors, whose sums fit in registers
IN_FLIGHT = 8  # sums that must grow side by side to hide the latency of an addition
BLAS_FROM = 1 << 23  # multiplications from which BLAS is faster, packing and threads included

INT, INDEX, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


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
        return cgutils.for_range_slice(self.builder, start, stop, self.index(step), inc=True)

    def shuffle(self, x: Any, y: Any, lanes: Any) -> Any:
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, self.lanes), lanes))

    def splat(self, x: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(x.type, self.lanes), ir.Undefined)
        return self.shuffle(self.builder.insert_element(undefined, x, ir.Constant(INT, 0)), undefined, [0] * self.lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(x, y, flags=["contract"]), z, flags=["contract"])

    def first(self, n: Any) -> Any:
        """The mask of the first n lanes."""
        numbers = ir.Constant(ir.VectorType(INDEX, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self.splat(n))

    def load(self, address: Any, mask: Any = None) -> Any:
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.size)
        return self.masked("load", self.type, pointer, ir.Constant(INT, self.size), mask, self.zero)

    def store(self, x: Any, address: Any, mask: Any = None) -> Any:
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        if mask is None:
            return self.builder.store(x, pointer, align=self.size)
        return self.masked("store", ir.VoidType(), x, pointer, ir.Constant(INT, self.size), mask)

    def masked(self, kind: str, result: Any, *args: Any) -> Any:
        function = ir.FunctionType(result, [x.type for x in args])
        name = f"llvm.masked.{kind}.v{self.lanes}f{8 * self.size}.p0"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), args)

    def load_splat(self, address: Any) -> Any:
        return self.splat(self.builder.load(self.builder.inttoptr(address, self.element.as_pointer())))

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


def blas(v: Any, operands: Any, alpha: Any, beta: Any) -> Any:
    """c = alpha * (a @ b) + beta * c by the BLAS that SciPy brings, for operands a, b, c of (type, value)."""

    def operand(ty: Any, value: Any) -> Any:
        # BLAS counts columns first, so it sees each array transposed: one stored by rows needs no transposition.
        array = make_array(ty)(v.context, v.builder, value)
        shape, strides = (cgutils.unpack_tuple(v.builder, x, 2) for x in (array.shape, array.strides))
        by_rows = v.builder.icmp_signed("==", strides[1], v.index(v.size))
        if ty.layout != "A":
            by_rows = ir.Constant(by_rows.type, ty.layout == "C")
        order = v.builder.select(by_rows, *(ir.Constant(BYTES.pointee, ord(letter)) for letter in "nt"))
        step = v.builder.sdiv(v.builder.select(by_rows, *strides), v.index(v.size))
        least = v.builder.select(by_rows, shape[1], shape[0])  # the stride of an axis of one element may be anything
        step = v.builder.select(v.builder.icmp_signed("<", step, least), least, step)
        return *shape, order, v.builder.bitcast(array.data, BYTES), step

    (m, k, a_order, *a), (_, n, b_order, *b), (*_, c_data, c_step) = (operand(*x) for x in operands)
    alpha, beta = (v.builder.bitcast(cgutils.alloca_once_value(v.builder, x), BYTES) for x in (alpha, beta))
    kind = ir.Constant(BYTES.pointee, ord("s" if v.size == 4 else "d"))
    args = [kind, b_order, a_order, n, m, k, alpha, *b, *a, beta, c_data, c_step]
    function = ir.FunctionType(INT, [x.type for x in args])
    v.builder.call(cgutils.get_or_insert_function(v.builder.module, function, "numba_xxgemm"), args)


def relu_slope(v: Vectors, x: Any, y: Any, _: Any) -> Any:
    return v.builder.select(v.builder.fcmp_unordered(">", y, v.zero), x, v.zero)


def leaky_relu_slope(v: Vectors, x: Any, y: Any, negative_slope: Any) -> Any:
    bent = v.builder.fmul(x, v.splat(negative_slope))
    return v.builder.select(v.builder.fcmp_ordered(">", y, v.zero), x, bent)


def elu_slope(v: Vectors, x: Any, y: Any, alpha: Any) -> Any:
    bent = v.builder.fmul(x, v.builder.fadd(y, v.splat(alpha)))
    return v.builder.select(v.builder.fcmp_ordered(">", y, v.zero), x, bent)


def tanh_slope(v: Vectors, x: Any, y: Any, _: Any) -> Any:
    return v.builder.fmul(x, v.builder.fmul(v.builder.fsub(v.one, y), v.builder.fadd(v.one, y)))


def sigmoid_slope(v: Vectors, x: Any, y: Any, _: Any) -> Any:
    return v.builder.fmul(x, v.builder.fmul(y, v.builder.fsub(v.one, y)))


#: x times the slope of an activation whose output is y
SLOPES = relu_slope, leaky_relu_slope, elu_slope, tanh_slope, sigmoid_slope


@intrinsic(prefer_literal=True)
def product(
    typingctx: Any,
    a: Any,
    b: Any,
    c: Any,
    bias: Any = None,
    relu: Any = None,
    mask: Any = None,
    slope: Any = None,
    number: Any = None,
    sums: Any = None,
    rate: Any = None,
) -> Any:
    """c = a @ b. a may be a transposed array, or None, which is a row of ones: c = the column sums of b.

    A transposed b means BLAS, because tiles need rows of b that are vectors.

    What else is given joins in, in this order: a @ b + bias; 0 where that is below 0; times the slope of an activation
    whose output is mask, ReLU's if it is not named by an index of SLOPES, with the activation's `number`; sums += its
    column sums; c -= rate * that instead of c = that.
    """
    given = [types.none if ty is None else ty for ty in (a, b, c, bias, relu, mask, slope, number, sums, rate)]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, c.dtype)
        (_, a_at), (b_shape, b_at), (c_shape, c_at), (_, bias_at), _, (_, mask_at), _, _, (_, sums_at), _ = map(
            v.matrix, given, args
        )
        (m, n), terms, zero = c_shape, b_shape[0], v.index(0)
        relu, rate = given[4] != types.none, given[9] != types.none
        times_slope = SLOPES[0 if given[6] == types.none else given[6].literal_value]

        def finish(x: Any, rows: Any, columns: Any, lanes: Any) -> Any:
            """Stores x[r, s] as the vector that begins at c[rows[r], columns[s]]. A row named twice counts once."""
            for r, s in x:
                if relu:
                    x[r, s] = builder.select(builder.fcmp_ordered("<=", x[r, s], v.zero), v.zero, x[r, s])
                if mask_at:
                    x[r, s] = times_slope(v, x[r, s], v.load(mask_at(rows[r], columns[s]), lanes), args[7])
                if rate:
                    x[r, s] = v.fma(v.splat(builder.fneg(args[-1])), x[r, s], v.load(c_at(rows[r], columns[s]), lanes))
            for r, s in x:
                v.store(x[r, s], c_at(rows[r], columns[s]), lanes)
            for s, column in enumerate(columns if sums_at else ()):
                total = x[0, s]
                for r in range(1, len(rows)):
                    total = builder.select(
                        builder.icmp_signed("==", rows[r], rows[r - 1]), total, builder.fadd(total, x[r, s])
                    )
                v.store(builder.fadd(total, v.load(sums_at(zero, column), lanes)), sums_at(zero, column), lanes)

        def start(column: Any, lanes: Any) -> Any:
            return v.load(bias_at(zero, column), lanes) if bias_at else v.zero

        def tile(rows: Any, columns: Any, lanes: Any = None) -> Any:
            """All terms of rows x columns of vectors, in registers."""
            spots = [(r, s) for r in range(len(rows)) for s in range(len(columns))]
            copies = [
                {spot: cgutils.alloca_once(builder, v.type) for spot in spots}
                for _ in range(-(-IN_FLIGHT // len(spots)))
            ]
            for copy in copies:
                for r, s in spots:
                    builder.store(start(columns[s], lanes) if copy is copies[0] else v.zero, copy[r, s])

            def add_term(k: Any, copy: Any) -> Any:
                right = [v.load(b_at(k, column), lanes) for column in columns]
                left = [v.load_splat(a_at(row, k)) for row in rows] if a_at else []
                for r, s in spots:
                    old = builder.load(copy[r, s])
                    builder.store(v.fma(left[r], right[s], old) if left else builder.fadd(right[s], old), copy[r, s])

            whole = v.up_to(zero, terms, len(copies))
            with v.each(zero, whole, len(copies)) as (k, _):
                for number, copy in enumerate(copies):
                    add_term(v.plus(k, number), copy)
            if len(copies) > 1:
                with v.each(whole, terms, 1) as (k, _):
                    add_term(k, copies[0])
            x = {spot: builder.load(copies[0][spot]) for spot in spots}
            for spot in spots:
                for copy in copies[1:]:
                    x[spot] = builder.fadd(x[spot], builder.load(copy[spot]))
            finish(x, rows, columns, lanes)

        def strip(rows: Any, widths: Any = (4, 2)) -> Any:
            """All columns of some rows, in tiles as wide as the registers allow."""
            done = zero
            for width in widths:
                stop = v.up_to(done, n, width * v.lanes)
                with v.each(done, stop, width * v.lanes) as (j, _):
                    tile(rows, [v.plus(j, s * v.lanes) for s in range(width)])
                done = stop
            with v.each(done, n, v.lanes) as (j, _):
                tile(rows, [j], v.first(builder.sub(n, j)))

        def in_tiles() -> Any:
            whole, last = v.up_to(zero, m, ROWS), v.plus(m, -1)
            with v.each(zero, whole, ROWS) as (i, _):
                strip([v.plus(i, r) for r in range(ROWS)], WIDTHS)
            with v.each(whole, m, 3) as (i, _):  # rows past the end repeat the last one
                rows = [v.plus(i, r) for r in range(3)]
                strip([builder.select(builder.icmp_signed("<", row, last), row, last) for row in rows])

        def by_blas() -> Any:
            one, none = (ir.Constant(v.element, x) for x in (1.0, 0.0))
            alpha, beta = (builder.fneg(args[-1]), one) if rate else (one, none)
            blas(v, zip(given[:3], args[:3], strict=True), alpha, beta)
            if bias_at or relu or mask_at:
                with v.each(zero, m, 1) as (i, _), v.each(zero, n, v.lanes) as (j, _):
                    lanes = v.first(builder.sub(n, j))
                    finish({(0, 0): builder.fadd(v.load(c_at(i, j), lanes), start(j, lanes))}, [i], [j], lanes)

        if not a_at:
            strip([zero])
        elif b.layout == "F":
            by_blas()
        else:
            size = builder.mul(builder.mul(m, n), terms)
            with builder.if_else(builder.icmp_signed("<", size, v.index(BLAS_FROM))) as (small, large):
                with small:
                    in_tiles()
                with large:
                    by_blas()
        return context.get_dummy_value()

    return types.none(*given), codegen


@intrinsic
def narrow_product(typingctx: Any, a: Any, bt: Any, bias: Any, ct: Any) -> Any:
    """ct = (a @ bt.T + bias).T, for few columns: vectors run along the terms. a has at least as many rows as lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, ct.dtype)
        (shape, a_at), (_, b_at), (_, bias_at), ((columns, rows), c_at) = map(v.matrix, signature.args, args)
        terms, zero = shape[1], v.index(0)
        whole, last, group = v.up_to(zero, terms, v.lanes), v.plus(rows, -v.lanes), 16 // v.size

        def fold(x: Any, y: Any, unit: Any, span: Any) -> Any:
            """Adds neighbours, of `unit` lanes, in each `span` lanes of x and y; sums from x come first."""
            odd_and_even = []
            for odd in (0, unit):
                odd_and_even.append(
                    v.shuffle(
                        x,
                        y,
                        [
                            source + begin + lane
                            for begin in range(0, v.lanes, span)
                            for source in (0, v.lanes)
                            for first in range(odd, span, 2 * unit)
                            for lane in range(first, first + unit)
                        ],
                    )
                )
            return builder.fadd(*odd_and_even)

        with v.each(zero, rows, v.lanes) as (i, _):
            i = builder.select(builder.icmp_signed("<", i, last), i, last)  # some rows may come twice, at the end
            with v.each(zero, columns, 1) as (j, _):
                sums = [cgutils.alloca_once_value(builder, v.zero) for _ in range(v.lanes)]
                for total in sums:
                    builder.store(v.zero, total)

                def add_terms(k: Any, lanes: Any = None) -> Any:
                    right = v.load(b_at(j, k), lanes)
                    for r, total in enumerate(sums):
                        builder.store(v.fma(v.load(a_at(v.plus(i, r), k), lanes), right, builder.load(total)), total)

                with v.each(zero, whole, v.lanes) as (k, _):
                    add_terms(k)
                with builder.if_then(builder.icmp_signed("<", whole, terms)):
                    add_terms(whole, v.first(builder.sub(terms, whole)))
                parts = [builder.load(total) for total in sums]
                while len(parts) > 1:  # within 16 bytes first: shuffles across are dearer
                    unit, span = (1, group) if len(parts) * group > v.lanes else (group, v.lanes)
                    parts = [fold(x, y, unit, span) for x, y in zip(parts[::2], parts[1::2], strict=True)]
                v.store(builder.fadd(parts[0], v.load_splat(bias_at(zero, j))), c_at(j, i))
        return context.get_dummy_value()

    return types.none(a, bt, bias, ct), codegen


@intrinsic
def copy_row(typingctx: Any, source: Any, i: Any, to: Any, j: Any) -> Any:
    """to[j] = source[i], in the type of to."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, to.dtype)
        (_, source_at), ((_, n), to_at) = v.matrix(source, args[0]), v.matrix(to, args[2])
        if source.dtype == to.dtype and source.layout == "C":

            def copy(k: Any, width: Any) -> Any:
                kind = ir.VectorType(v.element, width).as_pointer()
                x = builder.load(builder.inttoptr(source_at(args[1], k), kind), align=v.size)
                builder.store(x, builder.inttoptr(to_at(args[3], k), kind), align=v.size)

            with v.each(v.index(0), v.up_to(v.index(0), n, v.lanes), v.lanes) as (k, _):
                copy(k, v.lanes)
            width = v.lanes // 2
            while width:  # what is left has a part of this width where its length has this bit
                with builder.if_then(builder.icmp_signed("!=", builder.and_(n, v.index(width)), v.index(0))):
                    copy(builder.and_(n, v.index(-2 * width)), width)
                width //= 2
        else:
            with v.each(v.index(0), n, 1) as (k, _):
                pointer = builder.inttoptr(source_at(args[1], k), context.get_data_type(source.dtype).as_pointer())
                x = context.cast(builder, context.unpack_value(builder, source.dtype, pointer), source.dtype, to.dtype)
                builder.store(x, builder.inttoptr(to_at(args[3], k), v.element.as_pointer()))
        return context.get_dummy_value()

    return types.none(source, i, to, j), codegen


@njit(**FAST)
def is_narrow(x: Array) -> Any:
    """Whether x has so many rows and so few columns that vectors should not run along its columns."""
    lanes = VECTOR_BYTES // x.itemsize
    return x.shape[1] < lanes <= x.shape[0]


@njit(**FAST)
def is_narrow_product(x: Array, w: Array) -> Any:
    """Whether x @ w is small, and narrow as `is_narrow` says."""
    lanes = VECTOR_BYTES // x.itemsize
    return w.shape[1] < lanes <= x.shape[0] and is_small(x, w)


@njit(**FAST)
def is_small(a: Array, b: Array) -> Any:
    """Whether the product of a and b is one for tiles, not for BLAS."""
    return a.shape[0] * a.shape[1] * b.shape[1] < BLAS_FROM


@njit(**FAST)
def room(scratch: Array, rows: int, columns: int) -> Any:
    """A matrix at the start of the scratch, and what is left behind it, both on a boundary of 256 bytes."""
    used = (rows * columns + 63) // 64 * 64
    return scratch[: rows * columns].reshape(rows, columns), scratch[used:]


@njit(**FAST)
def transpose(a: Array, at: Array) -> None:
    for j in range(at.shape[0]):
        for i in range(at.shape[1]):
            at[j, i] = a[i, j]


@njit(**FAST)
def transposed(a: Array, scratch: Array) -> Any:
    """The transposed matrix, in scratch, and what is left of that."""
    at, rest = room(scratch, a.shape[1], a.shape[0])
    transpose(a, at)
    return at, rest


@njit(**FAST)
def narrow_forward(x: Array, w: Array, b: Array, scratch: Array) -> Any:
    """The output of a layer with few neurons, transposed, in scratch, and what is left of that."""
    wt, rest = transposed(w, scratch)
    zt, rest = room(rest, w.shape[1], x.shape[0])
    narrow_product(x, wt, b, zt)
    return zt, rest
