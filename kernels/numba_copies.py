"""Copies of rows and matrices for the Numba engine, written in vectors, and the room that they are made in."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .numba_math import FAST
from .numba_vectors import VECTOR_BYTES, Vectors
from .ops import Array

__all__ = ["by_columns", "copy_row", "copy_transposed", "prefetch_row", "room", "transpose", "transposed"]


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
        start, zero = at(args[1], v.index(0)), v.index(0)
        size = builder.sub(at(args[1], n), start)
        with v.each(zero, v.least(size, v.index(256)), 64) as (offset, _):
            v.prefetch(builder.add(start, offset))
        return context.get_dummy_value()

    return types.none(x, i), codegen


def copy_transposed(v: Vectors, rows: Any, columns: Any, from_at: Any, to_at: Any) -> None:
    """to[j, i] = from[i, j] for rows and columns from one to another, given functions from places to addresses."""
    builder, side = v.builder, 16 // v.size
    (top, bottom), (left, right) = rows, columns

    def copy(i: Any, j: Any) -> None:
        builder.store(builder.load(v.pointer(from_at(i, j))), v.pointer(to_at(j, i)))

    def square(i: Any, j: Any) -> None:
        sources = [v.load_part(from_at(v.plus(i, r), j), side) for r in range(side)]
        for c in range(side):
            pairs = [v.shuffle(x, y, [c, side + c]) for x, y in zip(sources[::2], sources[1::2], strict=True)]
            v.store_part(pairs[0] if side == 2 else v.shuffle(pairs[0], pairs[1], range(4)), to_at(v.plus(j, c), i))

    in_squares = builder.and_(
        *(
            builder.icmp_signed("==", builder.sub(address(i, v.plus(j, 1)), address(i, j)), v.index(v.size))
            for address, i, j in ((from_at, top, left), (to_at, left, top))
        )
    )
    last_row, last_column = (
        builder.select(in_squares, v.up_to(start, stop, side), start) for start, stop in (rows, columns)
    )
    done = top
    for height in (VECTOR_BYTES // v.size, side):  # whole vectors first, so that a cache line is written at a time
        stop = v.up_to(done, last_row, height)
        with v.each(done, stop, height) as (i, _), v.each(left, last_column, side) as (j, _):
            for r in range(0, height, side):
                square(v.plus(i, r), j)
        done = stop
    with v.each(last_row, bottom, 1) as (i, _), v.each(left, last_column, 1) as (j, _):
        copy(i, j)
    with v.each(last_column, right, 1) as (j, _), v.each(top, bottom, 1) as (i, _):
        copy(i, j)


@intrinsic
def transpose(typingctx: Any, a: Any, at: Any) -> Any:
    """at = a.T, as far as both reach."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, at.dtype)
        ((rows, columns), a_at), ((columns_too, rows_too), to_at) = map(v.matrix, signature.args, args)
        zero = v.index(0)
        copy_transposed(v, (zero, v.least(rows, rows_too)), (zero, v.least(columns, columns_too)), a_at, to_at)
        return context.get_dummy_value()

    return types.none(a, at), codegen


@njit(**FAST)
def transposed(a: Array, scratch: Array) -> Any:
    """The transposed matrix, in scratch, and what is left of that."""
    at, rest = room(scratch, a.shape[1], a.shape[0])
    transpose(a, at)
    return at, rest


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
