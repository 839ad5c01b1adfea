"""Matrix products for the Numba engine, written in vectors; nothing is allocated.

Tiles of a product stay in registers until their terms are added, and there they meet bias, ReLU, mask, column sums or
update. A transposed or large matrix on the right is copied, a part at a time, so that tiles find it in a core's cache,
one row behind the other, as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from .numba_copies import copy_transposed
from .numba_vectors import INDEX, MANY, VECTOR_BYTES, Vectors

__all__ = ["SLOPES", "product", "relu_slope"]

ROWS, WIDTHS = (6, (4, 2)) if MANY else (6, (2,))  # a tile's rows and vectors, whose sums fit in registers
IN_FLIGHT = 8  # sums that must grow side by side to hide the latency of an addition
UNROLLED = 4  # terms in a round, where they come from afar
FAR = 1 << 17  # bytes of a matrix on the right that the first cache cannot hold,
LARGE = 1 << 19  # or a core's second one beside what else it needs
TERMS, STRIPS = 256, 6  # of a part that is copied, which with AVX2 fits in a second cache of 256 KB,
STRIP = 4 * VECTOR_BYTES  # in strips of so many bytes for a term, one term behind the other
BLOCK = 3 * VECTOR_BYTES // 4  # rows of a transposed matrix on the left that are copied at a time, for the first cache


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


class Part(NamedTuple):
    """What tiles compute at a time: the terms from begin to end, of the columns from left to right."""

    begin: Any
    end: Any
    left: Any
    right: Any
    a_at: Any  # the address of (row, term) on the left
    b_at: Any  # the address of a column's first term on the right, behind which are those of a tile's other columns
    step: Any  # bytes from there to the next term
    far: Any  # whether it lies beyond the first cache


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
    scratch: Any = None,
) -> Any:
    """c = a @ b. a may be a transposed array, or None, which is a row of ones: c = the column sums of b.

    With `scratch`, room for parts of it, b may be transposed, or large.

    What else is given joins in, in this order: a @ b + bias; 0 where that is below 0; times the slope of an activation
    whose output is mask, ReLU's if it is not named by an index of SLOPES, with the activation's `number`; sums += its
    column sums; c -= rate * that instead of c = that.
    """
    given = [types.none if ty is None else ty for ty in (a, b, c, bias, relu, mask, slope, number, sums, rate, scratch)]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, c.dtype)
        (_, a_at), ((terms, _), b_at), ((m, n), c_at), (_, bias_at), _, (_, mask_at), _, _, (_, sums_at), _ = map(
            v.matrix, given[:-1], args[:-1]
        )
        zero, one, no = v.index(0), v.index(1), ir.Constant(ir.IntType(1), 0)
        relu, rate = given[4] != types.none, given[9] != types.none
        times_slope = SLOPES[0 if given[6] == types.none else given[6].literal_value]

        def finish(x: Any, rows: Any, columns: Any, lanes: Any) -> None:
            """Stores x[r, s] as the vector that begins at c[rows[r], columns[s]]. A row named twice counts once."""
            for r, s in x:
                if relu:
                    x[r, s] = builder.select(builder.fcmp_ordered("<", x[r, s], v.zero), v.zero, x[r, s])
                if mask_at:
                    x[r, s] = times_slope(v, x[r, s], v.load(mask_at(rows[r], columns[s]), lanes), args[7])
                if rate:
                    x[r, s] = v.fma(v.splat(builder.fneg(args[9])), x[r, s], v.load(c_at(rows[r], columns[s]), lanes))
            v.store_all([(x[r, s], c_at(rows[r], columns[s])) for r, s in x], lanes)
            for s, column in enumerate(columns if sums_at else ()):
                total = x[0, s]
                for r in range(1, len(rows)):
                    total = builder.select(
                        builder.icmp_signed("==", rows[r], rows[r - 1]), total, builder.fadd(total, x[r, s])
                    )
                v.store(builder.fadd(total, v.load(sums_at(zero, column), lanes)), sums_at(zero, column), lanes)

        def tile(part: Part, rows: Any, columns: Any, lanes: Any = None) -> None:
            """The part's terms of rows x columns of vectors, in registers."""
            is_first = builder.icmp_signed("==", part.begin, zero)
            is_last = builder.icmp_signed("==", part.end, terms)
            spots = {(r, s): c_at(row, column) for r, row in enumerate(rows) for s, column in enumerate(columns)}
            # How many sums of each spot grow side by side. A tile of several columns keeps enough in flight by one. The
            # number of rows must not decide, because with it each bit would depend on where a call is cut.
            many = (1 if len(columns) > 1 else 2) if a_at else -(-IN_FLIGHT // len(spots))
            copies = [{spot: cgutils.alloca_once(builder, v.type) for spot in spots} for _ in range(many)]
            for copy in copies:
                for r, s in spots:
                    starts = bias_at and copy is copies[0]
                    bias = v.load(bias_at(zero, columns[s]), lanes) if starts else v.zero
                    builder.store(builder.select(is_first, bias, v.zero), copy[r, s])
            terms_at = part.b_at(columns[0])

            def add_term(k: Any, copy: Any) -> None:
                at = builder.add(terms_at, builder.mul(builder.sub(k, part.begin), part.step))
                right = [v.load(v.plus(at, s * VECTOR_BYTES), lanes) for s in range(len(columns))]
                for r, row in enumerate(rows):
                    left = v.load_splat(part.a_at(row, k)) if a_at else None
                    for s, x in enumerate(right):
                        old = builder.load(copy[r, s])
                        builder.store(v.fma(left, x, old) if left else builder.fadd(x, old), copy[r, s])
                if len(spots) == ROWS * WIDTHS[0]:  # sums fill the registers
                    v.barrier()

            def in_rounds(begin: Any, in_turn: Any) -> Any:
                """Adds terms to copies in turn, as far as whole rounds go; returns where they end."""
                end = v.up_to(begin, part.end, len(in_turn))
                with v.each(begin, end, len(in_turn)) as (k, _):
                    for number, copy in enumerate(in_turn):
                        add_term(v.plus(k, number), copy)
                return end

            done = cgutils.alloca_once_value(builder, part.begin)
            if (len(rows), len(columns)) == (ROWS, WIDTHS[0]):
                with builder.if_then(part.far):  # which would be in the way where all is near
                    for address in spots.values():
                        v.prefetch(address)
                    builder.store(in_rounds(part.begin, copies * UNROLLED), done)
            rest = in_rounds(builder.load(done), copies)
            if many > 1:
                in_rounds(rest, copies[:1])

            x = {spot: builder.load(copies[0][spot]) for spot in spots}
            for spot in spots:
                for copy in copies[1:]:
                    x[spot] = builder.fadd(x[spot], builder.load(copy[spot]))
            if rate:  # each part of the terms is subtracted
                finish(x, rows, columns, lanes)
                return
            for spot, total in x.items():
                builder.store(total, copies[0][spot])
            with builder.if_then(builder.not_(is_first)):  # so late, because c may have to come from memory
                for spot, address in spots.items():
                    builder.store(builder.fadd(x[spot], v.load(address, lanes)), copies[0][spot])
            x = {spot: builder.load(copies[0][spot]) for spot in spots}
            with builder.if_else(is_last) as (last, more_follow):
                with last:
                    finish(x.copy(), rows, columns, lanes)
                with more_follow:
                    v.store_all([(x[spot], address) for spot, address in spots.items()], lanes)

        def strip(part: Part, rows: Any, widths: Any = (4, 2)) -> None:
            """The part's columns of some rows, in tiles as wide as the registers allow."""
            done = part.left
            for width in widths:
                stop = v.up_to(done, part.right, width * v.lanes)
                with v.each(done, stop, width * v.lanes) as (j, _):
                    tile(part, rows, [v.plus(j, s * v.lanes) for s in range(width)])
                done = stop
            with v.each(done, part.right, v.lanes) as (j, _):
                tile(part, rows, [j], v.first(builder.sub(part.right, j)))

        def in_tiles(part: Part, top: Any, bottom: Any) -> None:
            whole, last = v.up_to(top, bottom, ROWS), v.plus(m, -1)
            with v.each(top, whole, ROWS) as (i, _):
                strip(part, [v.plus(i, r) for r in range(ROWS)], WIDTHS)
            rest = builder.sub(bottom, whole)
            three = builder.and_(builder.icmp_signed(">", rest, one), builder.trunc(rest, ir.IntType(1)))
            with builder.if_then(three):
                strip(part, [v.plus(whole, r) for r in range(3)], (4, 2))
            with v.each(builder.select(three, v.plus(whole, 3), whole), bottom, 2) as (i, _):
                strip(part, [i, v.least(v.plus(i, 1), last)])  # the last one twice, where there is no other

        def copy_terms(part: Part, first: Any, stop: Any, from_at: Any, to_at: Any) -> None:
            with v.each(part.begin, part.end, 1) as (k, _), v.each(first, stop, v.lanes) as (j, _):
                v.store_part(v.load(from_at(k, j), v.first(builder.sub(stop, j))), to_at(k, j))

        def in_blocks(part: Part, room: Any) -> None:
            """All rows, where a is transposed and far from copies of some at a time: its terms are a long way apart."""
            if a.layout == "C":
                in_tiles(part, zero, m)
                return
            row, term = (stride_of(a_at, axis) for axis in (0, 1))
            copied = builder.and_(builder.icmp_signed("==", row, v.index(v.size)), part.far)
            row = builder.select(copied, v.index(v.size), row)
            term = builder.select(copied, v.index(BLOCK * v.size), term)
            height = builder.select(copied, v.index(BLOCK), m)
            with v.each_by(zero, m, height) as (top, _):
                bottom = v.least(builder.add(top, height), m)
                start = builder.select(copied, room, a_at(top, part.begin))

                def at(i: Any, k: Any) -> Any:
                    down, along = builder.mul(builder.sub(i, top), row), builder.mul(builder.sub(k, part.begin), term)
                    return builder.add(builder.add(start, down), along)

                with builder.if_then(copied):
                    copy_terms(part, top, bottom, lambda k, i: a_at(i, k), lambda k, i: at(i, k))
                in_tiles(part._replace(a_at=at), top, bottom)

        def in_parts() -> None:
            """All of it, from copies of parts of b where tiles cannot, or had better not, read b itself."""
            size = builder.mul(builder.mul(terms, n), v.index(v.size))
            far, large = (builder.icmp_signed(">", size, v.index(limit)) for limit in (FAR, LARGE))
            copied = builder.or_(builder.not_(has_vectors), large)
            height = evenly(terms, TERMS, 1)  # also of b itself, for the same bits
            width = builder.select(copied, evenly(n, STRIPS * STRIP // v.size, STRIP // v.size), n)
            step = builder.select(copied, v.index(STRIP), stride_of(b_at, 0))
            room = builder.ptrtoint(make_array(scratch)(context, builder, args[-1]).data, INDEX)
            room = builder.and_(v.plus(room, VECTOR_BYTES - 1), v.index(-VECTOR_BYTES))
            with v.each_by(zero, terms, height) as (begin, _), v.each_by(zero, n, width) as (left, _):
                end, right = v.least(builder.add(begin, height), terms), v.least(builder.add(left, width), n)
                start = builder.select(copied, room, b_at(begin, left))
                strip_bytes = builder.mul(builder.select(copied, builder.sub(end, begin), one), v.index(STRIP))

                def first_at(j: Any) -> Any:
                    across = builder.mul(builder.sub(j, left), v.index(v.size))
                    number, within = (f(across, v.index(STRIP)) for f in (builder.udiv, builder.urem))
                    return builder.add(builder.add(start, builder.mul(number, strip_bytes)), within)

                def to_at(k: Any, j: Any) -> Any:
                    return builder.add(first_at(j), builder.mul(builder.sub(k, begin), step))

                part = Part(begin, end, left, right, a_at, first_at, step, builder.or_(far, copied))
                with builder.if_then(copied):
                    if b.layout == "C":
                        copy_terms(part, left, right, b_at, to_at)
                    else:
                        with builder.if_else(has_vectors) as (by_rows, by_columns):
                            with by_rows:
                                copy_terms(part, left, right, b_at, to_at)
                            with by_columns:
                                copy_transposed(v, (left, right), (begin, end), lambda j, k: b_at(k, j), to_at)
                in_blocks(part, v.plus(room, TERMS * STRIPS * STRIP))

        def evenly(whole: Any, most: int, unit: int) -> Any:
            """The length of parts, no more than have to be, that are about equal: a multiple of `unit`."""
            parts = over(whole, v.index(most))
            return builder.mul(over(over(whole, parts), v.index(unit)), v.index(unit))

        def over(whole: Any, part: Any) -> Any:
            return builder.sdiv(v.plus(builder.add(whole, part), -1), part)  # rounded up

        def stride_of(at: Any, axis: int) -> Any:
            return builder.sub(at(*((one, zero), (zero, one))[axis]), at(zero, zero))

        has_vectors = builder.icmp_signed("==", stride_of(b_at, 1), v.index(v.size))
        whole = Part(zero, terms, zero, n, a_at, lambda j: b_at(zero, j), stride_of(b_at, 0), no)
        if not a_at:
            strip(whole, [zero])
        elif given[-1] == types.none:
            in_tiles(whole, zero, m)
        else:
            in_parts()
        return context.get_dummy_value()

    return types.none(*given), codegen
