"""Matrix products of layers of few neurons for the Numba engine: vectors run along the terms, or along the batch."""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_copies import by_columns, transposed
from .numba_math import FAST
from .numba_products import product, relu_slope
from .numba_vectors import MANY, VECTOR_BYTES, Vectors
from .ops import Array

__all__ = ["is_narrow", "narrow_backward", "narrow_forward"]

NARROW = 16  # columns
FEW = 4  # columns of a matrix whose transposed rows stay in registers


@njit(**FAST)
def is_narrow(rows: int, columns: int) -> Any:
    """Whether a matrix has so many rows and so few columns that vectors should not run along its columns."""
    return columns < NARROW and rows >= VECTOR_BYTES // 4


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

        def block_at(i: Any, columns: Any) -> None:  # some rows may come twice, at the end
            block(v.least(i, v.plus(rows, -(v.lanes // len(columns)))), columns)

        pairs = v.up_to(zero, columns, 2)
        with v.each(zero, rows, v.lanes // 2) as (i, _), v.each(zero, pairs, 2) as (j, _):
            block_at(i, [j, v.plus(j, 1)])
        with v.each(pairs, columns, 1) as (j, _), v.each(zero, rows, v.lanes) as (i, _):
            block_at(i, [j])
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
