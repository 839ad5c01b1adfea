"""Matrix products for the Numba engine, written in vectors.

`product` is the heart: tiles of a product stay in registers until all their terms are added, and there they meet bias,
ReLU, mask, column sums or update. BLAS takes over where products are large. Nothing is allocated.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_blas import blas
from .numba_math import FAST
from .numba_vectors import BYTES, INT, MANY, VECTOR_BYTES, Vectors
from .ops import Array

__all__ = [
    "SLOPES",
    "by_columns",
    "copy_row",
    "is_narrow",
    "is_narrow_product",
    "is_small",
    "narrow_backward",
    "narrow_forward",
    "narrow_product",
    "prefetch_row",
    "product",
    "room",
    "transpose",
    "transposed",
]

ROWS, WIDTHS = (6, (4, 2)) if MANY else (6, (2,))  # a tile's rows and vectors, whose sums fit in registers
IN_FLIGHT = 8  # sums that must grow side by side to hide the latency of an addition
BLAS_FROM = 1 << 23  # multiplications from which BLAS is faster, packing and threads included,
LARGE = 1 << 16  # or half of that where the matrix on the right takes so many bytes, which the first cache cannot hold
NARROW = 16  # columns
FEW = 4  # columns of a matrix whose transposed rows stay in registers


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
                    x[r, s] = builder.select(builder.fcmp_ordered("<", x[r, s], v.zero), v.zero, x[r, s])
                if mask_at:
                    x[r, s] = times_slope(v, x[r, s], v.load(mask_at(rows[r], columns[s]), lanes), args[7])
                if rate:
                    x[r, s] = v.fma(v.splat(builder.fneg(args[-1])), x[r, s], v.load(c_at(rows[r], columns[s]), lanes))
            v.store_all([(x[r, s], c_at(rows[r], columns[s])) for r, s in x], lanes)
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
            # a tile of several columns keeps enough in flight, and one sum each leaves it the registers
            many = 1 if a_at and len(columns) > 1 else -(-IN_FLIGHT // len(spots))
            copies = [{spot: cgutils.alloca_once(builder, v.type) for spot in spots} for _ in range(many)]
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
            rest = builder.sub(m, whole)
            three = builder.and_(builder.icmp_signed(">", rest, v.index(1)), builder.trunc(rest, ir.IntType(1)))
            with builder.if_then(three):
                strip([v.plus(whole, r) for r in range(3)], (4, 2))
            with v.each(builder.select(three, v.plus(whole, 3), whole), m, 2) as (i, _):
                strip([i, v.least(v.plus(i, 1), last)])  # the last one twice, where there is no other

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
            right = builder.mul(terms, n)
            size = builder.mul(m, right)
            large = builder.icmp_signed(">=", right, v.index(LARGE // v.size))
            limit = builder.select(large, v.index(BLAS_FROM // 2), v.index(BLAS_FROM))
            with builder.if_else(builder.icmp_signed("<", size, limit)) as (in_cache, beyond):
                with in_cache:
                    in_tiles()
                with beyond:
                    by_blas()
        return context.get_dummy_value()

    return types.none(*given), codegen


@intrinsic
def narrow_product(typingctx: Any, a: Any, bt: Any, bias: Any, ct: Any) -> Any:
    """ct = (a @ bt.T + bias).T, for few columns: vectors run along the terms. a has at least as many rows as lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, ct.dtype)
        ((rows, terms), a_at), ((columns, _), b_at), (_, bias_at), (_, c_at) = map(v.matrix, signature.args, args)
        zero, group = v.index(0), 16 // v.size
        whole = v.up_to(zero, terms, v.lanes)
        some = v.first(builder.sub(terms, whole))

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

        def block(i: Any, columns: Any) -> None:
            """A lane for each element of some rows, from i on, and of one or two columns."""
            height = v.lanes // len(columns)
            spots = [(r, s) for s in range(len(columns)) for r in range(height)]
            sums = {spot: cgutils.alloca_once(builder, v.type) for spot in spots}
            for total in sums.values():
                builder.store(v.zero, total)

            def add_terms(k: Any, lanes: Any = None) -> None:
                right = [v.load(b_at(column, k), lanes) for column in columns]
                left = [v.load(a_at(v.plus(i, r), k), lanes) for r in range(height)]
                for (r, s), total in sums.items():
                    builder.store(v.fma(left[r], right[s], builder.load(total)), total)

            with v.each(zero, whole, v.lanes) as (k, _):
                add_terms(k)
            with builder.if_then(builder.icmp_signed("<", whole, terms)):
                add_terms(whole, some)
            parts = [builder.load(total) for total in sums.values()]
            while len(parts) > 1:  # within 16 bytes first: shuffles across are dearer
                unit, span = (1, group) if len(parts) * group > v.lanes else (group, v.lanes)
                parts = [fold(x, y, unit, span) for x, y in zip(parts[::2], parts[1::2], strict=True)]
            for s, column in enumerate(columns):
                x = builder.fadd(parts[0], v.load_splat(bias_at(zero, column)))
                v.store_part(v.shuffle(x, x, range(s * height, (s + 1) * height)), c_at(column, i))

        def all_rows(columns: Any) -> None:
            height = v.lanes // len(columns)
            last = v.plus(rows, -height)
            with v.each(zero, rows, height) as (i, _):  # some rows may come twice, at the end
                block(v.least(i, last), columns)

        pairs = v.up_to(zero, columns, 2)
        with v.each(zero, pairs, 2) as (j, _):
            all_rows([j, v.plus(j, 1)])
        with v.each(pairs, columns, 1) as (j, _):
            all_rows([j])
        return context.get_dummy_value()

    return types.none(a, bt, bias, ct), codegen


