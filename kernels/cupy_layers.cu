// Batches, dropout, and what layers add to matrix products; see cupy_arrays.cu.

ELEMENTS shuffle(Words keys, Integers order)
{
    unsigned size = order.size;
    EACH(i, order.size) {
        unsigned row = i;
        for (Index k = 0; k < keys.size; k++) {
            unsigned middle = (keys[k] >> 32) * size >> 32, other = middle - row; // which is huge below 0
            other = other + size < other ? other + size : other;
            unsigned product = (row > other ? row : other) * (unsigned)keys[k];
            row = product >> 31 ? other : row;
        }
        order[i] = row;
    }
}

ONE_BLOCK next_batch(Integers order, Integers cursor, Integers rows)
{
    Word start = cursor[0];
    EACH_OF_BLOCK(i, rows.size)
        rows[i] = order[start + i];
    __syncthreads();
    if (is_first_thread())
        cursor[0] = start + rows.size;
}

ONE_BLOCK next_rate(Doubles rates, Integers step, Doubles rate)
{
    if (is_first_thread())
        rate[0] = rates[step[0]++];
}

// The rows of the next batch, where nobody has written them down.
__device__ static Integers coming(Integers order, Integers cursor) { return {order.data + cursor[0], order.size}; }

// Copy some rows to a batch, N columns at a time: `read` asks for what is in a row from column j on, and `number` makes
// of it the number of one of these columns.
template <int N, class T, class Read, class Number>
__device__ void take_packs(Integers rows, Rows<T> xb, Read read, Number number)
{
    const int AHEAD = 4; // how many rows a thread waits for at a time, in place of those beyond the last its first again
    Steps steps(xb.columns, N);
    ONE_TURN
    for (Index i = steps.row; i < xb.rows; i += AHEAD * steps.down)
        ONE_TURN
        for (Index j = steps.column; j < xb.columns; j += steps.right) {
            Index to[AHEAD], from[AHEAD];
            decltype(read(0, 0)) found[AHEAD];
            for (int n = 0; n < AHEAD; n++)
                to[n] = i + n * steps.down < xb.rows ? i + n * steps.down : i;
            for (int n = 0; n < AHEAD; n++)
                from[n] = rows[to[n]];
            for (int n = 0; n < AHEAD; n++)
                found[n] = read(from[n], j);
            for (int n = 0; n < AHEAD; n++) {
                if (N > 1 && n && to[n] == i) // for one column, to ask takes longer than to store it again
                    break;
                Pack<T, N> pack;
                for (int m = 0; m < N; m++)
                    pack.items[m] = number(found[n], m);
                store(pack, xb, to[n], j, true);
            }
        }
}

// Copy rows of floats or doubles, four at a time; whether they lie so.
template <class E, class T> __device__ bool take_fours(Table x, Integers rows, Rows<T> xb)
{
    bool fit = x.type == (sizeof(E) == 4 ? 9 : 10) && x.column_step == sizeof(E) && xb.columns % 4 == 0;
    if (!fit || ((Word)x.data | x.row_step) % 16 || !is_aligned<4>(xb))
        return false;
    take_packs<4>(rows, xb, [x](Word row, Index j) {
        return *(const Pack<E, 4> *)(x.data + row * x.row_step + j * sizeof(E));
    }, [](const Pack<E, 4> &pack, int n) { return pack.items[n]; });
    return true;
}

template <class T> __device__ void take_rows(Table x, Integers rows, Rows<T> xb)
{
#ifndef PARTS
    if (take_fours<float>(x, rows, xb) || take_fours<double>(x, rows, xb))
        return;
#endif
    take_packs<1>(rows, xb, [x](Word row, Index j) { return x.bits(row, j); },
                  [x](Word bits, int) { return x.number(bits); });
}

__device__ static void take_numbers(Integers t, Integers rows, Integers tb)
{
    ONE_TURN
    EACH_FROM_LAST(i, tb.size)
        tb[i] = t[rows[i]];
}

__device__ static void take_column(Table w, Integers rows, Vector wb)
{
    ONE_TURN
    EACH_FROM_LAST(i, wb.size)
        wb[i] = w.number(w.bits(rows[i], 0));
}

ELEMENTS take(Table x, Integers rows, Matrix xb) { take_rows(x, rows, xb); }
ELEMENTS take_bfloat16(Table x, Integers rows, Halves xb) { take_rows(x, rows, xb); }
ELEMENTS take_labels(Integers t, Integers rows, Integers tb) { take_numbers(t, rows, tb); }
ELEMENTS take_weights(Table w, Integers rows, Vector wb) { take_column(w, rows, wb); }