@intrinsic
def backward_of_few(typingctx: Any, dzt: Any, wt: Any, x: Any, dx: Any, sums: Any, rate: Any) -> Any:
    """A layer of few neurons behind a ReLU, in one pass over its inputs x.

    dx = dzt.T @ wt where x > 0, else 0; sums = the column sums of dx; unless the rate is None, wt -= rate * dzt @ x.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, dx.dtype)
        (_, dz_at), ((neurons, n), w_at), (_, x_at), ((m, _), dx_at), (_, sums_at), _ = map(
            v.matrix, signature.args, args
        )
        zero, learns = v.index(0), rate != types.none

        def all_rows(few: int, columns: Any, lanes: Any = None) -> None:
            spots = [(k, s) for k in range(few) for s in range(len(columns))]
            w = {(k, s): v.load(w_at(v.index(k), columns[s]), lanes) for k, s in spots}
            dw, totals = ({key: cgutils.alloca_once_value(builder, v.zero) for key in keys} for keys in (w, columns))
            with v.each(zero, m, 1) as (i, _):
                dz = [v.load_splat(dz_at(v.index(k), i)) for k in range(few)]
                found = []
                for s, column in enumerate(columns):
                    out = v.load(x_at(i, column), lanes)
                    grad = builder.fmul(dz[0], w[0, s])
                    for k in range(1, few):
                        grad = v.fma(dz[k], w[k, s], grad)
                    grad = relu_slope(v, grad, out, None)
                    builder.store(builder.fadd(grad, builder.load(totals[column])), totals[column])
                    for k in range(few if learns else 0):
                        builder.store(v.fma(dz[k], out, builder.load(dw[k, s])), dw[k, s])
                    found.append((grad, dx_at(i, column)))
                v.store_all(found, lanes)
            for column, total in totals.items():
                v.store(builder.load(total), sums_at(zero, column), lanes)
            for k, s in spots if learns else ():
                down = v.fma(v.splat(builder.fneg(args[5])), builder.load(dw[k, s]), w[k, s])
                v.store(down, w_at(v.index(k), columns[s]), lanes)

        for few in range(1, FEW + 1):
            with builder.if_then(builder.icmp_signed("==", neurons, v.index(few))):
                width = 2 if few < 4 or MANY else 1  # vectors, for all of which there are registers
                whole = v.up_to(zero, n, width * v.lanes)
                with v.each(zero, whole, width * v.lanes) as (j, _):
                    all_rows(few, [v.plus(j, s * v.lanes) for s in range(width)])
                with v.each(whole, n, v.lanes) as (j, _):
                    all_rows(few, [j], v.first(builder.sub(n, j)))
        return context.get_dummy_value()

    return types.none(dzt, wt, x, dx, sums, rate), codegen


@intrinsic
def copy_row(typingctx: Any, source: Any, i: Any, to: Any, j: Any) -> Any:
    """to[j] = source[i], in the type of to."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, to.dtype)
        (_, source_at), ((_, n), to_at) = v.matrix(source, args[0]), v.matrix(to, args[2])
        if source.layout == "C" and source.dtype != types.boolean:

            def copy(k: Any, width: Any) -> Any:
                x = v.load(source_at(args[1], k), kind=ir.VectorType(context.get_data_type(source.dtype), width))
                v.store_part(as_floats(v, x, source.dtype), to_at(args[3], k))

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
                builder.store(x, v.pointer(to_at(args[3], k)))
        return context.get_dummy_value()

    return types.none(source, i, to, j), codegen


def as_floats(v: Vectors, x: Any, kind: Any) -> Any:
    """A vector of numbers of some kind as one of floats."""
    result = ir.VectorType(v.element, x.type.count)
    if isinstance(kind, types.Integer):
        return (v.builder.sitofp if kind.signed else v.builder.uitofp)(x, result)
    if x.type == result:
        return x
    return (v.builder.fptrunc if kind.bitwidth > 8 * v.size else v.builder.fpext)(x, result)


@intrinsic
def prefetch_row(typingctx: Any, x: Any, i: Any) -> Any:
    """Asks for the beginning of x[i], which is soon read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, types.float32)
        (_, n), at = v.matrix(x, args[0])
        function = ir.FunctionType(ir.VoidType(), [BYTES, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        start, zero = at(args[1], v.index(0)), v.index(0)
        size = builder.sub(at(args[1], n), start)
        with v.each(zero, v.least(size, v.index(256)), 64) as (offset, _):
            place = builder.inttoptr(builder.add(start, offset), BYTES)
            builder.call(function, [place, *(ir.Constant(INT, k) for k in (0, 3, 1))])
        return context.get_dummy_value()

    return types.none(x, i), codegen


@njit(**FAST)
def is_narrow(x: Array) -> Any:
    """Whether x has so many rows and so few columns that vectors should not run along its columns."""
    return x.shape[1] < NARROW and x.shape[0] >= VECTOR_BYTES // x.itemsize


@njit(**FAST)
def is_narrow_product(x: Array, w: Array) -> Any:
    """Whether x @ w is small, and narrow as `is_narrow` says."""
    return w.shape[1] < NARROW and x.shape[0] >= VECTOR_BYTES // x.itemsize and is_small(x, w)


@njit(**FAST)
def is_small(a: Array, b: Array) -> Any:
    """Whether the product of a and b is one for tiles, not for BLAS."""
    limit = BLAS_FROM // 2 if b.size * b.itemsize >= LARGE else BLAS_FROM
    return a.shape[0] * a.shape[1] * b.shape[1] < limit


@njit(**FAST)
def room(scratch: Array, rows: int, columns: int) -> Any:
    """A matrix at the start of the scratch, and what is left behind it, both on a boundary of 256 bytes."""
    used = (rows * columns + 63) // 64 * 64
    return scratch[: rows * columns].reshape(rows, columns), scratch[used:]


@njit(**FAST)
def by_columns(scratch: Array, rows: int, columns: int) -> Any:
    """Room for a transposed matrix whose rows end with what fills up a vector, and what is left of the scratch."""
    lanes = VECTOR_BYTES // scratch.itemsize
    return room(scratch, columns, (rows + lanes - 1) // lanes * lanes)


@intrinsic
def transpose(typingctx: Any, a: Any, at: Any) -> Any:
    """at = a.T, as far as both reach."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, at.dtype)
        ((rows, columns), a_at), ((columns_too, rows_too), to_at) = map(v.matrix, signature.args, args)
        rows, columns = v.least(rows, rows_too), v.least(columns, columns_too)
        zero, one, side = v.index(0), v.index(1), 16 // v.size

        def copy(i: Any, j: Any) -> None:
            builder.store(builder.load(v.pointer(a_at(i, j))), v.pointer(to_at(j, i)))

        def square(i: Any, j: Any) -> None:
            sources = [v.load_part(a_at(v.plus(i, r), j), side) for r in range(side)]
            for c in range(side):
                pairs = [v.shuffle(x, y, [c, side + c]) for x, y in zip(sources[::2], sources[1::2], strict=True)]
                v.store_part(pairs[0] if side == 2 else v.shuffle(pairs[0], pairs[1], range(4)), to_at(v.plus(j, c), i))

        in_squares = builder.and_(
            *(
                builder.icmp_signed("==", builder.sub(address(zero, one), address(zero, zero)), v.index(v.size))
                for address in (a_at, to_at)
            )
        )
        rows_in_squares, columns_in_squares = (
            builder.select(in_squares, v.up_to(zero, n, side), zero) for n in (rows, columns)
        )
        with v.each(zero, columns_in_squares, side) as (j, _):
            with v.each(zero, rows_in_squares, side) as (i, _):
                square(i, j)
            with v.each(rows_in_squares, rows, 1) as (i, _):
                for c in range(side):
                    copy(i, v.plus(j, c))
        with v.each(columns_in_squares, columns, 1) as (j, _), v.each(zero, rows, 1) as (i, _):
            copy(i, j)
        return context.get_dummy_value()

    return types.none(a, at), codegen


@njit(**FAST)
def transposed(a: Array, scratch: Array) -> Any:
    """The transposed matrix, in scratch, and what is left of that."""
    at, rest = room(scratch, a.shape[1], a.shape[0])
    transpose(a, at)
    return at, rest


@njit(**FAST)
def narrow_forward(x: Array, w: Array, b: Array, scratch: Array) -> Any:
    """The output of a layer with few neurons, by columns, and the weights transposed, both in scratch."""
    wt, rest = transposed(w, scratch)
    zt, _ = by_columns(rest, x.shape[0], w.shape[1])
    narrow_product(x, wt, b, zt)
    return zt, wt


@njit(**FAST)
def narrow_backward(dzt: Array, wt: Array, x: Array, dx: Array, db: Array, rate: Any) -> None:
    """From a layer of few neurons to in front of the ReLU whose output is x, as `backward_of_few` does."""
    if len(wt) <= FEW:
        backward_of_few(dzt, wt, x, dx, db, rate)
    else:
        product(dzt.T, wt, dx, mask=x, sums=db)
        if rate is not None:
            product(dzt, x, wt, rate=rate)