ELEMENTS take_next(Table x, Integers order, Integers cursor, Matrix xb) { take_rows(x, coming(order, cursor), xb); }
ELEMENTS take_next_bfloat16(Table x, Integers order, Integers cursor, Halves xb)
{
    take_rows(x, coming(order, cursor), xb);
}
ELEMENTS take_labels_next(Integers t, Integers order, Integers cursor, Integers tb)
{
    take_numbers(t, coming(order, cursor), tb);
}
ELEMENTS take_weights_next(Table w, Integers order, Integers cursor, Vector wb)
{
    take_column(w, coming(order, cursor), wb);
}

// A sparse table's rows, before what is stored of them is put in its place.
ELEMENTS begin_rows(Matrix zeros, Matrix xb)
{
    EACH_ELEMENT(i, j, xb)
        xb(i, j) = zeros(0, j);
}

ROWS sparse_rows(Matrix xb, Table values, Integers columns, Integers starts, Integers stops, Integers rows)
{
    EACH_ROW(i, lanes, xb.rows, xb.columns)
        for (Index n = starts[rows[i]] + lanes.mine; n < stops[rows[i]]; n += lanes.count)
            xb(i, columns[n]) = values.number(values.bits(n, 0));
}

ONE_BLOCK move_cursor(Integers rows, Integers cursor)
{
    if (is_first_thread())
        cursor[0] += rows.size;
}

template <class T> __device__ void sum_slopes(Rows<T> dz, Matrix db, Room room)
{
    sum_rows<0>(db, room, [](Real slope) { return slope; }, dz);
}

SUMS dense_bias_grad(Matrix dz, Matrix db, Room room) { sum_slopes(dz, db, room); }
SUMS dense_bias_grad_bfloat16(Halves dz, Matrix db, Room room) { sum_slopes(dz, db, room); }

// Of the layer before, behind its activation.
SUMS bias_grad(Matrix dy, Matrix db, Room room) { sum_slopes(dy, db, room); }

template <class T> __device__ void add_to_rows(Rows<T> b, Rows<T> z)
{
    map(z, [](Real z, Real b) { return z + b; }, z, in_each_row(b, z.rows));
}

ELEMENTS add_bias(Matrix b, Matrix z) { add_to_rows(b, z); }
ELEMENTS add_bias_bfloat16(Halves b, Halves z) { add_to_rows(b, z); }

ELEMENTS rectify(Matrix z) { map(z, rectified, z); }
ELEMENTS rectify_bfloat16(Halves z) { map(z, rectified, z); }

ELEMENTS to_bfloat16(Matrix x, Halves h)
{
    map(h, [](Real x) { return x; }, x);
}

// Four random words of Philox4x64-10 (Salmon et al., 2011), as np.random.Philox gives them.
struct Block {
    unsigned long long word[4];
};

__device__ static Block philox(unsigned long long counter, Words key)
{
    unsigned long long c0 = counter, c1 = key[2], c2 = key[3], c3 = 0, k0 = key[0], k1 = key[1];
    const unsigned long long m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    for (int round = 0; round < 10; round++) {
        unsigned long long high0 = __umul64hi(m0, c0), low0 = m0 * c0, high1 = __umul64hi(m1, c2), low1 = m1 * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    return {{c0, c1, c2, c3}};
}

// N columns at a time.
template <int N> __device__ void drop(Matrix x, double rate, Words key, Matrix y, Matrix mask)
{
    Index size = x.rows * x.columns;
    Real scale = rate < 1 ? 1 / (1 - rate) : 0;
    unsigned limit = -floor(-rate * 16777216); // random numbers have 24 bits
    EACH(block, (size + 7) / 8) {
        Block random = philox(block + 1, key);
        Index i = 8 * block / x.columns, j = 8 * block % x.columns;
        for (int k = 0; k < 8; k += N) // unrolled, and so with words in registers
            if (i < x.rows) {
                Pack<Real, N> pack = load<N>(x, i, j, true), kept;
                for (int n = 0; n < N; n++) {
                    unsigned half = random.word[(k + n) / 2] >> ((k + n) % 2 ? 32 : 0);
                    kept.items[n] = half >> 8 >= limit ? scale : 0;
                    pack.items[n] *= kept.items[n];
                }
                store(kept, mask, i, j, true);
                store(pack, y, i, j, true);
                if ((j += N) == x.columns)
                    j = 0, i++;
            }
    }
}

ELEMENTS dropout_forward(Matrix x, Doubles rate, Words key, Matrix y, Matrix mask, Room room)
{
    if (by_fours(x, y) && is_aligned<4>(mask))
        drop<4>(x, rate[0], key, y, mask);
    else
        drop<1>(x, rate[0], key, y, mask);
    if (is_last_block(room) && is_first_thread())
        key[2]++;
}

ELEMENTS dropout_backward(Matrix dy, Matrix mask, Matrix dx) { map(dx, multiplied, dy, mask); }
